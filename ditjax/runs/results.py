"""The results of a run: result.json, metrics.jsonl, samples.npz and grids of samples.

A sweep and a report exchange one `result.json` in each run's folder and nothing else. Every file is
written whole or not at all, so that a reader never finds half of one and a crash keeps the old one.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from ditjax.config import check_recorded
from ditjax.data import clips
from ditjax.errors import FaultError, UserError, nearest, shown
from ditjax.files import faults, npz
from ditjax.files.atomic import finite_or_null, load_json, write_atomic, write_json
from ditjax.files.store import is_object, place, walk_tree
from ditjax.models.network import training_gflops
from ditjax.runs import rundir

RESULT_SCHEMA = 1
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
LOG_PARTS = "metrics"  # on a store, what a run has added to its metrics.jsonl, in parts
SAMPLES_FILE = "samples.npz"
EVALUATION_FILE = "evaluation.json"
RECORDS_FILE = "records.npz"  # scores of single held-out records or pairs, by metric

_Images = NDArray[np.uint8]


class TrainRecord(TypedDict):
    """The training. `images` = steps · batch_size; `seconds` are those of the loop alone.

    `passes` are forward passes that a step costs per image, where they are not 3.
    """

    steps: int
    batch_size: int
    images: int
    seconds: float
    learning_rate: float
    final_loss: float
    seed: int
    passes: NotRequired[float]


class SampleRecord(TypedDict):
    """How samples were drawn. `eta` is DDIM's; `cfg_channels` are the guided channels."""

    num: int
    sampler: str
    steps: int
    eta: float
    cfg_scale: float
    cfg_channels: str
    seed: int
    seconds: float


class PublishedFigures(TypedDict):
    """Figures that others published for such a run.

    `values`: metric -> value. `protocol`: what fixes their meaning. `source`: where they are from.
    """

    values: dict[str, float]
    protocol: dict[str, str]
    source: str


class Result(TypedDict):
    """One run.

    `gflops` are the multiply-accumulates of one forward pass / 1e9, as in the paper. `model` holds
    the network's `name` (DiT-XL/2) and whatever else describes it, as plain JSON values: for a DiT
    its size, depth, width, heads, patch, block and tokens. Reports group runs by `size`, `patch`
    and `block` where a network has them. `metrics` maps a name to a value, NaN where it could not
    be computed; `metrics["fd_digits_floor"]` is the distance of real images to real images. Results
    with different `protocol_hash` are never compared. `environment["command"]` made the run.
    """

    schema: int
    run: str
    model: dict[str, Any]
    params: int
    gflops: float
    train: TrainRecord
    sample: SampleRecord
    metrics: dict[str, float]
    protocol: dict[str, Any]
    protocol_hash: str
    environment: dict[str, Any]
    config: dict[str, Any]
    published: NotRequired[PublishedFigures]


class Found(NamedTuple):
    """A result and its folder."""

    folder: Path
    result: Result


def trained_gflops(result: Result, images: Any) -> Any:
    """The training Gflops of a result after a number of images, or f64[n]."""
    return training_gflops(result["gflops"], images, result["train"].get("passes", 3.0))


def training_compute(each: Found) -> float:
    """The training Gflops of a finished run."""
    return float(trained_gflops(each.result, each.result["train"]["images"]))


