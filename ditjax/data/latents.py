"""Encoded data sets: the autoencoder's moments of every image and of its mirror, as array_record.

The moments are stored and not samples, because the paper draws the posterior anew at every training
step. A recipe names such a data set `latents:PATH`; the directory has the layout of
tensorflow-datasets.

Each shard holds a fixed range of the records and is renamed into place when it is whole;
dataset_info.json is written last, and until then there is no data set. So a killed encoding resumes
at the first missing shard, several processes may share the shards of one set, and the finished
files have the same bytes however often the encoding was interrupted.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from ditjax.data.builders import count_records, expand_home
from ditjax.data.names import LATENTS
from ditjax.errors import UserError, reason
from ditjax.files import faults
from ditjax.files.atomic import (
    atomic_path,
    load_json,
    recordable,
    unfinished,
    write_atomic,
    write_json,
)
from ditjax.files.store import for_readers, place, present

# ImageNet's 84 GB are 626 files of 2,048 records, each seconds of work on an accelerator.
SHARD_MB = 128

_NAME = "latents"
_VERSION = "1.0.0"
_METADATA = "metadata.json"
STATISTICS = "statistics"  # the key of the metadata with the statistics of the latents
_INFO = "dataset_info.json"


class LatentRecord(TypedDict):
    """One image: mean and log_variance f32[2,h,w,c], of the image and then of its mirror."""

    mean: np.ndarray
    log_variance: np.ndarray
    label: int


class LatentWriter:
    """Write `num_examples` records of `shape` (h, w, c), in record order, below `directory`.

    `metadata` is plain JSON of all that the records depend on: images, split, autoencoder. A set
    that was begun with other metadata is not resumed. Raises UserError if the directory holds such
    a set, or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        num_examples: int,
        metadata: Mapping[str, Any],
        shard_mb: int = SHARD_MB,
    ) -> None:
        if set(split) & set("[]+"):
            raise UserError(
                f"split {split!r} is a slice or a sum: encode a whole split, such as"
                f" {split.partition('[')[0].partition('+')[0]!r}, and take slices of its latents."
            )
        if shard_mb < 1:
            raise UserError(f"shards of {shard_mb} MiB: expected at least 1.")
        self.folder, metadata = _prepared(place(directory)), recordable(metadata)
        self._split, self._shape, self._class_names = split, shape, class_names
        size = 2 * 2 * 4 * math.prod(shape)
        per_shard = min(num_examples, max(1, shard_mb * 2**20 // size))
        self._shards = [
            range(start, min(start + per_shard, num_examples))
            for start in range(0, num_examples, per_shard)
        ]
        self.finished = faults.exists(self.folder / _INFO)
        if self.finished:
            # Older sets recorded fewer keys; the others are not compared.
            there = self._read_metadata()
            self._check({key: value for key, value in metadata.items() if key in there})
            return
        # The metadata file of tensorflow-datasets describes the shards while they are written.
        record = {**metadata, "num_examples": num_examples, "records_per_shard": per_shard}
        if faults.exists(self.folder / _METADATA):
            there = self._read_metadata()
            self._check({k: v for k, v in record.items() if k in there or k != STATISTICS})
        else:
            write_json(self.folder / _METADATA, record)

    def _read_metadata(self) -> dict[str, Any]:
        path = self.folder / _METADATA
        try:
            there = load_json(path)
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UserError(f"{path} cannot be read: remove {self.folder}, and encode again.")
        return there

    def _check(self, ours: Mapping[str, Any]) -> None:
        there = self._read_metadata()
        for key, value in ours.items():
            if there.get(key) != value:
                raise UserError(
                    f"{self.folder} holds latents with {key}={there.get(key)!r}, and this command"
                    f" has {value!r}: give another --out, or remove that folder."
                )

    def shards(self, index: int = 0, count: int = 1) -> list[range]:
        """The shards of process `index` of `count`, as ranges of records."""
        return self._shards[index::count]

    def missing(self, index: int = 0, count: int = 1) -> list[range]:
        """The shards of that process that are not on disk, or damaged there."""
        if self.finished:
            return []
        shards = self.shards(index, count)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(count_records, map(self._path, shards)))
        return [shard for shard, n in zip(shards, found, strict=True) if n != len(shard)]

    def write(self, shard: range, records: Iterable[LatentRecord]) -> None:
        """Write one of the `missing` shards; it is on disk when this returns."""
        path, written = self._path(shard), 0
        for left in unfinished(path):
            left.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            with _disk_errors():
                # One record a group, as tensorflow-datasets writes it, for reading at random.
                writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
            for record in records:
                example = self._example(record)
                with _disk_errors():
                    writer.write(example)
                written += 1
            with _disk_errors():
                writer.close()
            if written != len(shard):
                raise ValueError(f"shard {shard} got {written} records")

    def finish(self) -> None:
        """Complete the data set. A second call does nothing.

        Any number of processes may call this once all have written. Raises UserError if a shard is
        missing.
        """
        if self.finished:
            return
        if gap := self.missing():
            raise UserError(
                f"{self.folder}: {len(gap)} of {len(self._shards)} shards are missing; run the"
                " same command again to write them."
            )
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=_NAME,
                version=tfds.core.Version(_VERSION),
                data_dir=os.fspath(self.folder),
                module_name=__name__,
                release_notes={_VERSION: "First release."},
            ),
            description="Moments of a KL autoencoder: of each image, then of its mirror.",
            features=_features(self._shape, self._class_names),
            disable_shuffling=True,  # the records are in the order of the images
        )
        info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
        split = tfds.core.SplitInfo(
            name=self._split,
            shard_lengths=[len(shard) for shard in self._shards],
            num_bytes=sum(self._path(shard).stat().st_size for shard in self._shards),
            filename_template=self._template,
        )
        info.set_splits(tfds.core.SplitDict([split]))
        with tempfile.TemporaryDirectory() as scratch:
            info.write_to_directory(scratch)
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == _INFO):
                write_atomic(self.folder / path.name, path.read_bytes())
        self.finished = True

    @property
    def _template(self) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=os.fspath(self.folder),
            dataset_name=_NAME,
            split=self._split,
            filetype_suffix="array_record",
        )

    def _path(self, shard: range) -> Path:
        index = self._shards.index(shard)
        return place(
            self._template.sharded_filepath(shard_index=index, num_shards=len(self._shards))
        )

    def _example(self, record: LatentRecord) -> bytes:
        """A record as a tf.train.Example in the order label, log_variance, mean.

        The serializer of tensorflow-datasets writes the features in an order that changes from
        process to process. It takes 3 ms for a record of ImageNet's latents, over 20 times as long.
        """
        floats = {
            name: _message(2, _message(1, record[name].astype("<f4").reshape(2, *self._shape)))
            for name in ("log_variance", "mean")
        }
        label = _message(3, _message(1, _varint(record["label"])))
        features = {"label": label, **floats}
        return _message(
            1,
            b"".join(
                _message(1, _message(1, name.encode()) + _message(2, feature))
                for name, feature in features.items()
            ),
        )


