"""The page of an inspection: its figures, drawn from the tables and arrays of each analysis."""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from ditjax.reporting import style
from ditjax.reporting.page import page_template
from ditjax.reporting.style import COLOURS, FAINT, MARKERS
from ditjax.studies.words import encodable, number

_Row = Mapping[str, Any]
_Tables = Mapping[str, Sequence[_Row]]
_Pictures = Mapping[str, np.ndarray]

SIZE = (340.0, 260.0)  # points
MAX_ROWS = 8  # of a grid of pictures, and columns
_MARKS = tuple(MARKERS)


class Sketch(NamedTuple):
    """A figure: the name of its file, what it shows, and what draws it with a title and notes."""

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure]

    def svg(self) -> str:
        """The figure as an <svg> for the page."""
        with style.styled():
            return style.svg(self.draw(), f"{self.name}: {self.title}")

    def png(self) -> bytes:
        """The figure as a PNG that stands alone."""
        with style.styled():
            return style.png(self.draw(title=self.title, notes=[self.caption]))


class Line(NamedTuple):
    """A line of a plot: its words, x, y, colour, marker ('' for none) and dashes."""

    words: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = "o"
    dashes: str = "-"


def _plot(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    levels: Mapping[str, float] | None = None,
    columns: int = 3,
) -> Sketch:
    """Lines over blocks or shares; `levels` are horizontal lines with words."""

    def draw(ax: Axes) -> None:
        x = np.concatenate([np.asarray(line.x, float) for line in lines])
        y = np.concatenate([np.asarray(line.y, float) for line in lines])
        y = np.append(y, [*(levels or {}).values()])
        room = 0.04 * (x.max() - x.min() or 1.0)
        ax.set_xlim(x.min() - room, x.max() + room)
        spread = y.max() - y.min() or abs(y.max()) or 1.0
        ax.set_ylim(y.min() - 0.08 * spread, y.max() + 0.08 * spread)
        ax.set_xlabel(x_title, loc="right")
        ax.set_title(y_title, loc="left")
        style.plain_ticks(ax)
        ends = {float(each) for each in x}
        if len(ends) <= 8 and all(each.is_integer() for each in ends):
            ax.xaxis.set_major_locator(FixedLocator(sorted(ends)))
        for line in lines:
            ax.plot(
                line.x,
                line.y,
                line.dashes,
                marker=line.marker,
                color=line.colour,
                label=line.words or None,
                lw=1.4,
                ms=5,
            )
        for k, (words, level) in enumerate((levels or {}).items()):
            dashes = ((0, (1, 2)), (0, (5, 2)), (0, (5, 2, 1, 2)))[k % 3]
            ax.axhline(level, color=FAINT, lw=1.1, ls=dashes, label=words)

    return Sketch(
        name, title, caption, functools.partial(style.plot_figure, [draw], *SIZE, columns=columns)
    )


def _by_time(rows: Sequence[_Row], value: str, *, dashes: str = "-") -> list[Line]:
    """One line over blocks for each share of the noise."""
    found = []
    for k, share in enumerate(dict.fromkeys(row["share"] for row in rows)):
        here = [row for row in rows if row["share"] == share]
        look = (COLOURS[k % len(COLOURS)], _MARKS[k % len(_MARKS)], dashes)
        x, y = ([float(row[key]) for row in here] for key in ("block", value))
        found.append(Line(f"{share:g}", x, y, *look))
    return found


def _of(rows: Sequence[_Row], *kinds: str) -> list[_Row]:
    return [row for row in rows if row.get("kind") in kinds]


def _best(rows: Sequence[_Row], value: str) -> tuple[list[float], list[float]]:
    """The shares of the noise, and the best value over blocks at each."""
    shares = list(dict.fromkeys(float(row["share"]) for row in rows))
    return shares, [max(row[value] for row in rows if row["share"] == each) for each in shares]


BLOCK, SHARE = "block", "share of the noise"
TIMES = "One line a share of the noise, from little to much."


def _compared(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[_Row],
    value: str,
    words: str,
    levels: Mapping[str, float] | None = None,
) -> Sketch:
    """The best block against other features, over the noise."""
    lines = [Line("best block", *_best(_of(rows, "block"), value), COLOURS[0])]
    for kind, colour, marker in (("pixels", COLOURS[4], "s"), ("untrained", FAINT, "^")):
        if here := _of(rows, kind):
            lines.append(Line(kind, *_best(here, value), colour, marker, "--"))
    return _plot(name, title, caption, lines, SHARE, words, levels)


# ---- one function an analysis


