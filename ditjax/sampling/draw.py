"""Draw samples in memory or into an npz file, and describe their protocol."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.files.store import place
from ditjax.parallel import processes
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening
from ditjax.runs.checkpoint import Step
from ditjax.runs.log import Progress
from ditjax.runs.snapshots import average_record
from ditjax.sampling.given import GivenRows, cycled, held_out_given
from ditjax.sampling.program import NOTHING, BatchSampler, batch_sampler, sampling_of
from ditjax.sampling.samples import SampleWriter
from ditjax.tasks import make_task
from ditjax.tasks.adapters import adapters_record, with_adapters
from ditjax.tasks.image_vectors import IMAGE_CLIP, PRIOR
from ditjax.training.program import precise
from ditjax.training.task import Frozen


class Drawn(NamedTuple):
    """Samples start to start + B: images u8[B,..,H,W,C], label i32[B]."""

    start: int
    images: np.ndarray
    label: np.ndarray


class Drawer:
    """Draw samples of recipes that share their network, mesh and frozen weights.

    A sampler compiles once: seed, weights, labels, and the scale and interval of guidance are its
    arguments.
    """

    def __init__(self, mesh: Mesh, frozen: Frozen) -> None:
        self.mesh, self._frozen = mesh, frozen
        self._programs: dict[Any, BatchSampler] = {}

    def __call__(
        self,
        c: Config,
        params: Any,
        ranges: Iterable[tuple[int, int]],
        *,
        seed: int,
        label_of: Sequence[int] | None = None,
        given: GivenRows | None = None,
        title: str = "",
        num: int = 0,
    ) -> Iterator[Drawn]:
        """Yield the samples of each range [start, stop), drawn by config.sample.

        Sample i depends only on (seed, i), its label, which is label_of[i % len], or uniform if
        `label_of` is None, and on what it is `given`: by default, if the network needs anything, on
        record i of config.evaluate.split, whose label it takes then unless `label_of` is given.
        With a title, progress towards `num` samples is reported.
        """
        sampler = self.sampler(c)
        guidance = sampling_of(c, make_task(c)).guidance
        given = given or held_out_given(c)
        progress = Progress(title, num, "images") if title else None
        for first, last in ranges:
            for start in range(first, last, sampler.batch_size):
                indices = np.arange(start, start + sampler.batch_size)
                wanted = None if label_of is None else cycled(indices, np.asarray(label_of))
                rows = given.rows(indices) if given else NOTHING
                keys, conditions, label, known = sampler.place(seed, start, wanted, rows)
                if known is not None:
                    guidance = guidance._replace(given=known)
                with precise(c), sampler.compiling():
                    drawn = sampler.program(params, self._frozen, keys, conditions, guidance)
                count = min(last - start, sampler.batch_size)
                yield Drawn(start, np.asarray(drawn)[:count], label[:count])
                if progress:
                    progress.report(start + count)

    def whole(
        self,
        c: Config,
        params: Any,
        num: int,
        *,
        seed: int,
        label_of: Sequence[int] | None = None,
        given: GivenRows | None = None,
        title: str = "",
    ) -> Drawn:
        """Draw samples 0 to num - 1 in memory; with a title, progress is reported."""
        options: Any = {"seed": seed, "label_of": label_of, "given": given}
        parts = list(self(c, params, [(0, num)], title=title, num=num, **options))
        images, label = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
        return Drawn(0, images, label)

    def sampler(self, c: Config) -> BatchSampler:
        """The sampler of a recipe. Raises UserError for an illegal batch size or steps."""
        key = sampling_of(c, make_task(c)).compiled
        if key not in self._programs:
            task = make_task(c, self.mesh)
            self._programs[key] = batch_sampler(c, task, self.mesh)
        return self._programs[key]


def load_model(
    c: Config, workdir: str | os.PathLike[str], mesh: Mesh, step: Step = "latest"
) -> tuple[Any, dict[str, Any]]:
    """Load (the parameters that a run's samples are drawn with, the record of that model).

    Raises UserError.
    """
    params, found = opening.load_weights(c, make_task(c), workdir, mesh, step)
    params = with_adapters(c, params, mesh)
    record = model_record(workdir, found, params)
    return params, {**record, **average_record(c, place(workdir), found)}


def model_record(workdir: str | os.PathLike[str], step: int, params: Any) -> dict[str, Any]:
    """The record of the model that samples are drawn from."""
    return {"run": str(workdir), "step": step, "params_sha256": opening.digest(params)}


def sampling_protocol(
    c: Config,
    *,
    seed: int,
    labels: str,
    decoder: str,
    guide: str = "",
    others: Sequence[str] = (),
    text: str = "",
    vectors: Mapping[str, str] = {},
    given: GivenRows | None = None,
) -> dict[str, Any]:
    """Everything but the count that two sample sets must share for their scores to be compared.

    `labels`: 'uniform', 'balanced' or the requested classes. `decoder`: the SHA-256 of the
    autoencoder's parameters, or 'pixels'. `guide`: that of the weak network's, if one guides.
    `others`: those of further controls; `text`: that of the text encoder; `vectors`: those of what
    makes vectors of images; `given`: what samples are given. The model itself is not part of the
    protocol.
    """
    s = c.sample
    guided = s.cfg_scale != 1
    return {
        "labels": labels,
        "seed": seed,
        "sampler": s.sampler,
        "steps": s.steps,
        "cfg_scale": s.cfg_scale,
        "cfg_channels": s.cfg_channels if guided else None,
        "cfg_interval": list(s.cfg_interval) if guided else None,
        "clip_x0": s.clip_x0,
        "weights": s.weights,
        "ema_decay": c.train.ema_decay if s.weights == "ema" else None,
        "decoder": decoder,
        "image_size": c.data.image_size,
        **({"frames": [c.data.frames, c.data.frame_stride]} if c.data.frames > 1 else {}),
        "sampling_precision": [c.model.dtype, c.model.matmul],
        **({"guide": guide} if guide and guided else {}),
        **({"control_others": list(others)} if others else {}),
        **({"text_encoder": text} if text else {}),
        **({"vectors": dict(vectors)} if vectors else {}),
        **(given.record if given else {}),
        **adapters_record(c),
        **sampling_of(c, make_task(c)).protocol,
    }


def draw_to(
    path: str | os.PathLike[str],
    drawer: Drawer,
    c: Config,
    params: Any,
    provenance: Mapping[str, Any],
    *,
    seed: int,
    label_of: Sequence[int] | None = None,
    given: GivenRows | None = None,
    size: tuple[int, int] | None = None,
) -> float:
    """Draw config.sample.num samples into the npz at `path`, writing each batch before the next.

    Existing samples of the same provenance are kept; others are replaced. Every process draws, and
    the first one writes. `size` are the images' (H, W), by default the recipe's. Returns the
    duration in seconds.
    """
    began, num = time.monotonic(), c.sample.num
    shape = (*size, c.data.channels) if size else c.data.shape
    drawer.sampler(c)  # raises before anything is written
    writer, ranges = None, []
    if is_primary():
        writer = SampleWriter(path, num, shape, provenance, labelled=True, replace=True)
        ranges = list(writer.missing(c.sample.batch_size))
    ranges = processes.broadcast_ranges(ranges)
    options: Any = {"seed": seed, "label_of": label_of, "given": given}
    for part in drawer(c, params, ranges, title="sample", num=num, **options):
        if writer:
            writer.write(part.start, part.images, part.label)
    if writer:
        writer.finish()
    processes.barrier()  # now the other processes can read the file
    return time.monotonic() - began


def decoder_of(frozen: Frozen) -> str:
    """The decoder's entry in a protocol: the digest of its parameters, or 'pixels'."""
    return opening.digest(frozen["autoencoder"]) if "autoencoder" in frozen else "pixels"


def digests_of(frozen: Frozen) -> dict[str, Any]:
    """The arguments of `sampling_protocol` that are digests of frozen weights."""
    found: dict[str, Any] = {"decoder": decoder_of(frozen)}
    for name in ("guide", "text"):
        if name in frozen:
            found[name] = opening.digest(frozen[name])
    vectors = (name for name in (IMAGE_CLIP, PRIOR) if name in frozen)
    found["vectors"] = {name: opening.digest(frozen[name]) for name in vectors}
    if "controls" in frozen:
        found["others"] = [opening.digest(each) for each in frozen["controls"]]
    return found
