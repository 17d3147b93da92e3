"""Samplers of any process: each one lax.scan over tables that are made in float64.

One step goes from t to u, from (α, σ) to (A, S). Everything is written in x and x̂0; ε̂ is
(x - α x̂0)/σ. With h = ln(A/S) - ln(α/σ), e^-h = αS/(Aσ) is 0 at both ends, where α or S is 0, so
no logarithm of them is taken. The state x is float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion import samplers
from ditjax.diffusion.adaptive import dopri5
from ditjax.diffusion.gaussian import Denoise, stateful
from ditjax.diffusion.losses import Objective, without_x
from ditjax.diffusion.meanflow import IntervalDenoise
from ditjax.diffusion.process import (
    Discrete,
    Preconditioning,
    Process,
    per_sample,
    precondition,
)
from ditjax.diffusion.samplers import Noise, Steps, walk
from ditjax.diffusion.schedule import Schedule, retained
from ditjax.errors import UserError

# x f32[B,H,W,C], one row of a table of preconditionings, memory -> x̂0 f32[B,H,W,C], memory
Estimate = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
# (process, times f64[n + 1]) -> the times at which the network is evaluated
EvaluationTimes = Callable[[Process, np.ndarray], np.ndarray]


def every_step(process: Process, times: np.ndarray) -> np.ndarray:
    """One evaluation at the start of each step."""
    return times[:-1]


def both_ends(process: Process, times: np.ndarray) -> np.ndarray:
    """Two evaluations a step, at its start and end; one in the last."""
    return np.append(np.stack([times[:-2], times[1:-1]], axis=1).ravel(), times[-2])


class Sampler(NamedTuple):
    """A sampler: `solve(denoise, objective, times, x_T, noise, *, clip_x0, **options)` -> x0.

    times f64[n + 1] are static, from noise to data (`grids.grid_times`). `options` are the keys of
    config.sample that it reads, with which it is called and which its protocol records. `evaluated`
    are the times at which the network is evaluated. `discrete`: it needs a process of discrete
    steps, on its own grid. `derivatives`: it needs α̇ and σ̇, which such a process does not have.
    `check(process, times, **options)` raises UserError for a combination that cannot be solved.
    `adaptive`: it chooses its own steps, one sample's apart from another's. `interval`: it needs a
    network of two times, and calls denoise(x, t, h). `blind`: it is for networks without x.
    `steps(denoise, objective, times, x_T, *, clip_x0, **options)` are the steps that `solve` takes,
    if none builds on the estimates of those before: chains take them in another order, and do more
    between them (`inverse.repaint`).
    """

    solve: Callable[..., jax.Array]
    evaluated: EvaluationTimes = every_step
    options: tuple[str, ...] = ()
    discrete: bool = False
    derivatives: bool = False
    check: Callable[..., Any] | None = None
    adaptive: bool = False
    steps: Callable[..., Steps] | None = None
    interval: bool = False
    blind: bool = False


# ---- the steps


class LinearSteps(NamedTuple):
    """Tables of n steps: a step is x ← keep x + Σ_j move_j x̂0_j + spread z, newest x̂0 first."""

    point: Preconditioning  # f64[n] each
    keep: np.ndarray  # f64[n]
    move: np.ndarray  # f64[n,k]
    spread: np.ndarray | None = None  # f64[n]


class _Pairs(NamedTuple):
    """α, σ at both ends of each step, e^-h and h, f64[n] each; h is infinite where e^-h is 0."""

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_next: np.ndarray
    sigma_next: np.ndarray
    decay: np.ndarray
    h: np.ndarray


def _ends(process: Process, starts: np.ndarray, ends: np.ndarray) -> _Pairs:
    a, b = process.at(starts), process.at(ends)
    decay = a.alpha * b.sigma / (b.alpha * a.sigma)
    with np.errstate(divide="ignore"):
        return _Pairs(a.alpha, a.sigma, b.alpha, b.sigma, decay, -np.log(decay))


def _pairs(process: Process, times: np.ndarray) -> _Pairs:
    """The ends of steps that follow each other."""
    return _ends(process, times[:-1], times[1:])


def _points(objective: Objective, times: np.ndarray) -> Preconditioning:
    p, prediction = objective.process, objective.prediction
    return precondition(p, prediction, np.asarray(times, np.float64), t_eps=objective.t_eps)


def _estimator(denoise: Denoise, x: jax.Array, clip_x0: bool) -> tuple[Estimate, Any]:
    """Build the estimate of x0 at one row of a table, clipped to [-1, 1] for pixels.

    The network's memory before the first estimate is returned beside it.
    """
    batch, channels = x.shape[0], x.shape[-1]
    network = stateful(denoise)

    def estimate(x: jax.Array, point: Preconditioning, memory: Any) -> tuple[jax.Array, Any]:
        out, memory = network.step(point.c_in * x, jnp.full((batch,), point.c_noise), memory)
        # A learned variance, if the network has one, is not read.
        predicted = out[..., :channels].astype(x.dtype)
        x0 = point.c_skip * x + point.c_out * predicted
        return (jnp.clip(x0, -1, 1) if clip_x0 else x0), memory

    return estimate, network.start(x)


def _on_device(tables: Any, dtype: Any) -> Any:
    """Move tables to the device: floating ones as the state's type, integers as they are."""

    def move(table: np.ndarray) -> jax.Array:
        kind = dtype if np.issubdtype(table.dtype, np.floating) else table.dtype
        return jnp.asarray(table, kind)

    return jax.tree.map(move, tables)


