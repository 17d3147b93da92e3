"""Our adaptive solver beside diffrax's (Kidger 2021), which has the same method and controller.

diffrax is no part of requirements.txt, as it brings a JAX of its own choice: install it with
`pip install --no-deps diffrax==0.7.2 equinox jaxtyping lineax optimistix wadler-lindig`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.diffusion.adaptive import dopri5

diffrax = pytest.importorskip("diffrax")
STARTS = np.random.default_rng(0).uniform(0.5, 2.0, (3, 2))


def predators(t: Any, y: Any) -> Any:
    """Lotka and Volterra's; of samples y [..,2]."""
    prey, hunters = y[..., 0], y[..., 1]
    return jnp.stack([prey * (1.5 - hunters), hunters * (prey - 1.0)], -1)


def van_der_pol(t: Any, y: Any) -> Any:
    return jnp.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def theirs(field: Any, y: Any, end: float, rtol: float) -> tuple[np.ndarray, int]:
    """The state at the end, and the number of accepted and rejected steps."""
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(t, y)),
        diffrax.Dopri5(),
        t0=0.0,
        t1=end,
        dt0=0.01,
        y0=y,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol, pcoeff=0.4, icoeff=0.3),
        max_steps=10_000,
    )
    return np.asarray(found.ys), int(found.stats["num_steps"])


@pytest.mark.parametrize("field", [predators, van_der_pol])
@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
def test_the_adaptive_solver_is_theirs(field: Any, rtol: float) -> None:
    """Within ten tolerances of the largest value, in about as many steps."""
    with jax.enable_x64(True):
        y = jnp.asarray(STARTS)
        found = dopri5(field, y, 0.0, 5.0, rtol=rtol, atol=rtol, first_step=0.01)
        for k in range(len(STARTS)):
            expected, steps = theirs(field, y[k], 5.0, rtol)
            error = np.abs(np.asarray(found.state[k]) - expected).max() / np.abs(expected).max()
            assert error < 10 * rtol, (k, error)
            ours = (int(found.evaluations[k]) - 1) / 6
            assert 0.8 < ours / steps < 1.25, (ours, steps)
