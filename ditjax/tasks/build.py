"""From a recipe to what it names: networks, schedule, objective, optimizer, denoiser."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.diffusion import losses, samplers
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.guidance import guide, within
from ditjax.diffusion.schedule import Schedule, make_schedule, respace
from ditjax.models import kernels, mup
from ditjax.models.attention import attend
from ditjax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    Moments,
    kl_to_standard_normal,
    sample_posterior,
)
from ditjax.models.cost import Shape, gflops
from ditjax.models.dit import DiT
from ditjax.models.embed import ANYWHERE, Attend, Placement, drop_labels
from ditjax.models.sizes import parse_size
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.training.optim import learning_rate_schedule, make_optimizer, spike_limit
from ditjax.training.step import Batch, Draw, Limit, LossFn, Metrics, no_limit

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LOSSES = {
    "simple": losses.simple_loss,
    "vlb": losses.vlb_loss,
    "hybrid": losses.hybrid_loss,
}


def dit(c: Config, mesh: Mesh | None = None) -> DiT:
    """The denoiser of a recipe, on a mesh or one device; the parameters are the same."""
    size = parse_size(c.model.size)
    return DiT(
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        patch=c.model.patch,
        out_channels=cost(c).out_channels,
        num_classes=c.data.num_classes,
        null_label=c.model.label_dropout > 0,
        block=c.model.block,
        mlp_ratio=c.model.mlp_ratio,
        unroll=c.model.unroll,
        remat=c.model.remat,
        frequency_shift=c.model.frequency_shift,
        norm2_eps=c.model.norm2_eps,
        dtype=DTYPES[c.model.dtype],
        place=ANYWHERE if mesh is None else placement(c, mesh),
        base=base(c),
    )


def base(c: Config) -> mup.Base | None:
    """What a recipe's parametrization goes by; None for the standard one."""
    m = c.model
    return mup.Base(m.base_width, m.base_head_width) if m.parametrization == "mup" else None


