"""Eight simulated devices, and no silent broadcasting or promotion: set before JAX starts."""

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our own arithmetic promotes no dtype silently; optax's does (a float to an integer power)."""
    ours = request.path.parent.name in ("diffusion", "models", "metrics")
    with jax.numpy_dtype_promotion("strict" if ours else "standard"):
        yield
