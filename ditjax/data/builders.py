"""Data sets on disk: builders of our own, and one door to every prepared tensorflow-datasets set.

A data set is prepared once, as array_record, under DATA_DIR/NAME[/CONFIG]/VERSION in the layout
of tensorflow-datasets, and is then read without TensorFlow. Three builders are ours and need no
TensorFlow to prepare either: `Digits`, `DigitScenes` of those digits (`data/scenes.py`), and
`ImageFolder` for a folder of class folders.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import scenes
from ditjax.data.images import MAX_PIXELS
from ditjax.data.scenes import DigitScenes
from ditjax.errors import UserError, nearest

# Only these decoders of PIL see a user's bytes; some of the others start outside programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_FILE = 1 << 28  # bytes of an encoded image
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_SPLIT_FOLDERS = ("train", "val", "validation", "test")
_FOLDER_PREFIX = "folder:"
_NUMBERS = r"\d{1,9}\.\d{1,9}\.\d{1,9}"
_NAME = re.compile(
    rf"(?P<name>\w{{1,100}})(?:/(?P<config>[\w.+-]{{1,200}}))?(?::(?P<version>{_NUMBERS}))?"
)
_VERSION = re.compile(_NUMBERS)


def data_root(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where prepared data sets lie: DATA_DIR, else $DITJAX_DATA, else ~/.cache/ditjax/data.

    Raises UserError for a URL: array_record files are read from file systems only.
    """
    chosen = os.fspath(data_dir or os.environ.get("DITJAX_DATA") or "~/.cache/ditjax/data")
    if "://" in chosen:
        raise UserError(
            f"data_dir {chosen!r} is a URL: array_record is read from a file system only;"
            " mount the bucket (gcsfuse, s3fs) and give the path of the mount."
        )
    return Path(of_home(chosen)).absolute()


def of_home(path: str) -> str:
    """A path with '~' or '~NAME' in front spelled out. Raises UserError where there is no such."""
    try:
        return os.fspath(Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"path {path!r}: {error} Give the whole path.") from None


def decode_image(encoded: bytes) -> Image.Image:
    """Encoded bytes -> a fully decoded PIL image, in the mode that the file has.

    Raises ValueError when the bytes are damaged, cut short, of no known format, or decode to more
    than MAX_PIXELS pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
        image.load()
    # PIL's decoders report damage as OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
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
            # The record order is load_digits': the split rule can then be checked by eye.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded: the images are inside the scikit-learn wheel.
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, counts, label in zip(*scenes.handwritten(split), strict=True):
            pixels = (counts * 255 / 16).round().astype("uint8")
            yield int(i), {"image": Image.fromarray(pixels), "label": int(label)}


# ---- a folder of class folders


class Listing(NamedTuple):
    """What a folder of class folders holds: split -> [(class, file)], and a digest of all of it."""

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, Path]]]
    digest: str


def list_folder(root: Path) -> Listing:
    """ROOT/class/**/image, or ROOT/{train,val,validation,test}/class/**/image -> Listing.

    The second reading is taken when ROOT/train holds class folders. Images are .jpg, .jpeg, .png,
    .webp and .bmp in any case; hidden entries and other files are skipped. Class names are the
    sorted names of the class folders, those of 'train' where there are splits. The digest is over
    every image's path, size and modification time.
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
    """A folder of class folders, converted once; the files' own encoded bytes are what is stored.

    Features are imagenet2012's: image, label, file_name (relative to the folder). The name of the
    configuration carries a hash of the folder's resolved path, so two folders never mix.
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
            # The file names are put in hashed order below instead: the images need not pass through
            # the shuffler, and a slice such as train[:10%] still holds every class.
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
        chunk = 16 * workers  # Bounds what is in memory: ThreadPoolExecutor.map runs ahead freely.
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(entries), chunk):
                part = entries[start : start + chunk]
                encoded = pool.map(_read_image, (path for _, path in part))
                for i, ((class_name, path), (image, fault)) in enumerate(
                    zip(part, encoded, strict=True)
                ):
                    if fault and not self._left:
                        raise UserError(
                            f"{path} is not a sound image ({fault}): mend or remove the file, then"
                            " run again, or let such be skipped by config.data.max_damaged."
                        )
                    self._left -= bool(fault)
                    name = os.fsencode(path.relative_to(root)).decode(errors="replace")
                    yield start + i, {"image": image, "label": class_name, "file_name": name}


def _read_image(path: Path) -> tuple[bytes, str]:
    """A file's bytes, and what is wrong with the image in them, '' where it is sound."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes: expected an image of at most {MAX_FILE};"
                " save it smaller, or remove it."
            )
        encoded = path.read_bytes()
        decode_image(encoded)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UserError:
        raise
    except ValueError as error:
        return encoded, str(error)
    return encoded, ""


