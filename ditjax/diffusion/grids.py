"""Grids: the times at which a sampler evaluates its network, from noise to data, f64[n + 1]."""

from collections.abc import Callable, Mapping

import numpy as np

from ditjax.diffusion.process import EDM, Discrete, Process
from ditjax.diffusion.schedule import space_timesteps
from ditjax.diffusion.times import shifted
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
    ratios = np.array([80.0, 0.002])
    with np.errstate(divide="ignore"):
        found = c.sigma / c.alpha
    inside = np.isfinite(found) & (found > 0)
    high, low = np.where(inside, np.clip(found, 0.002, None), ratios)
    return float(min(high, 80.0) if not isinstance(process, Discrete) else high), float(low)


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
        retained = space_timesteps(len(process.schedule), steps)  # type: ignore[attr-defined]
        return np.append(retained[::-1].astype(np.float64), process.data)
    if not steps.isdigit() or not 1 <= int(steps) <= 100_000:
        raise UserError(
            f"{steps!r} steps on the grid {name!r}: expected a number from 1 to 100000; a respacing"
            " such as 'ddim50' needs process 'ddpm' on its own grid."
        )
    n = int(steps)
    last = _last_time(process, name, first, n, last_step)
    t = np.append(GRIDS[name](process, first, last, n, rho), process.data)
    return _on_steps(process, _shifted(process, t, shift))


def _last_time(process: Process, name: str, first: float, n: int, last_step: float) -> float:
    """Return the last time that the network is evaluated at."""
    if isinstance(process, Discrete):
        return 0.0
    if isinstance(process, EDM):
        return process.sigma_min
    if last_step:
        return last_step if n > 1 else first
    return first / n if name == "uniform" else 0.0


def _shifted(process: Process, t: np.ndarray, shift: float) -> np.ndarray:
    if shift == 1:
        return t
    if isinstance(process, EDM):
        return np.append(np.minimum(shift * t[:-1], process.sigma_max), 0.0)
    if isinstance(process, Discrete):
        raise UserError("a shift of the grid: expected a process in continuous time.")
    return shifted(t, shift)


def _on_steps(process: Process, t: np.ndarray) -> np.ndarray:
    """Round the times of a discrete process to its steps. Raises UserError if two are the same."""
    if not isinstance(process, Discrete):
        return t
    rounded = np.rint(t)
    if np.any(np.diff(rounded) >= 0):
        raise UserError(
            f"{len(t) - 1} steps of a grid that has fewer of the {len(process.schedule)} timesteps:"
            " take fewer steps, or the process's own grid."
        )
    return rounded
