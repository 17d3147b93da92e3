"""The first samples of each model by size and patch, as in the DiT paper's figure 7."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.reporting.study import Group
from ditjax.runs.results import SAMPLES_FILE, Found, load_samples, tile
from ditjax.studies.words import metric_name, number, plural, short

MAX_ROWS, MAX_COLUMNS = 8, 5
MAX_IMAGES = 10  # read of a run
PAGE_SIDE = 128  # pixels of an image in the page: larger ones are made smaller
PAGE_BYTES = 4 << 20  # of all images in a page


@dataclass(frozen=True)
class Cells:
    """For (row, column): the run, its first images u8[n,H,W,C], a line of text."""

    rows: list[str]
    columns: list[int]
    runs: dict[tuple[str, int], Found]
    images: dict[tuple[str, int], NDArray[np.uint8]]
    words: dict[tuple[str, int], str]


def several_blocks(runs: Sequence[Found]) -> bool:
    return len({each.result["model"]["block"] for each in runs}) > 1


def row_names(runs: Sequence[Found], blocks: bool) -> list[str]:
    """Size names by their most parameters; the block is named where there are several blocks."""
    largest: dict[str, int] = {}
    for each in runs:
        row = row_name(each, blocks)
        largest[row] = max(largest.get(row, 0), each.result["params"])
    return sorted(largest, key=lambda row: (largest[row], row))


def row_name(each: Found, blocks: bool) -> str:
    model = each.result["model"]
    size = short(model["size"], 18)
    return f"{size} {short(model['block'], 18)}" if blocks else size


def sample_cells(group: Group, metric: str, problems: list[str]) -> tuple[Cells | None, str]:
    """The lowest seed of each size and patch, at most 8 x 5 cells, and what was left out.

    None where no run kept samples; what cannot be read is added to `problems`.
    """
    blocks = several_blocks(group.runs)
    runs: dict[tuple[str, int], Found] = {}
    others = 0
    for each in sorted(group.runs, key=lambda each: each.result["train"]["seed"]):
        if (each.folder / SAMPLES_FILE).exists():
            key = (row_name(each, blocks), each.result["model"]["patch"])
            others += runs.setdefault(key, each) is not each
    if not runs:
        return None, ""
    all_rows = row_names(list(runs.values()), blocks)
    all_columns = sorted({patch for _, patch in runs}, reverse=True)
    rows, columns = _spread(all_rows, MAX_ROWS), _spread(all_columns, MAX_COLUMNS)
    images, words = {}, {}
    for (row, patch), each in runs.items():
        if row not in rows or patch not in columns:
            continue
        try:
            images[row, patch], _ = load_samples(each.folder / SAMPLES_FILE, limit=MAX_IMAGES)
        except UserError as error:
            problems.append(str(error))
            continue
        value = each.result["metrics"].get(metric)
        words[row, patch] = (
            f"{number(each.result['gflops'])} Gflops, {metric_name(metric)} {number(value)}"
        )
    note = ""
    if (len(all_rows), len(all_columns)) != (len(rows), len(columns)):
        note += (
            f" Shown are {len(rows)} of {len(all_rows)} sizes and {len(columns)} of"
            f" {len(all_columns)} patches."
        )
    if others:
        note += f" {plural(others, 'run')} of another seed or recipe not shown."
    found = Cells(rows, columns, runs, images, words)
    return (found, note) if images else (None, "")


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, both ends among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def data_uri(images: NDArray[np.uint8]) -> str:
    """u8[n,H,W,C] -> a square of the first 9, 4 or 1 as one image in a data: URI.

    Small images keep their pixels (PNG); beyond PAGE_SIDE they are made smaller, and beyond 64
    they are JPEG.
    """
    from PIL import Image

    side = max(images.shape[1:3])
    most = 9 if side <= 32 else 4
    columns = int(min(len(images), most) ** 0.5)
    images = images[: columns**2]
    if side > PAGE_SIDE:
        height, width = (max(1, round(n * PAGE_SIDE / side)) for n in images.shape[1:3])
        images = np.stack(
            [
                np.asarray(
                    Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BOX)
                )
                for image in images
            ]
        ).reshape(len(images), height, width, -1)
    grid = tile(images, columns, gap=1 if side <= 32 else 2)
    picture = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid)
    buffer = io.BytesIO()
    if side <= 64:
        picture.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, format="JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
