"""Gflops against the metric, samples by model, loss curves: each a PNG for light and dark pages."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.io.results import METRICS_FILE, SAMPLES_FILE, Found, load_samples, read_metrics, tile
from ditjax.reporting.study import Group
from ditjax.reporting.style import (
    COLOURS,
    DARK,
    LIGHT,
    MARKERS,
    Draw,
    Theme,
    left_title,
    plain_ticks,
    png,
)
from ditjax.reporting.words import metric_name, number, plural, short
from ditjax.scaling.fit import PowerLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 4  # protocol groups drawn; the table holds all
MAX_SAMPLE_ROWS, MAX_SAMPLE_COLUMNS = 8, 5
MAX_LEGEND = 12


class Picture(NamedTuple):
    """A figure as PNG, for a light and for a dark page; `name` is its file's, without .png."""

    name: str
    caption: str
    light: bytes
    dark: bytes


def pictures(groups: Sequence[Group], metric: str, problems: list[str]) -> list[Picture]:
    """Every figure of a study; samples and logs that cannot be read are added to `problems`."""
    return [
        Picture(name, caption, png(draw, LIGHT), png(draw, DARK))
        for name, caption, draw in _figures(groups, metric, problems)
    ]


def _figures(
    groups: Sequence[Group], metric: str, problems: list[str]
) -> Iterable[tuple[str, str, Draw]]:
    """(file name, caption, draw) of each figure."""
    name = metric_name(metric)
    shown = groups[:MAX_PANELS]
    left_out = len(groups) - len(shown)
    more = f" {plural(left_out, 'smaller protocol')} not drawn." if left_out else ""
    yield (
        "gflops_vs_fid",
        f"{name} against Gflops (multiply-accumulates of one forward pass / 10⁹). Colour: patch"
        " size; marker: model size; dashed: the fitted power law; dotted: with an offset, where"
        f" one is found; in brackets the 95 % interval of the exponent.{more}",
        lambda theme: _draw_scatter(shown, metric, theme),
    )
    for index, group in enumerate(shown):
        cells, note = _sample_cells(group, metric, problems)
        if cells:
            suffix = f"_{short(group.protocol_hash, 16)}" if index else ""
            of = f"Protocol {short(group.protocol_hash, 16)}. " if len(groups) > 1 else ""
            yield (
                f"samples_by_model{suffix}",
                f"{of}The first samples of each model, unpicked: larger models downwards, smaller"
                f" patches rightwards, the lowest seed of each.{note}",
                lambda theme, cells=cells: _draw_samples(cells, theme),  # type: ignore[misc]
            )
    curves = _loss_curves([each for group in groups for each in group.runs], problems)
    if curves:
        yield (
            "loss_curves",
            "Training loss; each point is the mean over the steps from s / 1.2 to 1.2 s.",
            lambda theme: _draw_losses(curves, theme),
        )


def _several_blocks(runs: Sequence[Found]) -> bool:
    return len({each.result["model"]["block"] for each in runs}) > 1


def _row_names(runs: Sequence[Found], several_blocks: bool) -> list[str]:
    """Size names by their largest Gflops; the block is named where there are several blocks."""
    largest: dict[str, float] = {}
    for each in runs:
        row = _row_name(each, several_blocks)
        largest[row] = max(largest.get(row, 0.0), each.result["gflops"])
    return sorted(largest, key=lambda row: (largest[row], row))


def _row_name(each: Found, several_blocks: bool) -> str:
    model = each.result["model"]
    size = short(model["size"], 18)
    return f"{size} {short(model['block'], 18)}" if several_blocks else size


