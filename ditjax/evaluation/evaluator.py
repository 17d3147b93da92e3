"""What a DiT and its samples are worth: drawn by its recipe, seen once, scored, with protocol."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, replaced
from ditjax.data import records, source
from ditjax.data.images import open_images
from ditjax.data.names import is_latents
from ditjax.errors import UserError
from ditjax.evaluation import scoring
from ditjax.evaluation.features import Extractor, digits_extractor, open_extractor, scenes_extractor
from ditjax.evaluation.scoring import Reference, Seen, look, open_reference, score
from ditjax.evaluation.validation import Validator, held_out
from ditjax.files import lease
from ditjax.files.npz import load_array
from ditjax.parallel.rules import check_batch
from ditjax.runs import opening
from ditjax.runs.results import SAMPLES_FILE
from ditjax.sampling.draw import Drawer, decoder_of, draw_to, sampling_protocol
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.training.task import Frozen

GUIDED_FILE = "guided.npz"


class Evaluated(NamedTuple):
    """Metrics name -> value, the protocol that fixes their meaning, and what it took.

    `reference` names what the samples were compared with. `seconds`: of drawing alone.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    reference: str
    seconds: float


class Evaluator:
    """Draws and scores samples by config.evaluate, on a mesh, as often as it is called.

    Sampler and features compile at the first call only: a training loop may call it at every
    interval, a grid for every cell.
    """

    def __init__(self, c: Config, mesh: Mesh, frozen: Frozen, drawer: Drawer | None = None) -> None:
        """Opens features and reference. Raises UserError for what is none, or draws no samples."""
        sampling_of(c, make_task(c))
        if c.evaluate.features == "none":
            raise UserError(
                "config.evaluate.features is 'none': expected 'digits', 'scenes' or"
                " 'inception:FILE' (evaluate and grid take --features=)."
            )
        check_batch(c.sample.batch_size, mesh, "config.sample.batch_size")
        self._drawer = drawer or Drawer(mesh, frozen)
        self._decoder = decoder_of(frozen)
        self.extractor = open_extractor(c.evaluate.features, mesh)
        self.reference = reference_of(c, self.extractor)
        self._validate = Validator(mesh, frozen)
        self._validate.protocol(c)  # a split that is not there is found out now

    @property
    def distance(self) -> str:
        """The metric that a model is chosen by: 'fid' or 'fd_digits'."""
        return scoring.distance_name(self.extractor.family)

    def in_memory(self, c: Config, params: Any, num: int) -> Evaluated:
        """Distance of `num` samples, validation loss, what else is quick; nothing is written."""
        labels: list[np.ndarray] = []

        def images() -> Iterator[np.ndarray]:
            for part in self._drawer(
                c, params, [(0, num)], seed=c.evaluate.seed, label_of=_label_of(c)
            ):
                labels.append(part.label)
                yield part.images

        began = time.monotonic()
        seen = look(self.extractor, images(), num)
        seconds = time.monotonic() - began
        metrics = self._scored(c, seen, np.concatenate(labels), brief=True)
        metrics |= self._validate(c, params)
        return Evaluated(metrics, self.protocol(c, num), self.reference.name, seconds)

    @lease.scope()
    def of_run(self, c: Config, params: Any, folder: Path, model: dict[str, Any]) -> Evaluated:
        """config.evaluate.num_samples samples, drawn to `folder`, scored.

        Cut off, the same call again draws what is missing. `model` says whose samples they are.
        Raises UserError while another process writes samples there.
        """
        opening.own(folder, opening.SAMPLES_LEASE)
        num = c.evaluate.num_samples
        path = folder / SAMPLES_FILE
        seconds = self._draw(c, params, path, num, c.sample.cfg_scale, model)
        images = open_images(path)
        batches = images.batches(self.extractor.batch_size)
        seen = look(self.extractor, batches, num, title="features")
        metrics = self._scored(c, seen, load_array(path, "label"))
        if self.extractor.shipped:
            metrics |= self._digits_only(c, params, folder, model)
        metrics |= self._validate(c, params)
        return Evaluated(metrics, self.protocol_of_run(c), self.reference.name, seconds)

    def protocol_of_run(self, c: Config) -> dict[str, Any]:
        """The protocol of what `of_run` gives, known before anything is drawn."""
        protocol = self.protocol(c, c.evaluate.num_samples)
        if self.extractor.shipped:
            protocol |= {
                "guided_scale": c.evaluate.guided_scale,
                "guided_num": c.evaluate.guided_num if c.evaluate.guided_scale else 0,
            }
        return protocol

    def protocol(self, c: Config, num: int) -> dict[str, Any]:
        """Everything that two results must share to be compared."""
        protocol = scores_protocol(self.extractor, self.reference, num, self._sampling(c))
        return protocol | self._validate.protocol(c)

    def _sampling(self, c: Config) -> dict[str, Any]:
        return sampling_protocol(
            c, seed=c.evaluate.seed, labels=c.evaluate.labels, decoder=self._decoder
        )

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
        )

    def _scored(
        self, c: Config, seen: Seen, label: np.ndarray, *, brief: bool = False
    ) -> dict[str, float]:
        found = score(
            seen,
            self.reference.statistics,
            self.reference.pool,
            family=self.extractor.family,
            seed=c.evaluate.seed,
            brief=brief,
        )
        if seen.judged is not None:
            found["accuracy"] = float(np.mean(seen.judged == label))
        return found

    def _digits_only(
        self, c: Config, params: Any, folder: Path, model: dict[str, Any]
    ) -> dict[str, float]:
        """How far real digits are from real digits, and the class accuracy under guidance."""
        name, reference = "digits", "digits/train"
        if self.extractor.name == "scenes":
            name, reference = held_out(c).name, _reference_name(c)
        of_real = floor(self.extractor.name, name, reference, c.data.data_dir)
        found = {"fd_digits_floor": of_real}
        if c.evaluate.guided_scale not in (0, c.sample.cfg_scale):
            path = folder / GUIDED_FILE
            self._draw(c, params, path, c.evaluate.guided_num, c.evaluate.guided_scale, model)
            assert self.extractor.judge is not None
            seen = self.extractor.judge(load_array(path, "arr_0"))
            found["accuracy_guided"] = float(np.mean(seen == load_array(path, "label")))
        return found


