"""Processes: how data turns into noise, and what a network predicts of it.

x_t = α(t) x0 + σ(t) ε with noise time t, 0 at the data. A prediction names a target y = a x0 + b ε.
Everything else follows from these four numbers: with D = αb - σa, the network's estimate of x0 is

    x̂0 = c_skip x_t + c_out ŷ,  c_skip = b/D,  c_out = -σ/D,  ŷ = network(c_in x_t, c_noise),

which is Karras et al. 2022 Eq. 7 for every process and prediction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion import gaussian
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.schedule import Schedule, extract, space_timesteps
from ditjax.errors import UserError, nearest


def _namespace(t: Any) -> Any:
    return jnp if isinstance(t, jax.Array) else np


def _is_index(t: Any) -> bool:
    return isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.integer)


def _interpolated(x: Any, xs: np.ndarray, ys: np.ndarray) -> Any:
    """Interpolate linearly between points f64[n], of NumPy or JAX floats."""
    if isinstance(x, jax.Array):
        return jnp.interp(x, jnp.asarray(xs, x.dtype), jnp.asarray(ys, x.dtype))
    return np.interp(x, xs, ys)


class Coefficients(NamedTuple):
    """α, σ and their derivatives by t, each of t's shape; the derivatives are None for DDPM."""

    alpha: Any
    sigma: Any
    alpha_dot: Any = None
    sigma_dot: Any = None


class Preconditioning(NamedTuple):
    """Karras et al. 2022 Eq. 7 at some times: x̂0 = c_skip x + c_out · network(c_in x, c_noise)."""

    c_in: Any
    c_noise: Any
    c_skip: Any
    c_out: Any


