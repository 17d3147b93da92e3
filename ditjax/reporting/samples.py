"""The first samples of each model, by size and patch, as in the DiT paper's figure 7."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditjax.data.clips import encode_gif, picture
from ditjax.errors import UserError
from ditjax.reporting.study import Group, by_patch, described, described_by, names_by_size
from ditjax.runs.results import SAMPLES_FILE, Found, load_samples, tile, tiled_frames
from ditjax.studies.words import metric_name, number, plural

MAX_ROWS, MAX_COLUMNS = 8, 5
MAX_IMAGES = 10  # read from a run
PAGE_SIDE = 128  # pixels; larger images are scaled down for the page
PAGE_BYTES = 4 << 20  # of all images in a page


@dataclass(frozen=True)
class Cells:
    """For each (row, patch): the run, its first images u8[n,H,W,C], and a line of text.

    A row is a size. A column is a patch size. A network without one has the patch "-" and one cell,
    in the first column.
    """

    rows: list[str]
    columns: list[str]
    runs: dict[tuple[str, str], Found]
    images: dict[tuple[str, str], NDArray[np.uint8]]
    words: dict[tuple[str, str], str]

    def patches_of(self, row: str) -> list[str]:
        """The patches of a row's cells, from the first column on."""
        return ["-"] if (row, "-") in self.runs else self.columns


def sample_cells(group: Group, metric: str, problems: list[str]) -> tuple[Cells | None, str]:
    """The samples of the lowest seed of each size and patch, and a note on what is left out.

    At most MAX_ROWS x MAX_COLUMNS cells; None if no run kept samples. Files that cannot be read
    are added to `problems`.
    """
    several = len({described(each, "block") for each in group.runs} - {"-"}) > 1
    keys = ("size", "block") if several else ("size",)
    runs: dict[tuple[str, str], Found] = {}
    others = 0
    for each in sorted(group.runs, key=lambda each: each.result["train"]["seed"]):
        if (each.folder / SAMPLES_FILE).exists():
            key = (described_by(each, keys), described(each, "patch"))
            others += runs.setdefault(key, each) is not each
    if not runs:
        return None, ""
    all_rows = names_by_size(list(runs.values()), keys)
    patches = {patch for _, patch in runs}
    all_columns = sorted(patches - {"-"} or patches, key=by_patch)
    rows, columns = _spread(all_rows, MAX_ROWS), _spread(all_columns, MAX_COLUMNS)
    images, words = {}, {}
    for (row, patch), each in runs.items():
        if row not in rows or patch not in (*columns, "-"):
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
    """At most `most` of the items, evenly spaced, including both ends."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def data_uri(images: NDArray[np.uint8]) -> str:
    """A square of the first 9, 4 or 1 images u8[n,H,W,C] as one picture in a data: URI.

    Images larger than PAGE_SIDE are scaled down. The picture is a JPEG if they are larger than 64
    pixels, else a PNG. Of clips u8[n,F,H,W,C] it is a GIF of the same square in motion.
    """
    from PIL import Image

    if images.ndim == 5:
        shrink = -(-max(images.shape[2:4]) // PAGE_SIDE)
        frames = tiled_frames(images[:4, :, ::shrink, ::shrink], min(len(images), 2))
        return f"data:image/gif;base64,{base64.b64encode(encode_gif(frames)).decode()}"
    side = max(images.shape[1:3])
    most = 9 if side <= 32 else 4
    columns = int(min(len(images), most) ** 0.5)
    images = images[: columns**2]
    if side > PAGE_SIDE:
        height, width = (max(1, round(n * PAGE_SIDE / side)) for n in images.shape[1:3])
        smaller = [
            Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BOX)
            for image in images
        ]
        images = np.stack([*map(np.asarray, smaller)]).reshape(len(images), height, width, -1)
    grid = tile(images, columns, gap=1 if side <= 32 else 2)
    buffer = io.BytesIO()
    if side <= 64:
        picture(grid).save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture(grid).save(buffer, format="JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
