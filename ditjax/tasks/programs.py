"""Jitted programs with their shardings: initialise, train, encode, sample."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.models.autoencoder import Moments
from ditjax.parallel import compiling, processes, rules
from ditjax.tasks import build
from ditjax.training.step import Batch, Metrics, TrainState, init_state, make_step

# Streams of the run's key, so that no two uses of a seed share random numbers.
_INIT, _TRAIN, _LATENTS, _SAMPLE, _LABELS, _VALIDATE = range(6)


def stream(seed: int, which: int) -> jax.Array:
    """The key of one use of a seed."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), which)


def precise(c: Config) -> AbstractContextManager[None]:
    """The recipe's precision of float32 products: under 'default' a TPU rounds them to bfloat16."""
    return jax.default_matmul_precision(None if c.model.matmul == "default" else "float32")


class Training(NamedTuple):
    """What a training loop calls. `state` is donated to `step`."""

    init: Callable[[], TrainState]
    abstract_state: TrainState  # shapes, dtypes and shardings: the target of a restore
    rows: np.ndarray  # of the global batch, those that this process's devices hold
    put: Callable[[Mapping[str, np.ndarray]], Batch]  # these rows -> global arrays
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    lower: Callable[[], jax.stages.Lowered]  # the update from x0 on, of shapes alone


def abstract_state(c: Config, mesh: Mesh) -> TrainState:
    """The training state's shapes, dtypes and shardings, by the rules: the target of a restore."""
    trainee, tx = build.trainee(c), build.optimizer(c)
    shapes = jax.eval_shape(lambda: init_state(trainee.init(stream(c.seed, _INIT)), tx))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        rules.state_shardings(shapes, mesh),
    )


def training(c: Config, mesh: Mesh, frozen: Any = None) -> Training:
    """The training programs of a recipe on a mesh.

    `frozen` are the autoencoder's parameters when images are encoded on the way (a latent DiT on
    images); a data set of cached moments does not need them.
    """
    _check_microbatches(c, mesh)
    trainee, tx = build.trainee(c, mesh), build.optimizer(c)
    key = stream(c.seed, _TRAIN)
    abstract = abstract_state(c, mesh)
    rules.check_split(abstract.params, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(
        lambda: init_state(trainee.init(stream(c.seed, _INIT)), tx), out_shardings=shardings
    )
    batch_sharding = rules.batch_sharding(mesh)
    rows = processes.local_rows(batch_sharding, c.train.batch_size)
    step = make_step(
        trainee.draw,
        trainee.loss,
        tx,
        c.train.ema_decay,
        parts=c.train.microbatches,
        place=lambda grads: jax.lax.with_sharding_constraint(grads, shardings.params),
        limit=build.limit(c),
    )
    jit_step = jax.jit(
        lambda state, batch: step(state, batch, key),
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, rules.replicated(mesh)),
        donate_argnums=0,
    )
    watched_step = compiling.watched(jit_step, mesh)

    @jax.jit
    def to_x0(frozen: Any, batch: Batch, step: jax.Array) -> Batch:
        """Images or moments -> x0 of this step, on the mesh."""
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["log_variance"])
        elif c.latent:
            moments = build.encode(c, frozen, batch["image"])
        else:
            return {"x0": batch["image"], "label": batch["label"]}
        step_key = jax.random.fold_in(stream(c.seed, _LATENTS), step)
        return {"x0": build.draw_latents(c, moments, step_key), "label": batch["label"]}

    def put(local: Mapping[str, np.ndarray]) -> Batch:
        return {
            name: processes.global_rows(batch_sharding, c.train.batch_size, rows, value)
            for name, value in local.items()
            if name != "index"
        }

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with precise(c):
            return watched_step(state, to_x0(frozen, batch, state.step))

    def lower() -> jax.stages.Lowered:
        B, H, C = c.train.batch_size, c.input_size, c.input_channels
        batch = {
            "x0": jax.ShapeDtypeStruct((B, H, H, C), jnp.float32),
            "label": jax.ShapeDtypeStruct((B,), jnp.int32),
        }
        with precise(c):
            return jit_step.lower(abstract, batch)

    return Training(init, abstract, rows, put, run, lower)


def _check_microbatches(c: Config, mesh: Mesh) -> None:
    """Raises UserError when the devices do not divide the parts that a step's batch is cut into."""
    B, parts = c.train.batch_size, c.train.microbatches
    if parts == 1:
        rules.check_batch(B, mesh, "config.train.batch_size")
        return
    rules.check_batch(
        B // parts, mesh, f"config.train.batch_size / config.train.microbatches = {B} / {parts}"
    )


