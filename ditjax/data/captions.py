"""Captioned images: which captions a record has, folders and shards of them, and their tokens.

'captions:PATH' is a folder with metadata.jsonl, metadata.csv or captions.jsonl, or tar shards,
'captions:PATH/{000..099}.tar'. Either is converted once, as folders of images are.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from ditjax.data.builders import ConvertedBuilder
from ditjax.data.folders import MAX_FILE, report_reading
from ditjax.data.pictures import converted, decode_image
from ditjax.data.tokenizers import Tokenizer, check_text, cut_line, open_tokenizer
from ditjax.errors import UserError, first_few, reason

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "captions.jsonl")
_TEXT_KEYS = ("text", "caption", "prompt")
_NOT_CAPTIONS = ("file_name", "filename", "image/filename", "id", "url")
_SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TextSpec(NamedTuple):
    """How a record's captions become tokens: `config.text` as the readers expect it.

    mode: the 'first' caption, one at 'random', or all of them one after another ('concat').
    """

    mode: str
    feature: str
    tokenizer: str
    tokens: int


# ---- the captions of a record


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Text)


def _holds_texts(feature: Any) -> bool:
    """Whether a feature is a text, texts, or a sequence of records with a 'text'."""
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        return _is_text(inner) or (hasattr(inner, "keys") and _text_key(inner) is not None)
    return _is_text(feature)


def _text_key(inner: Mapping[str, Any]) -> str | None:
    return next((key for key in ("text", "raw") if key in inner and _is_text(inner[key])), None)


def find_captions(features: Mapping[str, Any], wanted: str, title: str) -> str:
    """The feature with a record's captions: `wanted`, or the only one that holds texts.

    '' if there is none and none is wanted. Raises UserError if it cannot be told.
    """
    found = [name for name in sorted(features) if _holds_texts(features[name])]
    usable = [name for name in found if name not in _NOT_CAPTIONS]
    if wanted:
        if wanted not in found:
            raise UserError(
                f"{title}: config.text.feature is {wanted!r}, which holds no texts; those that do:"
                f" {', '.join(found) or 'none'}."
            )
        return wanted
    if len(usable) > 1:
        raise UserError(
            f"{title}: several features hold texts ({', '.join(usable)}): set config.text.feature"
            " to one of them."
        )
    return usable[0] if usable else ""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions that a feature's value holds, as strings. Raises ValueError if there is none."""
    if isinstance(value, Mapping):
        value = value[next(key for key in ("text", "raw") if key in value)]
    elif isinstance(value, bytes | str):
        value = [value]
    found = []
    for each in value:
        if isinstance(each, Mapping):
            each = each[next(key for key in ("text", "raw") if key in each)]
        text = each.decode("utf-8") if isinstance(each, bytes) else str(each)
        found.append(text)
    if not found:
        raise ValueError("it has no caption")
    return tuple(found)


class CaptionReader:
    """Captions -> tokens of a split: one of a record's captions, chosen by a number in [0, 1)."""

    def __init__(self, spec: TextSpec) -> None:
        self._spec = spec
        self._tokenizer: Tokenizer = open_tokenizer(spec.tokenizer)
        self._reported = False

    def tokens(self, captions: Sequence[tuple[str, ...]], chosen: np.ndarray) -> np.ndarray:
        """Captions of n records, chosen f64[n] -> ids i32[n,M]. A line names the first that is cut.

        Raises UserError for a caption that is no text.
        """
        mode = self._spec.mode
        texts = [
            " ".join(each) if mode == "concat" else each[int(u * len(each)) * (mode == "random")]
            for each, u in zip(captions, chosen, strict=True)
        ]
        found = self._tokenizer(texts, self._spec.tokens)
        if found.cut and not self._reported:
            self._reported = True
            report_reading(
                f"{cut_line(found, self._spec.tokens)}; later ones are not reported; raise"
                " config.text.tokens to keep them whole"
            )
        return found.ids


# ---- folders and shards


class CaptionedFile(NamedTuple):
    """An image with captions: its name in the data set, and where it lies, None in a shard."""

    name: str
    captions: tuple[str, ...]
    path: Path | None = None