def _probe(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows = tables["probe"]
    return [
        _plot(
            "probe_by_block",
            "Accuracy of linear probes by block",
            f"Of the class of held-out images, from the mean token. {TIMES}",
            _by_time(_of(rows, "block"), "accuracy"),
            BLOCK,
            "accuracy",
        ),
        _compared(
            "probe_by_noise",
            "Linear probes beside baselines",
            "Pixels are those of the same noisy images; the untrained network is read after its"
            " last block.",
            rows,
            "accuracy",
            "accuracy",
        ),
    ]


def _attention(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows = tables["attention"]
    (uniform,) = _of(rows, "uniform")
    means: dict[tuple[float, int], list[_Row]] = {}
    for row in _of(rows, "head"):
        means.setdefault((row["share"], row["block"]), []).append(row)
    averaged = [
        {
            "share": share,
            "block": block,
            **{key: np.mean([r[key] for r in each]) for key in ("entropy", "distance")},
        }
        for (share, block), each in means.items()
    ]
    blocks = list(dict.fromkeys(row["block"] for row in _of(rows, "head")))
    maps = pictures["attention"]
    taken = _spread(len(blocks)), _spread(maps.shape[1])
    return [
        _plot(
            f"attention_{key}",
            f"Self-attention: {words}",
            f"Mean over heads, queries and images. {TIMES} Dotted: all tokens alike.",
            _by_time(averaged, key),
            BLOCK,
            words,
            {"uniform": uniform[key]},
        )
        for key, words in (("entropy", "entropy in nats"), ("distance", "mean distance in tokens"))
    ] + [
        _grid(
            "attention_maps",
            "Where the central token looks",
            f"It is in row {maps.shape[2] // 2 + 1} and column {maps.shape[3] // 2 + 1}. Mean"
            " weights over images at the middle of the times read; each map from 0 (dark) to its"
            " own largest weight (light).",
            [[maps[i, j] for j in taken[1]] for i in taken[0]],
            [f"block {blocks[i]}" for i in taken[0]],
            [f"head {j + 1}" for j in taken[1]],
        )
    ]


def _lens(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows = tables["lens"]
    sketches = []
    for key, words in (
        ("mse_target", "error to the target"),
        ("mse_last", "distance to the prediction"),
    ):
        raw = _by_time(_of(rows, "raw"), key)
        tuned = _by_time(_of(rows, "tuned"), key, dashes=":")
        sketches.append(
            _plot(
                f"lens_{key}",
                f"Lens: {words}",
                "Mean squares. Solid: the final layer on a block's tokens. Dotted: after a fitted"
                f" affine map. {TIMES}",
                [*raw, *(line._replace(words="") for line in tuned)],
                BLOCK,
                words,
            )
        )
    seen = pictures["lens"]
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    taken = _spread(len(blocks), MAX_ROWS)
    columns = [0, 1, *(2 + k for k in taken)]
    cells = [[(each[k] + 1) / 2 for k in columns] for each in seen]
    names = ["image", "noisy", *(f"block {blocks[k]}" for k in taken)]
    sketches.append(
        _grid(
            "lens_images",
            "The clean image as each block sees it",
            "x̂0 by the final layer on each block's tokens, at the middle of the times read; first"
            " held-out images, not selected.",
            cells,
            [""] * len(cells),
            names,
        )
    )
    return sketches


def _patch(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows = tables["patch"]
    effects = pictures["patch"]
    blocks = list(dict.fromkeys(row["block"] for row in _of(rows, "all")))
    taken = _spread(len(blocks))
    most = float(effects.max()) or 1.0
    return [
        _plot(
            "patch_by_block",
            "The label's effect that is recovered",
            f"All tokens after one block are those of the run with the right label. {TIMES}",
            _by_time(_of(rows, "all"), "effect"),
            BLOCK,
            "effect",
        ),
        _grid(
            "patch_tokens",
            "The same, token by token",
            "One token, or a window of a grid of 8x8, at a time, at the middle of the times read;"
            f" from 0 or less (dark) to {number(most)} (light).",
            [[np.clip(effects[k] / most, 0, 1) for k in taken]],
            [""],
            [f"block {blocks[k]}" for k in taken],
            scaled=False,
        ),
    ]


def _gates(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows, closed = tables["gates"], tables["gates_closed"]
    lines = []
    for k, branch in enumerate(dict.fromkeys(row["branch"] for row in rows)):
        for kind, dashes, words in (("zero", "-", "closed"), ("mean", ":", "held at its mean")):
            here = [row for row in _of(rows, kind) if row["branch"] == branch]
            blocks = list(dict.fromkeys(row["block"] for row in here))
            y = [float(np.mean([r["rise"] for r in here if r["block"] == b])) for b in blocks]
            look = (COLOURS[k % len(COLOURS)], _MARKS[k % len(_MARKS)], dashes)
            lines.append(Line(f"{branch} {words}", blocks, y, *look))
    orders = []
    for kind in dict.fromkeys(row["kind"] for row in closed):
        here = _of(closed, kind)
        ranked = kind == "ranked"
        look = (COLOURS[0] if ranked else FAINT, "o" if ranked else "", "-" if ranked else "--")
        x, y = ([float(row[key]) for row in here] for key in ("closed", "loss"))
        orders.append(Line("least needed first" if ranked else kind, x, y, *look))
    return [
        _plot(
            "gates",
            "Rise of the loss without one branch",
            "Of one block, mean over the times read, held-out images. The table has each time.",
            lines,
            BLOCK,
            "rise of the mean square error",
            {"no change": 0.0},
            columns=2,
        ),
        _plot(
            "gates_closed",
            "The loss as branches are closed",
            "One after the other, at the middle of the times read, in the order of their rises.",
            orders,
            "closed branches",
            "mean square error",
        ),
    ]


def _cknna(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    sketches = []
    if rows := tables.get("cknna", ()):
        sketches = [
            _plot(
                "cknna_by_block",
                "CKNNA with features, by block",
                f"Features of the clean images, by config.evaluate.features. {TIMES}",
                _by_time(_of(rows, "block"), "cknna"),
                BLOCK,
                "CKNNA",
            ),
            _compared(
                "cknna_by_noise",
                "CKNNA with features, beside pixels",
                "1 for the same neighbourhoods, about 0 for independent ones.",
                rows,
                "cknna",
                "CKNNA",
            ),
        ]
    among = tables["cknna_blocks"]
    blocks = list(dict.fromkeys(row["block"] for row in among))
    lines = []
    for k, block in enumerate(blocks[i] for i in _spread(len(blocks), len(COLOURS))):
        values = {
            row["other"] if row["block"] == block else row["block"]: row["cknna"]
            for row in among
            if block in (row["block"], row["other"]) and np.isfinite(row["cknna"])
        }
        x = sorted(values)
        lines.append(Line(f"block {block}", x, [values[b] for b in x], COLOURS[k], _MARKS[k]))
    caption = "At the middle of the times read; a block is like itself by 1."
    sketches.append(
        _plot("cknna_blocks", "CKNNA of blocks with one another", caption, lines, BLOCK, "CKNNA")
    )
    return sketches


def _correspondence(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows = tables["correspondence"]
    levels = {row["kind"]: row["pck"] for row in _of(rows, "same place", "random")}
    return [
        _plot(
            "correspondence_by_block",
            "Tokens found again, by block",
            "Of a warped copy, within 1 token of their place, by the largest cosine between tokens."
            f" {TIMES}",
            _by_time(_of(rows, "block"), "pck"),
            BLOCK,
            "share found",
            levels,
        ),
        _compared(
            "correspondence_by_noise",
            "Tokens found again, beside baselines",
            "Pixels: noisy patches in the place of tokens. Same place: as if nothing had moved.",
            rows,
            "pck",
            "share found",
            levels,
        ),
    ]


def _words(tables: _Tables, pictures: _Pictures) -> list[Sketch]:
    rows, pictured = tables["words"], tables["words_pictured"]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = []
    for kind, colour, marker in (("map", COLOURS[0], "o"), ("same map", COLOURS[4], "s")):
        y = [row["iou"] for row in _of(rows, kind)]
        words = {"map": "maps of words", "same map": "one map for all images"}[kind]
        lines.append(Line(words, shares, y, colour, marker, "-" if kind == "map" else "--"))
    images = pictures["words_images"]
    each = [[row for row in pictured if row["image"] == k + 1] for k in range(len(images))]
    columns = min(MAX_ROWS, max(len(said) for said in each))
    cells, captions = [], []
    for image, maps, said in zip(images, pictures["words"], each, strict=True):
        shown = [maps[row["token"] - 1] for row in said[:columns]]
        blank = [np.empty((0, 0))] * (columns - len(shown))
        cells.append([(image + 1) / 2, *shown, *blank])
        captions.append(" ".join(row["word"] for row in said[:columns]))
    texts = "; ".join(f"{k + 1}: {text}" for k, text in enumerate(captions))
    return [
        _plot(
            "words_by_block",
            "Where the image looks for its words",
            f"The share of a word's weights on tokens that show something. {TIMES} Dotted: all"
            " tokens alike.",
            _by_time(_of(rows, "block"), "inside"),
            BLOCK,
            "share of the weights",
            {"uniform": float(np.mean([row["inside"] for row in _of(rows, "uniform")]))},
        ),
        _plot(
            "words_by_noise",
            "Maps of words beside what is shown",
            "Intersection over union, each word at the threshold that is best in training images.",
            lines,
            SHARE,
            "overlap",
            {"the centre": float(np.mean([row["iou"] for row in _of(rows, "centre")]))},
            columns=2,
        ),
        _grid(
            "words_maps",
            "Maps of the words of a text",
            "First held-out images, not selected, at the middle of the times read; from 0 (dark)"
            f" to the largest weight (light). The words from the left are, {texts}.",
            cells,
            [str(k + 1) for k in range(len(cells))],
            ["image", *(f"word {j + 1}" for j in range(columns))],
        ),
    ]


# Analysis -> what it asks, and its figures
_ANALYSES: Mapping[str, tuple[str, Callable[[_Tables, _Pictures], list[Sketch]]]] = {
    "probe": ("How well can a linear classifier tell the class from a block's tokens?", _probe),
    "attention": ("How far, and how evenly, do the heads look?", _attention),
    "lens": ("What does the final layer make of the tokens of an earlier block?", _lens),
    "patch": ("After which block have the tokens taken up the label?", _patch),
    "gates": ("Which branches can the network do without?", _gates),
    "cknna": ("Do blocks see the same neighbours as features of the clean images do?", _cknna),
    "correspondence": ("Does a token know which part of an object it shows?", _correspondence),
    "words": ("Where in the image are the words of its text?", _words),
}


# ---- grids of pictures


def _spread(count: int, most: int = MAX_ROWS) -> list[int]:
    """At most `most` of so many indices, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _grid(
    name: str,
    title: str,
    caption: str,
    cells: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scaled: bool = True,
) -> Sketch:
    draw = functools.partial(_draw_grid, cells, rows, columns, scaled)
    return Sketch(name, title, caption, draw)


def _draw_grid(
    cells: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    scaled: bool,
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """_Pictures f[h,w] or f[h,w,C] of 0 to 1 side by side; maps are scaled to their largest."""
    across, down, cell, gap = len(columns), len(rows), 62.0, 6.0
    left = 10.0 + (48.0 if any(rows) else 0.0)
    width = max(left + across * (cell + gap) + 6, 7.8 * len(title) + 20)
    lines = [line for note in notes for line in textwrap.wrap(note, int(width / 4.8))]
    top, foot = 18.0 + (24.0 if title else 0.0), 8.0 + 12.5 * len(lines)
    height = top + down * (cell + gap) + foot
    figure = style.new_figure(width, height)
    for i, j in np.ndindex(down, across):
        x, y = left + j * (cell + gap), height - top - (i + 1) * (cell + gap) + gap
        ax = figure.add_axes((x / width, y / height, cell / width, cell / height))
        ax.set_axis_off()
        picture = cells[i][j]
        if not picture.size:
            pass  # a row that is shorter
        elif picture.ndim == 3 and picture.shape[-1] == 3:
            ax.imshow(picture, interpolation="nearest")
        else:
            grey = picture.ndim == 3
            flat = picture[..., 0] if grey else picture
            high = float(flat.max()) or 1.0 if scaled and not grey else 1.0
            colours = "gray" if grey else "viridis"
            ax.imshow(flat, cmap=colours, vmin=0, vmax=high, interpolation="nearest")
        if i == 0:
            ax.set_title(columns[j], fontsize=9)
        if j == 0 and rows[i]:
            figure.text(
                (left - 6) / width, (y + cell / 2) / height, rows[i], ha="right", va="center"
            )
    figure.text(10 / width, 1 - 6 / height, title, fontsize=13, fontweight="bold", va="top")
    words = "\n".join(lines)
    figure.text(10 / width, 4 / height, words, fontsize=8.5, color=FAINT, va="bottom")
    return figure


# ---- the page


class Part(NamedTuple):
    """An analysis on the page: its name, what it asks, what it found, and its figures."""

    name: str
    about: str
    line: str
    sketches: Sequence[Sketch]


def inspection_part(name: str, line: str, tables: _Tables, pictures: _Pictures) -> Part:
    """The part of the page for an analysis, of what it found."""
    about, draw = _ANALYSES[name]
    return Part(name, about, line, draw(tables, pictures))


def render_inspection(title: str, sections: Sequence[Part], protocol: Mapping[str, Any]) -> str:
    """Render the page. Every string is escaped, figures are in it, and nothing is loaded."""
    page = page_template("inspection.html.jinja").render(
        title=title, sections=sections, protocol=protocol
    )
    return encodable(page)