def folder_identity(root: Path) -> str:
    """A folder's configuration name: its last name made plain, and a hash of its resolved path."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", root.name).strip("_")[:40] or "folder"
    return f"{plain}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}"


# ---- preparation


def prepare(
    name: str, data_dir: str | os.PathLike[str] | None = None, max_damaged: int = 0
) -> tfds.core.DatasetBuilder:
    """NAME -> a builder whose data lie under DATA_DIR as array_record, prepared now if need be.

    NAME is 'digits'; 'digit_scenes', or 'digit_scenes/N' for another number of them;
    'folder:/path' for a folder of class folders; or any tensorflow-datasets name with an optional
    configuration and version: 'imagenet2012', 'mnist:3.0.1', 'imagenet_resized/64x64'. What is
    already prepared is opened as it is, without TensorFlow and from a folder that may be read-only.
    Other sets than ours are prepared by tensorflow-datasets'
    own command in a process of its own, so that TensorFlow never shares this one's devices.

    So many damaged images of a folder as `max_damaged` are stored as they are: who reads them finds
    the damage. Raises UserError for an unknown name, a folder that changed since it was converted,
    more damaged images, another file format, an unwritable data_dir, or TensorFlow missing where it
    is needed.
    """
    root = data_root(data_dir)
    if name.startswith(_FOLDER_PREFIX):
        return _prepare_folder(name, root, max_damaged)
    base = name.partition(":")[0].partition("/")[0]
    if base == DigitScenes.name:
        return _prepare_scenes(name, root)
    found = _find(name, root)
    if found is None:
        known = [*tfds.list_builders(with_community_datasets=False), DigitScenes.name]
        if base not in known:
            raise UserError(
                f"data set {name!r} is unknown: not among the {len(known)} of tensorflow-datasets,"
                f" not prepared under {root}, and not 'folder:/path'.{nearest(base, known)}"
            )
        if base != Digits.name:
            _prepare_with_tensorflow(name, root)
        elif name in (Digits.name, f"{Digits.name}:{Digits.VERSION}"):
            with _exclusive(name, root):
                write_whole(Digits(data_dir=root, file_format="array_record"))
        else:
            raise UserError(f"data set {name!r}: expected 'digits' or 'digits:{Digits.VERSION}'.")
        found = _find(name, root)
    if found is None:
        raise UserError(
            f"data set {name!r} was prepared, but not at that configuration and version:"
            f" look under {root / base} and name what is there."
        )
    return _open(name, found)


def _prepare_scenes(name: str, root: Path) -> tfds.core.DatasetBuilder:
    match = _parsed(name)
    size = scenes.parse_size(match["config"] or str(scenes.DEFAULT_EXAMPLES))
    if match["version"] not in (None, str(DigitScenes.VERSION)):
        raise UserError(f"data set {name!r}: expected version {DigitScenes.VERSION}.")
    # Spelt out: what else is prepared there does not change what the short name is.
    full_name = f"{DigitScenes.name}/{size.name}:{DigitScenes.VERSION}"
    found = _find(full_name, root)
    if found is None:
        with _exclusive(name, root):
            write_whole(DigitScenes(root, size))
        found = root / DigitScenes.name / size.name / str(DigitScenes.VERSION)
    return _open(name, found)


def _prepare_folder(name: str, root: Path, max_damaged: int) -> tfds.core.DatasetBuilder:
    given = name.removeprefix(_FOLDER_PREFIX)
    try:
        folder = Path(of_home(given)).resolve()
    except (RuntimeError, OSError, ValueError) as error:  # links in a ring, a name too long
        raise UserError(f"data set {name!r}: {error}; give the folder's own path.") from None
    converted = root / ImageFolder.name / folder_identity(folder) / str(ImageFolder.VERSION)
    # The identity is the path's alone, so a conversion outlives its folder: the originals may be
    # deleted or left on another machine.
    if not given or not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        if given and _is_complete(converted):
            return _open(name, converted)
        raise UserError(
            f"data set {name!r}: there is no folder '{folder if given else ''}';"
            " expected 'folder:/path/to/class/folders'."
        )
    listing = list_folder(folder)
    if not _is_complete(converted):
        with _exclusive(name, root):
            write_whole(ImageFolder(listing, root, max_damaged))
    builder = _open(name, converted)
    if (builder.info.metadata or {}).get("digest") != listing.digest:
        raise UserError(
            f"data set {name!r}: files were added, removed or changed since {folder} was converted;"
            f" undo that, or convert it anew after: rm -r '{converted}'"
        )
    return builder


# tensorflow-datasets' own command line also wants Apache Beam; its library does not.
_BUILD = (
    "import sys, tensorflow_datasets as tfds; name, data_dir = sys.argv[1:];"
    " tfds.builder(name, data_dir=data_dir, file_format='array_record').download_and_prepare()"
)


def _prepare_with_tensorflow(name: str, root: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data set {name!r} is not prepared under {root}, and preparing it needs TensorFlow"
            " (reading it does not): pip install 'ditjax[prepare]', then the same command again."
        )
    with _exclusive(name, root):
        if _find(name, root):
            return
        # No GPU for that process: TensorFlow would take all of its memory.
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, name, os.fspath(root)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
            check=False,
        )
    if done.returncode:
        raise UserError(
            f"data set {name!r} could not be downloaded and prepared: the message of"
            " tensorflow-datasets is above. Data that need a licence go by hand into"
            f" {root / 'downloads' / 'manual'}."
        )


@contextlib.contextmanager
def _exclusive(name: str, root: Path) -> Iterator[None]:
    """Hold DATA_DIR's lock: one process prepares, the others wait and then find the work done.

    The kernel lets go of the lock when its holder dies, however it dies.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".prepare.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.getLogger(__name__).warning("waiting: another process prepares in %s", root)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        remedy = (
            "free some space, or set data_dir to another disk"
            if error.errno == errno.ENOSPC
            else "set data_dir (or $DITJAX_DATA) to a folder you can write"
        )
        raise UserError(
            f"data set {name!r} cannot be written under {root}:"
            f" {error.strerror or error}; {remedy}."
        ) from error


