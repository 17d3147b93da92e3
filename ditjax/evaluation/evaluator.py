"""Evaluation of a generative network: draw samples by its recipe, score them, with protocol."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ditjax.config import FEATURES_EXPECTED, Config, replaced
from ditjax.data import records, source
from ditjax.data.images import open_images
from ditjax.data.names import Split
from ditjax.errors import UserError
from ditjax.evaluation import scoring
from ditjax.evaluation.clip_score import open_scorer
from ditjax.evaluation.features import (
    SHIPPED_EXTRACTORS,
    Extractor,
    check_frames_of,
    open_extractor,
)
from ditjax.evaluation.given import Scores, scores_of
from ditjax.evaluation.scoring import (
    ExtractedFeatures,
    Reference,
    extract_features,
    open_reference,
    score,
)
from ditjax.evaluation.validation import Validator
from ditjax.files import lease, npz
from ditjax.files.atomic import protocol_hash
from ditjax.files.npz import load_array
from ditjax.metrics import neighbours
from ditjax.parallel.processes import is_primary
from ditjax.parallel.rules import check_batch
from ditjax.runs import opening
from ditjax.runs.results import SAMPLES_FILE, write_record_scores
from ditjax.sampling.draw import Drawer, digests_of, draw_to, sampling_protocol
from ditjax.sampling.given import held_out_given
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.tasks.text_conditions import clips_of
from ditjax.training.task import Frozen

GUIDED_FILE = "guided.npz"


class Evaluated(NamedTuple):
    """Metrics by name, the protocol that fixes their meaning, the reference and the cost.

    `reference` names what the samples were compared with; `seconds` is the time of drawing.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    reference: str
    seconds: float


