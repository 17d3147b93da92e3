"""What our solvers and their oracles both run: a denoiser, its noise, and the cases compared."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion import process
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import SAMPLERS

SHAPE = (2, 3, 5, 4)  # B H W C: no two alike, so that a swapped axis shows
STEPS = 25


class SolverCase(NamedTuple):
    """One trajectory: a public solver, and our sampler, process and options that equal it."""

    theirs: str
    sampler: str
    process: str
    prediction: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        words = "".join(f"-{key}{value:g}" for key, value in self.options)
        return f"{self.theirs}-{self.sampler}-{self.process}-{self.prediction}{words}"


CASES = (
    SolverCase("DPMSolverMultistep", "dpmpp_2m", "ddpm", "eps"),
    SolverCase("DPMSolverMultistep", "dpmpp_2m", "ddpm", "v"),
    SolverCase("DPMSolverSinglestep", "dpmpp_2s", "ddpm", "eps"),
    SolverCase("UniPCMultistep", "unipc", "ddpm", "eps", (("order", 2),)),
    SolverCase("UniPCMultistep", "unipc", "ddpm", "v", (("order", 3),)),
    SolverCase("EulerDiscrete", "ddim", "ddpm", "eps"),
    SolverCase("HeunDiscrete", "edm", "ddpm", "eps"),
    SolverCase("EDMEuler", "euler", "edm", "F"),
    SolverCase("EDMDPMSolverMultistep", "dpmpp_2m", "edm", "F"),
    SolverCase("FlowMatchEuler", "euler", "flow", "velocity"),
    SolverCase("FlowMatchEuler", "ddim", "flow", "velocity"),
    SolverCase("FlowMatchHeun", "heun", "flow", "velocity"),
    SolverCase("sample_heun", "edm", "edm", "F"),
    SolverCase(
        "sample_heun",
        "edm",
        "edm",
        "F",
        (("s_churn", 10.0), ("s_min", 0.05), ("s_max", 50.0), ("s_noise", 1.003)),
    ),
    SolverCase("sample_dpmpp_2m", "dpmpp_2m", "edm", "F"),
    SolverCase("sample_dpmpp_2m_sde", "dpmpp_2m_sde", "edm", "F"),
)


def process_of_case(case: SolverCase) -> process.Process:
    """Our process of a case."""
    made: process.Process
    if case.process == "ddpm":
        made = process.Discrete(make_schedule("linear"))
    else:
        made = process.Flow() if case.process == "flow" else process.EDM()
    return made


def times_of_case(case: SolverCase) -> np.ndarray:
    """The times of a case, from noise to data -> f64[STEPS + 1]."""
    if case.process == "ddpm":
        times = np.linspace(999, 0, STEPS).round()
        # diffusers' singlestep solver evaluates two steps at a time: theirs are ours and the
        # middles between them.
        return np.append(times[::2] if case.theirs == "DPMSolverSinglestep" else times, -1.0)
    if case.process == "flow":
        return np.linspace(1, 0, STEPS + 1)
    high, low = (s ** (1 / 7) for s in (80.0, 0.002))
    return np.append(np.linspace(high, low, STEPS) ** 7, 0.0)


def step_noise() -> np.ndarray:
    """x_T in the last row and the noise of each step, f32[STEPS+1,B,H,W,C]."""
    return np.random.default_rng(3).standard_normal((STEPS + 1, *SHAPE)).astype(np.float32)


def clean(xp: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x0 | x] of ½N(m, s²) + ½N(-m, s²) over each pixel's channels; α, σ are numbers.

    Not linear, bounded, and the samples are as wide as data; m differs from pixel to pixel.
    """
    m = xp.asarray(np.random.default_rng(4).uniform(-1.2, 1.2, (1, *SHAPE[1:])).astype(np.float32))
    spread = 0.7**2
    total = alpha**2 * spread + sigma**2
    r = xp.tanh((x * m).sum(-1)[..., None] * (alpha / total)) * m
    return (alpha * spread / total) * x + (sigma**2 / total) * r


def target(xp: Any, case: SolverCase, x: Any, alpha: Any, sigma: Any) -> Any:
    """The perfect prediction of a case at x = α x0 + σ ε."""
    x0 = clean(xp, x, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    root = (0.25 + sigma**2) ** 0.5
    return {
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": eps - x0,
        "F": (sigma * x0 - 0.25 * eps) / (0.5 * root),
    }[case.prediction]


def our_result(case: SolverCase) -> np.ndarray:
    """Our sampler's x0 f32[B,H,W,C]."""
    made, z = process_of_case(case), jnp.asarray(step_noise())
    bar = jnp.asarray(make_schedule("linear").alphas_bar, jnp.float32)

    def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
        if case.process == "ddpm":
            alpha, sigma = jnp.sqrt(bar[time[0]]), jnp.sqrt(1 - bar[time[0]])
        elif case.process == "flow":
            alpha, sigma = 1 - time[0] / 1000, time[0] / 1000
        else:
            alpha, sigma = jnp.float32(1), jnp.exp(time[0] / 250)
            x = x * (0.25 + sigma**2) ** 0.5
        out: jax.Array = target(jnp, case, x, alpha, sigma)
        return out

    objective = Objective(made, case.prediction, "fixed_small")
    solve, times = SAMPLERS[case.sampler].solve, times_of_case(case)

    def run(x: jax.Array) -> jax.Array:
        return solve(
            denoise, objective, times, x, lambda i: z[i], clip_x0=False, **dict(case.options)
        )

    return np.asarray(jax.jit(run)(made.prior_std * z[-1]))