class CaptionListing(NamedTuple):
    """The captioned images of a folder by split, or the shards that hold them.

    `digest` covers metadata, and names, sizes and times of the files: while it is the same, nothing
    need be read again. `missing` are files that metadata name and that are not there.
    """

    root: Path
    files: dict[str, list[CaptionedFile]]
    shards: tuple[Path, ...]
    digest: str
    missing: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files) or ("train",)

    @property
    def left_out(self) -> str:
        return f"{len(self.missing)} missing files left out" if self.missing else "nothing left out"

    def examples(self, split: str) -> Iterator[tuple[CaptionedFile, bytes]]:
        """Each image of a split with its bytes, in order. Raises UserError."""
        if self.shards:
            yield from itertools.chain.from_iterable(map(read_shard, self.shards))
            return
        for each in self.files[split]:
            assert each.path is not None
            try:
                yield each, each.path.read_bytes()
            except OSError as error:
                raise UserError(f"{each.path} cannot be read: {error.strerror}.") from error

    def content(self) -> dict[str, str]:
        """Split -> a digest of the names, captions and bytes of its images. Raises UserError."""
        found = {}
        for split in self.splits:
            digest = hashlib.sha256()
            names: set[str] = set()
            for each, encoded in self.examples(split):
                if each.name in names:
                    raise UserError(f"{self.root}: {each.name} is there twice: rename one of them.")
                names.add(each.name)
                digest.update("\0".join((each.name, *each.captions, "")).encode())
                digest.update(hashlib.sha256(encoded).digest())
            found[split] = digest.hexdigest()
        return found