def _draw_scatter(groups: Sequence[Group], metric: str, theme: Theme) -> "Figure":
    """One panel a protocol; patch colours and size markers mean the same in all."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    name = metric_name(metric)
    runs = [each for group in groups for each in group.runs]
    several = _several_blocks(runs)
    rows = _row_names(runs, several)
    patches = sorted({each.result["model"]["patch"] for each in runs}, reverse=True)
    colour = {patch: COLOURS[i % len(COLOURS)] for i, patch in enumerate(patches)}
    marker = {row: MARKERS[i % len(MARKERS)] for i, row in enumerate(rows)}
    named = len(rows) <= len(MARKERS)  # beyond that a marker would mean two sizes
    longest = max(map(len, rows)) if named else 0
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(7.9 + 0.085 * max(longest - 8, 0), 0.6 + 4.4 * len(groups)),
        layout="constrained",
        squeeze=False,
    )
    for group, ax in zip(groups, axes[:, 0], strict=True):
        drawn = [each for each in group.runs if _plottable(each, metric)]
        for each in drawn:
            ax.plot(
                each.result["gflops"],
                each.result["metrics"][metric],
                marker[_row_name(each, several)] if named else "o",
                color=colour[each.result["model"]["patch"]],
                markersize=8 if len(drawn) <= 40 else 5,
                markeredgecolor=theme.background,
                markeredgewidth=0.8,
                zorder=3,
            )
        _finish_scatter(ax, group, drawn, metric, theme)
        if len(groups) > 1:
            ax.set_title(f"protocol {short(group.protocol_hash, 16)}", loc="left", fontsize=10)
    figure.suptitle(f"{name} against Gflops", x=0.01, ha="left", fontsize=13, fontweight="bold")
    spots = [
        Line2D([], [], ls="", marker="o", ms=8, color=colour[patch], label=str(patch))
        for patch in patches[: len(COLOURS)]
    ]
    shapes = [
        Line2D([], [], ls="", marker=marker[row], ms=7, color=theme.faint, label=row)
        for row in (rows if named else [])
    ]
    top = axes[0, 0]
    if laws := top.get_legend():
        top.add_artist(laws)  # an axes keeps only its last legend by itself
    legend = top.legend(
        handles=spots, title="patch", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0
    )
    left_title(legend)
    if shapes:
        top.add_artist(legend)
        below = 1 - (len(spots) + 1.9) * 0.049
        left_title(
            top.legend(
                handles=shapes,
                title="depth × width × heads" if any("x" in row for row in rows) else "size",
                loc="upper left",
                bbox_to_anchor=(1.01, below),
                borderaxespad=0,
            )
        )
    return figure


def _law_label(law: PowerLaw, name: str) -> str:
    """The law in matplotlib's mathtext; the name's own dollar signs are none of it."""
    offset = f"{number(law.c)} + " if law.c else ""
    low, high = number(law.b_interval.low), number(law.b_interval.high)
    return (
        rf"{name.replace('$', '')} ≈ {offset}{number(law.a)} · Gflops$^{{{number(-law.b)}}}$"
        f"   (b: {low} to {high})"
    )


def _finish_scatter(
    ax: "Axes", group: Group, drawn: Sequence[Found], metric: str, theme: Theme
) -> None:
    """Scales, laws, floor and the words in the empty upper right corner."""
    name, fit = metric_name(metric), group.fits[0]
    ax.set_xscale("log")
    ax.set_xlabel("Gflops of one forward pass (multiply-accumulates / 10⁹)")
    ax.set_ylabel(f"{name} (lower is better)")
    ax.grid(True, which="major", lw=0.7)
    if not drawn:
        ax.text(0.5, 0.5, f"no run has {name}", transform=ax.transAxes, ha="center")
        return
    x = np.array([each.result["gflops"] for each in drawn])
    y = np.array([each.result["metrics"][metric] for each in drawn])
    # Over a decade of y a linear axis would flatten the better half of the models.
    if y.max() / y.min() >= 10:
        ax.set_yscale("log")
        ax.set_ylim(y.min() / 1.3, y.max() * (y.max() / y.min()) ** 0.35)
    else:
        ax.set_ylim(0, y.max() * 1.3)
    ax.set_xlim(x.min() / 1.5, x.max() * 1.5)
    plain_ticks(ax)
    line = np.geomspace(x.min() / 1.25, x.max() * 1.25, 200)
    laws = [(fit.law, "--", theme.ink)]
    if fit.offset is not None and fit.offset.c > 0:
        laws.append((fit.offset, ":", theme.faint))
    for law, dashes, ink in laws:
        if law is not None:
            ax.plot(
                line, law(line), dashes, color=ink, lw=1.5, zorder=2, label=_law_label(law, name)
            )
    if fit.law is None:
        ax.text(0.98, 0.96, f"no law: {short(fit.why, 60)}", transform=ax.transAxes, ha="right")
    else:
        r = number(fit.pearson).replace("-", "−")
        legend = ax.legend(
            title=f"Pearson r(log₁₀ Gflops, {name}) = {r}, {plural(fit.models, 'model')}",
            loc="upper right",
            handlelength=2.6,
            fontsize=10,
        )
        left_title(legend, 10)
        for words in legend.get_texts():
            words.set_parse_math(True)
    floors = [each.result["metrics"].get(f"{metric}_floor", math.nan) for each in drawn]
    floors = [floor for floor in floors if math.isfinite(floor)]
    floor = float(np.median(floors)) if floors else math.nan
    if 0 < floor <= y.max():
        if ax.get_yscale() == "log":
            ax.set_ylim(bottom=min(ax.get_ylim()[0], floor / 1.3))
        ax.axhline(floor, color=theme.faint, lw=1, zorder=1)
        ax.annotate(
            f"real against real images: {number(floor)}",
            (0.01, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=theme.faint,
            fontsize=8.5,
        )


def _plottable(each: Found, metric: str) -> bool:
    value = each.result["metrics"].get(metric, math.nan)
    return math.isfinite(value) and value > 0


@dataclass(frozen=True)
class _Cells:
    """One image u8[h,w,3] and a line of text for (row, column)."""

    rows: list[str]
    columns: list[int]
    images: dict[tuple[str, int], NDArray[np.uint8]]
    words: dict[tuple[str, int], str]


def _sample_cells(group: Group, metric: str, problems: list[str]) -> tuple[_Cells | None, str]:
    """The first samples of the lowest seed of each size and patch; at most 8 x 5 cells."""
    several = _several_blocks(group.runs)
    runs: dict[tuple[str, int], Found] = {}
    for each in sorted(group.runs, key=lambda each: each.result["train"]["seed"]):
        if (each.folder / SAMPLES_FILE).exists():
            key = (_row_name(each, several), each.result["model"]["patch"])
            runs.setdefault(key, each)
    if not runs:
        return None, ""
    rows = _row_names(list(runs.values()), several)
    columns = sorted({patch for _, patch in runs}, reverse=True)
    all_rows, all_columns = len(rows), len(columns)
    rows, columns = _spread(rows, MAX_SAMPLE_ROWS), _spread(columns, MAX_SAMPLE_COLUMNS)
    images, words = {}, {}
    for (row, patch), each in runs.items():
        if row not in rows or patch not in columns:
            continue
        try:
            first, _ = load_samples(each.folder / SAMPLES_FILE, limit=10)
            images[row, patch] = _cell(first)
        except UserError as error:
            problems.append(str(error))
            continue
        value = each.result["metrics"].get(metric)
        words[row, patch] = (
            f"{number(each.result['gflops'])} Gflops, {metric_name(metric)} {number(value)}"
        )
    note = ""
    if (all_rows, all_columns) != (len(rows), len(columns)):
        note = f" {len(rows)} of {all_rows} sizes and {len(columns)} of {all_columns} patches."
    return (_Cells(rows, columns, images, words), note) if images else (None, "")


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, both ends among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _cell(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """u8[n<=10,H,W,C] -> u8[200,480,3] at most: 2 x 5 small images, or 1 x 2 large ones."""
    from PIL import Image

    side = max(images.shape[1:3])
    columns, target = (5, 92) if side <= 92 else (2, 236)
    if side > 92:
        images = images[:2]
    if side > target:
        images = np.stack(
            [
                np.asarray(
                    Image.fromarray(image.squeeze()).resize((target, target), Image.Resampling.BOX)
                )
                for image in images
            ]
        ).reshape(len(images), target, target, -1)
    else:
        images = images.repeat(target // side, axis=1).repeat(target // side, axis=2)
    grid = tile(images, columns, gap=4)
    return np.broadcast_to(grid, (*grid.shape[:2], 3)).copy()


def _draw_samples(cells: _Cells, theme: Theme) -> "Figure":
    """Rows by Gflops, columns by patch; one figure unit is a pixel of the cells."""
    import matplotlib.pyplot as plt

    height = max(image.shape[0] for image in cells.images.values())
    width = max(image.shape[1] for image in cells.images.values())
    left = max(120, 30 + 15 * max(map(len, cells.rows)))
    top, step_y, step_x = 56, height + 62, width + 26
    total_x, total_y = left + step_x * len(cells.columns), top + step_y * len(cells.rows)
    figure = plt.figure(figsize=(total_x / 160, total_y / 160))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    for i, row in enumerate(cells.rows):
        y = top + i * step_y
        ax.text(left - 16, y + height / 2, row, ha="right", va="center", fontsize=10.5)
        for j, patch in enumerate(cells.columns):
            x = left + j * step_x
            image = cells.images.get((row, patch))
            if image is None:
                ax.text(x + width / 2, y + height / 2, "not run", ha="center", color=theme.faint)
                continue
            h, w = image.shape[:2]
            ax.imshow(image, extent=(x, x + w, y + h, y), interpolation="nearest")
            ax.text(
                x, y + h + 8, cells.words[row, patch], va="top", fontsize=9.5, color=theme.faint
            )
    for j, patch in enumerate(cells.columns):
        ax.text(left + j * step_x, top - 14, f"patch {patch}", fontsize=11, fontweight="bold")
    ax.set_xlim(0, total_x)
    ax.set_ylim(total_y, 0)
    return figure


@dataclass(frozen=True)
class _Curve:
    name: str
    gflops: float
    steps: NDArray[np.float64]
    loss: NDArray[np.float64]


def _loss_curves(runs: Sequence[Found], problems: list[str]) -> list[_Curve]:
    """Smoothed losses of the runs that logged any, by Gflops; at most 400 points each."""
    curves = []
    for each in runs:
        path = each.folder / METRICS_FILE
        if not path.exists():
            continue
        try:
            lines = [line for line in read_metrics(path) if _is_number(line.get("loss"))]
        except UserError as error:
            problems.append(str(error))
            continue
        steps = np.array([line["step"] for line in lines], np.float64)
        loss = np.array([line["loss"] for line in lines], np.float64)
        bad = int(np.sum(~np.isfinite(loss)))
        if bad:
            problems.append(f"run {short(each.result['run'])!r}: {bad} logged losses not finite.")
        keep = np.isfinite(loss) & (loss > 0) & (steps > 0)
        if keep.sum() < 2:
            continue
        smooth = _smooth(steps[keep], loss[keep])
        thin = np.unique(np.geomspace(1, len(smooth), 400).round().astype(int) - 1)
        curves.append(
            _Curve(
                short(each.result["run"], 32),
                each.result["gflops"],
                steps[keep][thin],
                smooth[thin],
            )
        )
    return sorted(curves, key=lambda curve: curve.gflops)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _smooth(steps: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_i = mean of l_j over the steps from steps_i / 1.2 to 1.2 · steps_i.

    The window is as wide at each place of a logarithmic axis, so the first fall is not smeared.
    """
    total = np.concatenate([[0.0], np.cumsum(loss)])
    first = np.searchsorted(steps, steps / 1.2)
    last = np.searchsorted(steps, steps * 1.2, side="right")
    return np.asarray((total[last] - total[first]) / (last - first))


