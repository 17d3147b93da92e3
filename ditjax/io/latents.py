"""Encoded data sets: the autoencoder's moments of every image and of its mirror, as array_record.

Moments and not samples: the posterior is still drawn anew at every training step, as the paper
does. They lie in a directory of their own in tensorflow-datasets' layout, named `latents:PATH`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from ditjax.errors import UserError
from ditjax.io.builders import write_whole

PREFIX = "latents:"
Record = dict[str, Any]  # mean, log_variance f32[2,h,w,c], image then mirror; label int


class Latents(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Writes one data set of moments; `metadata` says of what and by what."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(
        self,
        directory: Path,
        shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        splits: Mapping[str, Iterable[Record]],
        metadata: Mapping[str, Any],
    ) -> None:
        self._shape, self._class_names = shape, class_names
        self._splits, self._metadata = splits, dict(metadata)
        super().__init__(data_dir=directory, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        moments = tfds.features.Tensor(shape=(2, *self._shape), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Moments of a KL autoencoder: of each image, then of its mirror.",
            features=tfds.features.FeaturesDict(
                {
                    "mean": moments,
                    "log_variance": moments,
                    "label": tfds.features.ClassLabel(names=list(self._class_names)),
                }
            ),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,  # the record order is the images'
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
        yield from enumerate(self._splits[split])


def write(
    directory: str | os.PathLike[str],
    shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    splits: Mapping[str, Iterable[Record]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes the splits, in record order; complete or not there at all. `shape` is (h, w, c).

    What is there already and has the same metadata is left as it is. Raises UserError when the
    directory cannot be written or holds latents of something else.
    """
    folder = Path(directory)
    if _prepared(folder).is_dir():
        there = open_latents(f"{PREFIX}{folder}").info.metadata or {}
        for key, value in metadata.items():
            if there.get(key) != value:
                raise UserError(
                    f"{folder} holds latents with {key}={there.get(key)!r}, this would be"
                    f" {value!r}: give another --out, or remove it."
                )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        builder = Latents(folder.resolve(), shape, class_names, splits, metadata)
        write_whole(builder)
    except OSError as error:
        raise UserError(f"cannot write latents to {folder}: {error.strerror or error}.") from None
    return folder


def _prepared(folder: Path) -> Path:
    return folder / "latents" / str(Latents.VERSION)


def open_latents(name: str) -> tfds.core.DatasetBuilder:
    """'latents:PATH' -> its builder. Raises UserError when nothing complete is there."""
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    found = _prepared(folder)
    try:
        return tfds.builder_from_directory(os.fspath(found.resolve()))
    except (FileNotFoundError, OSError, json.JSONDecodeError):
        raise UserError(
            f"data set {name!r}: no encoded latents at {folder}: make them with"
            f" python -m ditjax.encode --config=... --out={folder}"
        ) from None