def _message(field: int, payload: bytes | np.ndarray) -> bytes:
    """One length-delimited field in the wire format of Protocol Buffers.

    A tf.train.Example is field 1, a map (key 1, value 2) of features. A feature holds a list of
    floats in field 2 or of integers in field 3; either is a packed field 1.
    """
    data = payload if isinstance(payload, bytes) else payload.tobytes()
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Base 128, low digits first; all bytes but the last have their high bit set."""
    digits = []
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise OSError for the RuntimeError by which array_record reports a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _features(
    shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> tfds.features.FeaturesDict:
    moments = tfds.features.Tensor(shape=(2, *shape), dtype=np.float32)
    return tfds.features.FeaturesDict(
        {
            "mean": moments,
            "log_variance": moments,
            "label": tfds.features.ClassLabel(names=list(class_names)),
        }
    )


def _prepared(folder: Path) -> Path:
    return place(expand_home(os.fspath(folder))) / _NAME / _VERSION


def recorded_statistics(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The statistics of the latents at `path`, as recorded; None for sets older than the record."""
    try:
        found = load_json(_prepared(place(path)) / _METADATA)
    except (OSError, ValueError):
        return None
    statistics = found.get(STATISTICS) if isinstance(found, dict) else None
    return statistics if isinstance(statistics, dict) else None


def open_latents(path: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """The builder of the encoded data set at `path`. Raises UserError if none is complete there."""
    folder, title = place(path), f"data set {LATENTS + os.fspath(path)!r}"
    found = _prepared(folder)
    # Path.exists raises for a name that is too long.
    if present(found / _METADATA) and not present(found / _INFO):
        raise UserError(
            f"{title}: its encoding is not finished; resume it with the same command of"
            f" python -m ditjax.encode and --out={folder}."
        )
    if not present(found / _INFO):
        raise UserError(
            f"{title}: no encoded latents at {folder}: make them with"
            f" python -m ditjax.encode --config=... --out={folder}"
        )
    try:
        builder = tfds.builder_from_directory(os.fspath(for_readers(found.resolve())))
        features = builder.info.features
        shape = features["mean"].shape
        whole = shape == features["log_variance"].shape and len(shape) == 4 and "label" in features
    except Exception as error:  # a damaged JSON file fails in as many ways as it has keys
        raise UserError(
            f"{title}: the description in {found} cannot be read ({reason(error)}): remove the"
            " latents and encode again."
        ) from error
    if not whole:
        raise UserError(f"{title}: {found} does not hold latents: encode again.")
    return builder
