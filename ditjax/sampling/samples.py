"""Samples written to disk batch by batch, so that a killed run resumes where it was.

Each batch is a file START-STOP.npz in FILE.parts, renamed into place when it is whole, so a crash
cannot damage what was written before. Sample i depends on (seed, i) only, so several processes may
write parts of one set, and a lost part is drawn again. At the end the parts are copied, one in
memory at a time, to an npz as ADM's evaluator reads it, and removed. This needs twice the space for
a moment.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditjax.data.images import Images
from ditjax.errors import UserError
from ditjax.files import faults, npz
from ditjax.files.atomic import atomic, load_json, write_atomic
from ditjax.files.npz import provenance_text, read_provenance
from ditjax.files.store import place, remove_tree

_PART = re.compile(r"(\d{9})-(\d{9})\.npz")


class SampleWriter:
    """Write `count` images u8[H,W,C] or clips u8[F,H,W,C], and labels i32 if `labelled`, to `path`.

    `provenance` is plain JSON of all that the samples depend on (weights, sampler, seed), and is
    stored in the npz. A set that was begun with another provenance is removed with `replace`;
    otherwise UserError is raised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        count: int,
        shape: tuple[int, ...],
        provenance: Mapping[str, Any],
        *,
        labelled: bool,
        replace: bool = False,
    ) -> None:
        if count < 1 or len(shape) not in (3, 4) or min(shape) < 1 or shape[-1] not in (1, 3):
            raise UserError(
                f"{count} samples of {list(shape)}: expected at least one, of [H,W,C] or [F,H,W,C]"
                " with C = 1 or 3."
            )
        self.path, self.count = place(path), count
        self.shape, self.labelled = tuple(shape), labelled
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self._provenance = provenance_text(provenance)
        self._identity = _identity(json.loads(str(self._provenance)))
        self._record = json.dumps(
            [count, list(shape), labelled, str(self._provenance)], sort_keys=True
        )
        self.finished = self._is_finished(replace)
        if not self.finished:
            self._begin(replace)

    def missing(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of at most `size` samples that are missing on disk, in order."""
        if size < 1:
            raise UserError(f"batches of {size} samples: expected at least 1.")
        if self.finished:
            return
        end = 0
        for start, stop in [*self._found(), (self.count, self.count)]:
            for first in range(end, start, size):
                yield first, min(first + size, start)
            end = stop

    def write(self, start: int, images: Images, label: NDArray[Any] | None = None) -> None:
        """Write samples start to start + B: images u8[B,H,W,C], and label i[B] if labelled.

        They are on disk when this returns. Raises UserError for another type, shape or range.
        """
        images, stop = np.asarray(images), start + len(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or len(images) == 0:
            raise UserError(
                f"samples are {images.dtype}{list(images.shape)}, expected"
                f" u8[B,{','.join(map(str, self.shape))}]."
            )
        if not 0 <= start < stop <= self.count:
            raise UserError(f"samples {start} to {stop}: expected a range of {self.count}.")
        arrays: dict[str, NDArray[Any]] = {"arr_0": images}
        if self.labelled != (label is not None):
            raise UserError("every batch of a labelled set needs labels, and no other has them.")
        if label is not None:
            label = np.asarray(label)
            if label.shape != images.shape[:1] or label.dtype.kind not in "iu":
                raise UserError(
                    f"labels {label.dtype}{list(label.shape)} for {len(images)} images: expected"
                    " one integer per image."
                )
            arrays["label"] = label.astype(np.int32)
        with atomic(self._part(start, stop)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def finish(self) -> Path:
        """Write the npz of all samples, in order, and remove the parts. Returns its path.

        One process calls this once all have written; a second call does nothing. Raises UserError
        if a sample is missing.
        """
        if not self.finished:
            gap = next(self.missing(self.count), None)
            if gap is not None:
                raise UserError(
                    f"{self.path}: samples {gap[0]} to {gap[1]} of {self.count} are missing; run"
                    " the same command again to draw them."
                )
            found = self._found()
            with atomic(self.path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
                self._join(archive, "arr_0", (self.count, *self.shape), np.dtype(np.uint8), found)
                if self.labelled:
                    self._join(archive, "label", (self.count,), np.dtype(np.int32), found)
                with archive.open("provenance.npy", "w") as member:
                    np.lib.format.write_array(member, self._provenance, allow_pickle=False)
            self.finished = True
        remove_tree(self.parts, ignore_errors=True)
        return self.path

    def _join(
        self,
        archive: zipfile.ZipFile,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        found: list[tuple[int, int]],
    ) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for start, stop in found:
                try:
                    with npz.reading(self._part(start, stop)) as part:
                        rows = npz.read_array(part, name)
                except UserError as error:
                    raise UserError(
                        f"{error} Remove that part, and run the same command again to draw it."
                    ) from error
                member.write(rows.tobytes())

    def _part(self, start: int, stop: int) -> Path:
        return self.parts / f"{start:09d}-{stop:09d}.npz"

    def _found(self) -> list[tuple[int, int]]:
        """Ranges of the whole parts, in order and without overlap."""
        found: list[tuple[int, int]] = []
        for name in sorted(path.name for path in self.parts.iterdir()):
            match = _PART.fullmatch(name)
            if match is None:
                continue
            start, stop = int(match[1]), int(match[2])
            # Parts of processes with different batch sizes may overlap: the first one counts.
            if (not found or start >= found[-1][1]) and self._whole(start, stop):
                found.append((start, stop))
        return found

    def _whole(self, start: int, stop: int) -> bool:
        try:
            with npz.reading(self._part(start, stop)) as part:
                if self.labelled and npz.shape_and_dtype(part, "label")[0] != (stop - start,):
                    return False
                return npz.shape_and_dtype(part, "arr_0")[0] == (stop - start, *self.shape)
        except UserError:
            return False  # damaged: it is drawn again and replaced

    def _begin(self, replace: bool) -> None:
        record = self.parts / "record.json"
        there = faults.exists(record)
        if there and not self._is_record(record):
            if not replace:
                raise UserError(_differs(f"{self.parts} holds part of other samples"))
            remove_tree(self.parts)
            there = False
        if not there:
            write_atomic(record, self._record.encode())

    def _is_record(self, path: Path) -> bool:
        try:
            *theirs, text = load_json(path)
            *ours, _ = json.loads(self._record)
            return theirs == ours and _identity(json.loads(text)) == self._identity
        except (OSError, ValueError, TypeError):
            return False

    def _is_finished(self, replace: bool) -> bool:
        if not faults.exists(self.path):
            return False
        try:
            with npz.reading(self.path) as archive:
                same = (
                    npz.shape_and_dtype(archive, "arr_0")[0] == (self.count, *self.shape)
                    and ("label" in npz.names(archive)) == self.labelled
                    and _identity(read_provenance(archive)) == self._identity
                )
        except UserError:
            if not replace:
                raise
            return False
        if not (same or replace):
            raise UserError(_differs(f"{self.path} holds other samples"))
        return same


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without the path of the run: a model is known by its weights."""
    model = provenance.get("model")
    if not isinstance(model, dict) or "params_sha256" not in model:
        return dict(provenance)
    return {**provenance, "model": {k: v for k, v in model.items() if k != "run"}}


def _differs(what: str) -> str:
    return f"{what} (count, shape, seed, sampler or weights differ): remove it, or name another."
