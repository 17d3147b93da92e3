"""The figures of a report as PNGs, for terminals and papers."""

import itertools

import numpy as np
from matplotlib.figure import Figure

from ditjax.reporting import style
from ditjax.reporting.analysis import GFLOPS
from ditjax.reporting.looks import Encoding
from ditjax.reporting.page import MAX_GROUPS, Study
from ditjax.reporting.plots import WIDE, GroupPlots
from ditjax.reporting.samples import Cells
from ditjax.runs.results import tile
from ditjax.studies.words import short


def pictures(study: Study) -> dict[str, bytes]:
    """Draw every figure of a study: the name of its file -> a PNG."""
    looks = Encoding(study.runs)
    shown = study.analyses[:MAX_GROUPS]
    hashes = [short(analysis.group.protocol_hash, 16) for analysis in shown]
    groups = [
        GroupPlots(analysis, looks, absent=() if i else study.absent)
        for i, analysis in enumerate(shown)
    ]
    costs = [group.cost(GFLOPS, named=True) for group in groups]
    heads = [f"Protocol {name}: " for name in hashes] if len(groups) > 1 else [""]
    notes = [head + plot.caption for head, plot in zip(heads, costs, strict=True)]
    keys, title, draws = looks.keys(), costs[0].title, [plot.draw for plot in costs]
    with style.styled():
        drawn = {
            "gflops_vs_fid.png": style.plot_figure(
                draws, *WIDE, columns=3, title=title, notes=notes, keys=keys
            )
        }
        for i, (cells, _) in enumerate(study.cells):
            if cells:
                name = f"samples_by_model_{hashes[i]}.png" if i else "samples_by_model.png"
                drawn[name] = _draw_samples(cells)
        if losses := study.logs.losses():
            plot = groups[0].losses(losses)
            drawn["loss_curves.png"] = style.plot_figure(
                [plot.draw], *WIDE, title=plot.title, notes=[plot.caption], keys=keys
            )
        if paired := groups[0].paired():
            notes = [*dict.fromkeys(plot.caption for plot in paired)]
            drawn["paired.png"] = style.plot_figure(
                [plot.draw for plot in paired], *WIDE, title="Arms beside the baseline", notes=notes
            )
        return {name: style.png(figure) for name, figure in drawn.items()}


def _draw_samples(cells: Cells) -> Figure:
    """The first samples of each model, rows by size and columns by patch."""
    small = all(images.shape[1] <= 92 for images in cells.images.values())
    count, across = (10, 5) if small else (2, 2)
    rows, columns = len(cells.rows), len(cells.columns)
    figure = style.new_figure(240.0 * columns, 140.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.05 / columns, 0.18 / rows, 1, 1 - 0.18 / rows, 0.06, 0.5)
    for ax in grid.flat:
        ax.set_axis_off()
    keys = [[(row, patch) for patch in cells.patches_of(row)] for row in cells.rows]
    pairs = [zip(axes, row, strict=False) for axes, row in zip(grid, keys, strict=True)]
    for ax, key in itertools.chain(*pairs):
        title = key[0] if key[1] == "-" else f"{key[0]}, patch {key[1]}"
        ax.set_title(title, loc="left", fontweight="bold")
        if key in cells.images:
            image = tile(cells.images[key][:count], across, gap=1 if small else 4)
            ax.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), origin="upper", aspect="equal")
            ax.set_anchor("NW")
        words = cells.words.get(key, "not run")
        ax.text(0, -0.04, words, transform=ax.transAxes, va="top", fontsize=9, color=style.FAINT)
    return figure
