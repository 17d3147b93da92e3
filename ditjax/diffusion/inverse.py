"""Inverse problems: images that agree with a measurement, by a denoiser that was trained without.

A measurement is y = H x0 + σ_y n, where H Hᵀ is a multiple of the identity: a mask that keeps
pixels, or the mean over f x f pixels. It is given in the space of images, as H†y, with the
projection H†H, so that one formula serves every H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.gaussian import Denoise, Stateful, stateful
from ditjax.diffusion.losses import Objective
from ditjax.diffusion.process import per_sample, precondition
from ditjax.diffusion.samplers import Noise, Steps
from ditjax.errors import UserError


class Measured(NamedTuple):
    """A measurement: image f32[B,H,W,C] = H†y, project(x) = H†H x, H Hᵀ = gram · I."""

    image: jax.Array
    project: Callable[[jax.Array], jax.Array]
    gram: float = 1.0

    def residual(self, x0: jax.Array) -> jax.Array:
        """Return H†(y - H x0)."""
        return self.image - self.project(x0)


def known_pixels(image: jax.Array, known: jax.Array) -> Measured:
    """The pixels of image f32[B,H,W,C] where known f32[B,H,W,1] is 1; it is 0 elsewhere."""
    return Measured(known * image, lambda x: known * x)


def known_means(low: jax.Array, factor: int) -> Measured:
    """The means low f32[B,h,w,C] over `factor` x `factor` pixels."""

    def enlarge(x: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)

    def project(x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        cells = x.reshape(B, H // factor, factor, W // factor, factor, C)
        return enlarge(cells.mean((2, 4)))

    return Measured(enlarge(low), project, gram=factor**-2)


# ---- wrappers of a denoiser, for any sampler

# (estimate: x -> (x̂0, rest), x f32[B,H,W,C], α, σ f32[B,1,1,1]) -> change of x̂0, the rest
_Change = Callable[..., tuple[jax.Array, Any]]


def _steered(denoise: Denoise, objective: Objective, change: _Change) -> Stateful:
    """Change the x̂0 that a denoiser's output implies; other channels and its memory stay."""
    process, network = objective.process, stateful(denoise)

    def steered(x_in: jax.Array, timesteps: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        t = process.time_of_noise(timesteps)
        p = precondition(process, objective.prediction, t, t_eps=objective.t_eps)
        c = process.at(t)
        c_in, c_skip, c_out, alpha, sigma = (
            per_sample(each, x_in.ndim) for each in (p.c_in, p.c_skip, p.c_out, c.alpha, c.sigma)
        )
        channels = x_in.shape[-1]

        def estimate(x: jax.Array) -> tuple[jax.Array, Any]:
            out, after = network.step(c_in * x, timesteps, memory)
            out = out.astype(x.dtype)
            return c_skip * x + c_out * out[..., :channels], (out, after)

        moved, (out, after) = change(estimate, x_in / c_in, alpha, sigma)
        return out.at[..., :channels].add(moved / c_out), after

    return Stateful(network.start, steered)


def null_space(denoise: Denoise, objective: Objective, measured: Measured) -> Denoise:
    """Wang et al. 2023 (DDNM): x̂0 ← x̂0 + H†(y - H x̂0), which has the measurement exactly."""

    def change(
        estimate: Any, x: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, Any]:
        x0, rest = estimate(x)
        return measured.residual(x0), rest

    return _steered(denoise, objective, change)


def pseudo_inverse_guided(
    denoise: Denoise, objective: Objective, measured: Measured, *, strength: float = 1.0
) -> Denoise:
    """Song et al. 2023 (ΠGDM): the score of N(y; H x̂0, r² H Hᵀ), r² = σ²/(α² + σ²).

    ∇ log p(y | x) ≈ (∂x̂0/∂x)ᵀ H†(y - H x̂0)/r², by one product with the network's Jacobian, and
    x̂0 ← x̂0 + strength σ²/α ∇. Their algorithm multiplies by r²; strength 1 is the approximated
    posterior itself. Where α = 0, x says nothing of x0, and x̂0 is left as it is.
    """

    def change(
        estimate: Any, x: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, Any]:
        x0, pull, rest = jax.vjp(estimate, x, has_aux=True)
        r2 = sigma**2 / (alpha**2 + sigma**2)
        (gradient,) = pull(measured.residual(x0) / r2)
        some = alpha > 0
        gain = jnp.where(some, sigma**2 / jnp.where(some, alpha, 1), 0)
        return strength * gain * gradient, rest

    return _steered(denoise, objective, change)


# ---- chains: other steps made of a sampler's


def posterior_sampling(
    steps: Steps,
    objective: Objective,
    times: np.ndarray,
    measured: Measured,
    *,
    strength: float = 1.0,
) -> Steps:
    """Chung et al. 2023 (DPS) Alg. 1: after each step, x ← x - ζ ∇_x ‖y - H x̂0(x)‖.

    ζ is `strength`; their step ζ/‖·‖ of the squared norm is twice this. The gradient passes through
    the network, and through the clipping of x̂0.
    """

    def step(x: jax.Array, memory: Any, row: Any, noise: Noise) -> tuple[jax.Array, Any, jax.Array]:
        def distance(x: jax.Array) -> tuple[jax.Array, Any]:
            moved, after, x0 = steps.step(x, memory, row, noise)
            square = jnp.square(measured.residual(x0)).sum(tuple(range(1, x.ndim)))
            # The norm has no gradient at 0, where nothing is measured.
            return jnp.sqrt(measured.gram * square + 1e-12).sum(), (moved, after, x0)

        gradient, (moved, after, x0) = jax.grad(distance, has_aux=True)(x)
        return moved - strength * gradient, after, x0

    return steps._replace(step=step)


def repaint_moves(steps: int, jump: int, resample: int) -> np.ndarray:
    """The moves of RePaint -> i32[m,2]: a step from 0 at the noisiest, and 1 down or 0 undone.

    At every `jump`-th level from the data up, but the last, `jump` steps are undone and taken
    again, until they have been taken `resample` times. As in diffusers, the lowest level is the
    data; in the authors' code it is one step above.
    """
    left = dict.fromkeys(range(0, steps - jump, jump), resample - 1)
    level, moves = steps, []
    while level > 0:
        moves.append((steps - level, 1))
        level -= 1
        if left.get(level, 0):
            left[level] -= 1
            for _ in range(jump):
                level += 1
                moves.append((steps - level, 0))
    return np.asarray(moves, np.int32)


def repaint(
    steps: Steps,
    objective: Objective,
    times: np.ndarray,
    measured: Measured,
    *,
    jump: int = 10,
    resample: int = 10,
) -> Steps:
    """Lugmayr et al. 2022 (RePaint) Alg. 1 on any process.

    After each step the measured part is replaced by the measurement, noised to the new time, and
    steps are taken again (`repaint_moves`). The last move ends with the measurement itself. More
    resampling does not converge to the posterior.
    """
    moves = repaint_moves(len(times) - 1, jump, resample)
    c = objective.process.at(times)
    ratio = c.alpha[:-1] / c.alpha[1:]
    # Of noise that is added to undo a step: σ_t² less what x_{t-1} brings.
    spread = np.sqrt(np.maximum(c.sigma[:-1] ** 2 - (ratio * c.sigma[1:]) ** 2, 0))
    alpha, sigma, up, spread = (
        jnp.asarray(each, measured.image.dtype)
        for each in (c.alpha[1:], c.sigma[1:], ratio, spread)
    )

    def step(x: jax.Array, memory: Any, row: Any, noise: Noise) -> tuple[jax.Array, Any, jax.Array]:
        visit, i, down = row

        def lower(x: jax.Array, memory: Any) -> tuple[jax.Array, Any, jax.Array]:
            tables = jax.tree.map(lambda table: table[i], steps.rows)
            x, memory, x0 = steps.step(x, memory, tables, lambda _: noise(2 * visit))
            z = noise(2 * visit + 1)
            return x + alpha[i] * measured.image + measured.project(sigma[i] * z - x), memory, x0

        def higher(x: jax.Array, memory: Any) -> tuple[jax.Array, Any, jax.Array]:
            return up[i] * x + spread[i] * noise(2 * visit), memory, x

        return jax.lax.cond(down == 1, lower, higher, x, memory)

    visits = jnp.arange(len(moves), dtype=jnp.int32)
    return Steps(step, steps.memory, (visits, *jnp.asarray(moves).T))


def replacement(steps: Steps, objective: Objective, times: np.ndarray, measured: Measured) -> Steps:
    """Song et al. 2021 App. I.2: RePaint without resampling.

    With means of pixels for a mask it is ILVR (Choi et al. 2021), by another filter.
    """
    return repaint(steps, objective, times, measured, jump=len(times) - 1, resample=1)


def check_repaint(steps: int, *, jump: int, resample: int) -> None:
    """Raise UserError for jumps that no level is left for."""
    if resample > 1 and jump >= steps:
        raise UserError(
            f"config.edit.jump is {jump} and the sampler takes {steps} steps: expected fewer than"
            " that, or config.edit.resample=1."
        )


class InverseMethod(NamedTuple):
    """A way to agree with a measurement; either of the first two.

    `wrap(denoise, objective, measured, **options)` -> a denoiser for any sampler.
    `chain(steps, objective, times, measured, **options)` -> other steps, for samplers that have
    `steps`. `options` are the keys of config.edit that it reads. `random`: its chain needs noise in
    every step. `check(steps, **options)` raises UserError.
    """

    wrap: Callable[..., Denoise] | None = None
    chain: Callable[..., Steps] | None = None
    options: tuple[str, ...] = ()
    random: bool = False
    check: Callable[..., None] | None = None


# config.edit.method -> method
METHODS: dict[str, InverseMethod] = {
    "repaint": InverseMethod(
        chain=repaint, options=("jump", "resample"), random=True, check=check_repaint
    ),
    "replace": InverseMethod(chain=replacement, random=True),
    "ddnm": InverseMethod(wrap=null_space),
    "pigdm": InverseMethod(wrap=pseudo_inverse_guided, options=("strength",)),
    "dps": InverseMethod(chain=posterior_sampling, options=("strength",)),
}
