"""Cascades: what one network draws, others enlarge, each a run of its own (Ho et al. 2021)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.config import Config, changed
from ditjax.errors import UserError
from ditjax.files import npz
from ditjax.files.paths import split_paths
from ditjax.runs.results import load_samples
from ditjax.sampling.editing import Request, upscale_request
from ditjax.sampling.pipeline import Output, Pipeline, open_source
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.training.task import Known

SEEDS = 2**32


class Upsampler(NamedTuple):
    """A run that enlarges images, and the noise that it adds to them: None for its recipe's."""

    path: str
    noise: float | None = None


def parse_upsamplers(text: str) -> tuple[Upsampler, ...]:
    """'RUN[:NOISE],...' -> the runs; what follows a colon is the noise if it is a number."""
    found = []
    for word in map(str, split_paths(text, "--upsample") if text else ()):
        path, _, number = word.rpartition(":")
        try:
            found.append(Upsampler(path, float(number)) if path else Upsampler(word))
        except ValueError:
            found.append(Upsampler(word))
    return tuple(found)


class Cascade:
    """A pipeline, and those that enlarge what it draws, lowest first.

    Stage k has the seed (seed + k) mod 2^32, so that its noise is its own. Images are rounded to
    bytes between the stages. A stage is given the label of each image.
    """

    def __init__(self, base: Pipeline, upsamplers: Sequence[Upsampler | str]) -> None:
        """Open the runs. Raises UserError for those that do not follow one another."""
        self.stages = [base]
        for k, each in enumerate(upsamplers, start=1):
            run = Upsampler(each) if isinstance(each, str) else each
            source = open_source(run.path)
            changes: dict[str, Any] = {"seed": (base.config.seed + k) % SEEDS}
            if run.noise is not None:
                changes["given"] = {"noise": run.noise}
            c = changed(source.config, changes)
            _check_follows(self.stages[-1].config, c, run.path)
            self.stages.append(Pipeline(source, c))

    def __call__(
        self,
        classes: Sequence[int | str] | str | None = None,
        *,
        seed: int | None = None,
        quiet: bool = False,
        **keys: Any,
    ) -> list[Output]:
        """Draw images by the base, with its arguments, and enlarge them: one output a stage."""
        base, *others = self.stages
        seed = base.config.seed if seed is None else seed
        drawn = [base(classes, seed=seed, quiet=quiet, **keys)]
        for k, stage in enumerate(others, start=1):
            last = drawn[-1]
            options: Any = {"seed": (seed + k) % SEEDS, "num": len(last.array), "quiet": quiet}
            drawn.append(stage.upscale(last.array, last.label.tolist(), **options))
        return drawn

    def write(self, folder: Path, record: Mapping[str, Any], samples: str) -> dict[str, Any]:
        """Enlarge what the base has written to `stage_file(0)` of a folder, `record` its record.

        The last stage is written to `samples`. After an interruption the same call draws what is
        missing. Returns the record of the last stage with those of all.
        """
        records = [dict(record)]
        last = len(self.stages) - 1
        for k, stage in enumerate(self.stages[1:], start=1):
            below = folder / stage_file(k - 1)
            images, label = load_samples(below)
            request = _request_of(stage.config, images, below)
            path = folder / (samples if k == last else stage_file(k))
            labels = np.asarray(label).tolist()
            records.append(stage.write(path, labels, edit=request, num=len(images)))
        return {**records[-1], "stages": records}


def stage_file(k: int) -> str:
    """The file of the images of stage k but the last, in the folder of a cascade's samples."""
    return f"stage{k}.npz"


def _request_of(c: Config, images: np.ndarray, path: str | os.PathLike[str]) -> Request:
    """The edit of a stage, whose record says how the images below were drawn, and from what."""
    request = upscale_request(c, images)
    with npz.reading(path) as archive:
        return request._replace(record={**request.record, "of": npz.read_provenance(archive)})


def _check_follows(below: Config, c: Config, path: str) -> None:
    """Raise UserError for a stage that cannot enlarge the images of the one below."""
    side, found = c.data.image_size, (below.data.channels, below.data.num_classes)
    ours = (c.data.channels, c.data.num_classes)
    if ours != found:
        raise UserError(
            f"{path} draws images of {ours[0]} channel(s) and {ours[1]} classes, and the stage"
            f" below of {found[0]} and {found[1]}: expected the same."
        )
    lower, wanted = below.data.image_size, c.given.side
    if (wanted and wanted != lower) or side <= lower or side % lower:
        of = f" from {wanted}x{wanted}" if wanted else ""
        raise UserError(
            f"{path} enlarges images to {side}x{side}{of}, and the stage below draws"
            f" {lower}x{lower}: expected runs that follow one another, lowest first."
        )
    edits = sampling_of(c, make_task(c)).edits
    if edits is None:
        raise UserError(f"{path} is a run of task {c.task!r}, which does not edit images.")
    edits(Known(np.zeros((1, lower, lower, c.data.channels), np.float32)))