def scores_protocol(
    extractor: Extractor, reference: Reference, num: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """The protocol of scores: features, reference, number, and how the samples were drawn."""
    metric = f"FD-{extractor.family}" if extractor.family else "FID"
    return {
        "metric": metric,
        **extractor.record,
        **reference.record,
        "num_samples": num,
        **sampling,
    }


def reference_of(c: Config, extractor: Extractor) -> Reference:
    """config.evaluate.reference, or the images that the recipe trains on; a data set's is kept.

    Raises UserError.
    """
    return open_reference(_reference_name(c), extractor, c.data.image_size, c.data.data_dir)


def _reference_name(c: Config) -> str:
    if c.evaluate.reference:
        return c.evaluate.reference
    if is_latents(c.data.name):
        return source.images_of_latents(c.data.name)
    return f"{c.data.name}/{c.data.split}"


@functools.cache
def floor(features: str, name: str, against: str, data_dir: str) -> float:
    """FD-digits of a data set's test images to `against`: what no model need go below."""
    extractor = scenes_extractor() if features == "scenes" else digits_extractor()
    assert extractor.side is not None
    reference = open_reference(against, extractor, extractor.side, data_dir)
    images = records.load_arrays(name, "test", data_dir or None)["image"]
    seen = look(extractor, [images], len(images))
    return score(seen, reference.statistics, None, family="digits", brief=True)["fd_digits"]


def _label_of(c: Config) -> Sequence[int] | None:
    return None if c.evaluate.labels == "uniform" else range(c.data.num_classes)