def _linear(estimate: Estimate, tables: LinearSteps, x: jax.Array, memory: Any) -> Steps:
    """The steps that are linear in x and in the newest k estimates of x0."""
    history = (jnp.zeros_like(x),) * (tables.move.shape[1] - 1)

    def step(x: jax.Array, before: Any, row: Any, noise: Noise) -> tuple[jax.Array, Any, jax.Array]:
        (history, memory), (i, s) = before, row
        x0, memory = estimate(x, s.point, memory)
        x0s = (x0, *history)
        x = s.keep * x + sum(s.move[j] * x0 for j, x0 in enumerate(x0s))
        if s.spread is not None:
            x = x + s.spread * noise(i)
        return x, (x0s[:-1], memory), x0

    rows = (jnp.arange(len(tables.keep)), _on_device(tables, x.dtype))
    return Steps(step, (history, memory), rows, tables.spread)


class TwoStageSteps(NamedTuple):
    """Tables of steps with two evaluations: y = Σ over (x, x̂0), x ← Σ over (x, y, x̂0, x̂0(y))."""

    first: Preconditioning
    second: Preconditioning
    inner: np.ndarray  # f64[n,2]
    outer: np.ndarray  # f64[n,4]
    churn: np.ndarray | None = None  # f64[n,2]: x ← churn_0 x + churn_1 z before the step


def _two_stage(
    estimate: Estimate,
    steps: TwoStageSteps,
    last: LinearSteps,
    x: jax.Array,
    noise: Noise,
    memory: Any,
) -> jax.Array:
    """Run n - 1 steps of two evaluations, and the last one of one."""

    def step(carry: Any, row: Any) -> tuple[Any, None]:
        (x, memory), (i, s) = carry, row
        if s.churn is not None:
            x = s.churn[0] * x + s.churn[1] * noise(i)
        x0, memory = estimate(x, s.first, memory)
        y = s.inner[0] * x + s.inner[1] * x0
        y0, memory = estimate(y, s.second, memory)
        x = s.outer[0] * x + s.outer[1] * y + s.outer[2] * x0 + s.outer[3] * y0
        return (x, memory), None

    rows = (jnp.arange(len(steps.inner)), _on_device(steps, x.dtype))
    (x, memory), _ = jax.lax.scan(step, (x, memory), rows)
    return walk(_linear(estimate, last, x, memory), x, noise)


def _run(
    denoise: Denoise,
    steps: LinearSteps | tuple[TwoStageSteps, LinearSteps],
    x: jax.Array,
    noise: Noise,
    clip_x0: bool,
) -> jax.Array:
    estimate, memory = _estimator(denoise, x, clip_x0)
    if isinstance(steps, LinearSteps):
        return walk(_linear(estimate, steps, x, memory), x, noise)
    return _two_stage(estimate, *steps, x, noise, memory)