def _draw_losses(curves: Sequence[_Curve], theme: Theme) -> "Figure":
    """Colour runs with log Gflops, from violet to yellow-green; names where they fit."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    # The ends of viridis vanish, one on each background.
    shades = LinearSegmentedColormap.from_list(
        "laws", plt.get_cmap("viridis")(np.linspace(0.12, 0.88))
    )
    low, high = curves[0].gflops, curves[-1].gflops
    norm = LogNorm(low / 1.01, high * 1.01)
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for curve in curves:
        ax.plot(
            curve.steps,
            curve.loss,
            color=shades(norm(curve.gflops)),
            lw=1.5 if len(curves) <= 30 else 0.8,
            label=f"{curve.name} ({number(curve.gflops)})",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training steps")
    ax.set_ylabel("training loss, smoothed")
    ax.grid(True, which="major", lw=0.7)
    plain_ticks(ax)
    figure.suptitle("Training loss", x=0.01, ha="left", fontsize=13, fontweight="bold")
    if len(curves) <= MAX_LEGEND:
        left_title(
            ax.legend(
                title="run (Gflops)",
                fontsize=8,
                loc="upper left",
                bbox_to_anchor=(1.01, 1),
                borderaxespad=0,
            )
        )
    else:
        bar = figure.colorbar(ScalarMappable(norm, shades), ax=ax, label="Gflops", pad=0.02)
        bar.outline.set_visible(False)
        plain_ticks(bar.ax)
    return figure
