"""Folders of images: what is read of them, and a line that says what was left out and why."""

import errno
import functools
import hashlib
import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from ditjax.data.clips import FRAMES_SUFFIX, VIDEO_SUFFIXES, has_video
from ditjax.data.pictures import readable_suffixes
from ditjax.errors import UserError, first_few, one_line
from ditjax.files import faults
from ditjax.files.masking import masked

_T = TypeVar("_T")

MAX_FILE = 1 << 28  # bytes of an encoded image
UNLABELLED = "unlabelled"  # the class of images that have none
# Folders beside train/ that are splits, in any case; 'training' is train.
_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")


@functools.cache
def report_reading(line: str) -> None:
    """Print a line on stderr, once in a process."""
    print(masked(one_line(line)), file=sys.stderr, flush=True)


class LeftOut:
    """What a folder holds and is not read: counts by reason, and a few names."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, dict[str, int]] = {}

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] += 1
        names = self._names.setdefault(reason, {})
        if name in names or len(names) < 100:
            names[name] = names.get(name, 0) + 1

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        """'files of other types 3 (.txt 2, .heic), broken links 1 (cat/a.png)', or ''."""
        return ", ".join(
            f"{reason} {count} ({first_few(self._named(reason), 4)})"
            for reason, count in self._counts.items()
        )

    def _named(self, reason: str) -> list[str]:
        return [
            f"{name} {count}" if count > 1 else name
            for name, count in sorted(self._names[reason].items(), key=lambda each: -each[1])
        ]


class ImageFile(NamedTuple):
    """A file that is taken for an image or a clip, and what shows whether it was changed.

    A folder NAME.frames is one clip, whose frames are the images in it in the order of their names.
    """

    path: Path
    stamp: str


def walk_images(root: Path, folder: Path, left: LeftOut) -> Iterator[ImageFile]:
    """The image files below a folder: its own in the order of their names, then its subfolders'.

    Links are followed, except to a folder that they are in, up to `root`. Hidden entries and files
    of other types are left out. Raises UserError for a folder or file that cannot be read.
    """
    folders = [folder]
    try:
        while folders:
            place = folders.pop()
            below, names = _entries(root, place, left)
            for name in names:
                if found := _image_file(root, place / name, left):
                    yield found
            folders.extend(reversed(below))
    except OSError as error:
        raise _unreadable(error, folder) from error


def _unreadable(error: OSError, folder: Path) -> UserError:
    return UserError(
        f"{error.filename or folder} cannot be read: {error.strerror}; make it readable, or remove"
        " it."
    )


def _entries(root: Path, folder: Path, left: LeftOut) -> tuple[list[Path], list[str]]:
    """The folders in a folder that are walked into, and the names of its other entries, sorted."""
    folders, names = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not _is_folder(entry) or entry.name.endswith(FRAMES_SUFFIX):
                names.append(entry.name)
            elif entry.name.startswith("."):
                left.add("hidden files and folders", entry.name)
            elif entry.is_symlink() and _leads_up(root, folder, entry.path):
                left.add("links to a folder that they are in", entry.name)
            else:
                folders.append(folder / entry.name)
    return folders, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _leads_up(root: Path, folder: Path, link: str) -> bool:
    """Whether a link in `folder` leads to it, or to a folder above it up to `root`."""
    target = os.stat(link)
    for above in (folder, *folder.parents):
        if os.path.samestat(target, os.stat(above)):
            return True
        if above == root:
            break
    return False


def _image_file(root: Path, path: Path, left: LeftOut) -> ImageFile | None:
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        left.add("hidden files and folders", path.name)
    elif path.is_symlink() and not path.exists():
        left.add("broken links", _below(root, path))
    elif suffix == FRAMES_SUFFIX and path.is_dir():
        if frames := frame_files(path):
            return ImageFile(path, "".join(f"{each.name}\0{_stamp(each)}\n" for each in frames))
        left.add("folders without images", _below(root, path))
    elif suffix in VIDEO_SUFFIXES and not has_video():
        left.add("videos, which need pip install 'ditjax[video]',", suffix)
    elif suffix not in readable_suffixes() | VIDEO_SUFFIXES:
        left.add("files of other types", suffix or "no suffix")
    else:
        if stat.S_ISREG(path.stat().st_mode):
            return ImageFile(path, _stamp(path))
        left.add("no regular files", _below(root, path))
    return None


def frame_files(folder: Path) -> list[Path]:
    """The images in a folder of frames, in the order of their names."""
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in readable_suffixes())


def _stamp(path: Path) -> str:
    """Size and times of a file."""
    s = path.stat()
    return f"{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}"


def _below(root: Path, path: Path) -> str:
    return os.fspath(path.relative_to(root))


# ---- folders of class folders


class ListedImage(NamedTuple):
    """An image of a data set: its class, its path below the root, and its file."""

    class_name: str
    name: str
    file: ImageFile


class Listing(NamedTuple):
    """The images of a folder by split, the names of their classes, and what was left out.

    `digest` covers the root and the name, size and times of every file: while it is the same, the
    files need not be read again.
    """

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, list[ListedImage]]
    left_out: LeftOut
    digest: str

    def __str__(self) -> str:
        """'/data/birds: images of 2 classes (robin, wren): 80 in train; nothing left out'."""
        counts = ", ".join(f"{len(files):,} in {split}" for split, files in self.files.items())
        many = len(self.class_names)
        classes = f"{many} classes ({first_few(self.class_names, 5)})"
        if many == 1:
            classes = f"one class ({self.class_names[0]})"
            if self.class_names == (UNLABELLED,):
                classes = "one class, because they are in no class folders"
        left = f"; left out: {self.left_out}" if self.left_out else "; nothing left out"
        return f"{self.root}: images of {classes}: {counts}{left}"

    def content(self) -> dict[str, str]:
        """Split -> the digest of its images' names and bytes. Raises UserError."""
        found = {}
        for split, images in self.files.items():
            content = Content()
            for image, encoded in read_together(images, read_bytes):
                content.add(image, encoded)
            found[split] = str(content)
        return found


