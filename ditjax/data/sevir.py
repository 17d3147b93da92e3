"""SEVIR's radar events (Veillette et al. 2020) as clips: 'sevir:PATH'.

PATH holds CATALOG.csv and the HDF5 files that it names, as on the Registry of Open Data. Of each
event, 49 frames of 384x384 every five minutes, the windows of 25 frames at frames 0, 12 and 24 are
one record each; no window spans two events. Reading HDF5 needs h5py (the extra `sevir`), once.
"""

import csv
import hashlib
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.builders import ConvertedBuilder
from ditjax.data.clips import as_animation
from ditjax.errors import UserError, first_few, reason

SEVIR_WINDOW, SEVIR_STRIDE = 25, 12  # frames
# The first day after each split but the last (Gao et al. 2022, Earthformer).
SEVIR_SPLITS = {"train": "2019-01-01", "validation": "2019-06-01", "test": "9999"}
_IMAGE_TYPE = "vil"
_COLUMNS = ("id", "file_name", "file_index", "img_type", "time_utc", "pct_missing")


class SevirEvent(NamedTuple):
    """An event: a row of an HDF5 file."""

    id: str
    file: str
    row: int


class SevirListing(NamedTuple):
    """The whole events of a catalogue, by split; `digest` covers it and the times of files."""

    root: Path
    events: Mapping[str, tuple[SevirEvent, ...]]
    digest: str
    left_out: str

    def content(self) -> dict[str, str]:
        """split -> digest of its events, and of the sizes of the files they lie in."""
        found = {}
        for split, events in self.events.items():
            sizes = {each.file: (self.root / each.file).stat().st_size for each in events}
            text = repr((sorted(sizes.items()), [tuple(each) for each in events]))
            found[split] = hashlib.sha256(text.encode()).hexdigest()
        return found


def list_sevir(path: str, max_damaged: int = 0) -> SevirListing:
    """Read the catalogue of a folder. Raises UserError for one that is not SEVIR's.

    Left out are events with missing pixels, and ids that occur twice.
    """
    del max_damaged  # an event that is there can be read
    root = Path(path).expanduser()
    catalog = root / "CATALOG.csv"
    try:
        text = catalog.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"sevir:{path}: CATALOG.csv cannot be read ({reason(error)}): expected SEVIR's folder."
        ) from error
    rows = csv.DictReader(text.splitlines())
    if lacking := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise UserError(f"{catalog} lacks the columns {', '.join(lacking)}: expected SEVIR's.")
    vil = [row for row in rows if row["img_type"] == _IMAGE_TYPE]
    counts = Counter(row["id"] for row in vil)
    try:
        whole = [r for r in vil if float(r["pct_missing"]) == 0 and counts[r["id"]] == 1]
        events = {
            split: tuple(
                SevirEvent(row["id"], row["file_name"], int(row["file_index"]))
                for row in whole
                if first <= row["time_utc"] < last
            )
            for split, (first, last) in _periods().items()
        }
    except ValueError as error:
        raise UserError(f"{catalog} cannot be read ({reason(error)}).") from error
    events = {split: found for split, found in events.items() if found}
    if not events:
        raise UserError(f"{catalog} lists no whole event of type {_IMAGE_TYPE!r}.")
    files = {each.file for found in events.values() for each in found}
    if absent := sorted(name for name in files if not (root / name).is_file()):
        raise UserError(
            f"sevir:{path}: {len(absent)} of {len(files)} files of the catalogue are missing, such"
            f" as {first_few(absent, 1)}: download them, or remove their events from CATALOG.csv."
        )
    status = "".join(f"{name}\0{(root / name).stat().st_mtime_ns}\n" for name in sorted(files))
    digest = hashlib.sha256((text + status).encode()).hexdigest()
    return SevirListing(root, events, digest, f"{len(vil) - len(whole)} events left out")


def _periods() -> dict[str, tuple[str, str]]:
    lasts = list(SEVIR_SPLITS.values())
    return dict(zip(SEVIR_SPLITS, zip(["", *lasts[:-1]], lasts, strict=True), strict=True))


def has_h5py() -> bool:
    """Whether HDF5 can be read."""
    return importlib.util.find_spec("h5py") is not None


class SevirWindows(
    ConvertedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """SEVIR's windows, converted once: an animated PNG each, label 0, and 'event/first frame'."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(
        self, listing: SevirListing, content: dict[str, str], data_dir: Path, max_damaged: int = 0
    ) -> None:
        if not has_h5py():
            raise UserError(
                f"sevir:{listing.root} needs h5py to be converted: pip install 'ditjax[sevir]'."
            )
        super().__init__(listing, content, data_dir, max_damaged)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{SEVIR_WINDOW} frames of vertically integrated liquid each, 0 to 255.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["rain"]),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://registry.opendata.aws/sevir/",
            license="none: no restrictions (Registry of Open Data on AWS)",
            disable_shuffling=True,
        )

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        starts = range(0, 49 - SEVIR_WINDOW + 1, SEVIR_STRIDE)
        i = 0
        for event in self._listing.events[split]:
            frames = read_event(self._listing.root, event)
            for start in starts:
                window = frames[start : start + SEVIR_WINDOW]
                encoded = as_animation([Image.fromarray(frame) for frame in window])
                yield i, {"image": encoded, "label": 0, "file_name": f"{event.id}/{start}"}
                i += 1


def read_event(root: str | os.PathLike[str], event: SevirEvent) -> np.ndarray:
    """The frames u8[49,H,W] of an event. Raises UserError if the file holds another, or none."""
    h5py: Any = importlib.import_module("h5py")
    path = Path(root) / event.file
    try:
        with h5py.File(path, "r") as file:
            ids, data = file["id"], file[_IMAGE_TYPE]
            if not 0 <= event.row < len(ids):
                raise ValueError(f"it has {len(ids)} events")
            found = ids[event.row]
            found = found.decode() if isinstance(found, bytes) else str(found)
            if found != event.id:
                raise ValueError(f"event {event.row} is {found!r}")
            frames = np.asarray(data[event.row])
            if frames.dtype != np.uint8 or frames.ndim != 3 or frames.shape[2] != 49:
                raise ValueError(f"it holds {frames.dtype}{list(frames.shape)}, not u8[H,W,49]")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: event {event.id!r}, row {event.row} of the catalogue, cannot be read"
            f" ({reason(error)}): download the file again, or remove the event from CATALOG.csv."
        ) from error
    return np.ascontiguousarray(frames.transpose(2, 0, 1))
