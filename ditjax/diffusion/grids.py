"""Grids: the times at which a sampler evaluates its network, from noise to data, f64[n + 1]."""

from collections.abc import Callable, Mapping

import numpy as np

from ditjax.diffusion.process import Process
from ditjax.errors import UserError

# config.sample.grid -> (process, first time, last time before the data, n, rho) -> t f64[n]
Grid = Callable[[Process, float, float, int, float], np.ndarray]


def uniform(process: Process, first: float, last: float, n: int, rho: float) -> np.ndarray:
    """Evenly spaced in t."""
    return np.linspace(first, last, n)


def karras(process: Process, first: float, last: float, n: int, rho: float) -> np.ndarray:
    """Karras et al. 2022 Eq. 5: evenly spaced in (σ/α)^(1/ρ)."""
    high, low = (s ** (1 / rho) for s in _ratios(process, first, last))
    return process.time_of(np.linspace(high, low, n) ** rho)


def logsnr(process: Process, first: float, last: float, n: int, rho: float) -> np.ndarray:
    """Evenly spaced in ln(α/σ)."""
    high, low = (np.log(s) for s in _ratios(process, first, last))
    return process.time_of(np.exp(np.linspace(high, low, n)))


GRIDS: Mapping[str, Grid] = {"uniform": uniform, "karras": karras, "logsnr": logsnr}


def _ratios(process: Process, first: float, last: float) -> tuple[float, float]:
    """Return σ/α at both ends, which must be positive and finite."""
    c = process.at(np.array([first, last], np.float64))
    # EDM's range, for a process whose own has no end.
    ratios = np.array([process.most_noise, 0.002])
    with np.errstate(divide="ignore"):
        found = c.sigma / c.alpha
    inside = np.isfinite(found) & (found > 0)
    high, low = np.where(inside, np.clip(found, 0.002, None), ratios)
    return float(min(high, process.most_noise)), float(low)


def grid_times(
    process: Process,
    steps: str,
    *,
    prediction: str,
    grid: str = "",
    rho: float = 7.0,
    shift: float = 1.0,
    last_step: float = 0.0,
) -> np.ndarray:
    """Return the times of `steps` steps, from noise to data, the data included -> f64[n + 1].

    steps: a number, or for a discrete process on its own grid a respacing (`space_timesteps`).
    shift: t ← st/(1 + (s-1)t). last_step: the length of the step to the data, on the uniform grid;
    0 is that of the others.

    Raises UserError for steps that the process cannot take.
    """
    name = grid or process.grid
    first = process.first_time(prediction)
    if not name:
        return process.respaced(steps)
    if not steps.isdigit() or not 1 <= int(steps) <= 100_000:
        raise UserError(
            f"{steps!r} steps on the grid {name!r}: expected a number from 1 to 100000; a respacing"
            " such as 'ddim50' needs process 'ddpm' on its own grid."
        )
    n = int(steps)
    last = process.last_time(first, n, last_step, uniform=name == "uniform")
    t = np.append(GRIDS[name](process, first, last, n, rho), process.data)
    return process.on_steps(t if shift == 1 else process.shift_grid(t, shift))
