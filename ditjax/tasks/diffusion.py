"""Class-conditional diffusion of images or latents: the paper's task."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, FrozenAutoencoder, Sample, network_module, replaced
from ditjax.data.names import is_latents
from ditjax.diffusion import losses, samplers
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.guidance import within
from ditjax.diffusion.likelihood import density_bits_per_dim, log_density
from ditjax.diffusion.meanflow import null_weight
from ditjax.diffusion.times import stratified_times
from ditjax.diffusion.weighting import UNCERTAINTY_FEATURES, uncertain, uncertainty_features
from ditjax.errors import UserError
from ditjax.models import kernels
from ditjax.models.attention import attend
from ditjax.models.autoencoder import Moments, sample_posterior
from ditjax.models.embed import ANYWHERE, Placement, drop_labels
from ditjax.models.frozen import LM
from ditjax.models.network import DTYPES, Conditions, Inputs, Network, NetworkCost
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import (
    adapting,
    alignment,
    autoencoder,
    control,
    editing,
    given,
    image_vectors,
    language,
    nowcast,
    rewards,
    text_conditions,
)
from ditjax.tasks.guide import guide_recipe, load_guide
from ditjax.tasks.objective import (
    Diffusion,
    check_sampling,
    guided_denoiser,
    loss_options,
    objective_of,
    options_of,
    process_of,
    protocol_of,
    sampler_of,
    time_draw,
    times_of,
    training_loss,
    validation_target,
)
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import (
    IDENTITY,
    Additions,
    Definition,
    FromRecords,
    Frozen,
    Guidance,
    Inside,
    Sampling,
    Start,
    Task,
    Transform,
    ValidationScore,
)

GIVEN = "conditions"  # of a drawn batch: fields of `Conditions` beside the label
_OF_TEXTS = (text_conditions.ENCODER, text_conditions.NULL)
_OF_VECTORS = (image_vectors.IMAGE_CLIP,)

# ---- the network of a recipe


def network_of(c: Config) -> Network:
    """The network of a recipe, by config.model.kind."""
    network: Network = network_module(c.model.kind).NETWORK
    return network


def inputs_of(c: Config) -> Inputs:
    """What the network of a recipe is built for; sizes of layers in it are read from their file."""
    return inputs_without_files(c)._replace(language=language.language_of(c))


def inputs_without_files(c: Config) -> Inputs:
    """The shape of the network's input, and the number of its output channels."""
    learned = c.diffusion.variance in ("learned_range", "unused")
    channels = c.input_channels
    return Inputs(
        shape=nowcast.future_shape(c) if nowcast.is_nowcast(c) else c.input_shape,
        out_channels=channels * (2 if learned else 1),
        num_classes=c.data.num_classes,
        interval=training_loss(c.diffusion).interval,
        given=given.extra_channels(c),
        level=given.has_level(c),
        context=text_conditions.context_of(c),
        vector=image_vectors.vector_width(c),
        past=c.given.past,
    )


def placement(c: Config, mesh: Mesh) -> Placement:
    """The placement of the network's activations on a mesh, of real or described devices.

    Raises UserError if the mesh does not divide the tokens or heads, or if the devices do not
    support the attention kernel of the recipe.
    """
    split = network_of(c).attention(c.model, inputs_of(c))
    if split is None:
        rules.check_whole(mesh, f"config.model.kind={c.model.kind}")
        return ANYWHERE
    kernel = kernels.choose(
        network_of(c).kernel(c.model),
        mesh.devices.flat[0],
        tokens=split.tokens + split.extra,
        head_width=split.head_width,
        dtype=DTYPES[c.model.dtype],
    )
    chosen = None if kernel is attend else rules.by_heads(kernel, mesh)
    # With 'dots' the product is kept for the gradient, and heads of 72 take the memory of 128.
    first = kernel is kernels.flash and getattr(c.model, "remat", "none") != "dots"
    if mesh.size == 1:
        return Placement(attend=chosen, heads_first=first)
    if split.whole:
        rules.check_whole_tokens(mesh)
    rules.check_tokens(split.tokens, split.extra, split.heads, mesh, split.frames)
    return Placement(
        rules.activation_placement(mesh),
        merge_rows=mesh.shape["context"] == 1,
        merge_columns=mesh.shape["tensor"] == 1,
        heads_first=first,
        attend=chosen,
    )


def denoiser_module(c: Config, mesh: Mesh | None = None) -> Any:
    """Build the network of a recipe for a mesh or one device; the parameters are the same."""
    place = ANYWHERE if mesh is None else placement(c, mesh)
    return network_of(c).module(c.model, inputs_of(c), place)