def write_whole(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a builder of ours: into a sibling folder that is renamed when it is whole.

    The caller is the only writer. What a record generator raises comes out as it was raised.
    """
    target = Path(builder.data_dir)
    if _is_complete(target):
        return
    # The lock is ours, so what is unfinished here belongs to a process that was killed.
    for left in target.parent.glob(f"incomplete.*_{target.name}"):
        shutil.rmtree(left)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # tensorflow-datasets tells of every stage; ours take seconds, or show their own progress.
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


def _find(name: str, root: Path) -> Path | None:
    """The prepared folder of NAME, the newest version if none is given; None if there is none."""
    match = _parsed(name)
    base, config, version = match["name"], match["config"], match["version"]
    versions = _versions(root / base / (config or ""))
    if not versions and not config and (root / base).is_dir():
        configs = sorted(child.name for child in (root / base).iterdir() if _versions(child))
        if len(configs) > 1:
            raise UserError(
                f"data set {name!r} is prepared in several configurations under {root}:"
                f" name one of {', '.join(f'{base}/{c}' for c in configs)}."
            )
        versions = _versions(root / base / configs[0]) if configs else []
    return next((path for path in reversed(versions) if version in (None, path.name)), None)


def _parsed(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"data set {name!r} is not a name: expected 'digits', 'digit_scenes', 'folder:/path',"
            " or a name of tensorflow-datasets such as 'cifar10', 'mnist:3.0.1' or"
            " 'imagenet_resized/64x64'."
        )
    return match


def _versions(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    complete = (p for p in folder.iterdir() if _VERSION.fullmatch(p.name) and _is_complete(p))
    return sorted(complete, key=lambda path: tuple(int(part) for part in path.name.split(".")))


def _is_complete(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def _open(name: str, folder: Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(folder)
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    except Exception as error:  # A cut or edited JSON file fails in as many ways as it has keys.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(
            f"data set {name!r}: the description in {folder} cannot be read ({reason});"
            f" delete that folder and prepare the data set again."
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"data set {name!r} in {folder} is stored as {', '.join(sorted(formats))}, and only"
            " array_record can be read at random: prepare it again into another data_dir"
            f" (tfds build {name} --file_format=array_record --data_dir=OTHER)."
        )
    return builder


def count_records(path: str | os.PathLike[str]) -> int:
    """The records of an array_record file; 0 where it is not there, cut short or damaged."""
    try:
        # Given a bare path, and not the counts of dataset_info.json, grain asks the file itself.
        return len(grain.sources.ArrayRecordDataSource([os.fspath(path)]))
    except Exception:  # A file without a sound header holds nothing that can be read.
        return 0