def write_result(folder: str | os.PathLike[str], result: Result) -> Path:
    """Write `folder`/result.json, a NaN as null. Raises UserError for what is no result."""
    _validated(finite_or_null(result), "result")
    return write_json(place(folder) / RESULT_FILE, result)


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read a result.json, or the one in a folder.

    null becomes NaN, and keys beyond the schema are kept. Raises UserError with the file's name,
    and with the key if one is missing or has the wrong type, and FaultError as `load_json`.
    """
    path = place(path)
    if path.is_dir():
        path = path / RESULT_FILE
    try:
        value = load_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; run this cell again.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not whole JSON ({error}): it is half-written or was edited; run this cell"
            " again."
        ) from error
    result = _validated(value, str(path))
    check_recorded(result["config"], str(path))
    return result


def write_record_scores(folder: Path, scores: Mapping[str, NDArray[Any]], protocol: str) -> None:
    """Write the scores f[N] of single records to `folder`/records.npz; none remove the file.

    protocol: the hash of that of the metrics which are their means.
    """
    if not scores:
        (folder / RECORDS_FILE).unlink(missing_ok=True)
        return
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in scores.items()}
    arrays["provenance"] = npz.provenance_text({"protocol_hash": protocol})
    np.savez(buffer, **arrays)
    write_atomic(folder / RECORDS_FILE, buffer.getvalue())


def read_record_scores(folder: Path, protocol: str) -> dict[str, NDArray[np.float32]]:
    """The scores f32[N] of single records, NaN where one has none; {} if they are not on record.

    Raises UserError for a damaged file, or one of another protocol than this hash.
    """
    if not faults.exists(folder / RECORDS_FILE):
        return {}
    with npz.reading(folder / RECORDS_FILE) as archive:
        theirs = npz.read_provenance(archive).get("protocol_hash")
        names = [name for name in npz.names(archive) if name != "provenance"]
        found = {name: npz.read_array(archive, name) for name in names}
    if theirs != protocol:
        raise UserError(
            f"{folder / RECORDS_FILE} is of protocol {shown(theirs)}, and the run's result of"
            f" {protocol}: the run was evaluated again."
        )
    for name, values in found.items():
        if values.dtype != np.float32 or values.ndim != 1:
            raise UserError(
                f"{folder / RECORDS_FILE}: {name} is {values.dtype}{list(values.shape)}, expected"
                " f32[N]."
            )
    return found


def find_results(
    folders: Sequence[str | os.PathLike[str]],
) -> tuple[list[Found], list[str]]:
    """Find every result below `folders`, by folder and path; return them and all problems in words.

    Runs may lie within others. A folder with a metrics.jsonl and no result.json is a run that did
    not finish. A folder that is reached twice counts once. Raises UserError for a folder that does
    not exist.
    """
    found: list[Found] = []
    problems: list[str] = []
    seen: set[Path] = set()

    def unreadable(error: OSError) -> None:
        problems.append(f"cannot read {error.filename}: {error.strerror}.")

    for root in map(place, folders):
        if not faults.is_folder(root):
            is_file = " is a file" if faults.exists(root) else " is not there"
            raise UserError(f"folder {str(root)!r}{is_file}: give the folder of a sweep.")
        for here, subfolders, files in walk_tree(root, unreadable):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if RESULT_FILE in files:
                _leave_out_own(subfolders)
                if here.resolve() in seen:
                    continue
                seen.add(here.resolve())
                try:
                    found.append(Found(here, read_result(here / RESULT_FILE)))
                except (UserError, FaultError) as error:
                    problems.append(str(error))
            elif METRICS_FILE in files:
                _leave_out_own(subfolders)
                if here.resolve() not in seen:
                    seen.add(here.resolve())
                    problems.append(f"{here} has no {RESULT_FILE}: the run did not finish.")
    return found, problems


def _leave_out_own(subfolders: list[str]) -> None:
    """Leave a run's own large folders out of a walk; other runs may lie beside them."""
    own = (rundir.CHECKPOINTS, rundir.AVERAGES, LOG_PARTS)
    subfolders[:] = [name for name in subfolders if name not in own]


def log_files(path: Path) -> list[Path]:
    """A metrics.jsonl, and on a store the parts that a run has added to it, in order.

    A store cannot append: a run adds parts, and joins them when it ends or resumes.
    """
    if not is_object(path):
        return [path]
    return [path, *path.with_name(LOG_PARTS).iterdir()]