class Evaluator:
    """Draws and scores samples by config.evaluate on a mesh, any number of times.

    Sampler and features compile only at the first call, so a training loop can call it at every
    interval and a grid for every cell.
    """

    def __init__(self, c: Config, mesh: Mesh, frozen: Frozen, drawer: Drawer | None = None) -> None:
        """Open features and reference. Raises UserError, also for a task without samples."""
        sampling_of(c, make_task(c))
        if c.evaluate.features == "none":
            raise UserError(
                f"config.evaluate.features is 'none': expected {FEATURES_EXPECTED}"
                " (evaluate and grid take --features=)."
            )
        check_batch(c.sample.batch_size, mesh, "config.sample.batch_size")
        self._drawer = drawer or Drawer(mesh, frozen)
        self._digests = digests_of(frozen)
        self._given = held_out_given(c)  # raises now if its split is missing
        self._sampling(c)  # raises now if an adapter cannot be read
        self.extractor = open_extractor(c.evaluate.features, mesh)
        check_frames_of(self.extractor, c.data.frames, "samples of config.data.frames")
        if self.extractor.shipped and c.evaluate.guided_scale and self.extractor.judge is None:
            raise UserError(
                f"config.evaluate.guided_scale is {c.evaluate.guided_scale}, and features"
                f" {self.extractor.name!r} judge no class: set it to 0, or config.sample.cfg_scale."
            )
        self.reference = reference_of(c, self.extractor)
        self._clip = self._clip_protocol(c)
        self._validate = Validator(mesh, frozen)
        self._validate.protocol(c)  # raises now if the split is missing
        if self.extractor.shipped:
            source.dataset_info(*_real_splits(c, self.extractor)[0], c.data.data_dir or None)

    @property
    def distance(self) -> str:
        """The metric that selects the best model: 'fid', or 'fd_digits' on those features."""
        return scoring.distance_name(self.extractor.family)

    def in_memory(self, c: Config, params: Any, num: int) -> Evaluated:
        """Compute the distance of `num` samples, the validation loss and other quick metrics.

        Nothing is written to disk.
        """
        labels: list[np.ndarray] = []
        scores = self._given_scores(c)

        def images() -> Iterator[np.ndarray]:
            for part in self._drawer(
                *(c, params, [(0, num)]),
                seed=c.evaluate.seed,
                label_of=_label_of(c),
                given=self._given,
            ):
                labels.append(part.label)
                if scores:
                    scores.add(part.images)
                yield part.images

        began = time.monotonic()
        extracted = extract_features(self.extractor, images(), num)
        seconds = time.monotonic() - began
        metrics = self._metrics(c, extracted, np.concatenate(labels), brief=True)
        metrics |= scores.means() if scores else {}
        metrics |= self._validate(c, params)
        return Evaluated(metrics, self.protocol(c, num), self.reference.name, seconds)

    @lease.scope()
    def of_run(self, c: Config, params: Any, folder: Path, model: dict[str, Any]) -> Evaluated:
        """Draw config.evaluate.num_samples samples to `folder` and score them.

        After an interruption the same call draws only the missing samples. `model` is the record
        of the model that they are drawn from. Raises UserError if another process writes samples
        there.
        """
        opening.acquire_lease(folder, opening.SAMPLES_LEASE)
        num = c.evaluate.num_samples
        path = folder / SAMPLES_FILE
        seconds = self._draw(c, params, path, num, c.sample.cfg_scale, model)
        images = open_images(path)
        batches = images.batches(self.extractor.batch_size)
        extracted = extract_features(self.extractor, batches, num, title="features")
        metrics = self._metrics(c, extracted, load_array(path, "label"))
        scores = self._given_scores_of(c, path)
        metrics |= scores.means() if scores else {}
        if self.extractor.shipped:
            metrics |= self._shipped_metrics(c, params, folder, model)
        validated, pairs = self._validate.scored(c, params)
        metrics |= validated
        protocol = self.protocol_of_run(c)
        if is_primary():
            every = {**(scores.records() if scores else {}), **pairs}
            write_record_scores(folder, every, protocol_hash(protocol))
        return Evaluated(metrics, protocol, self.reference.name, seconds)

    def protocol_of_run(self, c: Config) -> dict[str, Any]:
        """Return the protocol of the metrics of `of_run`, before anything is drawn."""
        protocol = self.protocol(c, c.evaluate.num_samples)
        if self.extractor.shipped:
            protocol |= {
                "guided_scale": c.evaluate.guided_scale,
                "guided_num": c.evaluate.guided_num if c.evaluate.guided_scale else 0,
            }
        return protocol

    def protocol(self, c: Config, num: int) -> dict[str, Any]:
        """Return everything that two results must share to be compared."""
        protocol = scores_protocol(self.extractor, self.reference, num, self._sampling(c))
        return protocol | self._clip | self._validate.protocol(c)

    def _clip_protocol(self, c: Config) -> dict[str, Any]:
        """What fixes the meaning of a CLIP score; {} without. Raises UserError."""
        if not c.evaluate.clip:
            return {}
        needs = sampling_of(c, make_task(c)).needs
        if needs is None or needs.reads != "caption":
            raise UserError(
                f"config.evaluate.clip is {c.evaluate.clip!r}, and samples of this recipe have no"
                " captions: leave it out."
            )
        if c.evaluate.clip in clips_of(c) and is_primary():
            line = "note: the CLIP score is of the CLIP that the samples follow from:"
            print(f"{line} it is circular", file=sys.stderr)
        return dict(open_scorer(c.evaluate.clip).protocol)

    def _sampling(self, c: Config) -> dict[str, Any]:
        # Samples that are given something of records have the labels of these.
        labels = "records" if self._given else c.evaluate.labels
        return sampling_protocol(
            c, seed=c.evaluate.seed, labels=labels, given=self._given, **self._digests
        )

    def _given_scores(self, c: Config) -> Scores | None:
        return scores_of(c, self._given, c.evaluate.seed, self.extractor) if self._given else None

    def _given_scores_of(self, c: Config, samples: Path) -> Scores | None:
        """How well samples follow what they are given; None for nothing."""
        scores = self._given_scores(c)
        if scores is None:
            return None
        with npz.reading(samples) as archive:
            for images in npz.rows(archive, "arr_0", c.sample.batch_size):
                scores.add(images)
        return scores

    def _draw(
        self, c: Config, params: Any, path: Path, num: int, scale: float, model: dict[str, Any]
    ) -> float:
        c = replaced(c, sample=dataclasses.replace(c.sample, num=num, cfg_scale=scale))
        return draw_to(
            path,
            self._drawer,
            c,
            params,
            {"model": model, "sampling": self._sampling(c)},
            seed=c.evaluate.seed,
            label_of=_label_of(c),
            given=self._given,
        )

    def _metrics(
        self, c: Config, extracted: ExtractedFeatures, label: np.ndarray, *, brief: bool = False
    ) -> dict[str, float]:
        found = score(
            extracted,
            self.reference.statistics,
            self.reference.pool,
            family=self.extractor.family,
            seed=c.evaluate.seed,
            brief=brief,
        )
        if extracted.predicted is not None:
            found["accuracy"] = float(np.mean(extracted.predicted == label))
        return found

    def _shipped_metrics(
        self, c: Config, params: Any, folder: Path, model: dict[str, Any]
    ) -> dict[str, float]:
        """Return the floors that real images set, and the accuracy under guidance."""
        splits = _real_splits(c, self.extractor)
        side = self.extractor.side or c.data.image_size
        found = dict(real_scores(self.extractor.name, *splits, c.data.data_dir, side))
        if c.evaluate.guided_scale not in (0, c.sample.cfg_scale):
            path = folder / GUIDED_FILE
            self._draw(c, params, path, c.evaluate.guided_num, c.evaluate.guided_scale, model)
            assert self.extractor.judge is not None
            predicted = self.extractor.judge(load_array(path, "arr_0"))
            found["accuracy_guided"] = float(np.mean(predicted == load_array(path, "label")))
        return found