def list_folder(root: Path) -> Listing:
    """ROOT/CLASS/**/IMAGE, ROOT/SPLIT/CLASS/**/IMAGE, ROOT/SPLIT/**/IMAGE or ROOT/IMAGE -> Listing.

    Splits are read if ROOT/train holds class folders, or if all folders with images are splits:
    train, val, valid, validation, dev, eval, evaluation, test, testing in any case, and 'training'
    for train. Class names are the sorted names of the class folders, those of 'train' if there are
    splits. Images without class folders are of one class. Raises UserError for a folder without
    images, a class that 'train' lacks, or a class whose name cannot be recorded, and FaultError if
    the file system does not answer.
    """
    return faults.retried(root, lambda: _listed(root))


def _listed(root: Path) -> Listing:
    left = LeftOut()
    try:
        folders, names = _entries(root, root, left)
        splits = _split_folders(root, folders)
        if splits:
            files = _of_splits(root, folders, splits, left)
            for name in names:
                if _image_file(root, root / name, left):
                    left.add("images beside the splits", name)
        else:
            files = {"train": _by_class(root, root, folders, names, left)}
    except OSError as error:
        raise _unreadable(error, root) from error
    if not files["train"]:
        raise UserError(
            f"{root} holds no image: expected {root}/CLASS/IMAGE, the same below {root}/train, or"
            f" images alone, with {', '.join(sorted(readable_suffixes()))}."
            + (f" It holds: {left}." if left else "")
        )
    class_names = tuple(sorted({each.class_name for each in files["train"]}))
    for name in class_names:
        _check_class_name(root, name)
    return Listing(root, class_names, files, left, _digest(root, files))


def split_above(folder: Path) -> str:
    """The split of the folder above that a folder is, or ''. Raises as `list_folder`."""
    if folder.name.casefold() not in (*_TRAIN, *_HELD_OUT):
        return ""
    above = folder.parent
    try:
        splits = faults.retried(
            above, lambda: _split_folders(above, _entries(above, above, LeftOut())[0])
        )
    except OSError as error:
        raise _unreadable(error, above) from error
    return next((split for split, place in splits.items() if place == folder), "")


def _of_splits(
    root: Path, folders: list[Path], splits: dict[str, Path], left: LeftOut
) -> dict[str, list[ListedImage]]:
    """Split -> its images, all of them of classes that 'train' has."""
    for folder in folders:
        if folder not in splits.values():
            left.add("folders beside train that are no split", folder.name)
    found = {
        split: _by_class(root, folder, *_entries(root, folder, left), left)
        for split, folder in splits.items()
    }
    known = {each.class_name for each in found["train"]}
    for split, images in found.items():
        if known == {UNLABELLED}:
            found[split] = [each._replace(class_name=UNLABELLED) for each in images]
        elif {each.class_name for each in images} == {UNLABELLED}:
            for _ in images:
                left.add("images of a split without class folders", split)
            found[split] = []
        for each in found[split]:
            if each.class_name not in known:
                raise UserError(
                    f"{splits[split] / each.class_name} is a class that {splits['train']} does not"
                    " have: every split takes its class numbers from train; add or remove the"
                    " class."
                )
    return {split: images for split, images in found.items() if images}


