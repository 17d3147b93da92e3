"""Scores of held-out examples: the task's score, such as L_simple at fixed (t, eps) or PSNR.

The random draws of example i are a function of (seed, i), with the seed of the samples: all models
at all steps are measured on the same draws, on any number of devices and in any batch. So the
difference of two models is far more certain than either value.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, Optim, Section, Train
from ditjax.data import source, stream
from ditjax.data.names import Split
from ditjax.data.records import HostBatch
from ditjax.errors import UserError
from ditjax.evaluation import scoring
from ditjax.evaluation.features import open_extractor
from ditjax.metrics.uncertainty import systematic_error
from ditjax.parallel import host, processes, rules
from ditjax.runs import opening
from ditjax.tasks import make_task
from ditjax.training import keys
from ditjax.training.program import precise
from ditjax.training.task import Frozen, Task, ValidationScore

# (params, first example, rows of at most B) -> name: f32[rows]
Measure = Callable[[Any, int, dict[str, np.ndarray]], dict[str, np.ndarray]]


def measure_of(
    c: Config, score: ValidationScore, mesh: Mesh, frozen: Frozen, batch_size: int
) -> Measure:
    """Return the jitted measure of a score; example i gets the random key of its index."""
    batch_sharding = rules.batch_sharding(mesh)

    def of_batch(
        params: Any, frozen: Frozen, key: Any, indices: Any, batch: Any
    ) -> dict[str, jax.Array]:
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return score.measure(params, frozen, each, batch)

    program = jax.jit(
        of_batch,
        in_shardings=(None, None, None, batch_sharding, batch_sharding),
        out_shardings=rules.replicated(mesh),
    )
    compiled = False

    def measure(params: Any, start: int, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal compiled
        count = len(rows["label"])
        indices = np.arange(start, start + count, dtype=np.uint32)
        batch = {**rows, **score.drawn(indices)}
        filled = {
            name: processes.padded(x, batch_size) for name, x in {"": indices, **batch}.items()
        }
        on_mesh = {k: processes.from_whole(batch_sharding, x) for k, x in filled.items()}
        key = keys.stream(c.evaluate.seed, keys.VALIDATE)
        with precise(c):
            found = program(params, frozen, key, on_mesh.pop(""), on_mesh)
        if not compiled:
            host.discard_free_blocks()
            compiled = True
        return {name: np.asarray(value)[:count] for name, value in found.items()}

    return measure


def held_out_means(c: Config, mesh: Mesh, params: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Return (means of the task's score over config.evaluate.split, their protocol).

    With config.evaluate.features, reconstructions are compared with the split's images, too: their
    Fréchet distance is `rfid`, or `rfd_NAME` on features NAME. Raises UserError for a task without
    a score of every example.
    """
    task = make_task(c, mesh)
    scores = [each for each in task.scores if not each.num]
    if not scores:
        raise UserError(f"config.task is {c.task!r}: it has no score and draws no samples.")
    (score,) = scores
    if score.images and c.evaluate.features == "none":
        score = _without_images(score)
    size, spec = c.train.batch_size, opening.held_out(c)
    rules.check_batch(size, mesh, "config.train.batch_size")
    measure = measure_of(c, score, mesh, task.frozen(mesh), size)
    parts: list[dict[str, np.ndarray]] = []

    def reconstructions() -> Iterator[np.ndarray]:
        """Measure every batch, and yield its images as bytes; of other scores, nothing."""
        start = 0
        for rows in stream.in_order(spec, size):
            batch = {name: value for name, value in rows.items() if name != "index"}
            part = measure(params, start, batch)
            start += len(rows["label"])
            if score.images:
                yield scoring.as_uint8(part.pop(score.images))
            parts.append(part)

    distances: dict[str, float] = {}
    protocol = dict(score.protocol)
    if score.images:
        distances, record = _compared(c, mesh, spec, reconstructions())
        protocol |= record
    else:
        list(reconstructions())
    measured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    means = {metric: float(measured[name].mean()) for name, metric in score.names.items()}
    return {**means, **score.summary(measured), **distances}, protocol


def _without_images(score: ValidationScore) -> ValidationScore:
    """A score that measures no images: they stay on the devices."""

    def measure(*args: Any) -> dict[str, jax.Array]:
        return {name: x for name, x in score.measure(*args).items() if name != score.images}

    return score._replace(measure=measure, images="")