def list_captions(path: str, max_damaged: int = 0) -> CaptionListing:
    """The images and captions at a path: a folder with metadata, a tar file, or shards in braces.

    Raises UserError for metadata or a row that cannot be read, and for more than
    `max_damaged` files that are missing.
    """
    if path.endswith(".tar"):
        return _list_shards(path)
    root, digest = Path(path), hashlib.sha256()
    files: dict[str, list[CaptionedFile]] = {}
    missing: list[str] = []
    for metadata, split in _metadata_files(root):
        rows = _rows(metadata)
        digest.update(metadata.read_bytes())
        for number, row in rows:
            where = f"{metadata}, line {number}"
            name, captions = _checked_row(where, row)
            place = metadata.parent / name
            own = str(row.get("split") or "train") if split is None else split
            if not place.is_file():
                missing.append(os.fspath(place))
                continue
            status = place.stat()
            if status.st_size > MAX_FILE:
                raise UserError(f"{place} has {status.st_size} bytes: expected at most {MAX_FILE}.")
            digest.update(f"{own}\0{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            below = place.relative_to(root).as_posix()
            files.setdefault(own, []).append(CaptionedFile(below, captions, place))
    if len(missing) > max_damaged:
        raise UserError(
            f"{root}: {len(missing)} files that its metadata name are missing"
            f" ({first_few(missing, 2)}): put them there, or set config.data.max_damaged to leave"
            " them out."
        )
    for split, found in files.items():
        twice = [name for name, many in _counted(each.name for each in found) if many > 1]
        if twice:
            raise UserError(f"{root}, split {split!r}: {first_few(twice, 2)} are named twice.")
    if not files:
        raise UserError(f"{root}: its metadata name no image.")
    return CaptionListing(root, files, (), digest.hexdigest(), tuple(missing))


def _counted(names: Iterable[str]) -> list[tuple[str, int]]:
    ordered = sorted(names)
    return [(name, len(list(group))) for name, group in itertools.groupby(ordered)]


def _metadata_files(root: Path) -> list[tuple[Path, str | None]]:
    """Metadata with the split of its folder, None if it lies in the root."""
    folders: list[tuple[Path, str | None]] = [(root, None)]
    if root.is_dir():
        folders += [(each, each.name) for each in sorted(root.iterdir()) if each.is_dir()]
    found: list[tuple[Path, str | None]] = [
        (folder / name, split)
        for folder, split in folders
        for name in METADATA_FILES
        if (folder / name).is_file()
    ]
    own = [each for each in found if each[1] is None]
    places = [metadata.parent for metadata, _ in found]
    if not found or (own and len(found) > len(own)) or len(set(places)) < len(places):
        raise UserError(
            f"{root}: expected one of {', '.join(METADATA_FILES)} in the folder, or one in each"
            f" folder of a split; found {first_few([str(each[0]) for each in found], 3) or 'none'}."
        )
    return found


def _rows(metadata: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of metadata with their line numbers. Raises UserError."""
    try:
        text = metadata.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metadata} cannot be read as UTF-8 ({reason(error)}).") from error
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(reader.line_num, dict(row)) for row in reader]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{metadata}, line {number}: it is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{metadata}, line {number}: expected an object with file_name, text.")
        found.append((number, row))
    return found


def _checked_row(where: str, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The file's name and the captions of a row. Raises UserError."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: it has no file_name; expected file_name and text.")
    if name.startswith(("/", "\\")) or ".." in name.split("/") or ":" in name.split("/")[0]:
        raise UserError(
            f"{where}: file_name is {name!r}; expected a path below the folder, without '..'."
        )
    texts = next((row[key] for key in _TEXT_KEYS if row.get(key) is not None), None)
    return name, _checked_captions(where, texts)


def _checked_captions(where: str, texts: Any) -> tuple[str, ...]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(
            f"{where}: it has no caption; expected one of {', '.join(_TEXT_KEYS)}, a text or a list"
            " of texts."
        )
    for text in texts:
        if not text.strip():
            raise UserError(f"{where}: a caption is empty.")
        try:
            check_text(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return tuple(texts)


# ---- WebDataset's shards


def _list_shards(path: str) -> CaptionListing:
    """'PATH/{000..099}.tar' or 'PATH/x.tar' -> their listing. Raises UserError."""
    names, match = [path], _BRACES.search(path)
    if match:
        first, last = int(match[1]), int(match[2])
        width = len(match[1])
        names = [
            f"{path[: match.start()]}{k:0{width}d}{path[match.end() :]}"
            for k in range(first, last + 1)
        ]
    shards = tuple(map(Path, names))
    absent = [os.fspath(each) for each in shards if not each.is_file()]
    if absent or not shards:
        raise UserError(f"captions:{path}: missing: {first_few(absent, 2) or 'every shard'}.")
    digest = hashlib.sha256()
    for each in shards:
        status = each.stat()
        digest.update(f"{each}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return CaptionListing(shards[0].parent, {}, shards, digest.hexdigest())


def read_shard(shard: Path) -> Iterator[tuple[CaptionedFile, bytes]]:
    """The samples of a tar file in order: members that share a name up to its first dot.

    A sample has an image and a .txt, or a .json with "caption". Raises UserError.
    """

    def key(name: str) -> str:
        folder, slash, base = name.rpartition("/")
        return f"{folder}{slash}{base.partition('.')[0]}"

    parts: dict[str, bytes] = {}
    current = ""
    try:
        with tarfile.open(shard, "r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if (name := key(member.name)) != current and parts:
                    yield _sample(shard, current, parts)
                    parts = {}
                current = name
                file = archive.extractfile(member)
                assert file is not None
                parts[member.name[len(name) + 1 :].lower()] = file.read()
        if parts:
            yield _sample(shard, current, parts)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard} cannot be read as a tar file ({reason(error)}).") from error


def _sample(shard: Path, name: str, parts: Mapping[str, bytes]) -> tuple[CaptionedFile, bytes]:
    where = f"{shard}, sample {name!r}"
    suffix = next((each for each in _SHARD_IMAGES if each in parts), None)
    if suffix is None:
        raise UserError(f"{where}: it has no image; expected one of {', '.join(_SHARD_IMAGES)}.")
    try:
        texts: Any = None
        if "txt" in parts:
            texts = parts["txt"].decode("utf-8").strip()
        elif "json" in parts:
            texts = json.loads(parts["json"]).get("caption")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: its caption cannot be read ({reason(error)}).") from error
    captions = _checked_captions(where, texts)
    return CaptionedFile(f"{name}.{suffix}", captions), parts[suffix]


class CaptionFolder(
    ConvertedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A folder or shards of captioned images: image, captions, file_name, in metadata's order."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(
        self, listing: CaptionListing, content: dict[str, str], data_dir: Path, max_damaged: int = 0
    ) -> None:
        # Missing files are among the damaged ones.
        super().__init__(listing, content, data_dir, max_damaged - len(listing.missing))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The captioned images of {self._listing.root}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "file_name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (each, encoded) in enumerate(self._listing.examples(split)):
            try:
                converted(decode_image(encoded), "RGB")
            except ValueError as error:
                self.skip(each.path or each.name, error)
            record = {"image": encoded, "captions": list(each.captions), "file_name": each.name}
            yield i, record
