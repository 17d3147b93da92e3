"""Editing images with a trained denoiser: the keys of `config.edit`, and the edited sample."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import (
    Config,
    Section,
    above,
    at_least,
    at_most,
    key,
    lookup,
    registered,
    registry,
)
from ditjax.diffusion.denoising import in_windows, noise_range, posterior_mean, residual_noise
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.inverse import InverseMethod, Measured, known_means, known_pixels
from ditjax.diffusion.samplers import Noise, walk
from ditjax.errors import UserError
from ditjax.tasks import autoencoder
from ditjax.tasks.given import given_conditions
from ditjax.tasks.objective import objective_of, options_of, sampler_of, times_of
from ditjax.training.task import Frozen, Known

METHOD_REGISTRY = "ditjax.diffusion.inverse.METHODS"


@dataclass(frozen=True)
class Edit(Section):
    """How an image that is given is completed, enlarged or denoised (`sampling/editing.py`)."""

    FREE = True

    # 'repaint', 'replace', 'ddnm', 'pigdm', 'dps' or the dotted name of your own
    method: str = key("repaint", registered(METHOD_REGISTRY), protocol=True)
    jump: int = key(10, at_least(1), at_most(100_000), protocol=True)  # RePaint's j
    resample: int = key(10, at_least(1), at_most(100_000), protocol=True)  # RePaint's r
    strength: float = key(1.0, above(0), protocol=True)  # of a gradient
    # of the noise to remove, on pixels from 0 to 255; 0 = estimated from the image
    sigma: float = key(0.0, at_least(0), protocol=True)
    # how: by its finest details, or such that as much is removed
    estimate: Literal["wavelet", "residual"] = key("wavelet", protocol=True)

    def unused(self, name: str, c: Config) -> str:
        if c.given.kind != "none":  # whose network was trained to edit, by no method
            return "given.kind"
        if name == "estimate" and self.sigma:
            return "sigma"
        every = {each for method in registry(METHOD_REGISTRY).values() for each in method.options}
        return "method" if name in every - {*method_of(c).options} else super().unused(name, c)


def method_of(c: Config) -> InverseMethod:
    """The method of a recipe."""
    method: InverseMethod = lookup(c.edit.method, METHOD_REGISTRY)
    return method


def settings_of(c: Config) -> dict[str, Any]:
    """The keys of `config.edit` that the recipe's method reads."""
    return {name: getattr(c.edit, name) for name in method_of(c).options}


def edit_protocol(c: Config, given: Known) -> dict[str, Any]:
    """What an edit adds to a sampling protocol.

    Raises UserError for a method that does not go with the sampler or with what is given.
    """
    _check_canvas(c, given)
    if c.given.kind != "none":
        return _trained_protocol(c, given)
    if given.sigma is not None:
        _check_noise(c, np.asarray(given.sigma))
        return {}
    method, sampler, s = method_of(c), sampler_of(c), c.sample
    name = f"config.edit.method is {c.edit.method!r}"
    if method.chain and not sampler.steps:
        raise UserError(
            f"{name}, which takes the steps of a sampler in its own way, and config.sample.sampler"
            f" is {s.sampler!r}, which does not offer its own: set it to 'ddim' (with"
            " config.sample.eta=1) or 'ddpm', or config.edit.method to 'ddnm' or 'pigdm'."
        )
    if method.random and "eta" in sampler.options and s.eta == 0:
        raise UserError(
            f"{name}, whose steps need noise, and config.sample.eta is 0.0: set it to 1."
        )
    if method.check:
        method.check(len(times_of(c)) - 1, **settings_of(c))
    if given.mask is None and c.latent:
        raise UserError(
            "an image is to be enlarged by a network of latents, which lack the means of pixels:"
            " expected a network of pixels (config.autoencoder.kind='none')."
        )
    return {"method": c.edit.method, **settings_of(c)}


def _trained_protocol(c: Config, given: Known) -> dict[str, Any]:
    """The protocol of an edit by a network that was trained to make it.

    Raises UserError for an edit that the network was not trained for.
    """
    said = f"config.given.kind is {c.given.kind!r}"
    edit = "denoise" if given.sigma is not None else "low" if given.mask is None else "mask"
    if edit != c.given.kind:
        does = {"low": "enlarges images: --edit=upscale", "mask": "completes them: --edit=inpaint"}
        raise UserError(f"{said}, whose network {does[c.given.kind]}.")
    side = np.shape(given.image)[1]
    if edit == "low" and side != c.given.side:
        raise UserError(
            f"an image of {side}x{side} to enlarge, and {said} of {c.given.side}x{c.given.side}:"
            " expected that size."
        )
    return {"method": "trained"}


