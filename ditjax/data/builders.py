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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import scenes
from ditjax.data.images import open_picture
from ditjax.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_FILE = 1 << 28  # bytes of an encoded image
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_SPLIT_FOLDERS = ("train", "val", "validation", "test")


def expand_home(path: str) -> str:
    """A path with a leading '~' or '~NAME' expanded. Raises UserError for an unknown name."""
    try:
        return os.fspath(Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"path {path!r}: {error} Give the whole path.") from None


def decode_image(encoded: bytes) -> Image.Image:
    """Encoded bytes -> a fully decoded PIL image, in the mode of the file.

    Raises ValueError for bytes that are damaged, truncated, of an unknown format, or that decode to
    more than MAX_PIXELS pixels.
    """
    try:
        image = open_picture(io.BytesIO(encoded), _FORMATS)
        image.load()
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ValueError(
            re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error)) or repr(error)
        ) from error
    return image


# ---- digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 real handwritten digits, 8x8 grey: UCI optdigits' test set, shipped by scikit-learn.

    Record i, in the order of sklearn.datasets.load_digits, is 'test' when i % 5 == 4 and 'train'
    otherwise: 359 and 1438. A pixel counts the ink in a 4x4 cell, 0..16, and is stored as u8
    round(count * 255 / 16).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

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
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
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
            yield int(i), {"image": Image.fromarray(pixels), "label": int(label)}


# ---- a folder of class folders


class Listing(NamedTuple):
    """The contents of a folder of class folders: split -> [(class, file)], with a digest of all."""

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, Path]]]
    digest: str


def list_folder(root: Path) -> Listing:
    """ROOT/class/**/image, or ROOT/{train,val,validation,test}/class/**/image -> Listing.

    The second layout is read if ROOT/train holds class folders. Images are .jpg, .jpeg, .png, .webp
    and .bmp in any case; hidden entries and other files are skipped. Class names are the sorted
    names of the class folders, those of 'train' if there are splits. The digest covers the path,
    size and modification time of every image. Raises UserError for a folder without images, or a
    class that 'train' lacks.
    """
    try:
        splits = {"train": root}
        if _class_folders(root / "train"):
            splits = {s: root / s for s in _SPLIT_FOLDERS if _class_folders(root / s)}
        class_names = tuple(folder.name for folder in _class_folders(splits["train"]))
        if not class_names:
            raise UserError(
                f"{root} holds no class folders with images: expected {root}/CLASS/IMAGE with"
                f" {', '.join(sorted(_EXTENSIONS))}, or the same below {root}/train."
            )
        files: dict[str, list[tuple[str, Path]]] = {}
        digest = hashlib.sha256()
        for split, folder in splits.items():
            files[split] = []
            for class_folder in _class_folders(folder):
                if class_folder.name not in class_names:
                    raise UserError(
                        f"{class_folder} is a class that {splits['train']} does not have:"
                        " every split takes its class numbers from train; add or remove the class."
                    )
                for image in _images(class_folder):
                    status = image.stat()
                    line = f"{image.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
                    digest.update(line.encode(errors="surrogateescape"))
                    files[split].append((class_folder.name, image))
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}.") from error
    return Listing(root, class_names, files, digest.hexdigest())


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    children = (child for child in folder.iterdir() if not child.name.startswith("."))
    return sorted(c for c in children if c.is_dir() and next(_images(c), None) is not None)


def _images(class_folder: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(class_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in _EXTENSIONS and not name.startswith("."):
                yield Path(folder, name)


class ImageFolder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A folder of class folders, converted once. The files' own encoded bytes are stored.

    Features are imagenet2012's: image, label, file_name (relative to the folder). The name of the
    configuration carries a hash of the folder's resolved path, so that two folders never mix.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(self, listing: Listing, data_dir: Path, max_damaged: int = 0) -> None:
        self._listing, self._left = listing, max_damaged
        config = tfds.core.BuilderConfig(
            name=folder_identity(listing.root), description=f"Converted from {listing.root}."
        )
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

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
            metadata=tfds.core.MetadataDict(
                root=os.fspath(self._listing.root), digest=self._listing.digest
            ),
            # Records are in hashed order of their file names instead: the images need not pass
            # through the shuffler, and a slice such as train[:10%] still holds every class.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._listing.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        root = self._listing.root

        def hashed(entry: tuple[str, Path]) -> bytes:
            name = os.fsencode(entry[1].relative_to(root))
            return hashlib.sha256(name).digest()

        entries = sorted(self._listing.files[split], key=hashed)
        workers = os.cpu_count() or 1
        chunk = 16 * workers  # Bounds the memory: ThreadPoolExecutor.map runs ahead freely.
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(entries), chunk):
                part = entries[start : start + chunk]
                encoded = pool.map(_read_image, (path for _, path in part))
                for i, ((class_name, path), (image, fault)) in enumerate(
                    zip(part, encoded, strict=True)
                ):
                    if fault and not self._left:
                        raise UserError(
                            f"{path} is not a sound image ({fault}): repair or remove the file,"
                            " then run again, or set config.data.max_damaged to skip it."
                        )
                    self._left -= bool(fault)
                    name = os.fsencode(path.relative_to(root)).decode(errors="replace")
                    yield start + i, {"image": image, "label": class_name, "file_name": name}


def _read_image(path: Path) -> tuple[bytes, str]:
    """The bytes of an image file, and what is wrong with them, '' for a sound image."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UserError(
                f"{path} has {size} bytes: expected an image of at most {MAX_FILE}; save it"
                " smaller, or remove it."
            )
        encoded = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        decode_image(encoded)
    except ValueError as error:
        return encoded, str(error)
    return encoded, ""


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


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole data set in the layout of tensorflow-datasets."""
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def count_records(path: str | os.PathLike[str]) -> int:
    """The number of records in an array_record file; 0 if it is missing, truncated or damaged."""
    try:
        # Given a bare path, and not the counts of dataset_info.json, grain reads the file itself.
        return len(grain.sources.ArrayRecordDataSource([os.fspath(path)]))
    except Exception:  # A file without a sound header holds nothing that can be read.
        return 0
