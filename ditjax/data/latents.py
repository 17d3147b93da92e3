"""Encoded data sets: the autoencoder's moments of every image and of its mirror, as array_record.

Moments and not samples: the posterior is still drawn anew at every training step, as the paper
does. They lie in a directory of their own in tensorflow-datasets' layout, named `latents:PATH`.

Each shard holds a fixed range of the records and is renamed into place when whole;
dataset_info.json comes last, and until then there is no data set. So a killed encoding goes on at
the first shard that is missing, several processes may each write shards of one set, and the
finished files are the same bytes however often it was cut off.
"""

import contextlib
import json
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

from ditjax.data.builders import count_records, of_home
from ditjax.errors import UserError, reason
from ditjax.files.atomic import atomic_path, load_json, unfinished, write_atomic
from ditjax.files.masking import masked_tree

PREFIX = "latents:"
# ImageNet's 84 GB in 626 files of 2,048 records: seconds of work on an accelerator.
SHARD_MB = 128

_NAME = "latents"
_VERSION = "1.0.0"
_METADATA = "metadata.json"
_INFO = "dataset_info.json"


class Record(TypedDict):
    """One image: mean, log_variance f32[2,h,w,c], of the image and then of its mirror."""

    mean: np.ndarray
    log_variance: np.ndarray
    label: int


