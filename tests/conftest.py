"""Eight simulated devices, and no silent broadcasting or promotion: set before JAX starts."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compilation: LLVM's dear passes are left out, and nothing is compiled
# twice, in this process, the other workers or the commands that tests start. Not
# --xla_backend_optimization_level=1, which is faster still: gradients of float32 are off by 1e-4.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ditjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our own arithmetic promotes no dtype silently; optax's does (a float to an integer power)."""
    ours = request.path.parent.name in ("diffusion", "models", "metrics")
    with jax.numpy_dtype_promotion("strict" if ours else "standard"):
        yield