def tabled(
    tables: Callable[..., LinearSteps | tuple[TwoStageSteps, LinearSteps]],
) -> Callable[..., jax.Array]:
    """Make the `solve` of a sampler from its tables: (objective, times, **options) -> steps."""

    def solve(
        denoise: Denoise,
        objective: Objective,
        times: np.ndarray,
        x_T: jax.Array,
        noise: Noise,
        *,
        clip_x0: bool,
        **options: Any,
    ) -> jax.Array:
        steps = tables(objective, times, **options)
        return _run(denoise, steps, x_T, noise, clip_x0)

    return solve


def general_ddim(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
    eta: float = 0.0,
) -> jax.Array:
    """DDIM Eq. 12 on any process: A x̂0 + √(S² - τ²) ε̂ + τ z, τ = η S √(1 - e^-2h).

    η = 1 is ancestral sampling. Order 1.
    """
    steps = general_ddim_steps(denoise, objective, times, x_T, clip_x0=clip_x0, eta=eta)
    return walk(steps, x_T, noise)


def general_ddim_steps(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    *,
    clip_x0: bool,
    eta: float = 0.0,
) -> Steps:
    """Build the steps of `general_ddim`."""
    prediction = objective.prediction
    if isinstance(objective.process, Discrete):
        schedule = _respaced(objective, times)
        return samplers.ddim_steps(
            denoise, schedule, x_T, eta=eta, prediction=prediction, clip_x0=clip_x0
        )
    p = _pairs(objective.process, times)
    spread = eta * p.sigma_next * np.sqrt(1 - p.decay**2)
    keep = np.sqrt(p.sigma_next**2 - spread**2) / p.sigma
    move = (p.alpha_next - p.alpha * keep)[:, None]
    tables = LinearSteps(_points(objective, times[:-1]), keep, move, spread if eta else None)
    estimate, memory = _estimator(denoise, x_T, clip_x0)
    return _linear(estimate, tables, x_T, memory)


def ddim_invert(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x0: jax.Array,
    *,
    clip_x0: bool = False,
    iterations: int = 2,
) -> jax.Array:
    """The x_T that `general_ddim` with η = 0 draws x0 from (Song et al. 2020, Sec. 4.3).

    The x_t whose step to the cleaner s ends at x_s is found from g x_s on, `iterations` times, by
    x_t ← x_t + g (x_s - α_s x̂0 - σ_s ε̂), with x̂0 and ε̂ of x_t. For data N(0, 1), the gain
    g = (α² + σ²)/(α α_s + σ σ_s) is that of Newton's method.
    """
    p, points = _pairs(objective.process, times), _points(objective, times[:-1])
    estimate, memory = _estimator(denoise, x0, clip_x0)

    def step(carry: tuple[jax.Array, Any], row: Any) -> tuple[tuple[jax.Array, Any], None]:
        (x, memory), (point, gain, alpha, sigma, alpha_s, sigma_s) = carry, row
        found, after = gain * x, memory
        for _ in range(iterations):
            mean, after = estimate(found, point, memory)
            eps = (found - alpha * mean) / sigma
            found = found + gain * (x - alpha_s * mean - sigma_s * eps)
        return (found, after), None

    gain = (p.alpha**2 + p.sigma**2) / (p.alpha * p.alpha_next + p.sigma * p.sigma_next)
    tables = (points, gain, p.alpha, p.sigma, p.alpha_next, p.sigma_next)
    rows = _on_device(jax.tree.map(lambda table: table[::-1], tables), x0.dtype)
    (x_T, _), _ = jax.lax.scan(step, (x0, memory), rows)
    return x_T


def _respaced(objective: Objective, times: np.ndarray) -> Schedule:
    return retained(objective.schedule, times[-2::-1].astype(np.int64))


def respaced_ddpm(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
) -> jax.Array:
    """DDPM Alg. 2 on the schedule respaced to `times` (`samplers.ddpm`)."""
    return walk(respaced_ddpm_steps(denoise, objective, times, x_T, clip_x0=clip_x0), x_T, noise)