class LatentWriter:
    """Writes `num_examples` records of `shape` (h, w, c), in record order, below `directory`.

    `metadata` is plain JSON of all that they depend on (images, split, autoencoder): a set begun
    under another is not gone on with. Raises UserError where the directory holds latents of
    something else, or cannot be written.
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
        self._folder, metadata = _prepared(Path(directory)), masked_tree(metadata)
        self._split, self._shape, self._class_names = split, shape, class_names
        size = 2 * 2 * 4 * math.prod(shape)
        per_shard = min(num_examples, max(1, shard_mb * 2**20 // size))
        self._shards = [
            range(start, min(start + per_shard, num_examples))
            for start in range(0, num_examples, per_shard)
        ]
        self.finished = (self._folder / _INFO).is_file()
        if self.finished:
            # Sets from before said less: what they do not say is not compared.
            there = self._read()
            self._check({key: value for key, value in metadata.items() if key in there})
            return
        # tensorflow-datasets' own metadata file: while shards are written, it says what they are.
        record = {**metadata, "num_examples": num_examples, "records_per_shard": per_shard}
        if (self._folder / _METADATA).exists():
            self._check(record)
        else:
            write_atomic(self._folder / _METADATA, json.dumps(record).encode())

    def _read(self) -> dict[str, Any]:
        path = self._folder / _METADATA
        try:
            there = load_json(path)
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UserError(f"{path} cannot be read: remove {self._folder}, and encode again.")
        return there

    def _check(self, ours: Mapping[str, Any]) -> None:
        there = self._read()
        for key, value in ours.items():
            if there.get(key) != value:
                raise UserError(
                    f"{self._folder} holds latents with {key}={there.get(key)!r}, this would be"
                    f" {value!r}: give another --out, or remove it."
                )

    def shards(self, index: int = 0, count: int = 1) -> list[range]:
        """The shards of process `index` of `count`, as ranges of records."""
        return self._shards[index::count]

    def missing(self, index: int = 0, count: int = 1) -> list[range]:
        """Those of them that are not on disk; one that is damaged counts as missing."""
        if self.finished:
            return []
        shards = self.shards(index, count)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(count_records, map(self._path, shards)))
        return [shard for shard, n in zip(shards, found, strict=True) if n != len(shard)]

    def write(self, shard: range, records: Iterable[Record]) -> None:
        """One of `missing`, with its records: on disk after."""
        path, written = self._path(shard), 0
        for left in unfinished(path):
            left.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            with _disk_errors():
                # One record a group, as tensorflow-datasets writes it: it is read at random.
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
        """The data set is there. Raises UserError if any shard is missing. Again does nothing.

        Of several processes any number may call this, when all have written.
        """
        if self.finished:
            return
        if gap := self.missing():
            raise UserError(
                f"{self._folder}: {len(gap)} of {len(self._shards)} shards are missing; the same"
                " command again writes them."
            )
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=_NAME,
                version=tfds.core.Version(_VERSION),
                data_dir=os.fspath(self._folder),
                module_name=__name__,
                release_notes={_VERSION: "First release."},
            ),
            description="Moments of a KL autoencoder: of each image, then of its mirror.",
            features=_features(self._shape, self._class_names),
            disable_shuffling=True,  # the record order is the images'
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
                write_atomic(self._folder / path.name, path.read_bytes())
        self.finished = True

    @property
    def _template(self) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=self._folder,
            dataset_name=_NAME,
            split=self._split,
            filetype_suffix="array_record",
        )

    def _path(self, shard: range) -> Path:
        index = self._shards.index(shard)
        return Path(
            self._template.sharded_filepath(shard_index=index, num_shards=len(self._shards))
        )

    def _example(self, record: Record) -> bytes:
        """A record as tensorflow-datasets' own serializer makes it, but for two things.

        That one writes the features in an order that changes from process to process, and takes
        3 ms for a record of ImageNet's latents, more than 20 times as long.
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
    """Protocol Buffers' wire format of one length-delimited field.

    tf.train.Example is features = 1, a map (key = 1, value = 2) of features that hold, under 2, a
    list of floats or, under 3, of integers, each a packed field 1.
    """
    data = payload if isinstance(payload, bytes) else payload.tobytes()
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Base 128, the low digits first; all but the last byte have their high bit set."""
    digits = []
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """array_record tells of a full disk by a RuntimeError."""
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
    return Path(of_home(os.fspath(folder))) / _NAME / _VERSION


def images_of(name: str) -> str:
    """'latents:PATH' -> DATASET/SPLIT that was encoded. Raises UserError."""
    said = open_latents(name).info.metadata or {}
    if not {"images", "split"} <= said.keys():
        raise UserError(
            f"data set {name!r}: its {_METADATA} does not say of which images it is: encode again."
        )
    return f"{str(said['images']).rpartition('/')[0]}/{said['split']}"


def shape_of(name: str) -> tuple[int, ...]:
    """'latents:PATH' -> (h, w, c) of one latent. Raises UserError."""
    return tuple(open_latents(name).info.features["mean"].shape[1:])


def open_latents(name: str) -> tfds.core.DatasetBuilder:
    """'latents:PATH' -> its builder. Raises UserError when nothing complete is there."""
    folder = Path(name.removeprefix(PREFIX))
    found = _prepared(folder)
    # Not Path.exists, which raises for a name that is too long.
    if os.path.exists(found / _METADATA) and not (found / _INFO).exists():
        raise UserError(
            f"data set {name!r}: its encoding is not finished: the same command of"
            f" python -m ditjax.encode, with --out={folder}, goes on with it."
        )
    if not os.path.exists(found / _INFO):
        raise UserError(
            f"data set {name!r}: no encoded latents at {folder}: make them with"
            f" python -m ditjax.encode --config=... --out={folder}"
        )
    try:
        builder = tfds.builder_from_directory(os.fspath(found.resolve()))
        moments = [builder.info.features[key].shape for key in ("mean", "log_variance")]
        whole = (
            moments[0] == moments[1] and len(moments[0]) == 4 and "label" in builder.info.features
        )
    except Exception as error:  # a cut or edited JSON file fails in as many ways as it has keys
        raise UserError(
            f"data set {name!r}: the description in {found} cannot be read ({reason(error):.200}):"
            " remove the latents and encode again."
        ) from error
    if not whole:
        raise UserError(f"data set {name!r}: what lies in {found} are no latents: encode again.")
    return builder
