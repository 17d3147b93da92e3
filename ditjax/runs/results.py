"""What a run leaves behind: result.json, metrics.jsonl, samples.npz, samples.png.

One `result.json` in each run's folder is all that a sweep and a report exchange. Every file is
written whole or not at all: a reader never meets half of one, and a crash keeps the old one.
"""

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError, nearest, shown
from ditjax.files import npz
from ditjax.files.atomic import finite_or_null, load_json, write_atomic, write_json

SCHEMA = 1
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.npz"
GRID_FILE = "samples.png"

Images = NDArray[np.uint8]


class Model(TypedDict):
    """`name` as in the paper (DiT-XL/2), `size` as in `ditjax.models.sizes`, N = `tokens`."""

    name: str
    size: str
    depth: int
    width: int
    heads: int
    patch: int
    block: str
    tokens: int


class Train(TypedDict):
    """`images` = steps · batch_size; `seconds` of the training loop alone."""

    steps: int
    batch_size: int
    images: int
    seconds: float
    learning_rate: float
    final_loss: float
    seed: int


class Sample(TypedDict):
    """How the samples were drawn; `eta` is DDIM's, `cfg_channels` the channels guided."""

    num: int
    sampler: str
    steps: int
    eta: float
    cfg_scale: float
    cfg_channels: str
    seed: int
    seconds: float


class Published(TypedDict):
    """What others have measured of such a run: metric -> value, what fixes it, where it stands."""

    values: dict[str, float]
    protocol: dict[str, str]
    source: str


class Result(TypedDict):
    """One run. `gflops` are multiply-accumulates of one forward pass / 1e9, as in the paper.

    `metrics` name -> value, NaN for one that could not be computed; `metrics["fd_digits_floor"]`
    is the distance of real images to real images. Two results with different `protocol_hash` are
    never compared. `environment["command"]` is the command that made the run.
    """

    schema: int
    run: str
    model: Model
    params: int
    gflops: float
    train: Train
    sample: Sample
    metrics: dict[str, float]
    protocol: dict[str, Any]
    protocol_hash: str
    environment: dict[str, Any]
    config: dict[str, Any]
    published: NotRequired[Published]


class Found(NamedTuple):
    """A result and the folder it lies in."""

    folder: Path
    result: Result


def write_result(folder: str | os.PathLike[str], result: Result) -> Path:
    """Writes `folder`/result.json, validated first; a NaN is written as null."""
    _validated(finite_or_null(result), "result")
    return write_json(Path(folder) / RESULT_FILE, result)


def read_result(path: str | os.PathLike[str]) -> Result:
    """Reads a result.json (or the one in a folder); null is NaN; keys beyond the schema stay.

    Raises UserError naming the file, and the key where one is missing or mistyped.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RESULT_FILE
    try:
        value = load_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: run this cell again.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not whole JSON ({error}): it was half-written or edited; run this cell"
            " again."
        ) from error
    return _validated(value, str(path))


def find_results(
    folders: Sequence[str | os.PathLike[str]],
) -> tuple[list[Found], list[str]]:
    """Every result below `folders`, in order of folder and path, and what was wrong, in words.

    A folder that holds a metrics.jsonl and no result.json is a run that did not finish. A folder
    reached twice counts once. Raises UserError for a folder that is not there.
    """
    found: list[Found] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for root in map(Path, folders):
        if not root.is_dir():
            raise UserError(f"folder {str(root)!r} is not there: expected the folder of a sweep.")
        for folder, subfolders, files in os.walk(root, onerror=_note_unreadable(problems)):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            here = Path(folder)
            if RESULT_FILE in files:
                subfolders.clear()  # checkpoints lie below
                if here.resolve() in seen:
                    continue
                seen.add(here.resolve())
                try:
                    found.append(Found(here, read_result(here / RESULT_FILE)))
                except UserError as error:
                    problems.append(str(error))
            elif METRICS_FILE in files:
                subfolders.clear()
                if here.resolve() not in seen:
                    seen.add(here.resolve())
                    problems.append(f"{here} has no {RESULT_FILE}: the run did not finish.")
    return found, problems


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Lines {"step": int, "loss": float, ...} -> one dict a line; a torn last line is dropped.

    A resumed run may log a step twice: the later line holds. Raises UserError for a damaged line
    before the last, naming it.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))  # of bytes json would guess the encoding
            step = entry["step"]
            if not _is(step, int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):  # no newline after it: torn
                break
            raise UserError(
                f"{path} line {number} is damaged: expected an object with an integer 'step'."
            ) from error
        by_step.pop(step, None)
        by_step[step] = entry
    return [by_step[step] for step in sorted(by_step)]


def save_grid(
    images: Images,
    path: str | os.PathLike[str],
    columns: int,
    *,
    upscale: int = 1,
    gap: int = 1,
) -> Path:
    """u8[N,H,W,C] (C = 1 or 3) -> a PNG of ceil(N / columns) rows, in reading order.

    Each pixel is repeated `upscale` times; `gap` white pixels (before upscaling) lie between
    images and fill the unused cells.
    """
    from PIL import Image

    grid = tile(images, columns, gap=gap)
    if upscale < 1:
        raise UserError(f"upscale {upscale}: expected an integer of at least 1.")
    grid = grid.repeat(upscale, axis=0).repeat(upscale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid).save(buffer, format="PNG")
    return write_atomic(path, buffer.getvalue())


def tile(images: Images, columns: int, *, gap: int = 1) -> Images:
    """u8[N,H,W,C] -> u8[rows·H + (rows-1)·gap, columns·W + (columns-1)·gap, C] on white."""
    images = _checked_images(images)
    n, height, width, channels = images.shape
    if columns < 1 or gap < 0 or n < 1:
        raise UserError(
            f"a grid of {n} images in {columns} columns with gap {gap}: expected at least one"
            " image, one column and a gap of 0 or more."
        )
    columns = min(columns, n)
    rows = -(-n // columns)
    cells = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    cells[:n, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, channels)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def save_samples(
    path: str | os.PathLike[str], images: Images, label: NDArray[np.integer[Any]] | None = None
) -> Path:
    """npz as ADM's evaluator reads it: arr_0 u8[N,H,W,C], and label i32[N] where there are any."""
    arrays: dict[str, NDArray[Any]] = {"arr_0": _checked_images(images)}
    if label is not None:
        label = np.asarray(label)
        if label.shape != images.shape[:1] or not np.issubdtype(label.dtype, np.integer):
            raise UserError(
                f"labels {label.dtype}{list(label.shape)} for {len(images)} images: expected one"
                " integer for each."
            )
        arrays["label"] = label.astype(np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return write_atomic(path, buffer.getvalue())


def load_samples(
    path: str | os.PathLike[str], limit: int | None = None
) -> tuple[Images, NDArray[np.int32] | None]:
    """npz -> arr_0 u8[N,H,W,C], label i32[N] or None; with `limit` only the first ones are read.

    Raises UserError naming the file and the array. Pickled arrays are refused.
    """
    with npz.reading(path) as archive:
        images = npz.read(archive, "arr_0", limit)
        label = npz.read(archive, "label", limit) if "label" in npz.names(archive) else None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{path}: arr_0 is {images.dtype}{list(images.shape)}, expected u8[N,H,W,C] with C = 1"
            " or 3."
        )
    if label is not None and (label.dtype.kind not in "iu" or label.shape != images.shape[:1]):
        raise UserError(
            f"{path}: label is {label.dtype}{list(label.shape)}, expected i32[{len(images)}]."
        )
    return images, None if label is None else label.astype(np.int32)