def with_conditions(apply: Callable[..., Any], conditions: Conditions) -> Callable[..., jax.Array]:
    """Build denoise(x, t), or (x, t, h) of a network of two times (`Conditions.interval`)."""

    def denoise(x: jax.Array, t: jax.Array, h: jax.Array | None = None) -> jax.Array:
        out: jax.Array = apply(x, t, conditions if h is None else conditions._replace(interval=h))
        return out

    return denoise


def transform_of(c: Config) -> Transform:
    """What a recipe trains of its network."""
    network, inputs = network_of(c), inputs_of(c)
    return adapting.adapter_of(c, network, lambda: control.branch_shapes(c, network, inputs))


def apply_of(
    c: Config, mesh: Mesh | None = None, recipes: Sequence[Config] = ()
) -> Callable[..., Any]:
    """The function of a recipe's network: (variables, x, t, conditions) -> prediction.

    With a control it is that of the network and its branches, by default its own alone; with texts
    the variables hold the null text, too (`text_conditions.with_null_text`).
    """
    module = denoiser_module(c, mesh)
    if text_conditions.has_texts(c):
        return text_conditions.with_null_text(c, module.apply)
    if not control.is_controlled(c):
        apply: Callable[..., Any] = module.apply
        return apply
    place = ANYWHERE if mesh is None else placement(c, mesh)
    return control.with_branches(c, network_of(c), inputs_of(c), module, place, recipes or (c,))


# ---- the task


def cost_with_loss(c: Config) -> NetworkCost | None:
    """The cost of a recipe's network and its control, with what its loss adds to a step."""
    network, inputs = network_of(c), inputs_of(c)
    if network.cost is None:
        return None
    cost = network.cost(c.model, inputs)
    if c.diffusion.uncertainty:
        cost = cost._replace(parameters=cost.parameters + UNCERTAINTY_FEATURES)
    if control.is_controlled(c):
        cost = control.with_cost(c, network, inputs, cost)
    if rewards.is_rewarded(c):
        drawn = sampling(c)
        assert drawn.timesteps is not None  # `rewards.check_reward`
        return rewards.with_reward_cost(c, cost, len(drawn.timesteps) + drawn.guided)
    evaluations = training_loss(c.diffusion).evaluations(**loss_options(c.diffusion))
    return cost._replace(passes=cost.passes + evaluations)


# Of the parameters: what a loss is divided by, which the network never reads.
UNCERTAINTY = "uncertainty"


def _rates(c: Config) -> Callable[[str], float] | None:
    """The learning-rate multipliers of the network's parameters; that of its uncertainty is 1."""
    of = network_of(c).rates(c.model)
    if of is None:
        return None
    return lambda path: 1.0 if path.partition("/")[0] == UNCERTAINTY else of(path)


