"""Builders of data sets on disk that need no TensorFlow: handwritten digits, and image folders.

`data/scenes.py` holds a third. They write the layout of tensorflow-datasets, as array_record;
`data/source.py` finds them by name.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import grain
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import scenes
from ditjax.data.clips import FRAMES_SUFFIX, VIDEO_SUFFIXES, as_animation, video_frames
from ditjax.data.folders import (
    Content,
    ListedImage,
    Listing,
    frame_files,
    read_bytes,
    read_together,
)
from ditjax.data.pictures import converted, decode_image, peculiarities, upright
from ditjax.errors import FaultError, UserError
from ditjax.files import faults, store


def expand_home(path: str) -> str:
    """A path with a leading '~' or '~NAME' expanded. Raises UserError for an unknown name."""
    try:
        return os.fspath(store.place(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"path {path!r}: {error} Give the whole path.") from None


# ---- digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 real handwritten digits, 8x8 grey: UCI optdigits' test set, shipped by scikit-learn.

    Record i, in the order of sklearn.datasets.load_digits, is 'test' when i % 5 == 4 and 'train'
    otherwise: 359 and 1438. A pixel counts the ink in a 4x4 cell, 0..16, and is stored as u8
    round(count * 255 / 16).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    CLASSES: ClassVar[int] = 10

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Optical Recognition of Handwritten Digits (UCI Machine Learning Repository), the"
                " test set of 1,797 images as distributed in scikit-learn's load_digits. Each"
                " pixel counts the ink in a 4x4 cell of a 32x32 bitmap, 0 to 16, and is stored as"
                " round(count * 255 / 16). Record i in load_digits order is 'test' iff i % 5 == 4."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(k) for k in range(self.CLASSES)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "@misc{alpaydin1998optdigits, author = {Alpaydin, E. and Kaynak, C.},"
                " title = {Optical Recognition of Handwritten Digits},"
                " howpublished = {UCI Machine Learning Repository}, year = {1998},"
                " doi = {10.24432/C50P49}}"
            ),
            license="Creative Commons Attribution 4.0 (CC BY 4.0)",
            # The record order is that of load_digits, so that the split rule can be checked by eye.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded: the images are inside the scikit-learn wheel.
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, counts, label in zip(*scenes.read_handwriting(split), strict=True):
            pixels = (counts * 255 / 16).round().astype("uint8")
            if label < self.CLASSES:
                yield int(i), {"image": Image.fromarray(pixels), "label": int(label)}


class FirstDigits(Digits):
    """The digits 0 to 4 of `Digits`: a base to add classes to."""

    CLASSES: ClassVar[int] = 5


# ---- a folder of class folders


class ConvertedBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Images of a user that are listed, and converted once. Their own encoded bytes are stored.

    The name of the configuration is a digest of the content, so that a copy of a folder is the same
    data set wherever it is.
    """

    def __init__(
        self, listing: Any, content: dict[str, str], data_dir: Path, max_damaged: int = 0
    ) -> None:
        self._listing, self._content, self._left = listing, content, max_damaged
        config = tfds.core.BuilderConfig(
            name=content_name(content), description=f"Converted from {listing.root}."
        )
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._content}

    def skip(self, image: Any, fault: object) -> None:
        """Count a damaged image. Raises UserError if that is one too many."""
        if self._left <= 0:
            raise UserError(
                f"{image} is not a sound image ({fault}): repair or remove the file, then run"
                " again, or set config.data.max_damaged to skip it."
            )
        self._left -= 1


class ImageFolder(
    ConvertedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A folder of class folders.

    Features are imagenet2012's: image, label, file_name (relative to the folder).
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "2.0.0": "Named by content, not by path; images are shown upright.",
        "1.0.0": "First release.",
    }

    def __init__(
        self, listing: Listing, content: dict[str, str], data_dir: Path, max_damaged: int = 0
    ) -> None:
        self._peculiar: Counter[str] = Counter()
        self._longest, self._shortest = 0, dict[str, int]()
        super().__init__(listing, content, data_dir, max_damaged)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The images of {self._listing.root}, by class folder.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=list(self._listing.class_names)),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(root=os.fspath(self._listing.root)),
            # Records are in hashed order of their file names instead: the images need not pass
            # through the shuffler, and a slice such as train[:10%] still holds every class.
            disable_shuffling=True,
        )

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        def hashed(image: ListedImage) -> bytes:
            return hashlib.sha256(os.fsencode(image.name)).digest()

        content, shortest = Content(), (0, 0)
        images = read_together(sorted(self._listing.files[split], key=hashed), _inspected)
        for i, (image, (encoded, fault, peculiar, stored, frames)) in enumerate(images):
            shortest = min(shortest, (frames, i)) if i else (frames, i)
            self._longest = max(self._longest, frames)
            if fault:
                self.skip(image.file.path, fault)
            self._peculiar.update(peculiar)
            content.add(image, encoded)
            name = os.fsencode(image.name).decode(errors="replace")
            yield i, {"image": stored, "label": image.class_name, "file_name": name}
        if str(content) != self._content[split]:
            raise UserError(
                f"files in {self._listing.root} changed while they were read: run the same command"
                " again."
            )
        # tensorflow-datasets writes the metadata after the last record.
        self.info.metadata["peculiar"] = dict(sorted(self._peculiar.items()))
        if self._longest > 1:  # the record with the fewest frames, for those who ask for clips
            self._shortest[split] = shortest[1]
            self.info.metadata["shortest"] = self._shortest


