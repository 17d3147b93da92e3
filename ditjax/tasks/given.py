"""Networks that are given channels beside x: a low-resolution image, or what is known of one.

Super-resolution (SR3, Saharia et al. 2021; cascades, Ho et al. 2021, arXiv:2106.15282) and trained
inpainting are the same: what is known of an image is computed from it and a key in training, and
given while sampling. Both make channels of it by `given_conditions`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import PATH, Config, Section, at_least, at_most, between, check_used, key
from ditjax.data.masks import random_mask
from ditjax.diffusion.process import per_sample
from ditjax.diffusion.resampling import blurred, resized
from ditjax.diffusion.samplers import given_noise
from ditjax.errors import UserError, divisors
from ditjax.models.network import Network
from ditjax.tasks.objective import process_of, training_loss
from ditjax.training.task import Beside, FromRecords, Known

ENLARGED_BY = "bicubic"  # what a network is given of a low-resolution image
_LOW, _PAST = ("kind", ("low",)), ("kind", ("past",))
BLUR_RADII = 3  # a blur is cut at 1 to 3 pixels


@dataclass(frozen=True)
class GivenChannels(Section):
    """What a network is given of the image that it draws (`tasks/given.py`)."""

    # past: the first frames of a clip, of which the network draws the others (`tasks/nowcast.py`)
    kind: Literal["none", "low", "mask", "past"] = key("none")
    side: int = key(0, at_least(0), at_most(16_384), used_if=_LOW)  # of the low-resolution image
    # how training makes that image, resampled by ditjax/diffusion/resampling.py
    kernel: Literal["area", "bicubic"] = key("area", used_if=_LOW)
    # noise that is added to it, as a share of the process's times: at most in training, in samples
    noise_most: float = key(0.0, between(0, 1), used_if=_LOW)
    # Gaussian blur of it in training: the largest deviation, in its pixels (DALL-E 2)
    blur_most: float = key(0.0, between(0, 8), used_if=_LOW)
    noise: float = key(0.0, between(0, 1), free=True, protocol=True, used_if=_LOW)
    past: int = key(0, at_least(0), at_most(4096), used_if=_PAST)  # frames that are known
    first: str = key("", PATH, used_if=_PAST)  # a run whose forecast is given beside them
    # of that forecast's error, which is drawn in units of it; 0 = the frames themselves are drawn
    residual_std: float = key(0.0, at_least(0), used_if=_PAST)

    def check(self, c: Config) -> None:
        changed = (
            name for name, value in vars(GivenChannels()).items() if getattr(self, name) != value
        )
        check_used(c, (f"given.{name}" for name in changed))
        size = c.data.image_size
        if self.kind == "low" and (not self.side or size % self.side or self.side == size):
            smaller = ", ".join(map(str, divisors(size)[:-1]))
            raise UserError(
                f"config.given.side is {self.side} and config.data.image_size {size}: expected the"
                f" side of a smaller image that divides it: {smaller}."
            )
        if self.kind == "past" and not 0 < self.past < c.data.frames:
            raise UserError(
                f"config.given.past is {self.past} and config.data.frames {c.data.frames}: expected"
                " from 1 to one frame fewer than a clip has."
            )
        if self.residual_std and not self.first:
            raise UserError(
                f"config.given.residual_std is {self.residual_std} and config.given.first '':"
                " expected the run whose error is drawn."
            )
        if self.noise > self.noise_most:
            raise UserError(
                f"config.given.noise is {self.noise} and config.given.noise_most"
                f" {self.noise_most}: the network was trained on no more noise than that."
            )


def extra_channels(c: Config) -> int:
    """The channels that a recipe's network is given beside x."""
    C = c.input_channels
    past = 1 + C + C * bool(c.given.first)
    return {"none": 0, "low": C, "mask": 1 + C, "past": past}[c.given.kind]


def has_level(c: Config) -> bool:
    """Whether a recipe's network takes the level of the noise in its channels."""
    return bool(c.given.noise_most > 0)


def known_of(c: Config, images: jax.Array, keys: jax.Array) -> Known:
    """What is known of images f32[B,H,W,C], pixels or latents, with keys key[B]."""
    if c.given.kind == "low":
        return Known(resized(images, c.given.side, c.given.kernel))
    if c.given.kind == "past":
        return known_past(images, c.given.past)
    H, W = images.shape[1:3]
    return Known(images, jax.vmap(lambda key: random_mask(key, H, W))(keys))


def known_past(clips: jax.Array | np.ndarray, past: int) -> Known:
    """The first frames of clips [B,F,H,W,C]: a mask f32[B,F,1,1,1]."""
    known = (np.arange(clips.shape[1]) < past).astype(np.float32)
    shape = (len(clips), clips.shape[1], 1, 1, 1)
    return Known(clips, np.broadcast_to(known[None, :, None, None, None], shape))


def given_conditions(
    c: Config, known: Known, keys: jax.Array, level: jax.Array | np.float32 | None = None
) -> dict[str, jax.Array]:
    """The fields of `Conditions` that follow from what is known: channels, and their level.

    Of a low-resolution image y they are α y + σ ε (Ho et al. 2021, Sec. 4.2), enlarged; α, σ are
    the process's at a share `level` f32[B] or f32[] of its times, and ε depends on keys key[B]. Of
    an image with a mask m, known f32[B,H,W,1], they are m and m ⊙ image.
    """
    image = jnp.asarray(known.image)
    if known.mask is not None:
        mask = jnp.asarray(known.mask)
        return {"channels": jnp.concatenate([mask, mask * image], axis=-1)}
    found = {}
    if level is not None:
        process = process_of(c.diffusion)
        t = process.from_unit(jnp.broadcast_to(level, len(image)))
        at = process.at(t)
        alpha, sigma = (per_sample(each, image.ndim) for each in (at.alpha, at.sigma))
        image = alpha * image + sigma * given_noise(keys, image.shape[1:])
        found["level"] = process.c_noise(t)
    return {"channels": resized(image, c.data.image_size, ENLARGED_BY), **found}