def shifted(t: Any, shift: float) -> Any:
    """Esser et al. 2024 Eq. 23: t ← st/(1 + (s-1)t), elementwise in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


class Process:
    """A process in time t, from `low` to `high` while training; 0 is the data.

    Every method takes t as a NumPy array (float64: tables of samplers) or as a JAX array [B]. Those
    below `first_time` are what the grids of samplers ask of it.
    """

    predictions: ClassVar[tuple[str, ...]]
    grid: ClassVar[str] = "uniform"  # of a sampler, if a recipe names none; '': respacing
    data: ClassVar[float] = 0.0  # the time of the data
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    most_noise: ClassVar[float] = 80.0  # the largest σ/α of a grid in it, which may have no end
    from_noise: bool = False  # the network's time runs from noise to data

    def at(self, t: Any) -> Coefficients:
        """Return α, σ and their derivatives at t."""
        raise NotImplementedError

    def time_of(self, ratio: Any) -> Any:
        """Invert σ/α: [...] -> t [...]."""
        raise NotImplementedError

    def from_unit(self, u: Any) -> Any:
        """Map a number in (0, 1), rising with the noise, to a time."""
        return self.low + (self.high - self.low) * u

    def network_time(self, share: float) -> float:
        """Return the network's time at a share of the noise: `from_unit` of it, unclipped."""
        return float(self.c_noise(np.float64(share)))

    def c_in(self, t: Any) -> Any:
        """Return the factor of the network's input, or 1."""
        return 1.0

    def c_noise(self, t: Any) -> Any:
        """Return the time that the network is given."""
        raise NotImplementedError

    def time_of_noise(self, c_noise: jax.Array) -> jax.Array:
        """Invert `c_noise`: the network's time -> t."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """The standard deviation of the noise that sampling starts from."""
        return 1.0

    def first_time(self, prediction: str) -> float:
        """Return the time that sampling starts from.

        A prediction of ε alone says nothing of x0 where α = 0, so sampling starts just below it.
        """
        end = np.float64(self.high)
        alone = prediction == "eps" and float(self.at(end).alpha) == 0
        return self.high - 1e-3 if alone else self.high

    def last_time(self, first: float, n: int, last_step: float, *, uniform: bool) -> float:
        """Return the last time before the data of n times from `first`, evenly spaced or not.

        `last_step` is the length of the step to the data; 0 is that of the others.
        """
        if last_step:
            return last_step if n > 1 else first
        return first / n if uniform else 0.0

    @property
    def least_time(self) -> float:
        """The time near the data at which every prediction has a finite velocity."""
        return 1e-4

    def shift_grid(self, t: np.ndarray, shift: float) -> np.ndarray:
        """Move the times of a grid f64[n + 1] towards the noise. Raises UserError if it cannot."""
        return np.asarray(shifted(t, shift))

    def on_steps(self, t: np.ndarray) -> np.ndarray:
        """Round the times of a grid f64[n + 1] to those that exist: all, in continuous time."""
        return t

    def respaced(self, steps: str) -> np.ndarray:
        """Return the times of the process's own grid, if it is a respacing -> f64[n + 1]."""
        raise NotImplementedError

    def noised(self, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """Return x_t = α x0 + σ ε; x0, eps f32[B,...], t [B]."""
        c = self.at(t)
        return per_sample(c.alpha, x0.ndim) * x0 + per_sample(c.sigma, x0.ndim) * eps

    def evaluate(self, denoise: Denoise, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Return the network's raw output at x_t f32[B,...], t [B]."""
        c_in = self.c_in(t)
        scaled = x_t if isinstance(c_in, float) else per_sample(c_in, x_t.ndim) * x_t
        return denoise(scaled, self.c_noise(t)).astype(jnp.float32)

    def target(self, x0: jax.Array, t: jax.Array, eps: jax.Array, prediction: str) -> jax.Array:
        """Return the regression target y = a x0 + b ε of a prediction -> f32[B,...]."""
        if prediction in ("eps", "x0"):
            return eps if prediction == "eps" else x0
        a, b = mixture(self, prediction, self.at(t))
        return per_sample(a, x0.ndim) * x0 + per_sample(b, x0.ndim) * eps


@dataclasses.dataclass(frozen=True)
class _Scaled(Process):
    """A process whose network is given `time_scale` t.

    1000 gives DiT's sinusoids the range that they resolve. `from_noise`: the network's time runs
    from noise to data, as in SiT, LightningDiT and JiT: it is given `time_scale` (1 - t), and its
    velocity is -dx/dt.
    """

    time_scale: float = 1000.0
    from_noise: bool = False

    predictions: ClassVar[tuple[str, ...]] = ("eps", "x0", "v", "velocity")

    def c_noise(self, t: Any) -> Any:
        return self.time_scale * (1 - t if self.from_noise else t)

    def time_of_noise(self, c_noise: jax.Array) -> jax.Array:
        t = c_noise / self.time_scale
        return 1 - t if self.from_noise else t


@dataclasses.dataclass(frozen=True)
class Flow(_Scaled):
    """Rectified flow (Liu et al. 2022; Lipman et al. 2023): α = 1 - t, σ = t."""

    predictions: ClassVar[tuple[str, ...]] = ("eps", "x0", "velocity")

    def at(self, t: Any) -> Coefficients:
        one = 0 * t + 1
        return Coefficients(1 - t, t, -one, one)

    def time_of(self, ratio: Any) -> Any:
        return ratio / (1 + ratio)


@dataclasses.dataclass(frozen=True)
class GVP(_Scaled):
    """Albergo & Vanden-Eijnden 2023, in SiT's terms: α = cos(πt/2), σ = sin(πt/2)."""

    def at(self, t: Any) -> Coefficients:
        xp, quarter = _namespace(t), math.pi / 2
        # As sines, both are exactly 0 at their ends.
        alpha, sigma = xp.sin(quarter * (1 - t)), xp.sin(quarter * t)
        return Coefficients(alpha, sigma, -quarter * sigma, quarter * alpha)

    def time_of(self, ratio: Any) -> Any:
        return _namespace(ratio).arctan(ratio) / (math.pi / 2)


@dataclasses.dataclass(frozen=True)
class VP(_Scaled):
    """Song et al. 2021 App. C: ln α = -¼t²(β₁-β₀) - ½tβ₀, σ² = 1 - α², β₀ = .1, β₁ = 20."""

    low: ClassVar[float] = 1e-5  # σ̇ is infinite at 0
    beta: ClassVar[tuple[float, float]] = (0.1, 20.0)

    def at(self, t: Any) -> Coefficients:
        xp, (first, last) = _namespace(t), self.beta
        log_alpha = -0.25 * t**2 * (last - first) - 0.5 * t * first
        alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
        alpha_dot = -0.5 * alpha * (t * (last - first) + first)
        nonzero = xp.where(sigma > 0, sigma, 1)
        return Coefficients(alpha, sigma, alpha_dot, -alpha * alpha_dot / nonzero)

    def time_of(self, ratio: Any) -> Any:
        xp, (first, last) = _namespace(ratio), self.beta
        log_alpha = -0.5 * xp.log1p(ratio**2)
        return -4 * log_alpha / (first + xp.sqrt(first**2 - 4 * (last - first) * log_alpha))


@dataclasses.dataclass(frozen=True)
class EDM(Process):
    """Karras et al. 2022 Table 1: α = 1, and the time is σ itself, from sigma_min to sigma_max.

    The network's time is `time_scale` ¼ ln σ, and its input has unit variance.
    """

    time_scale: float = 1000.0
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    predictions: ClassVar[tuple[str, ...]] = ("eps", "x0", "F")
    grid: ClassVar[str] = "karras"

    def at(self, t: Any) -> Coefficients:
        one = 0 * t + 1
        return Coefficients(one, t, 0 * t, one)

    def time_of(self, ratio: Any) -> Any:
        return ratio

    def network_time(self, share: float) -> float:
        # 0 and 1 are before and after every σ.
        with np.errstate(divide="ignore"):
            return float(self.c_noise(np.float64(share) / (1 - np.float64(share))))

    def from_unit(self, u: Any) -> Any:
        low, high = (s / (1 + s) for s in (self.sigma_min, self.sigma_max))
        u = low + (high - low) * u
        return u / (1 - u)

    def c_in(self, t: Any) -> Any:
        return (self.sigma_data**2 + t**2) ** -0.5

    def c_noise(self, t: Any) -> Any:
        return self.time_scale * 0.25 * _namespace(t).log(t)

    def time_of_noise(self, c_noise: jax.Array) -> jax.Array:
        return jnp.exp(4 / self.time_scale * c_noise)

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def first_time(self, prediction: str) -> float:
        return self.sigma_max

    def last_time(self, first: float, n: int, last_step: float, *, uniform: bool) -> float:
        return self.sigma_min

    @property
    def least_time(self) -> float:
        return self.sigma_min

    def shift_grid(self, t: np.ndarray, shift: float) -> np.ndarray:
        return np.append(np.minimum(shift * t[:-1], self.sigma_max), 0.0)


@dataclasses.dataclass(frozen=True)
class Discrete(Process):
    """DDPM's process: t i32[B] indexes the tables of a schedule, all computed as in `gaussian`.

    Between two steps ln(σ/α) is interpolated. There the network of a sampler is given the nearest
    timestep, as public ones do, and of a JAX array of floats a timestep between. The time -1 is the
    data.
    """

    schedule: Schedule

    predictions: ClassVar[tuple[str, ...]] = gaussian.DISCRETE_PREDICTIONS
    grid: ClassVar[str] = ""
    data: ClassVar[float] = -1.0
    most_noise: ClassVar[float] = math.inf  # its steps end

    @functools.cached_property
    def _log_ratio(self) -> np.ndarray:
        return 0.5 * np.log(1 / self.schedule.alphas_bar - 1)

    @functools.cached_property
    def _steps(self) -> np.ndarray:
        return np.arange(float(len(self.schedule)))

    def at(self, t: Any) -> Coefficients:
        bar = self.schedule.alphas_bar
        if _is_index(t):
            return Coefficients(extract(np.sqrt(bar), t, 1), extract(np.sqrt(1 - bar), t, 1))
        xp = _namespace(t)
        ratio = xp.exp(_interpolated(t, self._steps, self._log_ratio))
        alpha = xp.where(t < 0, 1.0, 1 / xp.sqrt(1 + ratio**2))
        return Coefficients(alpha, xp.where(t < 0, 0.0, ratio * alpha))

    def time_of(self, ratio: Any) -> Any:
        return _interpolated(_namespace(ratio).log(ratio), self._log_ratio, self._steps)

    def network_time(self, share: float) -> float:
        # Rounded first: 0.3 * 1000 must be timestep 300, not 301.
        return math.ceil(round(share * self.schedule.num_train_timesteps, 6))

    def from_unit(self, u: jax.Array) -> jax.Array:
        last = len(self.schedule) - 1
        return jnp.minimum(jnp.floor((last + 1) * u), last).astype(jnp.int32)

    def c_noise(self, t: Any) -> Any:
        steps = self.schedule.timesteps
        if _is_index(t):
            return jnp.asarray(steps, jnp.int32)[t]
        if isinstance(t, jax.Array):
            return _interpolated(t, self._steps, steps)
        return steps[np.clip(np.rint(t).astype(np.int64), 0, len(steps) - 1)].astype(np.int32)

    def time_of_noise(self, c_noise: jax.Array) -> jax.Array:
        return jnp.searchsorted(jnp.asarray(self.schedule.timesteps, jnp.int32), c_noise)

    def first_time(self, prediction: str) -> float:
        return len(self.schedule) - 1

    def last_time(self, first: float, n: int, last_step: float, *, uniform: bool) -> float:
        return 0.0

    def shift_grid(self, t: np.ndarray, shift: float) -> np.ndarray:
        raise UserError("a shift of the grid: expected a process in continuous time.")

    def on_steps(self, t: np.ndarray) -> np.ndarray:
        rounded = np.rint(t)
        if np.any(np.diff(rounded) >= 0):
            raise UserError(
                f"{len(t) - 1} steps of a grid that has fewer of the {len(self.schedule)}"
                " timesteps: take fewer steps, or the process's own grid."
            )
        return rounded

    def respaced(self, steps: str) -> np.ndarray:
        retained = space_timesteps(len(self.schedule), steps)
        return np.append(retained[::-1].astype(np.float64), self.data)

    def noised(self, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        return gaussian.q_sample(self.schedule, x0, t, eps)

    def evaluate(self, denoise: Denoise, x_t: jax.Array, t: jax.Array) -> jax.Array:
        return gaussian.predict(denoise, self.schedule, x_t, t)

    def target(self, x0: jax.Array, t: jax.Array, eps: jax.Array, prediction: str) -> jax.Array:
        return gaussian.target(self.schedule, x0, t, eps, prediction)


# Processes with no parameter but their network's time scale.
SCALED: dict[str, type[_Scaled]] = {"flow": Flow, "gvp": GVP, "vp": VP}


def per_sample(value: Any, ndim: int) -> jax.Array:
    """Append axes to a coefficient of each sample: [B] -> [B,1,...,1] of rank ndim."""
    return jnp.reshape(value, (-1,) + (1,) * (ndim - 1))


def check_prediction(process: Process, prediction: str) -> None:
    """Raise UserError for a prediction that the process does not have."""
    legal = process.predictions
    if prediction not in legal:
        raise UserError(
            f"prediction {prediction!r} with process {type(process).__name__}: expected one of"
            f" {', '.join(legal)}.{nearest(prediction, legal)}"
        )


_MIXTURES: Mapping[str, Callable[[Process, Coefficients], tuple[Any, Any]]] = {
    "eps": lambda p, c: (0 * c.sigma, 0 * c.sigma + 1),
    "x0": lambda p, c: (0 * c.sigma + 1, 0 * c.sigma),
    "v": lambda p, c: (-c.sigma, c.alpha),  # Salimans & Ho 2022
    "velocity": lambda p, c: _velocity_mixture(p, c),
    "F": lambda p, c: _edm_mixture(p, c.sigma),
}


def _velocity_mixture(process: Process, c: Coefficients) -> tuple[Any, Any]:
    """dx_t/dt at fixed x0 and ε, in the network's direction of time."""
    sign = -1 if process.from_noise else 1
    return sign * c.alpha_dot, sign * c.sigma_dot


def _edm_mixture(process: Process, sigma: Any) -> tuple[Any, Any]:
    """Karras et al. 2022 Eq. 8: F = (x0 - c_skip x_t) / c_out."""
    assert isinstance(process, EDM)
    sigma_data = process.sigma_data
    root = (sigma_data**2 + sigma**2) ** 0.5
    return sigma / (sigma_data * root), -sigma_data / root


def mixture(process: Process, prediction: str, c: Coefficients) -> tuple[Any, Any]:
    """Return a, b of the target y = a x0 + b ε, each of the shape of t."""
    return _MIXTURES[prediction](process, c)


def precondition(
    process: Process, prediction: str, t: Any, *, t_eps: float = 0.0
) -> Preconditioning:
    """Return the four coefficients at t, where σ > 0, and α > 0 or the prediction is not ε.

    t_eps, on a flow: the velocity is (x - x̂0)/max(t, t_eps) instead of (x - x̂0)/t, which bounds
    what a prediction of x0 implies near the data (JiT). 0 leaves every step exact.
    """
    c = process.at(t)
    a, b = mixture(process, prediction, c)
    d = c.alpha * b - c.sigma * a
    skip, out = b / d, -c.sigma / d
    if t_eps:
        share = c.sigma / _namespace(t).maximum(c.sigma, t_eps)
        skip, out = 1 - share + share * skip, share * out
    return Preconditioning(process.c_in(t) + 0 * c.sigma, process.c_noise(t), skip, out)
