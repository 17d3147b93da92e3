"""What unCLIP's decoder makes of images that are given (Ramesh et al. 2022, Sec. 3).

from ditjax.sampling.unclip import Unclip

pipeline = Unclip.from_pretrained("runs/small/unclip_decoder")
pipeline.variations("digit.png", num=4).images[0].save("x.png")
"""

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config, changed
from ditjax.data.clips import picture
from ditjax.data.crop import normalize
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.interpolation import slerp
from ditjax.diffusion.samplers import per_sample_noise
from ditjax.diffusion.solvers import ddim_invert
from ditjax.errors import UserError
from ditjax.models.clip import unit
from ditjax.models.network import Conditions
from ditjax.runs.results import tile
from ditjax.sampling.editing import Pictures, pixels_digest, read_images
from ditjax.sampling.given import checked_prompts
from ditjax.sampling.pipeline import Output, Source
from ditjax.sampling.text2image import Text2Image
from ditjax.tasks import autoencoder, diffusion
from ditjax.tasks.image_vectors import embedded_images, embedded_texts, has_vectors
from ditjax.tasks.objective import objective_of, options_of, sampler_of, times_of
from ditjax.tasks.prior import standardized
from ditjax.tasks.text_conditions import encoded_conditions, tokens_of, with_null
from ditjax.training import keys
from ditjax.training.program import precise
from ditjax.training.task import Frozen, Guidance


class Bipartite(NamedTuple):
    """Images as the decoder draws them: √E z f32[N,E] by CLIP, and the noise x_T f32[N,H,W,C].

    The noise is that from which DDIM draws the image itself, given the vector.
    """

    vector: Any
    noise: Any


@jax.jit
def _arc(first: jax.Array, second: jax.Array, shares: jax.Array) -> jax.Array:
    """Points at shares f[N] of the arc from one row [1,...] to another: [N,...]."""
    a, b = (jnp.repeat(each, len(shares), axis=0) for each in (first, second))
    return slerp(a, b, shares.astype(jnp.float32))


def interpolated(first: Bipartite, second: Bipartite, shares: np.ndarray) -> Bipartite:
    """Sec. 3.2: vector and noise at shares f[N] of the arcs from one image to another, [1] each."""
    return Bipartite(*(_arc(a, b, shares) for a, b in zip(first, second, strict=True)))


def towards(image: Bipartite, direction: jax.Array, shares: np.ndarray) -> Bipartite:
    """Sec. 3.3: the vector at shares f[N] of the arc from an image's, [1], to `direction` f32[E].

    The noise stays as it is.
    """
    noise = jnp.repeat(jnp.asarray(image.noise), len(shares), axis=0)
    return Bipartite(_arc(image.vector, direction[None], shares), noise)


def text_direction(before: Any, after: Any) -> jax.Array:
    """Sec. 3.3: √E norm(z_t - z_t0), by the vectors f32[E] of two captions."""
    return standardized(unit(jnp.asarray(after) - jnp.asarray(before)))


# ---- the decoder, without captions

_embedded_texts = jax.jit(embedded_texts, static_argnums=0)


def _denoiser(c: Config, trained: Any, frozen: Frozen, vector: jax.Array, g: Guidance) -> Denoise:
    """The decoder given vectors f32[N,E] and the empty caption, guided as the recipe says."""
    params = diffusion.transform_of(c).join(frozen.get("base"), trained)
    label, ids = jnp.zeros(len(vector), jnp.int32), tokens_of(c, [""] * len(vector))
    conditions = Conditions(label=label, vector=vector, context=ids)
    conditions, frozen = encoded_conditions(c, frozen, conditions, g.negative)
    return diffusion.denoiser(c, diffusion.apply_of(c), with_null(frozen, params), conditions, g)


@functools.partial(jax.jit, static_argnums=0)
def _inverted(c: Config, trained: Any, frozen: Frozen, images: jax.Array, g: Guidance) -> Bipartite:
    vector = embedded_images(c, frozen, images)
    x0 = images
    if c.latent:
        moments = autoencoder.encode_images(c, frozen["autoencoder"], images)
        x0 = autoencoder.normalized(c, moments.mean)
    denoise = _denoiser(c, trained, frozen, vector, g)
    clip = {"clip_x0": c.sample.clip_x0}
    return Bipartite(vector, ddim_invert(denoise, objective_of(c), times_of(c), x0, **clip))


@functools.partial(jax.jit, static_argnums=0)
def _decoded(
    c: Config, trained: Any, frozen: Frozen, image: Bipartite, each: jax.Array, g: Guidance
) -> jax.Array:
    denoise = _denoiser(c, trained, frozen, image.vector, g)
    noise = per_sample_noise(each, image.noise.shape[1:])
    options = {"clip_x0": c.sample.clip_x0, **options_of(c)}
    given = denoise, objective_of(c), times_of(c), image.noise, noise
    x0 = sampler_of(c).solve(*given, **options)
    x = autoencoder.decode_latents(c, frozen["autoencoder"], x0) if c.latent else x0
    return diffusion.to_uint8(x)


# ---- the pipeline