def scores_protocol(
    extractor: Extractor, reference: Reference, num: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Return the protocol of scores: features, reference, number and sampling settings."""
    metric = f"FD-{extractor.family}" if extractor.family else "FID"
    return {
        "metric": metric,
        **extractor.record,
        **reference.record,
        "num_samples": num,
        **sampling,
    }


def reference_of(c: Config, extractor: Extractor) -> Reference:
    """Open config.evaluate.reference, by default the recipe's training images.

    The statistics of a data set are cached. Raises UserError.
    """
    d = c.data
    return open_reference(
        *(_reference(c), extractor, d.image_size, d.data_dir),
        frames=d.frames,
        stride=d.frame_stride,
    )


def _reference(c: Config) -> str | Split:
    """Return config.evaluate.reference, or the images that the recipe trains on."""
    return c.evaluate.reference or source.images_of(Split(c.data.name, c.data.split))


def _real_splits(c: Config, extractor: Extractor) -> tuple[Split, str | Split]:
    """Return real images, and the reference whose distance to them is the floor of the metric."""
    if extractor.name == "digits":
        return Split("digits", "test"), Split("digits")
    held = opening.held_out(c)
    splits = source.prepare(held.name, held.data_dir).info.splits
    return Split(held.name, "test" if "test" in splits else held.split), _reference(c)


@functools.cache
def real_scores(
    features: str, real: Split, against: str | Split, data_dir: str, side: int
) -> Mapping[str, float]:
    """Return the distance and the authenticity of real images that were not trained on, as floors.

    `features` are those of a shipped classifier, of images of `side` pixels.
    """
    extractor = SHIPPED_EXTRACTORS[features]()._replace(judge=None)
    reference = open_reference(against, extractor, side, data_dir)
    images = records.load_arrays(*real, data_dir or None, side)["image"]
    extracted = extract_features(extractor, [images], len(images))
    distance = scoring.distance_name(extractor.family)
    found = score(extracted, reference.statistics, None, family=extractor.family, brief=True)
    floors = {f"{distance}_floor": found[distance]}
    if reference.pool is not None:
        authentic = neighbours.authenticity(reference.pool, extracted.pool)
        floors[f"authenticity_{extractor.family}_floor"] = float(authentic.mean())
    return floors


def _label_of(c: Config) -> Sequence[int] | None:
    return None if c.evaluate.labels == "uniform" else range(c.data.num_classes)