def _checked_images(images: Images) -> Images:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"images are {images.dtype}{list(images.shape)}, expected u8[N,H,W,C] with C = 1 or 3."
        )
    return images


def _schema(kind: type) -> dict[str, Any]:
    """Every key that must be there, with its type."""
    required = kind.__dict__["__required_keys__"]
    return {
        key: getattr(value, "__origin__", value)
        for key, value in kind.__annotations__.items()
        if key in required
    }


_NESTED = {Model, Train, Sample}
_POSITIVE = {"params", "gflops"}


def _validated(value: Any, where: str) -> Result:
    """The value as a Result, null metrics as NaN; UserError names `where` and the key."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, not {type(value).__name__}.")
    if value.get("schema") != SCHEMA and "schema" in value:
        raise UserError(
            f"{where}: schema is {shown(value['schema'])}, this ditjax reads {SCHEMA}; use the"
            " version that wrote it."
        )
    result = _checked_keys(value, Result, where, "")
    for key in _POSITIVE:
        if not (math.isfinite(result[key]) and result[key] > 0):
            raise UserError(f"{where}: {key} is {result[key]}, expected a positive number.")
    metrics = {}
    for name, metric in result["metrics"].items():
        if metric is not None and not _is(metric, float):
            raise UserError(f"{where}: metrics.{name} is {shown(metric)}, expected a number.")
        metrics[name] = math.nan if metric is None else float(metric)
    result["metrics"] = metrics
    digits = result["protocol_hash"]
    if not digits or set(digits) - set("0123456789abcdef"):
        raise UserError(f"{where}: protocol_hash is {shown(digits)}, expected hex digits.")
    if "published" in result and not is_published(result["published"]):
        raise UserError(
            f"{where}: published is {shown(result['published'])}, expected values (numbers above"
            " 0), their protocol (text) and a source."
        )
    return cast(Result, result)


def is_published(value: Any) -> bool:
    """Whether a value out of a file is a `Published`."""
    if not isinstance(value, dict):
        return False
    values, protocol = value.get("values"), value.get("protocol")
    return (
        isinstance(values, dict)
        and all(_is(each, float) and math.isfinite(each) and each > 0 for each in values.values())
        and isinstance(protocol, dict)
        and all(isinstance(text, str) for text in protocol.values())
        and isinstance(value.get("source"), str)
    )


def _checked_keys(value: dict[str, Any], kind: type, where: str, prefix: str) -> dict[str, Any]:
    checked = dict(value)
    for key, expected in _schema(kind).items():
        if key not in value:
            raise UserError(
                f"{where}: key {prefix + key!r} is missing.{nearest(key, value)} Run this cell"
                " again."
            )
        found = value[key]
        if expected in _NESTED and isinstance(found, dict):
            checked[key] = _checked_keys(found, expected, where, f"{prefix}{key}.")
        elif expected is float and found is None:
            checked[key] = math.nan
        elif expected is float and _is(found, float):
            checked[key] = float(found)
        elif expected in _NESTED or not _is(found, expected):
            name = "object" if expected in _NESTED or expected is dict else expected.__name__
            raise UserError(
                f"{where}: {prefix}{key} is {shown(found)}, expected {_ARTICLES.get(name, name)}."
            )
    return checked


_ARTICLES = {
    "object": "an object",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
}


def _is(value: Any, kind: type) -> bool:
    """True is no number here, and an integer is a number; one beyond 64 bits is neither."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() > 63):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _note_unreadable(problems: list[str]) -> Any:
    return lambda error: problems.append(f"cannot read {error.filename}: {error.strerror}.")