class Unclip(Text2Image):
    """unCLIP's decoder on a mesh: it draws prompts, and what it makes of images that are given.

    An image is a path, a PIL image or u8[H,W,C] of the recipe's size. The methods take DDIM's
    steps, of config.sample.steps, and `cfg_scale`, by default the recipe's.
    """

    def __init__(self, source: Source, config: Config | None = None) -> None:
        """As `Pipeline`. Raises UserError for a network that is given no vectors."""
        if not has_vectors(config or source.config):
            raise UserError(
                f"config.task is {source.config.task!r}, whose network is given no vector of an"
                " image: expected a run of task 'unclip'."
            )
        super().__init__(source, config)

    def invert(self, image: Pictures, *, cfg_scale: float | None = None) -> Bipartite:
        """The vector and the noise of an image, [1] each. Raises UserError."""
        c = self._of_ddim(0.0, cfg_scale)
        with precise(c):
            g = diffusion.guidance_of(c)
            pixels = normalize(_one_image(c, image))
            found: Bipartite = _inverted(c, self._params, self._frozen, pixels, g)
        return found

    def decode(
        self,
        image: Bipartite,
        *,
        eta: float = 0.0,
        seed: int | None = None,
        cfg_scale: float | None = None,
        record: Mapping[str, Any] = {},
    ) -> Output:
        """Draw the images of vectors and noise. Image i depends on (seed, i) if η > 0.

        Raises UserError.
        """
        c, seed = self._of_ddim(eta, cfg_scale), self.config.seed if seed is None else seed
        began, count = time.monotonic(), len(image.vector)
        stream = keys.stream(seed, keys.SAMPLE)
        each = jax.vmap(jax.random.fold_in, (None, 0))(stream, jnp.arange(count))
        with precise(c):
            g = diffusion.guidance_of(c)
            drawn = _decoded(c, self._params, self._frozen, image, each, g)
        array, null = np.asarray(drawn), c.data.num_classes
        pictures = [picture(tile(x[None], 1, gap=0)) for x in array]
        seconds = time.monotonic() - began
        found = self._record(c, [null], {"unclip": dict(record)}, seconds, None)
        return Output(pictures, array, np.full(count, null, np.int32), {**found, "seed": seed})

    def variations(self, image: Pictures, *, num: int = 4, eta: float = 1.0, **keys: Any) -> Output:
        """Sec. 3.1: images with the vector and the noise of one; η = 0 draws the image itself.

        `keys` are `seed` and `cfg_scale`. Raises UserError.
        """
        image = _one_image(self.config, image)
        one = self.invert(image, cfg_scale=keys.get("cfg_scale"))
        many = Bipartite(*(jnp.repeat(each, num, axis=0) for each in one))
        return self.decode(many, eta=eta, record=_said("variations", image), **keys)

    def interpolate(
        self, first: Pictures, second: Pictures, *, num: int = 8, **keys: Any
    ) -> Output:
        """Sec. 3.2: `num` images on the way from one to another, both included.

        `keys` are `eta`, `seed` and `cfg_scale`. Raises UserError.
        """
        ends = [_one_image(self.config, each) for each in (first, second)]
        one, other = (self.invert(each, cfg_scale=keys.get("cfg_scale")) for each in ends)
        said = _said("interpolation", *ends)
        between = interpolated(one, other, np.linspace(0, 1, num))
        return self.decode(between, record=said, **keys)

    def text_difference(
        self,
        image: Pictures,
        before: str,
        after: str,
        *,
        theta: float = 0.5,
        num: int = 8,
        **keys: Any,
    ) -> Output:
        """Sec. 3.3: an image, changed as one caption differs from another, by shares 0 to `theta`.

        In the paper theta is between 0.25 and 0.5. `keys` are `eta`, `seed` and `cfg_scale`. Raises
        UserError.
        """
        if not 0 <= theta <= 1:
            raise UserError(f"theta is {theta}: expected a share of the arc, from 0 to 1.")
        c, texts = self.config, checked_prompts([before, after])
        if texts[0] == texts[1]:
            raise UserError("both captions are the same: expected two that differ.")
        image = _one_image(c, image)
        own, other = _embedded_texts(c, self._frozen, tokens_of(c, texts))
        one = self.invert(image, cfg_scale=keys.get("cfg_scale"))
        moved = towards(one, text_direction(own, other), np.linspace(0, theta, num))
        said = {**_said("text difference", image), "texts": texts, "theta": theta}
        return self.decode(moved, record=said, **keys)

    def _of_ddim(self, eta: float, cfg_scale: float | None) -> Config:
        """The recipe with DDIM as its sampler; not of the seed, for which nothing compiles anew."""
        scale = {} if cfg_scale is None else {"cfg_scale": cfg_scale}
        return changed(self.config, {"sample": {"sampler": "ddim", "eta": eta, **scale}})


def _said(use: str, *images: np.ndarray) -> dict[str, Any]:
    return {"use": use, "images": [pixels_digest(each) for each in images]}


def _one_image(c: Config, image: Pictures) -> np.ndarray:
    """An image as u8[1,S,S,C]. Raises UserError for several, or another size."""
    pixels, side = read_images(c, image, "image"), c.data.image_size
    if pixels.shape[:3] != (1, side, side):
        N, H, W = pixels.shape[:3]
        raise UserError(
            f"{N} image(s) of {H}x{W}: expected one of {side}x{side}, the size of the network's."
        )
    return pixels