def trained_conditions(c: Config, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """The fields of `Conditions` in training: of images f32[B,H,W,C] and keys key[B] alone."""
    parts = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    level = None
    if has_level(c):
        level = c.given.noise_most * jax.vmap(jax.random.uniform)(parts[:, 1])
    known = known_of(c, images, parts[:, 0])
    if c.given.blur_most:
        # Of a fourth key, so that what the other three draw is as without.
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
        known = known._replace(image=_random_blur(c, jnp.asarray(known.image), own))
    return given_conditions(c, known, parts[:, 2], level)


def _random_blur(c: Config, low: jax.Array, keys: jax.Array) -> jax.Array:
    """Ramesh et al. 2022 (DALL-E 2) App. C: a blur of each low-resolution image f32[B,h,w,C].

    Its deviation is uniform up to config.given.blur_most, and its radius one of 1 to `BLUR_RADII`.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    sigma = c.given.blur_most * jax.vmap(jax.random.uniform)(pairs[:, 0])
    radius = jax.vmap(lambda key: jax.random.randint(key, (), 1, BLUR_RADII + 1))(pairs[:, 1])
    return blurred(low, sigma, radius)


def beside_examples(c: Config, x0: jax.Array, keys: jax.Array) -> jax.Array:
    """The channels that samples would be given of x0 f32[B,H,W,C], with keys key[B].

    They have the noise of samples, and masks are drawn as in training.
    """
    parts = jax.vmap(jax.random.split)(keys)
    level = np.float32(c.given.noise) if has_level(c) else None
    known = known_of(c, x0, parts[:, 0])
    return given_conditions(c, known, parts[:, 1], level)["channels"]


def levels_of(c: Config, count: int) -> jax.Array | None:
    """The network's time of the noise that samples add to what they are given [count], or None."""
    if not has_level(c):
        return None
    process = process_of(c.diffusion)
    return jnp.asarray(process.c_noise(process.from_unit(jnp.full(count, c.given.noise))))


def given_from_images(c: Config) -> FromRecords:
    """What samples of a recipe are given, of images of a data set."""

    def beside(images: jax.Array, keys: jax.Array) -> Beside:
        return Beside(known=known_of(c, images, keys))

    return FromRecords(beside, "given_images", edited=c.given.kind != "past")


def in_training(c: Config) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None:
    """The fields of `Conditions` that training makes of (images, keys); None for none."""
    # What follows from the past of a clip is prepared with the clip (`tasks/nowcast.py`).
    found = c.given.kind in ("none", "past")
    return None if found else functools.partial(trained_conditions, c)


def given_protocol(c: Config) -> dict[str, Any]:
    """What it adds to a sampling protocol; {} without."""
    g = c.given
    if g.kind == "none":
        return {}
    low = {"side": g.side, "kernels": [g.kernel, ENLARGED_BY], "noise": g.noise}
    return {"given": {"kind": g.kind, **{"low": low, "past": {"past": g.past}}.get(g.kind, {})}}


def training_protocol(c: Config) -> dict[str, Any]:
    """What it adds to the protocol of a validation loss; {} without."""
    g = c.given
    if g.kind == "none":
        return {}
    low = {"side": g.side, "kernels": [g.kernel, ENLARGED_BY], "noise_most": g.noise_most}
    low |= {"blur_most": g.blur_most} if g.blur_most else {}
    # A first stage is part of the model; the error of another target is another loss.
    past = {"past": g.past, **({"residual_std": g.residual_std} if g.residual_std else {})}
    return {"val_loss_given": {"kind": g.kind, **{"low": low, "past": past}.get(g.kind, {})}}


def check_given(c: Config, network: Network) -> None:
    """Raise UserError for what does not go with a network that is given channels."""
    g = c.given
    if g.kind == "none":
        return
    said = f"config.given.kind is {g.kind!r}"
    if not network.given:
        raise UserError(
            f"{said}, and network {c.model.kind!r} takes no channels beside x: set"
            f" config.model.kind to {'video' if g.kind == 'past' else 'dit'!r}."
        )
    if g.kind in ("low", "past") and c.latent:
        what = {"low": "a low-resolution image", "past": "frames of pixels"}[g.kind]
        raise UserError(
            f"{said}, {what}, and the network is of latents: expected a network of pixels"
            " (config.autoencoder.kind='none')."
        )
    if (g.kind == "past") != (c.data.frames > 1):
        raise UserError(
            f"{said} and config.data.frames {c.data.frames}: the past is that of clips, and nothing"
            " else is given of them; set kind to 'past', or frames to 1."
        )
    others = {
        "config.adapt.kind": c.adapt.kind == "control",
        "config.align.teacher": bool(getattr(c.model, "align_block", 0)),
        "config.diffusion.loss": training_loss(c.diffusion).interval,
        "config.sample.guide": bool(c.sample.guide),
    }
    for name, wrong in others.items():
        if wrong:
            section, leaf = name.split(".")[1:]
            value = getattr(getattr(c, section), leaf)
            raise UserError(
                f"{said}, which the network of {name} {value!r} is not given: leave one of them"
                " out."
            )
    if c.evaluate.labels != "uniform":
        raise UserError(
            f"config.evaluate.labels is {c.evaluate.labels!r}, and {said}: samples have the labels"
            " of the records that they are given; leave it out."
        )