def _compared(
    c: Config, mesh: Mesh, spec: source.DataSpec, images: Iterator[np.ndarray]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The distance of reconstructions to the images of their split, and its protocol.

    Both have the recipe's size before the features resize them.
    """
    extractor = open_extractor(c.evaluate.features, mesh)._replace(side=None)
    originals = scoring.open_reference(
        Split(spec.name, spec.split), extractor, c.data.image_size, c.data.data_dir
    )
    count = source.dataset_info(spec.name, spec.split, spec.data_dir).num_examples
    found = scoring.extract_features(extractor, images, count, title="reconstructions")
    family = extractor.family
    distances = scoring.score(
        found, originals.statistics, None, family=family, seed=c.evaluate.seed
    )
    name = scoring.distance_name(family)
    record = {"reconstructions": f"r{name}", **extractor.record, **originals.record}
    kept = (name, f"{name}_low", f"{name}_high")
    return {f"r{each}": distances[each] for each in kept}, record


class Validator:
    """Measures the validation loss on one mesh with frozen weights; each program compiles once."""

    def __init__(self, mesh: Mesh, frozen: Frozen) -> None:
        self._mesh, self._frozen = mesh, frozen
        self._programs: dict[Any, list[tuple[ValidationScore, Measure]]] = {}
        self._infos: dict[source.DataSpec, source.DatasetInfo] = {}
        self._kept: dict[Any, list[HostBatch]] = {}

    def __call__(self, c: Config, params: Any) -> dict[str, float]:
        """Return the means of the task's scores that have a number of examples; {} for none.

        For diffusion these are val_loss (L_simple) and val_vlb (bits/dim at t) of a learned
        variance over config.evaluate.val_loss_num pairs, and bits_per_dim over bpd_num images.
        _stderr is the standard error over other draws with the same images. Raises UserError for a
        missing split or a damaged record.
        """
        return self.scored(c, params)[0]

    def scored(self, c: Config, params: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The means, as a call returns them, and the values f64[num] of each pair by metric."""
        found: dict[str, float] = {}
        each: dict[str, np.ndarray] = {}
        for score, measure in self._program(c):
            starts = range(0, score.num, c.sample.batch_size)
            parts = [
                measure(params, start, rows)
                for start, rows in zip(starts, self._images(c, score.num), strict=True)
            ]
            drawn = score.drawn(np.arange(score.num))
            for name, metric in score.names.items():
                values = np.concatenate([part[name] for part in parts])[: score.num]
                values = values.astype(np.float64)
                found[metric], each[metric] = float(values.mean()), values
                if "t" in drawn:
                    found[f"{metric}_stderr"] = systematic_error(values, drawn["t"])
        return found, each

    def protocol(self, c: Config) -> dict[str, Any]:
        """Return what two validation losses must share to be compared; {} if there is no loss.

        Raises UserError like a call, but before anything is computed.
        """
        scores = _counted(c, make_task(c))
        if not scores:
            return {}
        found: dict[str, Any] = {"val_loss_data": f"{self._info(c).full_name}/{c.evaluate.split}"}
        if c.evaluate.val_loss_num:
            found = {"val_loss_num": c.evaluate.val_loss_num, **found}
        for score in scores:
            found |= score.protocol
        return found

    def _program(self, c: Config) -> list[tuple[ValidationScore, Measure]]:
        # All that a score may read: neither how the network was trained, nor how it is drawn from.
        read = (x for x in vars(c).values() if isinstance(x, Section) and not x.FREE)
        read = (x for x in read if not isinstance(x, Train | Optim))
        key = (c.task, *read, c.evaluate, c.sample.batch_size)
        if key not in self._programs:
            self._programs[key] = []
            for score in _counted(c, make_task(c, self._mesh)):
                rules.check_batch(c.sample.batch_size, self._mesh, "config.sample.batch_size")
                measure = measure_of(c, score, self._mesh, self._frozen, c.sample.batch_size)
                self._programs[key].append((score, measure))
        return self._programs[key]

    def _info(self, c: Config) -> source.DatasetInfo:
        spec = opening.held_out(c)
        if spec not in self._infos:
            self._infos[spec] = source.dataset_info(spec.name, spec.split, spec.data_dir)
        return self._infos[spec]

    def _images(self, c: Config, num: int) -> Iterator[HostBatch]:
        """Yield batches of the pairs' images; small sets stay in memory for the next call."""
        spec, size = opening.held_out(c), c.sample.batch_size
        records = stream.records_of_step(c.evaluate.seed, 1, num, self._info(c).num_examples)
        key = (spec, size, c.evaluate.seed, len(records))
        if key in self._kept:
            return iter(self._kept[key])
        batches = stream.read_records(spec, records, size)
        if 4 * len(records) * math.prod(spec.shape) > c.data.cache_mb * 2**20:
            return batches
        self._kept[key] = list(batches)
        return iter(self._kept[key])


def _counted(c: Config, task: Task) -> list[ValidationScore]:
    """The scores of a number of examples. Raises UserError if the recipe asks for what is none."""
    found = [score for score in task.scores if score.num]
    if c.evaluate.val_loss_num and not found:
        raise UserError(
            f"config.evaluate.val_loss_num is {c.evaluate.val_loss_num}, and task"
            f" {c.task!r} has no validation loss: set it to 0."
        )
    return found
