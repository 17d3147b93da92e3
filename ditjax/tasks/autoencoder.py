"""The KL autoencoder of latent diffusion: its training, and its use, frozen, by other tasks."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ditjax.config import Autoencoder, Config, network_module
from ditjax.data.names import is_latents
from ditjax.errors import UserError
from ditjax.models import autoencoder as network
from ditjax.models.autoencoder import (
    AutoencoderKL,
    Moments,
    kl_to_standard_normal,
    sample_posterior,
)
from ditjax.parallel import rules
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import Definition, Frozen, Task, ValidationScore, check_draws_nothing
from ditjax.weights import networks, reading


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task that trains an autoencoder; its mesh may only split the data."""
    if mesh is not None:
        rules.check_data_only(mesh, "the autoencoder")
    module = network_module(c.model.kind).NETWORK.module(c.model, c.autoencoder, c.data.channels)
    apply: Callable[..., Any] = module.apply
    inputs = image_inputs(c)

    def draw(batch: Batch, key: jax.Array) -> Batch:
        """Draw the noise of z ~ q(z|x), in the moments' shape."""
        x0, f = batch["x0"], module.config.downsample
        shape = (len(x0), x0.shape[1] // f, x0.shape[2] // f, module.config.latent_channels)
        return {"x0": x0, "eps": jax.random.normal(key, shape, jnp.float32)}

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        """LDM App. G without the adversarial loss: mean (x - x̂)² + kl_weight · KL(q(z|x)||N(0, I)).

        The KL is averaged over latent values, so that its weight does not depend on the size.
        """
        moments = apply(params, drawn["x0"], method="encode")
        z = sample_posterior(moments, drawn["eps"])
        mse = jnp.square(apply(params, z, method="decode") - drawn["x0"]).mean()
        kl = kl_to_standard_normal(moments).mean() / moments.mean[0].size
        psnr = psnr_db(mse)
        return mse + c.autoencoder.kl_weight * kl, {"mse": mse, "kl": kl, "psnr_db": psnr}

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """10 log10(2² / mse) dB of each image, decoded from the posterior mean and clipped."""
        x = batch["image"]
        decoded = apply(params, apply(params, x, method="encode").mean, method="decode")
        mse = jnp.square(jnp.clip(decoded, -1, 1) - x).mean(axis=(1, 2, 3))
        return {"psnr_db": psnr_db(mse), "images": decoded}

    return Task(
        name=f"KL autoencoder (f={module.config.downsample})",
        inputs=inputs,
        init=lambda key: module.init(key, jnp.zeros((1, *inputs["x0"].shape)), key),
        prepare=lambda frozen, batch, key: {"x0": batch["image"], "label": batch["label"]},
        draw=draw,
        loss=loss,
        scores=(
            ValidationScore(
                measure,
                names={"psnr_db": "psnr_db"},
                protocol={
                    "metric": "PSNR",
                    "split": c.evaluate.split,
                    "image_size": c.data.image_size,
                },
                images="images",
            ),
        ),
    )


def image_inputs(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One example of a task that reconstructs images."""
    side = c.data.image_size
    return {
        "x0": jax.ShapeDtypeStruct((side, side, c.data.channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
    }


def psnr_db(mse: jax.Array) -> jax.Array:
    """10 log10(2² / mse): images span [-1, 1], so that the peak is 2."""
    return 10 * jnp.log10(4 / mse)


def check_reconstructs(c: Config) -> None:
    """Raise UserError for data or settings that a task which reconstructs images lacks."""
    if is_latents(c.data.name):
        raise UserError(
            f"config.data.name is {c.data.name!r}, encoded latents, and the recipe trains an"
            " autoencoder: name a data set of images."
        )
    check_draws_nothing(c)


TASK = Definition(
    make=make,
    network="autoencoder",
    sections={"autoencoder": Autoencoder},
    check=check_reconstructs,
)


# ---- the frozen autoencoder of other tasks


def _frozen_module(c: Config) -> AutoencoderKL:
    return network.module(c.model, c.autoencoder, c.data.channels)


def encode_images(c: Config, params: Any, images: jax.Array) -> Moments:
    """The posterior q(z|x) of images f32[B,H,W,C] in [-1, 1], or of every frame of clips."""
    apply: Callable[..., Any] = _frozen_module(c).apply
    moments: Moments = apply(params, frames_of(images), method="encode")
    lead = images.shape[:-3]
    return Moments(*(x.reshape(*lead, *x.shape[-3:]) for x in moments))


def frames_of(x: jax.Array) -> jax.Array:
    """All images of f32[B,..,H,W,C], such as the frames of clips, in one batch."""
    return x.reshape(-1, *x.shape[-3:])


def draw_latents(c: Config, moments: Moments, key: jax.Array) -> jax.Array:
    """Draw z ~ q(z|x), normalised, for the training of a denoiser."""
    eps = jax.random.normal(key, moments.mean.shape, jnp.float32)
    return normalized(c, sample_posterior(moments, eps))


def normalized(c: Config, z: jax.Array) -> jax.Array:
    """z f32[...,c] at about mean 0 and variance 1, by the statistics of the recipe.

    As in diffusers: (z - shift) * scale, or (z - mean) * scale / std of each channel.
    """
    a = c.autoencoder
    if a.latent_mean:
        z = (z - _channels(a.latent_mean, z)) / _channels(a.latent_std, z)
    if a.shift:
        z = z - a.shift
    return z * a.scale


def denormalized(c: Config, z: jax.Array) -> jax.Array:
    """The inverse of `normalized`."""
    a = c.autoencoder
    z = z / a.scale
    if a.shift:
        z = z + a.shift
    if a.latent_mean:
        z = z * _channels(a.latent_std, z) + _channels(a.latent_mean, z)
    return z


def _channels(values: tuple[float, ...], z: jax.Array) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))


def decode_latents(c: Config, params: Any, z: jax.Array) -> jax.Array:
    """Decode normalised latents f32[B,..,h,w,c] to f32[B,..,H,W,C], approximately in [-1, 1]."""
    apply: Callable[..., Any] = _frozen_module(c).apply
    images: jax.Array = apply(params, frames_of(denormalized(c, z)), method="decode")
    return images.reshape(*z.shape[:-3], *images.shape[-3:])


_ARCHITECTURE = (
    *("base_width", "multipliers", "res_blocks", "latent_channels", "groups"),
    *("quant_conv", "post_quant_conv"),
)


def load_frozen(c: Config, mesh: Mesh) -> Any:
    """Load the autoencoder at config.autoencoder.path: a run's directory, or published weights.

    Raises UserError if its architecture or the statistics of its latents differ from the recipe's.
    """
    path = c.autoencoder.path
    if not path:
        raise UserError(
            "config.autoencoder.path is '': a latent recipe needs the directory of a run that"
            " trained an autoencoder, or a file of weights (docs/weights.md)."
        )
    published = None
    if not rundir.is_run(path):
        published = reading.load_autoencoder(path)
        if is_primary():
            print("\n".join(published.notes), file=sys.stderr, flush=True)
    trained = published.config if published else opening.recipe_of(path)
    theirs = getattr(trained, "autoencoder", None)
    if theirs is None or theirs.FROZEN:
        what = "holds" if published else "is a run of"
        raise UserError(
            f"config.autoencoder.path={path} {what} another network (task {trained.task!r}):"
            " expected an autoencoder."
        )
    for field in _ARCHITECTURE:
        value, ours = getattr(theirs, field), getattr(c.autoencoder, field)
        if value != ours:
            raise UserError(
                f"config.autoencoder.{field} is {ours}, and the autoencoder at {path} was trained"
                f" with {value}."
            )
    if trained.data.channels != c.data.channels:
        raise UserError(
            f"config.data.channels is {c.data.channels}, and the autoencoder at {path} was trained"
            f" on {trained.data.channels}."
        )
    if published:
        networks.check_statistics(
            path, published, c.autoencoder, "; set config.autoencoder.{key} to that"
        )
        return opening.put_on_mesh(networks.as_float32(published), mesh)
    # The averaged weights, whatever config.sample.weights is.
    return opening.load_weights(trained, make(trained), path, mesh)[0]


def frozen_shapes(c: Config) -> Any:
    """The parameters of a latent recipe's autoencoder as shapes."""
    module, side = _frozen_module(c), c.data.image_size
    image = jax.ShapeDtypeStruct((1, side, side, c.data.channels), jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, jax.random.key(0)), image)