def _check_uncertainty(c: Config) -> None:
    """Raise UserError for a loss that cannot be divided by its uncertainty."""
    if not c.diffusion.uncertainty:
        return
    for name, value, wanted in (
        ("adapt.kind", c.adapt.kind, "full"),
        ("adapt.base", c.adapt.base, ""),
        ("align.teacher", c.align.teacher, "none"),
        ("reward.method", c.reward.method, "none"),
    ):
        if value != wanted:
            raise UserError(
                f"config.diffusion.uncertainty with config.{name} {value!r}: it is learned with a"
                f" whole network from its start; expected {wanted!r}."
            )


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the class-conditional diffusion task of a recipe, for a mesh or one device."""
    task = _on_images(c, mesh)
    return rewards.rewarded(c, task, policy_of(c, mesh)) if rewards.is_rewarded(c) else task


def _on_images(c: Config, mesh: Mesh | None) -> Task:
    """The task that is trained on the images of its data set."""
    network, inputs, init = network_of(c), inputs_of(c), _initialiser(c)

    def start(mesh: Mesh) -> Start:
        return adapting.start_of(c, network, inputs_of, init, mesh)

    def frozen(mesh: Mesh) -> Frozen:
        return _load_frozen(c, mesh) | ({"base": start(mesh).params} if adapted else {})

    transform = transform_of(c)
    adapted = transform is not IDENTITY
    images = c.latent and not is_latents(c.data.name)
    build = functools.partial(denoiser_module, mesh=mesh)
    align = alignment.alignment_of(c, network, inputs, objective_of(c), build)
    pixels, texts = _pixels(c), text_conditions.text_inputs(c)
    example = nowcast.example_maker(c, build) if nowcast.is_nowcast(c) else None

    def prepare(frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        """Turn images or moments into x0, and add what the loss is aligned to, or control needs."""
        found = {"label": batch["label"], **(align.prepare(batch) if align else {})}
        found |= {name: batch[name] for name in pixels if name in batch}
        found |= text_conditions.prepare_texts(c, frozen, batch, mesh)
        if example:
            made = example(frozen, batch["image"])
            return {"x0": made.x0, "channels": made.channels, **found}
        return {"x0": _example(c, frozen, batch, key), **found}

    cost = cost_with_loss(c)
    return Task(
        name=cost.name if cost else c.model.kind,
        inputs={
            "x0": jax.ShapeDtypeStruct(inputs.shape, jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
            **(align.inputs if align else {}),
            **pixels,
            **texts,
        },
        init=init,
        prepare=prepare,
        draw=functools.partial(draw, c, time_draw(c.diffusion)),
        loss=make_loss(c, mesh, align),
        frozen=frozen,
        planned=functools.partial(_planned, c),
        spread=(text_conditions.ENCODER,),
        reads=("autoencoder",) * images + ("base",) * adapted + _read_beside(c),
        open_rows=functools.partial(_additions, c),
        shapes=lambda: {**language.language_shapes(c), **text_conditions.text_shapes(c)},
        averages=c.align.teacher == "self",
        transform=transform,
        start=start if c.adapt.base else None,
        rules=network.rules,
        rates=_rates(c),
        cost=cost,
        sampling=sampling(c, mesh),
        scores=(validation(c, mesh), *([density(c, mesh)] if c.evaluate.bpd_num else [])),
        inside=inside_of(c, mesh),
    )


def _load_frozen(c: Config, mesh: Mesh) -> Frozen:
    """The frozen weights of a recipe on the mesh, but for the base of a transform."""
    found = {"autoencoder": autoencoder.load_frozen(c, mesh)} if c.latent else {}
    for load in _LOADS:
        found |= load(c, mesh)
    return found


_LOADS: Sequence[Callable[[Config, Mesh], Frozen]] = (
    control.load_controls,
    language.load_language,
    nowcast.load_first,
    load_guide,
    text_conditions.load_texts,
)


def _planned(c: Config) -> Frozen:
    """The frozen weights as shapes. Those of an autoencoder need no file; the others are read."""
    found = {"autoencoder": autoencoder.frozen_shapes(c)} if c.latent else {}
    for load in _LOADS:
        found |= jax.eval_shape(lambda x: x, load(c, make_mesh(-1, 1)))
    return found


def _read_beside(c: Config) -> tuple[str, ...]:
    """The frozen weights that training reads beside an autoencoder and a base."""
    spec = language.language_of(c)
    texts = tuple(text_conditions.text_inputs(c) and _OF_TEXTS)
    texts += _OF_VECTORS * image_vectors.has_vectors(c)
    return texts + (LM,) * bool(spec and spec.frozen) + (nowcast.FIRST,) * bool(c.given.first)


def _initialiser(c: Config) -> Callable[[jax.Array], Any]:
    """The initial parameters of a recipe's network by a key."""
    # Without the mesh, which could not divide the batch of one that initialises the parameters.
    model, inputs = denoiser_module(c), inputs_of(c)

    def init(key: jax.Array) -> Any:
        x, label = jnp.zeros((1, *inputs.shape)), jnp.zeros((1,), jnp.int32)
        conditions = Conditions(label=label)
        if inputs.context.tokens:
            conditions = text_conditions.example_conditions(inputs)
        if inputs.given:
            frames = (inputs.past + inputs.shape[0],) if inputs.past else inputs.shape[:-3]
            channels = jnp.zeros((1, *frames, *inputs.shape[-3:-1], inputs.given))
            conditions = conditions._replace(
                channels=channels, level=label if inputs.level else None
            )
        found = model.init(key, x, label, conditions)
        if not c.diffusion.uncertainty:
            return found
        learned = {"kernel": jnp.zeros(UNCERTAINTY_FEATURES, jnp.float32)}
        return {**found, "params": {**found["params"], UNCERTAINTY: learned}}

    return language.with_initial(c, init)