def query_scale(c: Config) -> float:
    """What the denoiser multiplies its queries by, beyond 1 / √d."""
    size, relative = parse_size(c.model.size), base(c)
    return 1.0 if relative is None else mup.query_scale(relative, size.width // size.heads)


def placement(c: Config, mesh: Mesh) -> Placement:
    """Where a mesh wants the denoiser's activations.

    Raises UserError when the mesh does not divide its tokens or heads.
    """
    kernel = attention(c, mesh)
    if mesh.size == 1:
        return Placement(attend=kernel)
    tokens = (c.input_size // c.model.patch) ** 2
    extra = 2 if c.model.block == "in_context" else 0
    rules.check_tokens(tokens, extra, parse_size(c.model.size).heads, mesh)
    return Placement(
        rules.placement(mesh),
        merge_rows=mesh.shape["context"] == 1,
        merge_columns=mesh.shape["tensor"] == 1,
        attend=kernel,
    )


def attention(c: Config, mesh: Mesh) -> Attend | None:
    """The kernel of a recipe's attention on a mesh's devices; None is the plain form.

    A mesh may be of devices that are only described, on a machine with others. Raises UserError
    when they do not have what the recipe names.
    """
    size = parse_size(c.model.size)
    patches = (c.input_size // c.model.patch) ** 2
    kernel = kernels.choose(
        c.model.attention,
        mesh.devices.flat[0],
        tokens=patches + 2 if c.model.block == "in_context" else patches,
        head_width=size.width // size.heads,
        dtype=DTYPES[c.model.dtype],
    )
    return None if kernel is attend else rules.by_heads(kernel, mesh)


def cost(c: Config) -> Shape:
    """What the closed forms of `models/cost.py` need of the denoiser."""
    learned = c.diffusion.variance == "learned_range"
    return Shape(
        size=parse_size(c.model.size),
        patch=c.model.patch,
        input_size=c.input_size,
        in_channels=c.input_channels,
        out_channels=c.input_channels * (2 if learned else 1),
        num_classes=c.data.num_classes,
        null_label=c.model.label_dropout > 0,
        block=c.model.block,
        mlp_ratio=c.model.mlp_ratio,
    )


def autoencoder(c: Config) -> AutoencoderKL:
    """The KL autoencoder of a recipe."""
    return AutoencoderKL(
        AutoencoderConfig(
            base_width=c.autoencoder.base_width,
            multipliers=c.autoencoder.multipliers,
            res_blocks=c.autoencoder.res_blocks,
            latent_channels=c.autoencoder.latent_channels,
            image_channels=c.data.channels,
            groups=c.autoencoder.groups,
        ),
        dtype=DTYPES[c.model.dtype],
    )


def mesh(c: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of a run, all there are unless given, as the recipe's grid."""
    m = c.mesh
    return make_mesh(m.data, m.fsdp, devices, tensor=m.tensor, context=m.context, slices=m.slices)


def schedule(c: Config) -> Schedule:
    """The full training schedule of a recipe."""
    return make_schedule(c.diffusion.schedule, c.diffusion.timesteps)


def check(c: Config) -> None:
    """What `config.read` cannot know: whether the schedule can be respaced to the sampling steps.

    Raises UserError; compiles nothing, so that no run finds out at its first sample grid.
    """
    if c.train.network == "dit":
        sampling_schedule(c)


def optimizer(c: Config) -> optax.GradientTransformation:
    """The optax chain of a recipe."""
    o, relative = c.optim, base(c) if c.train.network == "dit" else None
    rate = learning_rate_schedule(o.learning_rate, o.schedule, o.warmup_steps, c.train.steps)
    return make_optimizer(
        rate,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        spike_factor=o.spike_factor,
        scale=None if relative is None else _scale(parse_size(c.model.size).width / relative.width),
    )


def _scale(ratio: float) -> Callable[[Any], Any]:
    """Updates by the table of `models/mup.py`, of a network `ratio` times as wide as its base."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        multiplier = mup.rate_multiplier(rules.path_of(path), ratio)
        return update if multiplier == 1 else update * multiplier

    return functools.partial(jax.tree_util.tree_map_with_path, one)


def limit(c: Config) -> Limit:
    """The largest gradient of a recipe's updates, by the optimizer's state."""
    factor = c.optim.spike_factor
    return functools.partial(spike_limit, factor=factor) if factor else no_limit


class Trainee(NamedTuple):
    """A network in training: `init(key) -> params`, what a step draws, and the loss of that.

    Batches are of x0 and labels.
    """

    init: Callable[[jax.Array], Any]
    draw: Draw
    loss: LossFn


def trainee(c: Config, mesh: Mesh | None = None) -> Trainee:
    """The network that the recipe trains, with its objective, on a mesh or one device."""
    if c.train.network == "dit":
        return _dit_trainee(c, mesh)
    if mesh is not None:
        rules.check_data_only(mesh, "the autoencoder")
    return _autoencoder_trainee(c)


def _dit_trainee(c: Config, mesh: Mesh | None) -> Trainee:
    # One row is no batch that a mesh divides: parameters are made without it.
    model, process = dit(c), schedule(c)
    apply: Callable[..., Any] = dit(c, mesh).apply
    x = jnp.zeros((1, c.input_size, c.input_size, c.input_channels))
    labels = jnp.zeros((1,), jnp.int32)

    def draw(batch: Batch, key: jax.Array) -> Batch:
        """t ~ U, eps ~ N(0, I), and the labels that are dropped."""
        key_t, key_eps, key_drop = jax.random.split(key, 3)
        x0, label = batch["x0"], batch["label"]
        return {
            "x0": x0,
            "t": losses.sample_timesteps(key_t, len(x0), len(process)),
            "eps": jax.random.normal(key_eps, x0.shape, jnp.float32),
            "y": drop_labels(key_drop, label, c.model.label_dropout, c.data.num_classes),
        }

    def loss(params: Any, drawn: Batch) -> tuple[jax.Array, Metrics]:
        """The mean over the batch of the recipe's objective."""
        parts = LOSSES[c.diffusion.loss](
            lambda x_t, t: apply(params, x_t, t, drawn["y"]),
            process,
            drawn["x0"],
            drawn["t"],
            drawn["eps"],
            prediction=c.diffusion.prediction,
            variance=c.diffusion.variance,
        )
        means = {name: value.mean() for name, value in parts.items()}
        return means["loss"], means

    return Trainee(lambda key: model.init(key, x, labels, labels), draw, loss)


def _autoencoder_trainee(c: Config) -> Trainee:
    model = autoencoder(c)
    apply: Callable[..., Any] = model.apply
    side = c.data.image_size
    x = jnp.zeros((1, side, side, c.data.channels))

    def draw(batch: Batch, key: jax.Array) -> Batch:
        """The noise of z ~ q(z|x), of the moments' shape."""
        x0, f = batch["x0"], model.config.downsample
        shape = (len(x0), x0.shape[1] // f, x0.shape[2] // f, model.config.latent_channels)
        return {"x0": x0, "eps": jax.random.normal(key, shape, jnp.float32)}

    def loss(params: Any, drawn: Batch) -> tuple[jax.Array, Metrics]:
        """LDM App. G without its adversary: mean (x - x̂)² + kl_weight · KL(q(z|x) || N(0, I)).

        The KL is per latent value, so that its weight means the same at any size.
        """
        moments = apply(params, drawn["x0"], method="encode")
        z = sample_posterior(moments, drawn["eps"])
        mse = jnp.square(apply(params, z, method="decode") - drawn["x0"]).mean()
        kl = kl_to_standard_normal(moments).mean() / moments.mean[0].size
        # Images span [-1, 1]: the peak is 2.
        psnr = 10 * jnp.log10(4 / mse)
        return mse + c.autoencoder.kl_weight * kl, {"mse": mse, "kl": kl, "psnr_db": psnr}

    return Trainee(lambda key: model.init(key, x, key), draw, loss)


def encode(c: Config, params: Any, images: jax.Array) -> Moments:
    """The posterior q(z|x) of images f32[B,H,W,C] in [-1,1]."""
    apply: Callable[..., Any] = autoencoder(c).apply
    return apply(params, images, method="encode")


def draw_latents(c: Config, moments: Moments, key: jax.Array) -> jax.Array:
    """z ~ q(z|x), scaled to about unit variance: what the denoiser is trained on."""
    eps = jax.random.normal(key, moments.mean.shape, jnp.float32)
    return sample_posterior(moments, eps) * c.autoencoder.scale


def decode(c: Config, params: Any, latents: jax.Array) -> jax.Array:
    """Scaled latents f32[B,h,w,c] -> images f32[B,H,W,C], about [-1, 1]."""
    apply: Callable[..., Any] = autoencoder(c).apply
    return apply(params, latents / c.autoencoder.scale, method="decode")


def reconstruct(c: Config, params: Any, images: jax.Array) -> jax.Array:
    """decode(mean of q(z|x)): what an autoencoder makes of images f32[B,H,W,C]."""
    apply: Callable[..., Any] = autoencoder(c).apply
    return apply(params, encode(c, params, images).mean, method="decode")


# (params, autoencoder's, keys key[B], images f32[B,H,W,C], labels i32[B], t i32[B]) -> f32[B] each
PairLosses = Callable[[Any, Any, jax.Array, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]


def pair_losses(c: Config, mesh: Mesh | None = None) -> PairLosses:
    """DDPM Eq. 14 of each (image, t, eps), labels never dropped -> mse; vlb too where Σ is learned.

    `hybrid_loss`'s parts, whatever the recipe is trained on. Noise b is from keys[b] alone, in any
    batch: eps, and of a latent recipe also that of z ~ q(z|x).
    """
    apply: Callable[..., Any] = dit(c, mesh).apply
    process = schedule(c)
    shape = (c.input_size, c.input_size, c.input_channels)
    loss = losses.hybrid_loss if c.diffusion.variance == "learned_range" else losses.simple_loss

    def measure(
        params: Any,
        frozen: Any,
        keys: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        t: jax.Array,
    ) -> dict[str, jax.Array]:
        x0 = images
        if c.latent:
            noise = samplers.per_sample_noise(keys, shape)(jnp.int32(0))
            x0 = sample_posterior(encode(c, frozen, images), noise) * c.autoencoder.scale
        found = loss(
            lambda x_t, t: apply(params, x_t, t, labels),
            process,
            x0,
            t,
            samplers.initial_noise(keys, shape),
            prediction=c.diffusion.prediction,
            variance=c.diffusion.variance,
        )
        return {name: found[name] for name in ("mse", "vlb") if name in found}

    return measure


class Guidance(NamedTuple):
    """Arguments of guidance, f32[] each: its scale, and the timesteps low <= t < high of it."""

    scale: jax.Array | np.float32
    low: jax.Array | np.float32
    high: jax.Array | np.float32


def guidance_of(c: Config) -> Guidance:
    """A recipe's guidance, for a sampler that was made for its `guided`."""
    # Rounded first: 0.3 * 1000 must be timestep 300 and not the one after.
    low, high = (
        math.ceil(round(share * c.diffusion.timesteps, 6)) for share in c.sample.cfg_interval
    )
    return Guidance(np.float32(c.sample.cfg_scale), np.float32(low), np.float32(high))


def guided(c: Config) -> Literal["never", "always", "within"]:
    """When a recipe's sampler evaluates the unconditional half: what it is compiled for."""
    if c.sample.cfg_scale == 1:
        return "never"
    return "always" if c.sample.cfg_interval == (0.0, 1.0) else "within"


def denoiser(c: Config, model: DiT, params: Any, labels: jax.Array, g: Guidance) -> Denoise:
    """The network with parameters and labels closed over, guided as the recipe says.

    labels i32[B]. Guidance evaluates both halves as one doubled batch.
    """
    apply: Callable[..., Any] = model.apply

    def conditional(x: jax.Array, t: jax.Array) -> jax.Array:
        return apply(params, x, t, labels)

    if guided(c) == "never":
        return conditional
    null = jnp.full_like(labels, c.data.num_classes)

    def pair(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        twice = functools.partial(jnp.tile, reps=2)
        both = apply(
            params,
            jnp.concatenate([x, x]),
            twice(t),
            jnp.concatenate([labels, null]),
        )
        conditional, unconditional = jnp.split(both, 2)
        return conditional, unconditional

    always = guide(pair, g.scale, channels=c.sample.cfg_channels, x_channels=c.input_channels)
    return always if guided(c) == "always" else within(always, conditional, g.low, g.high)


def sampling_schedule(c: Config) -> Schedule:
    """The schedule respaced to the recipe's sampling steps."""
    return respace(schedule(c), c.sample.steps)


def sampling_gflops(c: Config) -> float:
    """Multiply-accumulates / 1e9 of the DiT for one sample: its forward pass, twice when guided.

    The decoder's are not counted, as in the paper's figure 10.
    """
    t, g = sampling_schedule(c).timesteps, guidance_of(c)
    twice = 0 if guided(c) == "never" else int(((g.low <= t) & (t < g.high)).sum())
    return gflops(cost(c)) * (len(t) + twice)


def sampler(
    c: Config, mesh: Mesh | None = None
) -> Callable[[Any, jax.Array, jax.Array, Guidance], jax.Array]:
    """(params, keys key[B], labels i32[B], guidance) -> x0 f32[B,h,w,c], on a mesh or one device.

    Sample b depends on (keys[b], labels[b]) alone, whatever the batch it is drawn in.
    """
    process, model = sampling_schedule(c), dit(c, mesh)
    shape = (c.input_size, c.input_size, c.input_channels)
    prediction, variance = c.diffusion.prediction, c.diffusion.variance

    def sample(params: Any, keys: jax.Array, labels: jax.Array, guidance: Guidance) -> jax.Array:
        denoise = denoiser(c, model, params, labels, guidance)
        x_T = samplers.initial_noise(keys, shape)
        noise = samplers.per_sample_noise(keys, shape)
        if c.sample.sampler == "ddpm":
            return samplers.ddpm(
                denoise,
                process,
                x_T,
                noise,
                prediction=prediction,
                variance=variance,
                clip_x0=c.sample.clip_x0,
            )
        return samplers.ddim(
            denoise,
            process,
            x_T,
            noise,
            eta=c.sample.eta,
            prediction=prediction,
            clip_x0=c.sample.clip_x0,
        )

    return sample
