"""What our samplers and their oracles both run: a network, its noise, and the cases compared."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.diffusion.samplers import ddim, ddpm
from ditjax.diffusion.schedule import make_schedule, respace

SHAPE = (2, 3, 5, 4)  # B H W C: no two alike, so that a swapped axis shows
SNAPSHOTS = 6


class Case(NamedTuple):
    """One trajectory: sampler 'ddpm' or 'ddim', our respacing, and the sampler's options."""

    sampler: str
    spec: str
    prediction: str = "eps"
    variance: str = "learned_range"
    eta: float = 0.0
    clip_x0: bool = False

    @property
    def name(self) -> str:
        last = self.variance if self.sampler == "ddpm" else f"eta{self.eta}"
        return f"{self.sampler}-{self.spec}-{self.prediction}-{last}{'-clip' * self.clip_x0}"


CASES = (
    Case("ddpm", "250"),
    Case("ddpm", "1000"),
    Case("ddpm", "250", variance="fixed_small"),
    Case("ddpm", "250", variance="fixed_large"),
    Case("ddpm", "250", "x0"),
    Case("ddpm", "250", "v", variance="fixed_small"),
    Case("ddim", "ddim50"),
    Case("ddim", "ddim50", eta=0.5),
    Case("ddim", "ddim50", eta=1.0),
    Case("ddim", "ddim50", "x0", eta=0.5),
    Case("ddim", "ddim50", "v"),
)


def noise(steps: int) -> np.ndarray:
    """x_T in the last row and the noise of each step, f32[steps+1,B,H,W,C]."""
    return np.random.default_rng(3).standard_normal((steps + 1, *SHAPE)).astype(np.float32)


def network(xp: Any, prediction: str, x: Any, t: Any) -> Any:
    """The exact denoiser of ½N(m, s²) + ½N(-m, s²) over each pixel's channels, and a variance.

    With c = ᾱ s² + 1 - ᾱ and r = tanh(√ᾱ m·x_t / c): x0 = (√ᾱ s² x_t + (1-ᾱ) r m) / c and
    ε = √(1-ᾱ) (x_t - √ᾱ r m) / c. Not linear, bounded, and the samples are as wide as data; m
    differs from pixel to pixel. x f32[B,H,W,C], t i32[B] -> f32[B,H,W,2C], in any of NumPy, JAX
    and PyTorch (xp).
    """
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    centre = np.random.default_rng(4).uniform(-1.2, 1.2, (1, *SHAPE[1:]))
    spread = 0.7**2

    def table(values: np.ndarray) -> Any:
        return xp.asarray(values.astype(np.float32))[t][:, None, None, None]

    total = alphas_bar * spread + 1 - alphas_bar
    signal, sigma = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
    m = xp.asarray(centre.astype(np.float32))
    r = xp.tanh(table(signal / total) * (x * m).sum(-1)[..., None]) * m
    x0 = table(signal * spread / total) * x + table((1 - alphas_bar) / total) * r
    eps = table(sigma / total) * (x - table(signal) * r)
    out = {"eps": eps, "x0": x0, "v": table(signal) * eps - table(sigma) * x0}[prediction]
    # Past [-1, 1] at times, as a network's fraction may be.
    fraction = 1.3 * xp.sin(2 * x + table(np.arange(1000) / 150.0))
    return xp.concatenate([out, fraction], -1)


def ours(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Our sampler: x_t f32[S+1,B,H,W,C] from x_T to x0, and the network's timesteps i32[S]."""
    schedule = respace(make_schedule("linear"), case.spec)
    z = jnp.asarray(noise(len(schedule)))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda *args: seen.append(args), x, t, ordered=True)
        out: jax.Array = network(jnp, case.prediction, x, t)
        return out

    options: Any = {"prediction": case.prediction, "clip_x0": case.clip_x0}
    sampler: Any = ddpm
    if case.sampler == "ddim":
        sampler, options = ddim, options | {"eta": case.eta}
    else:
        options["variance"] = case.variance
    x0 = jax.jit(lambda x: sampler(denoise, schedule, x, lambda i: z[i], **options))(z[-1])
    jax.effects_barrier()
    x, t = zip(*seen, strict=True)
    timesteps = np.stack(t)
    assert np.all(timesteps == timesteps[:, :1]), "a batch of one trajectory has one timestep"
    return np.stack([*x, np.asarray(x0)]), timesteps[:, 0]


def errors(x: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Each step's largest error over its largest value: f32[S,B,H,W,C] twice -> f32[S]."""
    axes = (1, 2, 3, 4)
    return np.abs(x - expected).max(axis=axes) / np.abs(expected).max(axis=axes)


def snapshots(x: np.ndarray) -> np.ndarray:
    """x_t f32[S+1,B,H,W,C] from x_T to x0 -> f32[SNAPSHOTS,B,H,W,C], evenly spaced, x0 last."""
    return x[np.linspace(0, len(x) - 1, SNAPSHOTS + 1).round().astype(int)[1:]]