def _example(c: Config, frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
    """x0 of a batch of images, or of the moments of latents."""
    if "mean" in batch:
        moments = Moments(batch["mean"], batch["log_variance"])
    elif c.latent:
        moments = autoencoder.encode_images(c, frozen["autoencoder"], batch["image"])
    else:
        return batch["image"]
    return autoencoder.draw_latents(c, moments, key)


def _additions(c: Config) -> Additions:
    """What training adds to the rows that it reads."""
    return text_conditions.cached_texts(c, alignment.open_features(c, network_of(c), inputs_of(c)))


def _pixels(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """What an example has beside x0 and its label: arrays of one.

    The images that control maps are made of, where x0 are their latents; channels of the past.
    """
    if nowcast.is_nowcast(c):
        every = (*c.input_shape[:-1], given.extra_channels(c))
        return {"channels": jax.ShapeDtypeStruct(every, jnp.float32)}
    side = c.data.image_size
    shape = jax.ShapeDtypeStruct((side, side, c.data.channels), jnp.float32)
    return {"image": shape} if c.latent and control.is_controlled(c) else {}


def draw(
    c: Config, times: Callable[[jax.Array, int], Batch], batch: Batch, key: jax.Array
) -> Batch:
    """Draw times and eps ~ N(0, I), and drop labels at random; make what the network is given."""
    key_t, key_eps, key_drop = jax.random.split(key, 3)
    x0, label = batch["x0"], batch["label"]
    made, found = _conditions_of_images(c), dict[str, Any]()
    if made is not None:
        # Of a fourth key, so that what the other three draw is as without.
        each = jax.random.split(jax.random.fold_in(key, 3), len(x0))
        found = {GIVEN: made(batch.get("image", x0), each)}
    if nowcast.is_nowcast(c):
        found = {GIVEN: {"channels": batch["channels"]}}
    dropout = c.control.drop if control.is_controlled(c) else c.model.label_dropout
    return {
        **{n: value for n, value in batch.items() if n not in ("label", "image", "channels")},
        **times(key_t, len(x0)),
        "eps": jax.random.normal(key_eps, x0.shape, jnp.float32),
        "y": drop_labels(key_drop, label, dropout, c.data.num_classes),
        **image_vectors.drop_vectors(c, batch, key),
        **found,
    }


def _conditions_of_images(
    c: Config,
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None:
    """The fields of `Conditions` that a network is given of (images, keys), or None.

    Those of a control are of pixels, others of what the network is trained to draw.
    """
    if not control.is_controlled(c):
        return given.in_training(c)
    maps = control.maps_of((c,))
    return lambda images, keys: {"channels": maps(images, keys)}


def make_loss(
    c: Config, mesh: Mesh | None, align: alignment.Alignment | None = None
) -> Callable[[Any, Frozen, Batch], tuple[jax.Array, Metrics]]:
    """Build the loss function of a recipe: the mean of its objective over the batch.

    With an alignment, the weighted negative cosine is added, and its mean is a metric.
    """
    apply = apply_of(c, mesh)
    objective, chosen = objective_of(c), training_loss(c.diffusion)
    options, transform = loss_options(c.diffusion), transform_of(c)

    def of_interval(of_params: Callable[..., Any], drawn: Batch) -> dict[str, Any]:
        """What only the losses of intervals are given."""
        null = jnp.full_like(drawn["y"], c.data.num_classes)
        dropped, conditions = drawn["y"] == null, Conditions(label=null)
        unconditional = with_conditions(of_params, conditions)
        return {"r": drawn["r"], "unconditional": unconditional, "dropped": dropped}

    def loss(trained: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        params = language.with_layers(frozen, transform.join(frozen.get("base"), trained))
        of_params = functools.partial(apply, text_conditions.with_null(frozen, params))
        tapped = alignment.Tapped(of_params, drawn["y"])
        made: Any = drawn.get(GIVEN, {})
        beside = {**made, **text_conditions.drawn_texts(drawn)}
        conditions = Conditions(label=drawn["y"], **beside)
        denoise = tapped if align else with_conditions(of_params, conditions)
        further = of_interval(of_params, drawn) if chosen.interval else {}
        parts = chosen.evaluate(
            objective, denoise, drawn["x0"], drawn["t"], drawn["eps"], **options, **further
        )
        if c.diffusion.uncertainty:
            kernel = params["params"][UNCERTAINTY]["kernel"]
            u = uncertainty_features(objective.process, drawn["t"]) @ kernel
            parts |= {"loss": uncertain(parts["loss"], u), "log_variance": u}
        means = {name: value.mean() for name, value in parts.items()}
        if align is None:
            return means["loss"], means
        cosine = alignment.mean_cosine(tapped.only("aligned"), align.features(frozen, drawn))
        return means["loss"] - align.weight * cosine, {**means, "alignment": cosine}

    return loss


def check(c: Config) -> None:
    """Raise UserError for keys that contradict each other."""
    language.check_language(c, network_of(c))
    if is_latents(c.data.name) and not c.latent:
        raise UserError(
            f"config.data.name is {c.data.name!r}, encoded latents, and the recipe trains on"
            " pixels: name a data set of images, or set config.autoencoder.kind to 'kl'."
        )
    if inputs_without_files(c).interval and not network_of(c).interval:
        raise UserError(
            f"config.diffusion.loss is {c.diffusion.loss!r}, which needs a network of two times,"
            f" and config.model.kind is {c.model.kind!r}: choose another network, or another loss."
        )
    if c.data.frames > 1 and not network_of(c).clips:
        raise UserError(
            f"config.data.frames is {c.data.frames}, and config.model.kind is {c.model.kind!r}, a"
            " network of images: set kind to 'video', or frames to 1."
        )
    if nowcast.is_nowcast(c) and c.evaluate.bpd_num:
        raise UserError(
            f"config.evaluate.bpd_num is {c.evaluate.bpd_num} and config.given.kind 'past': the"
            " density of a future is not computed; set it to 0."
        )
    if c.data.frames > 1 and control.is_controlled(c):
        raise UserError(
            f"config.data.frames is {c.data.frames}, and a control is of an image: set it to 1, or"
            " config.adapt.kind to another than 'control'."
        )
    _check_uncertainty(c)
    given.check_given(c, network_of(c))
    text_conditions.check_texts(c, network_of(c))
    network_of(c).check(c.model, inputs_without_files(c))
    alignment.check_alignment(c, network_of(c), inputs_without_files(c))
    control.check_control(c, network_of(c), inputs_without_files(c))
    rewards.check_reward(c, inputs_without_files(c))
    check_sampling(c)
    d = c.diffusion
    if null_weight(d.target_omega, d.target_kappa) and c.model.label_dropout == 0:
        raise UserError(
            f"config.diffusion.target_omega is {d.target_omega} and target_kappa {d.target_kappa}:"
            " the guided velocity needs the null label, and config.model.label_dropout is 0. Set"
            " label_dropout above 0, or target_omega to 1 and target_kappa to 0."
        )
    guided = c.sample.cfg_scale != 1 or c.evaluate.guided_scale not in (0, 1)
    if guided and c.model.label_dropout == 0 and not c.sample.guide:
        raise UserError(
            "guidance needs the null label: config.sample.cfg_scale or config.evaluate.guided_scale"
            " enables guidance, and config.model.label_dropout is 0. Set label_dropout above 0, the"
            " scales to 1 and 0, or config.sample.guide to a worse network."
        )
    if c.sample.cfg_channels == "three" and c.input_channels < 3 and guided:
        raise UserError(
            "config.sample.cfg_channels is 'three' and the input has"
            f" {c.input_channels} channel(s): set it to 'all'."
        )


# ---- sampling


def policy_of(c: Config, mesh: Mesh | None = None) -> rewards.Policy:
    """The network of a recipe as what draws, with the guidance of its samples and without."""
    apply = apply_of(c, mesh)

    def denoise(c: Config, params: Any, labels: jax.Array) -> Denoise:
        return denoiser(c, apply, params, Conditions(label=labels), guidance_of(c))

    plain = replaced(c, sample=dataclasses.replace(c.sample, cfg_scale=1.0))
    guided, unguided = (functools.partial(denoise, each) for each in (c, plain))
    return rewards.Policy(inputs_of(c).shape, guided, unguided)


def guidance_of(c: Config) -> Guidance:
    """The guidance arguments of a recipe, for a sampler compiled for the same `guided` mode."""
    process = process_of(c.diffusion)
    low, high = sorted(process.network_time(share) for share in c.sample.cfg_interval)
    weights = control.control_weights(c) if control.is_controlled(c) else None
    level = np.float32(c.given.noise) if given.has_level(c) else None
    scale, bounds = np.float32(c.sample.cfg_scale), (np.float32(low), np.float32(high))
    negative = text_conditions.negative_ids(c) if c.sample.cfg_scale != 1 else None
    return Guidance(scale, *bounds, weights, level=level, negative=negative)


def guided(c: Config) -> Literal["never", "always", "within"]:
    """At which steps a recipe's sampler evaluates the unconditional half; fixed at compile time."""
    if c.sample.cfg_scale == 1:
        return "never"
    return "always" if c.sample.cfg_interval == (0.0, 1.0) else "within"


def denoiser(
    c: Config,
    apply: Callable[..., Any],
    params: Any,
    conditions: Conditions,
    g: Guidance,
    weak: Callable[..., Any] | None = None,
) -> Denoise:
    """Build the denoising function from parameters and conditions, guided as in the recipe.

    With guidance, the conditional and the unconditional half are evaluated as one doubled batch,
    or the conditional prediction of `weak(x, t, conditions)` is taken for the unconditional half.
    """
    labels = conditions.label
    assert labels is not None
    if g.control is not None:
        apply = functools.partial(apply, weights=g.control)

    conditional = with_conditions(functools.partial(apply, params), conditions)
    if guided(c) == "never":
        return conditional
    null = jnp.full_like(labels, c.data.num_classes)

    def pair(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        twice = functools.partial(jnp.tile, reps=2)
        both = apply(
            params,
            jnp.concatenate([x, x]),
            twice(t),
            _doubled(conditions, null),
            **control.conditional_rows(c, len(x)),
        )
        conditional, unconditional = jnp.split(both, 2)
        return conditional, unconditional

    def pair_of_networks(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert weak is not None
        return conditional(x, t), weak(x, t, conditions=Conditions(label=labels))

    always = guided_denoiser(c, pair_of_networks if weak else pair, g.scale)
    return always if guided(c) == "always" else within(always, conditional, g.low, g.high)


def _doubled(conditions: Conditions, null: jax.Array) -> Conditions:
    """The conditions of a doubled batch, whose second half has the labels `null` and no vector."""
    label = jnp.concatenate([jnp.asarray(conditions.label), null])
    rest = conditions._replace(label=None)
    both = jax.tree.map(lambda each: jnp.concatenate([each, each]), rest)
    if rest.vector is not None:
        vector = jnp.asarray(rest.vector)
        both = both._replace(vector=jnp.concatenate([vector, jnp.zeros_like(vector)]))
    return both._replace(label=label)


def sampling(c: Config, mesh: Mesh | None = None) -> Sampling:
    """The sampling of a recipe, on a mesh or one device."""
    process, sampler = process_of(c.diffusion), sampler_of(c)
    g, times = guidance_of(c), times_of(c)
    t = process.c_noise(sampler.evaluated(process, times)) if not sampler.adaptive else None
    sample = dataclasses.replace(
        c.sample, cfg_scale=0.0, cfg_interval=(), num=1, weights="ema", adapters=""
    )
    architecture = (c.model, c.diffusion, c.data, c.autoencoder, c.adapt, c.lm)
    vectors = getattr(c, "unclip", None)  # whose source is another program
    controls = dataclasses.replace(c.control, scale=(), start=0.0, end=1.0)
    edit, shown = dataclasses.replace(c.edit, sigma=0.0), dataclasses.replace(c.given, noise=0.0)
    return Sampling(
        draw=make_sampler(c, mesh),
        guidance=g,
        compiled=(*architecture, edit, sample, guided(c), controls, shown, vectors),
        timesteps=t,
        guided=0 if t is None else _count_guided(guided(c), g, t),
        protocol={**protocol_of(c), **control.control_protocol(c), **given.given_protocol(c)},
        weak=guide_recipe(c) if c.sample.guide else None,
        needs=_needs(c),
        edits=functools.partial(editing.edit_protocol, c),
    )


def _needs(c: Config) -> FromRecords | None:
    """What samples are given of records, if the network needs anything beside labels."""
    if text_conditions.has_texts(c):
        return text_conditions.captions_from_records(c)
    if control.is_controlled(c):
        return control.controls_from_images(c)
    return given.given_from_images(c) if inputs_of(c).given else None


def _count_guided(when: str, g: Guidance, t: np.ndarray) -> int:
    """The number of evaluations that are guided, of those at the network's times t [n]."""
    if when == "within":
        return int(((g.low <= t) & (t < g.high)).sum())
    return len(t) if when == "always" else 0


def make_sampler(
    c: Config, mesh: Mesh | None = None
) -> Callable[[Any, Frozen, jax.Array, Conditions, Guidance], jax.Array]:
    """(trained, frozen, keys key[B], conditions, guidance) -> images u8[B,H,W,C].

    Sample b depends only on keys[b] and its conditions, not on the batch that it is drawn in.
    """
    apply = apply_of(c, mesh, control.all_controls(c))
    weak = denoiser_module(guide_recipe(c), mesh).apply if c.sample.guide else None
    inputs, times, objective = inputs_of(c), times_of(c), objective_of(c)
    shape = inputs.shape
    options = {"clip_x0": c.sample.clip_x0, **options_of(c)}
    solve, start = sampler_of(c).solve, objective.process.prior_std
    transform = transform_of(c)
    build = functools.partial(denoiser_module, mesh=mesh)
    example = nowcast.example_maker(c, build) if nowcast.is_nowcast(c) else None

    def sample(
        trained: Any, frozen: Frozen, keys: jax.Array, conditions: Conditions, g: Guidance
    ) -> jax.Array:
        params = language.with_layers(frozen, transform.join(frozen.get("base"), trained))
        conditions, frozen = text_conditions.encoded_conditions(
            c, frozen, conditions, g.negative, keys, mesh
        )
        params = text_conditions.with_null(frozen, params)
        canvas = shape if example else editing.canvas_of(c, g.given, shape)
        if example:
            clips = editing.known_of_samples(g.given)
            seen = example(frozen, jnp.asarray(clips.image))
            conditions = conditions._replace(channels=seen.channels)
        elif inputs.given:
            beside = editing.beside_x(c, frozen, g.given, keys, g.level)
            conditions = conditions._replace(**beside)
        if "controls" in frozen:
            params = {**params, "controls": frozen["controls"]}
        other = functools.partial(weak, frozen["guide"]) if weak else None
        denoise = denoiser(c, apply, params, conditions, g, other)
        x_T = samplers.initial_noise(keys, canvas)
        x_T = x_T if start == 1 else start * x_T
        noise = samplers.per_sample_noise(keys, canvas)
        if g.given is None or inputs.given:
            x0 = solve(denoise, objective, times, x_T, noise, **options)
        else:
            x0 = editing.edited(c, frozen, denoise, g.given, x_T, noise)
        if example:
            return to_uint8(nowcast.finished(c, clips, x0, seen.forecast))
        x = autoencoder.decode_latents(c, frozen["autoencoder"], x0) if c.latent else x0
        return to_uint8(x if g.given is None else editing.pasted(g.given, x))

    return sample


def to_uint8(x: jax.Array) -> jax.Array:
    """Convert images in about [-1, 1] to bytes: f32[B,H,W,C] -> u8[B,H,W,C].

    Values are truncated, not rounded, as in the release and ADM's evaluator.
    """
    return jnp.clip(127.5 * x + 128.0, 0, 255).astype(jnp.uint8)


# ---- inspection


def inside_of(c: Config, mesh: Mesh | None = None) -> Inside | None:
    """What can be read of a recipe's network; None without a stack of blocks alone."""
    network, inputs = network_of(c), inputs_of(c)
    seam, split = network.inspection, network.attention(c.model, inputs)
    if seam is None or split is None or network.cost is None or inputs.language:
        return None
    place = ANYWHERE if mesh is None else placement(c, mesh)
    side = math.isqrt(split.tokens)

    def built(build: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        apply = build(c.model, inputs, place)
        texts = text_conditions.has_texts(c)
        return text_conditions.with_null_text(c, apply) if texts else apply

    def decode(frozen: Frozen, x0: jax.Array) -> jax.Array:
        return autoencoder.decode_latents(c, frozen["autoencoder"], x0) if c.latent else x0

    def example(frozen: Frozen, images: jax.Array, keys: jax.Array) -> jax.Array:
        x0 = _held_out_example(c, frozen, images, keys)
        if not inputs.given:
            return x0
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
        return jnp.concatenate([x0, given.beside_examples(c, x0, own)], axis=-1)

    return Inside(
        objective=objective_of(c),
        x0=example,
        decode=decode,
        shape=inputs.shape,
        depth=network.cost(c.model, inputs).description["depth"],
        grid=(side, side),
        stack=network.stack,
        branches=seam.branches(c.model),
        null=c.data.num_classes if c.model.label_dropout > 0 else None,
        levels=functools.partial(given.levels_of, c),
        read=built(seam.read),
        patch=built(seam.patch),
        lens=built(seam.lens),
        variables=text_conditions.with_null,
        beside=functools.partial(text_conditions.prepare_texts, c),
        pieces=text_conditions.pieces_of(c),
    )


# ---- validation loss


def validation(c: Config, mesh: Mesh | None = None) -> ValidationScore:
    """The unweighted loss on held-out triples (image, t, eps): mse, and vlb if Σ is learned.

    For DDPM these are the parts of `hybrid_loss`, whatever the training objective is; labels are
    never dropped. The image, the time and the noise of triple i depend only on (seed, i), as does
    the noise of z ~ q(z|x) for latents. A control counts in full.
    """
    apply = apply_of(c, mesh)
    objective, shape, d = objective_of(c), inputs_of(c).shape, c.diffusion
    transform, learned = transform_of(c), d.variance == "learned_range"
    loss = losses.hybrid_loss if learned else losses.simple_loss
    loss = losses.regression_loss if training_loss(d).blind else loss
    build = functools.partial(denoiser_module, mesh=mesh)
    example = nowcast.example_maker(c, build) if nowcast.is_nowcast(c) else None
    # NumPy guarantees that SeedSequence's output never changes.
    shift = int(np.random.SeedSequence(c.evaluate.seed).generate_state(1)[0])

    def measure(
        trained: Any, frozen: Frozen, keys: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        params = language.with_layers(frozen, transform.join(frozen.get("base"), trained))
        params = text_conditions.with_null(frozen, params)
        if example:
            made = example(frozen, batch["image"])
            x0, conditions = made.x0, Conditions(batch["label"], channels=made.channels)
        else:
            x0 = _held_out_example(c, frozen, batch["image"], keys)
            conditions = _held_out_conditions(c, frozen, keys, batch, x0, mesh)
        denoise = functools.partial(apply, params, conditions=conditions)
        eps = samplers.initial_noise(keys, shape)
        found = loss(objective, denoise, x0, batch["t"], eps)
        return {name: found[name] for name in ("mse", "vlb") if name in found}

    return ValidationScore(
        measure,
        names={"mse": "val_loss", "vlb": "val_vlb"} if learned else {"mse": "val_loss"},
        protocol={
            "val_loss_target": validation_target(d),
            **_latent_protocol(c),
            **({"val_loss_control": c.control.source} if control.is_controlled(c) else {}),
            **given.training_protocol(c),
        },
        num=c.evaluate.val_loss_num,
        # Times are spread evenly over the examples.
        drawn=lambda indices: {
            "t": stratified_times(objective.process, indices, shift, d.time_most)
        },
    )


def _held_out_example(c: Config, frozen: Frozen, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Images, or z ~ q(z|x) of latents, whose noise depends only on the keys."""
    if not c.latent:
        return images
    noise = samplers.per_sample_noise(keys, inputs_of(c).shape)(jnp.int32(0))
    moments = autoencoder.encode_images(c, frozen["autoencoder"], images)
    return autoencoder.normalized(c, sample_posterior(moments, noise))


def _held_out_conditions(
    c: Config, frozen: Frozen, keys: jax.Array, batch: Batch, x0: jax.Array, mesh: Mesh | None
) -> Conditions:
    """The label or caption of a held-out image, and what the network is given of the image."""
    made, found = _conditions_of_images(c), text_conditions.prepare_texts(c, frozen, batch, mesh)
    if made is not None:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
        found |= made(batch["image"] if control.is_controlled(c) else x0, own)
    return Conditions(label=batch["label"], **found)


def density(c: Config, mesh: Mesh | None = None) -> ValidationScore:
    """Bits/dim of held-out images under the probability-flow ODE (`likelihood.log_density`).

    Bytes are dequantised by uniform noise of one bin; it and the probe depend only on (seed, i).
    """
    apply = apply_of(c, mesh)
    objective, shape = objective_of(c), inputs_of(c).shape
    transform, width, dims = transform_of(c), 2 / 255, math.prod(shape)

    def measure(
        trained: Any, frozen: Frozen, keys: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        params = language.with_layers(frozen, transform.join(frozen.get("base"), trained))
        params = text_conditions.with_null(frozen, params)
        conditions = _held_out_conditions(c, frozen, keys, batch, batch["image"], mesh)
        denoise = functools.partial(apply, params, conditions=conditions)
        pairs = jax.vmap(jax.random.split)(keys)
        spread = jax.vmap(lambda key: jax.random.uniform(key, shape))(pairs[:, 0])
        probe = jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(pairs[:, 1])
        x0 = batch["image"] + width * (spread - 0.5)
        found = log_density(objective, denoise, x0, probe, rtol=1e-4, atol=1e-4)
        return {
            "bpd": density_bits_per_dim(found.log_density, dims, width),
            "evaluations": found.evaluations.astype(jnp.float32),
        }

    return ValidationScore(
        measure,
        names={"bpd": "bits_per_dim", "evaluations": "bits_per_dim_evaluations"},
        protocol={"bpd_num": c.evaluate.bpd_num, "bpd_solver": "dopri5, rtol 1e-4, bins of 2/255"},
        num=c.evaluate.bpd_num,
    )


def _latent_protocol(c: Config) -> dict[str, Any]:
    """What a loss on latents depends on and older protocols did not have."""
    a = c.autoencoder
    return {"latent_statistics": a.statistics} if c.latent and (a.shift or a.latent_mean) else {}


TASK = Definition(
    make=make,
    network="dit",
    sections={
        "diffusion": Diffusion,
        "align": alignment.Align,
        "autoencoder": FrozenAutoencoder,
        "adapt": adapting.Adapt,
        "control": control.Control,
        "sample": Sample,
        "edit": editing.Edit,
        "reward": rewards.Reward,
        "given": given.GivenChannels,
        "lm": language.LanguageModel,
    },
    check=check,
    resolve=lambda c, workdir: adapting.with_base(c, workdir, network_of(c), inputs_of),
)