def read_log(path: Path) -> bytes:
    """The content of a metrics.jsonl with its parts. Raises OSError."""
    return b"".join(file.read_bytes() for file in log_files(path))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read lines {"step": int, "loss": float, ...} as one dict a step.

    A torn last line is dropped. Of a step that a resumed run logged twice, the later line counts.
    Raises UserError with the number of a damaged line before the last.
    """
    path = place(path)
    try:
        lines = read_log(path).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))  # from bytes json would guess the encoding
            step = entry["step"]
            if not _is(step, int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):  # no newline after it: it is torn
                break
            raise UserError(
                f"{path} line {number} is damaged: expected an object with an integer 'step'."
            ) from error
        by_step.pop(step, None)
        by_step[step] = entry
    return [by_step[step] for step in sorted(by_step)]


def save_grid(
    images: _Images,
    path: str | os.PathLike[str],
    columns: int,
    *,
    upscale: int = 1,
    gap: int = 1,
) -> Path:
    """Write images u8[N,H,W,C] (C = 1 or 3) as a PNG of ceil(N / columns) rows, in reading order.

    Each pixel is repeated `upscale` times. Between the images are `gap` white pixels, before
    upscaling, and unused cells are white. Clips u8[N,F,H,W,C] are strips of their frames, one a
    row, and the grid in motion is written beside them, as NAME.gif.
    """
    if upscale < 1:
        raise UserError(f"upscale {upscale}: expected an integer of at least 1.")
    if np.ndim(images) == 5:
        frames = tiled_frames(images, columns, gap=gap, upscale=upscale)
        write_atomic(Path(path).with_suffix(".gif"), clips.encode_gif(frames))
    grid = _enlarged(tile(images, columns, gap=gap), upscale)
    buffer = io.BytesIO()
    clips.picture(grid).save(buffer, format="PNG")
    return write_atomic(path, buffer.getvalue())


def _enlarged(grid: _Images, upscale: int) -> _Images:
    return grid.repeat(upscale, axis=-3).repeat(upscale, axis=-2)


def tiled_frames(
    images: _Images, columns: int, *, gap: int = 1, upscale: int = 1
) -> NDArray[np.uint8]:
    """Clips u8[N,F,H,W,C] -> the frames of a grid of them, u8[F,h,w,C]."""
    frames = [tile(each, columns, gap=gap) for each in np.moveaxis(images, 1, 0)]
    return _enlarged(np.stack(frames), upscale)


def tile(images: _Images, columns: int, *, gap: int = 1) -> _Images:
    """Tile u8[N,H,W,C] on white -> u8[rows·H + (rows-1)·gap, columns·W + (columns-1)·gap, C].

    A clip of u8[N,F,H,W,C] is a row of its frames.
    """
    images = _checked_images(images)
    if images.ndim == 5:
        images, columns = images.reshape(-1, *images.shape[2:]), images.shape[1]
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


def load_samples(
    path: str | os.PathLike[str], limit: int | None = None
) -> tuple[_Images, NDArray[np.int32] | None]:
    """Read an npz: arr_0 u8[N,..,H,W,C] and label i32[N] or None, or the first `limit` of them.

    Raises UserError with the names of the file and the array. Pickled arrays are refused.
    """
    with npz.reading(path) as archive:
        images = npz.read_array(archive, "arr_0", limit)
        label = npz.read_array(archive, "label", limit) if "label" in npz.names(archive) else None
    _checked_images(images, f"{path}: arr_0 is")
    return images, None if label is None else checked_labels(path, label, len(images))


def checked_labels(
    path: str | os.PathLike[str], label: NDArray[Any], count: int
) -> NDArray[np.int32]:
    """The labels of `count` samples as i32[count]. Raises UserError for another type or shape."""
    if label.dtype.kind not in "iu" or label.shape != (count,):
        raise UserError(
            f"{path}: label is {label.dtype}{list(label.shape)}, expected i32[{count}]."
        )
    return label.astype(np.int32)


def _checked_images(images: _Images, name: str = "images are") -> _Images:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{name} {images.dtype}{list(images.shape)}, expected u8[N,H,W,C], or u8[N,F,H,W,C] of"
            " clips, with C = 1 or 3."
        )
    return images


def _schema(kind: type) -> dict[str, Any]:
    """Every required key and its type."""
    required = kind.__dict__["__required_keys__"]
    return {
        key: getattr(value, "__origin__", value)
        for key, value in kind.__annotations__.items()
        if key in required
    }


class _Named(TypedDict):
    """The part of `model` that every network has."""

    name: str


_NESTED = {TrainRecord, SampleRecord}
_POSITIVE = {"params", "gflops"}
_COUNTS = ("steps", "batch_size", "images")  # of the training
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def is_plausible(value: float) -> bool:
    """Whether a number is finite and as large as float32 holds: no measurement gives another."""
    return value == 0 or _TINY <= abs(value) <= _HUGE


def _validated(value: Any, where: str) -> Result:
    """The value as a Result, null metrics as NaN. Raises UserError with `where` and the key."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, not {type(value).__name__}.")
    if value.get("schema") != RESULT_SCHEMA and "schema" in value:
        raise UserError(
            f"{where}: schema is {shown(value['schema'])}, this ditjax reads {RESULT_SCHEMA}; use"
            " the version that wrote it."
        )
    result = _checked_keys(value, Result, where, "")
    result["model"] = _checked_keys(result["model"], _Named, where, "model.")
    for key in _POSITIVE:
        if not is_plausible(result[key]) or result[key] <= 0:
            raise UserError(f"{where}: {key} is {result[key]}, expected a positive number.")
    for key in _COUNTS:
        if result["train"][key] < 1:
            raise UserError(f"{where}: train.{key} is {result['train'][key]}, expected at least 1.")
    passes = result["train"].get("passes", 3.0)
    if not _is(passes, float) or not passes > 0:
        raise UserError(f"{where}: train.passes is {shown(passes)}, expected a number above 0.")
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
    """Whether a value read from a file is a `PublishedFigures`."""
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
    """Like isinstance, but an integer is a float too, and True is no number.

    An integer beyond 64 bits is neither an integer nor a float.
    """
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() > 63):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
