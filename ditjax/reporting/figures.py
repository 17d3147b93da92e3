"""Gflops against the metric, samples by model, loss curves as PNGs: for terminals and papers."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditjax.reporting.analysis import Analysis, floor_of
from ditjax.reporting.curves import Curve, thinned
from ditjax.reporting.samples import Cells, row_name, row_names, several_blocks
from ditjax.reporting.study import usable
from ditjax.reporting.style import (
    COLOURS,
    LIGHT,
    MARKERS,
    Draw,
    Theme,
    left_title,
    plain_ticks,
    png,
)
from ditjax.runs.results import Found, tile
from ditjax.scaling.fit import PowerLaw
from ditjax.studies.words import metric_name, number, plural, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 4  # protocol groups drawn; the table holds all
MAX_LEGEND = 12


class Picture(NamedTuple):
    """A figure as PNG; `name` is its file's, without .png."""

    name: str
    png: bytes


def pictures(
    analyses: Sequence[Analysis], cells: Sequence[Cells | None], losses: Sequence[Curve]
) -> list[Picture]:
    """Every figure of a study. `cells` are those of the first MAX_PANELS groups."""
    return [Picture(name, png(draw, LIGHT)) for name, draw in _figures(analyses, cells, losses)]


def _figures(
    analyses: Sequence[Analysis], cells: Sequence[Cells | None], losses: Sequence[Curve]
) -> Iterable[tuple[str, Draw]]:
    yield "gflops_vs_fid", lambda theme: _draw_scatter(analyses[:MAX_PANELS], theme)
    for index, (analysis, found) in enumerate(zip(analyses, cells, strict=False)):
        if found:
            suffix = f"_{short(analysis.group.protocol_hash, 16)}" if index else ""
            yield (
                f"samples_by_model{suffix}",
                lambda theme, found=found: _draw_samples(found, theme),  # type: ignore[misc]
            )
    if losses:
        yield "loss_curves", lambda theme: _draw_losses(losses, theme)


def _draw_scatter(analyses: Sequence[Analysis], theme: Theme) -> "Figure":
    """One panel a protocol; patch colours and size markers mean the same in all."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    metric = analyses[0].metric
    name = metric_name(metric)
    runs = [each for analysis in analyses for each in analysis.group.runs]
    several = several_blocks(runs)
    rows = row_names(runs, several)
    patches = sorted({each.result["model"]["patch"] for each in runs}, reverse=True)
    colour = {patch: COLOURS[i % len(COLOURS)] for i, patch in enumerate(patches)}
    marker = {row: MARKERS[i % len(MARKERS)] for i, row in enumerate(rows)}
    named = len(rows) <= len(MARKERS)  # beyond that a marker would mean two sizes
    longest = max(map(len, rows)) if named else 0
    figure, axes = plt.subplots(
        len(analyses),
        1,
        figsize=(7.9 + 0.085 * max(longest - 8, 0), 0.6 + 4.4 * len(analyses)),
        layout="constrained",
        squeeze=False,
    )
    for analysis, ax in zip(analyses, axes[:, 0], strict=True):
        drawn = [each for each in analysis.group.runs if usable(each, metric)]
        for each in drawn:
            ax.plot(
                each.result["gflops"],
                each.result["metrics"][metric],
                marker[row_name(each, several)] if named else "o",
                color=colour[each.result["model"]["patch"]],
                markersize=8 if len(drawn) <= 40 else 5,
                markeredgecolor=theme.background,
                markeredgewidth=0.8,
                zorder=3,
            )
        _finish_scatter(ax, analysis, drawn, theme)
        if len(analyses) > 1:
            named_hash = short(analysis.group.protocol_hash, 16)
            ax.set_title(f"protocol {named_hash}", loc="left", fontsize=10)
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


def _finish_scatter(ax: "Axes", analysis: Analysis, drawn: Sequence[Found], theme: Theme) -> None:
    """Scales, laws, floor and the words in the empty upper right corner."""
    metric = analysis.metric
    name, fit = metric_name(metric), analysis.fits[0]
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
    floor = floor_of(drawn, metric)
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


def _draw_samples(cells: Cells, theme: Theme) -> "Figure":
    """Rows by Gflops, columns by patch; one figure unit is a pixel of the cells."""
    import matplotlib.pyplot as plt

    images = {key: _cell(first) for key, first in cells.images.items()}
    height = max(image.shape[0] for image in images.values())
    width = max(image.shape[1] for image in images.values())
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
            image = images.get((row, patch))
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


def _draw_losses(curves: Sequence[Curve], theme: Theme) -> "Figure":
    """Colour runs with log Gflops, from violet to yellow-green; names where they fit."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    # The ends of viridis vanish, one on each background.
    shades = LinearSegmentedColormap.from_list(
        "laws", plt.get_cmap("viridis")(np.linspace(0.12, 0.88))
    )
    low, high = (curves[end].run.result["gflops"] for end in (0, -1))
    norm = LogNorm(low / 1.01, high * 1.01)
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for curve in map(thinned, curves):
        run = curve.run.result
        ax.plot(
            curve.steps,
            curve.values,
            color=shades(norm(run["gflops"])),
            lw=1.5 if len(curves) <= 30 else 0.8,
            label=f"{short(run['run'], 32)} ({number(run['gflops'])})",
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