# (params, seed, start, labels i[B] or None, guidance) -> images u8[B,H,W,C], labels i32[B]
Draw = Callable[[Any, int, int, np.ndarray | None, build.Guidance], tuple[np.ndarray, np.ndarray]]


class Sampling(NamedTuple):
    """A compiled `draw` and its batch size B."""

    draw: Draw
    batch_size: int


def sampling(c: Config, mesh: Mesh, frozen: Any = None) -> Sampling:
    """Draws samples [start, start + B) of a recipe on a mesh.

    Sample i depends on (seed, i) and its label only: not on the batch, not on the mesh. Without
    labels, label i is uniform over the classes, from (seed, i) too. Another seed or guidance
    compiles nothing anew, but for guidance that begins, ends or gets an interval (`build.guided`).
    """
    rules.check_batch(c.sample.batch_size, mesh, "config.sample.batch_size")
    sample = build.sampler(c, mesh)
    batch_sharding = rules.batch_sharding(mesh)

    keys_of = jax.vmap(jax.random.fold_in, (None, 0))

    @jax.jit
    def labels_of(key: jax.Array, indices: jax.Array) -> jax.Array:
        keys = keys_of(key, indices)
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, c.data.num_classes))(keys)

    def images(
        params: Any, frozen: Any, key: Any, indices: Any, labels: Any, guidance: Any
    ) -> jax.Array:
        x = sample(params, keys_of(key, indices), labels, guidance)
        x = build.decode(c, frozen, x) if c.latent else x
        # Truncated, not rounded, to uint8: what the release and ADM's evaluator do.
        return jnp.clip(127.5 * x + 128.0, 0, 255).astype(jnp.uint8)

    settled_images = compiling.settled(
        jax.jit(
            images,
            in_shardings=(None, None, None, batch_sharding, batch_sharding, None),
            out_shardings=rules.replicated(mesh),
        )
    )

    def draw(
        params: Any, seed: int, start: int, labels: np.ndarray | None, guidance: build.Guidance
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = np.arange(start, start + c.sample.batch_size, dtype=np.uint32)
        if labels is None:
            labels = np.asarray(labels_of(stream(seed, _LABELS), indices))
        key = stream(seed, _SAMPLE)
        with precise(c):
            drawn = settled_images(
                params,
                frozen,
                key,
                processes.from_whole(batch_sharding, indices),
                processes.from_whole(batch_sharding, labels),
                guidance,
            )
        return np.asarray(drawn), np.asarray(labels, np.int32)

    return Sampling(draw, c.sample.batch_size)


# (params, seed, first pair, rows of at most B images, all timesteps i32[n]) -> NAME: f32[rows]
Validation = Callable[[Any, int, int, Mapping[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]


def validation(c: Config, mesh: Mesh, frozen: Any = None) -> Validation:
    """`build.pair_losses` of a recipe on a mesh, B = config.sample.batch_size pairs at a time.

    Pair i depends on (seed, i), its image and its timestep only: not on the batch, not on the mesh.
    """
    B = c.sample.batch_size
    rules.check_batch(B, mesh, "config.sample.batch_size")
    losses = build.pair_losses(c, mesh)
    batch_sharding = rules.batch_sharding(mesh)

    def of_batch(
        params: Any, frozen: Any, key: Any, indices: Any, images: Any, labels: Any, t: Any
    ) -> dict[str, jax.Array]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return losses(params, frozen, keys, images, labels, t)

    program = compiling.settled(
        jax.jit(
            of_batch,
            in_shardings=(None, None, None, *[batch_sharding] * 4),
            out_shardings=rules.replicated(mesh),
        )
    )

    def run(
        params: Any, seed: int, start: int, rows: Mapping[str, np.ndarray], t: np.ndarray
    ) -> dict[str, np.ndarray]:
        count = len(rows["label"])
        indices = np.arange(start, start + count, dtype=np.uint32)
        # A short batch is filled up, so that one shape is compiled.
        filled = (
            np.pad(x, ((0, B - count), *[(0, 0)] * (x.ndim - 1)))
            for x in (indices, rows["image"], rows["label"], t[start : start + count])
        )
        on_mesh = (processes.from_whole(batch_sharding, x) for x in filled)
        with precise(c):
            found = program(params, frozen, stream(seed, _VALIDATE), *on_mesh)
        return {name: np.asarray(value)[:count] for name, value in found.items()}

    return run