def respaced_ddpm_steps(
    denoise: Denoise, objective: Objective, times: np.ndarray, x_T: jax.Array, *, clip_x0: bool
) -> Steps:
    """Build the steps of `respaced_ddpm`."""
    return samplers.ddpm_steps(
        denoise,
        _respaced(objective, times),
        x_T,
        prediction=objective.prediction,
        variance=objective.variance,
        clip_x0=clip_x0,
    )


def _field(process: Process, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The velocity dx/dt = g x + g0 x̂0 -> g, g0 f64[n]."""
    c = process.at(np.asarray(times, np.float64))
    g = c.sigma_dot / c.sigma
    return g, c.alpha_dot - c.alpha * g


def euler(objective: Objective, times: np.ndarray) -> LinearSteps:
    """Euler's method on dx/dt = α̇ x̂0 + σ̇ ε̂. Order 1; on a flow it is DDIM."""
    g, g0 = _field(objective.process, times[:-1])
    dt = np.diff(times)
    return LinearSteps(_points(objective, times[:-1]), 1 + dt * g, (dt * g0)[:, None])


def heun(objective: Objective, times: np.ndarray) -> tuple[TwoStageSteps, LinearSteps]:
    """Heun's method on dx/dt; the last step is Euler's. Order 2."""
    g, g0 = _field(objective.process, times[:-1])
    dt = np.diff(times)[-1:]
    last = LinearSteps(_points(objective, times[-2:-1]), 1 + dt * g[-1:], (dt * g0[-1:])[:, None])
    return _heun_steps(objective, times, g, g0), last


def _heun_steps(
    objective: Objective,
    times: np.ndarray,
    f: np.ndarray,
    f0: np.ndarray,
    churn: np.ndarray | None = None,
) -> TwoStageSteps:
    """All steps but the last of Heun's method on dx/dt = f x + f0 x̂0, f64[n] each."""
    dt = np.diff(times)
    keep, move = 1 + dt * f, dt * f0
    half = dt[:-1] / 2
    return TwoStageSteps(
        _points(objective, times[:-2]),
        _points(objective, times[1:-1]),
        inner=np.stack([keep[:-1], move[:-1]], 1),
        outer=np.stack([1 + half * f[:-1], half * f[1:], half * f0[:-1], half * f0[1:]], 1),
        churn=churn,
    )


def edm(
    objective: Objective,
    times: np.ndarray,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = 1e9,
    s_noise: float = 1.0,
) -> tuple[TwoStageSteps, LinearSteps]:
    """Karras et al. 2022 Alg. 2: Heun's method on x/α against σ/α, with churn. Order 2.

    The last step is Euler's, and so is a first step from α = 0, where σ/α has no value.
    """
    process = objective.process
    c = process.at(times)
    churn, starts = None, times[:-2]
    if s_churn:
        alpha_0 = c.alpha[:-2]
        with np.errstate(divide="ignore"):
            s = c.sigma[:-2] / alpha_0
        gamma = min(s_churn / (len(times) - 1), np.sqrt(2) - 1)
        # Alg. 2, lines 4-6. Where α is 0, s is infinite and beyond s_max.
        moved = (s >= s_min) & (s <= s_max)
        s_hat = np.where(moved, s, 1.0) * (1 + gamma)
        starts = np.where(moved, process.time_of(s_hat), starts)
        spread = s_noise * np.sqrt(np.where(moved, s_hat**2 - np.where(moved, s, 0) ** 2, 0))
        alpha = process.at(starts).alpha
        ratio = np.where(moved, alpha / np.where(moved, alpha_0, 1), 1)
        churn = np.stack([ratio, alpha * spread], 1)
    p = _ends(process, starts, times[1:-1])
    whole = p.alpha > 0
    # x' = A (x/α + (s' - s)(ε̂ + ε̂')/2), in x, y = the Euler step, x̂0 and x̂0(y).
    step = np.where(whole, p.sigma_next / p.alpha_next - p.sigma / np.where(whole, p.alpha, 1), 0)
    half = p.alpha_next * step / 2
    keep, move = p.sigma_next / p.sigma, p.alpha_next - p.alpha * p.sigma_next / p.sigma
    steps = TwoStageSteps(
        _points(objective, starts),
        _points(objective, times[1:-1]),
        inner=np.stack([keep, move], 1),
        outer=np.stack(
            [
                keep - half / p.sigma,
                half / p.sigma_next,
                move + half * p.alpha / p.sigma,
                -half * p.alpha_next / p.sigma_next,
            ],
            1,
        ),
        churn=churn,
    )
    return steps, _to_data(objective, times)


def _to_data(objective: Objective, times: np.ndarray) -> LinearSteps:
    """The last step: x ← A x̂0 + S ε̂."""
    p = _pairs(objective.process, times[-2:])
    keep = p.sigma_next / p.sigma
    return LinearSteps(
        _points(objective, times[-2:-1]), keep, (p.alpha_next - p.alpha * keep)[:, None]
    )


def _second_order(p: _Pairs) -> np.ndarray:
    """r of x̂0 + r (x̂0 - x̂0_prev): h/(2 h_prev); 0 in the first step, and from or to an infinity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.append(0.0, p.h[1:] / p.h[:-1] / 2)
    return np.where(np.isfinite(r), r, 0.0)


def dpmpp_2m(objective: Objective, times: np.ndarray) -> LinearSteps:
    """Lu et al. 2022 (DPM-Solver++) Alg. 2, multistep, of order 2."""
    p = _pairs(objective.process, times)
    gain, r = p.alpha_next * (1 - p.decay), _second_order(p)
    move = np.stack([gain * (1 + r), -gain * r], 1)
    return LinearSteps(_points(objective, times[:-1]), p.sigma_next / p.sigma, move)


def dpmpp_2m_sde(objective: Objective, times: np.ndarray) -> LinearSteps:
    """Lu et al. 2022's SDE solver of order 2, multistep: S √(1 - e^-2h) of new noise a step."""
    p = _pairs(objective.process, times)
    gain, r = p.alpha_next * (1 - p.decay**2), _second_order(p)
    move = np.stack([gain * (1 + r), -gain * r], 1)
    keep = p.sigma_next / p.sigma * p.decay
    spread = p.sigma_next * np.sqrt(1 - p.decay**2)
    return LinearSteps(_points(objective, times[:-1]), keep, move, spread)


def _middles(process: Process, times: np.ndarray) -> np.ndarray:
    """The middle of each step but the last in ln(α/σ), or the end of one that starts at α = 0."""
    c = process.at(times[:-1])
    with np.errstate(divide="ignore"):
        s = c.sigma / c.alpha
    middle = np.where(
        np.isfinite(s[:-1]), np.sqrt(np.where(np.isfinite(s), s, 1)[:-1] * s[1:]), s[1:]
    )
    return process.time_of(middle)


def start_and_middle(process: Process, times: np.ndarray) -> np.ndarray:
    """Two evaluations a step, at its start and middle; one in the last."""
    return np.append(np.stack([times[:-2], _middles(process, times)], 1).ravel(), times[-2])


def dpmpp_2s(objective: Objective, times: np.ndarray) -> tuple[TwoStageSteps, LinearSteps]:
    """Lu et al. 2022 (DPM-Solver++) Alg. 1, singlestep, of order 2."""
    process = objective.process
    middles = _middles(process, times)
    whole, inner = _ends(process, times[:-2], times[1:-1]), _ends(process, times[:-2], middles)
    # The weight of x̂0(y): 1 at the middle of ln(α/σ), less where a discrete process rounds it.
    with np.errstate(invalid="ignore"):
        r = inner.h / whole.h
    weight = np.where(np.isfinite(r), 1 / (2 * np.where(np.isfinite(r), r, 1)), 0)
    gain = whole.alpha_next * (1 - whole.decay)
    zero = np.zeros_like(gain)
    steps = TwoStageSteps(
        _points(objective, times[:-2]),
        _points(objective, middles),
        inner=np.stack([inner.sigma_next / inner.sigma, inner.alpha_next * (1 - inner.decay)], 1),
        outer=np.stack(
            [whole.sigma_next / whole.sigma, zero, gain * (1 - weight), gain * weight], 1
        ),
    )
    return steps, _to_data(objective, times)


# ---- UniPC


def _unipc_weights(h: float, history: list[float], order: int, corrects: bool) -> np.ndarray:
    """Zhao et al. 2023 Eq. 3: weights of (x̂0_0, ..., x̂0_order-1, x̂0 at the end) in a step.

    history: λ of the earlier estimates minus λ of the newest. B(h) = e^-h - 1.
    """
    finite = [d for d in history[: order - 1] if np.isfinite(d)]
    order = len(finite) + 1
    r = np.array([*(d / h for d in finite), 1.0])
    big = np.expm1(-h)
    phi, factorial, b = (big / -h - 1 if np.isfinite(h) else -1.0), 1, []
    for i in range(1, order + 1):
        b.append(phi * factorial / big)
        factorial *= i + 1
        phi = (phi / -h if np.isfinite(h) else 0.0) - 1 / factorial
    R = np.stack([r**k for k in range(order)])
    rho = np.zeros(order)
    if corrects:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(R, np.array(b))
    elif order > 1:
        inner = np.array([0.5]) if order == 2 else np.linalg.solve(R[:-1, :-1], np.array(b[:-1]))
        rho[:-1] = inner
    # Σ ρ_k (x̂0_k - x̂0_0)/r_k, with r = 1 for the estimate at the end.
    weights = np.zeros(order + 1)
    weights[1:] = rho / r
    weights[0] = -weights[1:].sum()
    return -big * weights


class _Corrected(NamedTuple):
    """Tables of UniPC: after step i's prediction, the next row corrects x and predicts again."""

    point: Preconditioning
    correct: np.ndarray  # f64[n,1 + p + 1]: weights of the state before, of x̂0s, of the new x̂0
    keep: np.ndarray
    move: np.ndarray  # f64[n,p]


def unipc(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
    order: int = 2,
) -> jax.Array:
    """Zhao et al. 2023 (UniPC), B(h) = e^-h - 1, of order 1 to 3; n evaluations.

    The corrector reuses the estimate at the predicted state.
    """
    p, n = _pairs(objective.process, times), len(times) - 1
    c = objective.process.at(times)
    with np.errstate(divide="ignore"):
        logs = np.log(c.alpha / c.sigma)
    keep = p.sigma_next / p.sigma
    gain = p.alpha_next * (1 - p.decay)
    move, correct = np.zeros((n, order)), np.zeros((n, order + 2))
    correct[0, 0] = np.nan  # never used: nothing was predicted before the first step
    for i in range(n):
        # Towards the data, where h is infinite, the order falls to 1.
        now = min(order, i + 1, n - i if p.sigma_next[-1] == 0 else order)
        history = [logs[i - k] - logs[i] for k in range(1, now)]
        w = p.alpha_next[i] * _unipc_weights(p.h[i], history, now, corrects=False)
        move[i, : len(w) - 1] = w[:-1]
        move[i, 0] += gain[i]
        if i + 1 < n:
            w = p.alpha_next[i] * _unipc_weights(p.h[i], history, now, corrects=True)
            correct[i + 1, 0] = keep[i]
            correct[i + 1, 1 : len(w)] = w[:-1]
            correct[i + 1, 1] += gain[i]
            correct[i + 1, -1] = w[-1]
    steps = _Corrected(_points(objective, times[:-1]), correct, keep, move)
    estimate, memory = _estimator(denoise, x_T, clip_x0)

    def step(carry: Any, row: Any) -> tuple[Any, None]:
        (x, before, history, memory), (i, s) = carry, row
        x0, memory = estimate(x, s.point, memory)
        corrected = s.correct[0] * before + s.correct[-1] * x0
        corrected += sum(s.correct[1 + j] * each for j, each in enumerate(history))
        x = jnp.where(i > 0, corrected, x)
        history = (x0, *history[:-1])
        moved = s.keep * x + sum(s.move[j] * each for j, each in enumerate(history))
        return (moved, x, history, memory), None

    zeros = (jnp.zeros_like(x_T),) * order
    rows = (jnp.arange(n), _on_device(steps, x_T.dtype))
    (x, *_), _ = jax.lax.scan(step, (x_T, x_T, zeros, memory), rows)
    return x


# ---- the SDE


# config.sample.sde_form -> (process, t, σ/α coefficients) -> w of the SDE; SiT Sec. 3 and its code
SDE_FORMS: Mapping[str, Callable[[Process, np.ndarray], np.ndarray]] = {
    "constant": lambda p, t: np.ones_like(t),
    "sigma": lambda p, t: p.at(t).sigma,
    "sbdm": lambda p, t: _sbdm(p, t),
    "linear": lambda p, t: t,
    "decreasing": lambda p, t: 0.25 * (np.cos(np.pi * (1 - t)) + 1) ** 2,
    "increasing_decreasing": lambda p, t: np.sin(np.pi * t) ** 2,
}


def _sbdm(process: Process, t: np.ndarray) -> np.ndarray:
    """σσ̇ - σ²α̇/α: the diffusion of the process itself."""
    c = process.at(t)
    return c.sigma * c.sigma_dot - c.sigma**2 * c.alpha_dot / c.alpha


def sde_diffusion(
    process: Process, times: np.ndarray, *, sde_form: str, sde_norm: float, **others: Any
) -> np.ndarray:
    """Return w at the start of each step -> f64[n]. Raises UserError where it is infinite."""
    starts = times[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        w = 2 * sde_norm * SDE_FORMS[sde_form](process, starts)
    if not np.all(np.isfinite(w)):
        raise UserError(
            f"sde_form {sde_form!r} from time {starts[0]:g}, where its diffusion is infinite:"
            " expected a form that is finite there, such as 'sigma'."
        )
    return w


def _drift(process: Process, times: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The drift v + ½w ε̂/σ = f x + f0 x̂0 of the SDE -> f, f0 f64[n]."""
    g, g0 = _field(process, times)
    c = process.at(times)
    half = w / 2 / c.sigma**2
    return g + half, g0 - c.alpha * half


def sde(
    objective: Objective,
    times: np.ndarray,
    *,
    sde_form: str = "sigma",
    sde_norm: float = 1.0,
    sde_last: str = "mean",
) -> LinearSteps:
    """Ma et al. 2024 (SiT) Eq. 9 by Euler and Maruyama: dx = (v + ½w ε̂/σ) dt + √w dW, backwards.

    The last step adds no noise: 'mean' keeps the drift, 'euler' the velocity alone, 'tweedie' is
    x̂0. Weak order 1.
    """
    process, starts = objective.process, times[:-1]
    dt = np.diff(times)
    w = sde_diffusion(process, times, sde_form=sde_form, sde_norm=sde_norm)
    w[-1] = w[-1] if sde_last == "mean" else 0.0
    f, f0 = _drift(process, starts, w)
    keep, move = 1 + dt * f, dt * f0
    if sde_last == "tweedie":
        keep[-1], move[-1] = 0.0, 1.0
    spread = np.sqrt(-w * dt)
    spread[-1] = 0.0
    return LinearSteps(_points(objective, starts), keep, move[:, None], spread)


def sde_heun(
    objective: Objective,
    times: np.ndarray,
    *,
    sde_form: str = "sigma",
    sde_norm: float = 1.0,
    sde_last: str = "mean",
) -> tuple[TwoStageSteps, LinearSteps]:
    """The SDE of `sde` by SiT's Heun: a step's noise first, then Heun's method on the drift.

    Its last step is that of `sde`. Weak order 1: only the error of the drift is of order 2.
    """
    w = sde_diffusion(objective.process, times, sde_form=sde_form, sde_norm=sde_norm)
    f, f0 = _drift(objective.process, times[:-1], w)
    spread = np.sqrt(-w * np.diff(times))[:-1]
    steps = _heun_steps(objective, times, f, f0, np.stack([np.ones_like(spread), spread], 1))
    last = sde(objective, times[-2:], sde_form=sde_form, sde_norm=sde_norm, sde_last=sde_last)
    return steps, last._replace(spread=None)


# ---- adaptive steps


def velocity_of(
    objective: Objective, denoise: Denoise, t: jax.Array, x: jax.Array, clip_x0: bool = False
) -> jax.Array:
    """The velocity dx/dt = α̇ x̂0 + σ̇ ε̂ at x f[B,...], t [B], from any prediction -> f[B,...]."""
    process, prediction = objective.process, objective.prediction
    p, c = precondition(process, prediction, t, t_eps=objective.t_eps), process.at(t)

    def column(value: jax.Array) -> jax.Array:
        return per_sample(value, x.ndim)

    out = denoise(column(p.c_in) * x, p.c_noise)[..., : x.shape[-1]].astype(x.dtype)
    if prediction == "velocity" and not clip_x0:
        return -out if process.from_noise else out
    x0 = column(p.c_skip) * x + column(p.c_out) * out
    x0 = jnp.clip(x0, -1, 1) if clip_x0 else x0
    eps = (x - column(c.alpha) * x0) / column(c.sigma)
    return column(c.alpha_dot) * x0 + column(c.sigma_dot) * eps


def data_time(objective: Objective) -> float:
    """The time at which the ODE meets the data: 0 where the velocity is finite there."""
    process = objective.process
    exact = objective.prediction == "velocity" and process.low == 0
    return 0.0 if exact else process.least_time


def adaptive_ode(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
    rtol: float = 1e-4,
) -> jax.Array:
    """Dormand & Prince's method from noise to data, each sample with its own steps, to `rtol`.

    Of `times` only the ends count. Its evaluations are not known before.
    """
    end = max(float(times[-1]), data_time(objective))
    solved = dopri5(
        lambda t, x: velocity_of(objective, denoise, t, x, clip_x0),
        x_T,
        float(times[0]),
        end,
        rtol=rtol,
        atol=rtol,
    )
    x0: jax.Array = solved.state
    return x0


# ---- average velocities


def mean_flow(
    denoise: IntervalDenoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
) -> jax.Array:
    """Geng et al. 2025, Sec. 4.1: x_r = x_t - (t - r) u(x_t, r, t), exact in any number of steps.

    Only the last state estimates x0, so that `clip_x0` clips it alone.
    """
    batch = x_T.shape[0]

    def step(x: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, h = row
        u = denoise(x, jnp.full((batch,), t), jnp.full((batch,), h))
        return x - h * u.astype(x.dtype), None

    rows = _on_device((times[:-1], times[:-1] - times[1:]), x_T.dtype)
    x, _ = jax.lax.scan(step, x_T, rows)
    return jnp.clip(x, -1, 1) if clip_x0 else x


def regression(
    denoise: Denoise,
    objective: Objective,
    times: np.ndarray,
    x_T: jax.Array,
    noise: Noise,
    *,
    clip_x0: bool,
) -> jax.Array:
    """The one estimate of `losses.regression_loss`; neither x_T nor noise has a part in it."""
    x0 = without_x(objective, denoise, x_T.shape)
    return jnp.clip(x0, -1, 1) if clip_x0 else x0


# config.sample.sampler -> sampler
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(respaced_ddpm, discrete=True, steps=respaced_ddpm_steps),
    "ddim": Sampler(general_ddim, options=("eta",), steps=general_ddim_steps),
    "euler": Sampler(tabled(euler), derivatives=True),
    "heun": Sampler(tabled(heun), both_ends, derivatives=True),
    "edm": Sampler(tabled(edm), both_ends, ("s_churn", "s_min", "s_max", "s_noise")),
    "dpmpp_2m": Sampler(tabled(dpmpp_2m)),
    "dpmpp_2s": Sampler(tabled(dpmpp_2s), start_and_middle),
    "dpmpp_2m_sde": Sampler(tabled(dpmpp_2m_sde)),
    "unipc": Sampler(unipc, options=("order",)),
    "meanflow": Sampler(mean_flow, interval=True),
    "regression": Sampler(regression, evaluated=lambda process, times: times[:1], blind=True),
    "dopri5": Sampler(adaptive_ode, options=("rtol",), derivatives=True, adaptive=True),
    "sde": Sampler(
        tabled(sde),
        options=("sde_form", "sde_norm", "sde_last"),
        derivatives=True,
        check=sde_diffusion,
    ),
    "sde_heun": Sampler(
        tabled(sde_heun),
        both_ends,
        options=("sde_form", "sde_norm", "sde_last"),
        derivatives=True,
        check=sde_diffusion,
    ),
}