def _inspected(image: ListedImage) -> tuple[bytes, str, list[str], bytes, int]:
    """The bytes of a file, what is wrong with them ('' if nothing), its peculiarities.

    Then what is stored of it, which for folders of frames and videos is an animated picture, and
    the number of its frames.
    """
    encoded = stored = read_bytes(image)
    try:
        stored = animated(image.file.path) or encoded
        decoded = decode_image(stored)
        converted(decoded, "RGB")
    except ValueError as error:
        return encoded, str(error), [], encoded, 0
    return encoded, "", peculiarities(decoded), stored, getattr(decoded, "n_frames", 1)


def animated(path: Path) -> bytes:
    """A folder of frames or a video as one animated picture; b"" for another file.

    Raises ValueError for frames that cannot be read or differ in size.
    """
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return as_animation(list(video_frames(path)))
    if suffix != FRAMES_SUFFIX or not path.is_dir():
        return b""
    frames: list[Image.Image] = []
    for each in frame_files(path):
        frame = converted(upright(decode_image(each.read_bytes())), "RGB")
        if frames and frame.size != frames[0].size:
            raise ValueError(
                f"its frame {each.name} is {frame.width}x{frame.height}, and the first"
                f" {frames[0].width}x{frames[0].height}"
            )
        frames.append(frame)
    return as_animation(frames)


def content_name(content: dict[str, str]) -> str:
    """The name of the configuration that holds some content: split -> digest."""
    text = "".join(f"{split}\0{digest}\n" for split, digest in sorted(content.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def folder_identity(root: Path) -> str:
    """A folder's configuration name: its last name made plain, and a hash of its resolved path."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", root.name).strip("_")[:40] or "folder"
    return f"{plain}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}"


# ---- on disk


def write_whole(builder: tfds.core.DatasetBuilder) -> None:
    """Prepare a builder in a sibling folder, which is renamed when it is complete.

    The caller must be the only writer. An exception of a record generator is raised unchanged.
    """
    target = Path(builder.data_dir)
    if is_complete(target):
        return
    # The caller holds the lock, so a process that was killed left these.
    for left in target.parent.glob(f"incomplete.*_{target.name}"):
        shutil.rmtree(left)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # tensorflow-datasets reports every stage; ours take seconds, or show their own progress.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except (UserError, OSError):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # tensorflow-datasets wraps what a generator raises.
            if isinstance(cause, UserError | OSError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise


def write_below(root: Path, make: Callable[[Path], tfds.core.DatasetBuilder]) -> None:
    """Prepare what `make` builds below a root, as `write_whole`.

    For a root on a store it is written to a folder of this machine, and then copied: a data set
    there is complete with its last object.
    """
    if not store.is_object(root):
        write_whole(make(root))
        return
    with tempfile.TemporaryDirectory(prefix="ditjax-") as scratch:
        builder = make(Path(scratch))
        folder = Path(builder.data_dir)
        target = root / folder.relative_to(scratch)
        if not is_complete(target):
            write_whole(builder)
            store.upload_tree(folder, target, last=_INFO)


_INFO, _FEATURES = "dataset_info.json", "features.json"


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole data set in the layout of tensorflow-datasets."""
    return all(faults.exists(folder / name) for name in (_INFO, _FEATURES))


def count_records(path: str | os.PathLike[str]) -> int:
    """The number of records in an array_record file; 0 if it is missing, truncated or damaged.

    Raises FaultError if the file system does not answer.
    """
    try:
        # Given a bare path, and not the counts of dataset_info.json, grain reads the file itself.
        if store.is_object(path := store.place(path)) and not path.exists():
            return 0
        paths = [os.fspath(store.for_readers(path))]
        return faults.retried(path, lambda: len(grain.sources.ArrayRecordDataSource(paths)))
    except FaultError:
        raise
    except Exception:  # A file without a sound header holds nothing that can be read.
        return 0