def canvas_of(c: Config, given: Known | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x0: the network's, or that of a larger image to complete."""
    if given is None or given.mask is None or c.latent:
        return shape
    return (*np.shape(given.image)[1:3], shape[-1])


def on_canvas(denoise: Denoise, size: int, canvas: tuple[int, ...]) -> Denoise:
    """A denoiser of a larger image: of windows that overlap by half, averaged (`in_windows`).

    As in MultiDiffusion (Bar-Tal et al. 2023), with Hann weights: the average is the least-squares
    answer to what each window says.
    """
    if canvas[:2] == (size, size):
        return denoise
    return lambda x, t: in_windows(lambda window: denoise(window, t), x, size)


def _check_canvas(c: Config, given: Known) -> None:
    """Raise UserError for a larger image that this network cannot complete."""
    H, W = np.shape(given.image)[1:3]
    if given.mask is None or (c.data.image_size,) * 2 == (H, W):
        return
    said = f"an image of {H}x{W} to complete, larger than the network's {c.data.image_size}"
    if c.given.kind != "none":
        raise UserError(
            f"{said}, and config.given.kind is {c.given.kind!r}, whose network is given a whole"
            " image: expected its size."
        )
    if c.latent:
        raise UserError(
            f"{said}, and a network of latents, whose windows are not those of pixels: expected a"
            " network of pixels (config.autoencoder.kind='none'), or an image of its size."
        )
    if c.sample.cfg_rule == "apg" and c.sample.apg_momentum and c.sample.cfg_scale != 1:
        raise UserError(
            f"{said}, and config.sample.apg_momentum is {c.sample.apg_momentum}: it remembers one"
            " window, and there are several; set it to 0."
        )


def known_of_samples(given: Known | None) -> Known:
    """What is known of samples. Raises ValueError if nothing is."""
    if given is None:
        raise ValueError("this network draws nothing without an image: sampling gives it none")
    return given


def beside_x(
    c: Config,
    frozen: Frozen,
    given: Known | None,
    keys: jax.Array,
    level: jax.Array | np.float32 | None,
) -> dict[str, jax.Array]:
    """What a network that was trained to edit is given: fields of `Conditions`."""
    given = known_of_samples(given)
    if c.latent:
        measured = _measured(c, frozen, given)
        mask = measured.project(jnp.ones_like(measured.image))[..., :1]
        given = Known(measured.image, mask)
    return given_conditions(c, given, keys, level)


def _check_noise(c: Config, sigma: np.ndarray) -> None:
    """Raise UserError for noise f32[N], on pixels from -1 to 1, that the network cannot remove."""
    if c.latent:
        raise UserError(
            "an image to denoise and a network of latents, in which its noise is not white:"
            " expected a network of pixels (config.autoencoder.kind='none')."
        )
    if c.sample.cfg_scale != 1:
        raise UserError(
            f"config.sample.cfg_scale is {c.sample.cfg_scale} and an image to denoise, whose mean"
            " guidance would move: set it to 1."
        )
    low, high = _noise_range(c)
    unknown = (sigma == 0) & (c.edit.estimate == "residual")
    wrong = sigma[~unknown & ((sigma < low) | (sigma > high))]
    if wrong.size:
        raise UserError(
            f"an image with noise of {127.5 * wrong[0]:.4g}, on pixels from 0 to 255: expected"
            f" {127.5 * low:.4g} to {127.5 * high:.4g}, as the network was trained; set"
            " config.edit.sigma."
        )


def _noise_range(c: Config) -> tuple[float, float]:
    """The noise that a recipe's network was trained on, on pixels from -1 to 1."""
    return noise_range(objective_of(c).process, c.diffusion.time_most)


def edited(
    c: Config, frozen: Frozen, denoise: Denoise, given: Known, x_T: jax.Array, noise: Noise
) -> jax.Array:
    """Draw x0 that agrees with what is given -> f32[B,H,W,C], or latents.

    Of an image plus noise it is the mean of all such x0, which needs neither x_T nor noise.
    """
    objective, times = objective_of(c), times_of(c)
    if given.sigma is not None:
        y, sigma = jnp.asarray(given.image), jnp.asarray(given.sigma)

        def removed_from(y: jax.Array, sigma: jax.Array) -> jax.Array:
            mean = functools.partial(posterior_mean, denoise, objective, sigma=sigma)
            return in_windows(mean, y, c.data.image_size)

        if c.edit.estimate == "residual":
            found = residual_noise(removed_from, y, *_noise_range(c))
            sigma = jnp.where(sigma > 0, sigma, found)
        return removed_from(y, sigma)
    sampler, method = sampler_of(c), method_of(c)
    denoise = denoise if c.latent else on_canvas(denoise, c.data.image_size, x_T.shape[1:])
    measured, settings = _measured(c, frozen, given), settings_of(c)
    options = {"clip_x0": c.sample.clip_x0, **options_of(c)}
    if method.wrap:
        wrapped = method.wrap(denoise, objective, measured, **settings)
        return sampler.solve(wrapped, objective, times, x_T, noise, **options)
    assert sampler.steps is not None  # `edit_protocol`
    assert method.chain is not None
    steps = sampler.steps(denoise, objective, times, x_T, **options)
    return walk(method.chain(steps, objective, times, measured, **settings), x_T, noise)


def _measured(c: Config, frozen: Frozen, given: Known) -> Measured:
    """What is known of x0, in pixels or in latents."""
    image, mask = jnp.asarray(given.image), given.mask
    if mask is None:
        return known_means(image, c.data.image_size // image.shape[1])
    known = jnp.asarray(mask)
    if c.latent:
        moments = autoencoder.encode_images(c, frozen["autoencoder"], image)
        image = autoencoder.normalized(c, moments.mean)
        # A latent is known where all its pixels are.
        f = c.downsample
        B, H, W, _ = known.shape
        known = known.reshape(B, H // f, f, W // f, f, 1).min((2, 4))
    return known_pixels(image, known)


def pasted(given: Known, images: jax.Array) -> jax.Array:
    """Put the known pixels into images f32[B,H,W,C], as a decoder and some methods change them."""
    if given.mask is None:
        return images
    return jnp.where(jnp.asarray(given.mask) > 0, jnp.asarray(given.image), images)