def _has_images(root: Path, folder: Path) -> bool:
    return next(walk_images(root, folder, LeftOut()), None) is not None


def _split_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    """Split -> its folder; {} if the folders are classes."""

    def with_images(some: Iterable[Path]) -> bool:
        return any(_has_images(root, folder) for folder in some)

    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.name.casefold()
        if name in (*_TRAIN, *_HELD_OUT) and _has_images(root, folder):
            split = "train" if name in _TRAIN else name
            if split in found:
                raise UserError(
                    f"{found[split]} and {folder} are the same split {split!r}: rename one of them."
                )
            found[split] = folder
    if "train" not in found:
        return {}
    below, _ = _entries(root, found["train"], LeftOut())
    # Folders named train and plane, with images in them, are two classes.
    others = (each for each in folders if each not in found.values())
    flat = len(found) > 1 and not with_images(others)
    return found if with_images(below) or flat else {}


def _by_class(
    root: Path, folder: Path, folders: list[Path], names: list[str], left: LeftOut
) -> list[ListedImage]:
    """The images of the class folders in a folder, or its own if no class folder holds any."""
    found = []
    for class_folder in folders:
        images = [
            ListedImage(class_folder.name, _below(root, file.path), file)
            for file in walk_images(root, class_folder, left)
        ]
        if not images:
            left.add("folders without images", _below(root, class_folder))
        found += images
    own = [file for name in names if (file := _image_file(root, folder / name, left))]
    if not found:
        return [ListedImage(UNLABELLED, _below(root, file.path), file) for file in own]
    for file in own:
        left.add("images beside the class folders", _below(root, file.path))
    return found


def _check_class_name(root: Path, name: str) -> None:
    """Raise UserError for a name that the list of names, a line each in UTF-8, would change."""
    if name == name.strip() and not any(
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name
    ):
        return
    raise UserError(
        f"the class folder {name!a} in {root} has a name that is not plain text: expected"
        " UTF-8 without line breaks, control characters or spaces at its ends; rename the folder."
    )


def _digest(root: Path, files: dict[str, list[ListedImage]]) -> str:
    digest = hashlib.sha256(os.fsencode(root) + b"\n")
    for split, found in files.items():
        digest.update(f"{split}\n".encode())
        for each in found:
            line = f"{each.name}\0{each.file.stamp}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---- content


class Content:
    """The content of one split, whatever the order and the place of its files."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, image: ListedImage, encoded: bytes) -> None:
        entry = hashlib.sha256(f"{image.class_name}\0{image.name}\0".encode(errors="replace"))
        entry.update(hashlib.sha256(encoded).digest())
        self._sum = (self._sum + int.from_bytes(entry.digest(), "big")) % (1 << 256)

    def __str__(self) -> str:
        return f"{self._sum:064x}"


def read_together(
    images: Sequence[ListedImage], read: Callable[[ListedImage], _T]
) -> Iterator[tuple[ListedImage, _T]]:
    """Each image with what `read` gives of it; several are read at once."""
    workers = os.cpu_count() or 1
    chunk = 16 * workers  # bounds the memory: ThreadPoolExecutor.map runs ahead freely
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), chunk):
            part = images[start : start + chunk]
            yield from zip(part, pool.map(read, part), strict=True)


def read_bytes(image: ListedImage) -> bytes:
    """The bytes of an image file, or of all frames of a clip.

    Raises UserError, and FaultError as `list_folder`.
    """
    path = image.file.path
    if path.suffix.lower() == FRAMES_SUFFIX and path.is_dir():
        frames = [image.file._replace(path=each) for each in frame_files(path)]
        return b"".join(read_bytes(image._replace(file=each)) for each in frames)

    def read() -> bytes:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UserError(
                f"{path} has {size} bytes: expected an image of at most {MAX_FILE}; save it"
                " smaller, or remove it."
            )
        return path.read_bytes()

    try:
        return faults.retried(path, read)
    except OSError as error:
        raise _unreadable(error, path) from error
