"""Table, plots and laws from any number of result.json, and one HTML page that holds them all.

    python -m ditjax.report --runs=DIR[,DIR...] [--out=DIR/report] [--metric=fd_digits]

Results of different protocols never share a curve: each protocol hash is a group with its own
panel and its own fit. What is wrong with a result is named, on the page and in the terminal; a
run with something wrong is never silently averaged in or dropped.
"""

import base64
import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditjax import cli
from ditjax.errors import UserError
from ditjax.io.results import (
    METRICS_FILE,
    SAMPLES_FILE,
    Found,
    find_results,
    load_samples,
    read_metrics,
    tile,
    write_atomic,
    write_json,
)
from ditjax.scaling.fit import (
    Interval,
    PowerLaw,
    fit_power_law,
    fit_power_law_offset,
    pearson,
    pearson_interval,
    spearman,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# The honest names: FID is said only of the 2015 Inception features.
METRIC_NAMES = {
    "fd_digits": "FD-digits",
    "fd_digits_floor": "FD-digits floor",
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
}

MAX_PANELS = 4  # protocol groups drawn; the table holds all
MAX_SAMPLE_ROWS, MAX_SAMPLE_COLUMNS = 8, 5
MAX_LEGEND = 12


@dataclass(frozen=True)
class Fit:
    """The laws of one set of runs, or `why` there are none. `models` < `n` with several seeds."""

    label: str
    n: int
    models: int
    why: str = ""
    pearson: float = math.nan
    pearson_interval: Interval | None = None
    spearman: float = math.nan
    law: PowerLaw | None = None
    offset: PowerLaw | None = None
    why_no_offset: str = ""


@dataclass(frozen=True)
class Group:
    """All runs of one protocol, by Gflops, and their fits: all runs first, then each seed."""

    protocol_hash: str
    protocol: dict[str, Any]
    runs: tuple[Found, ...]
    fits: tuple[Fit, ...]


@dataclass(frozen=True)
class Summary:
    """What a report found and wrote. `text` is the terminal's version of the page."""

    out_dir: Path
    page: Path
    groups: tuple[Group, ...]
    problems: tuple[str, ...]
    text: str
    files: tuple[Path, ...]


def main(argv: list[str]) -> int:
    """The command: prints the table and where the page is. UserErrors propagate."""
    parser = cli.parser("report", "Table, plots, fits and a page of finished runs.", config=False)
    parser.add_argument("--runs", required=True, help="folders of sweeps or runs, comma-separated")
    parser.add_argument("--out", help="folder of the report (default: report/ in the first folder)")
    parser.add_argument("--metric", default="fd_digits", help="the metric fitted (fd_digits)")
    arguments = parser.parse_args(argv)
    folders = [Path(folder) for folder in arguments.runs.split(",") if folder]
    if not folders:
        raise UserError("--runs is empty: expected one or more folders, comma-separated.")
    out_dir = Path(arguments.out) if arguments.out else folders[0] / "report"
    print(make_report(folders, out_dir, metric=arguments.metric).text)
    return 0


def make_report(
    run_dirs: Sequence[str | Path], out_dir: str | Path, *, metric: str = "fd_digits"
) -> Summary:
    """Reads every result.json below `run_dirs` and writes the report into `out_dir`.

    Files: index.html, table.csv, table.txt, results.json, gflops_vs_fid.png, loss_curves.png,
    samples_by_model.png (samples_by_model_HASH.png for further protocols).
    Raises UserError where there is no result to report or `out_dir` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    out_dir = Path(out_dir)
    found, problems = find_results(run_dirs)
    if not found:
        where = ", ".join(map(str, run_dirs))
        more = f" {len(problems)} problems, the first: {problems[0]}" if problems else ""
        raise UserError(f"no readable result.json below {where}: run a sweep first.{more}")
    found = _without_duplicates(found, problems)
    groups = _grouped(found, metric, problems)
    figures = [
        (name, caption, light, dark)
        for name, caption, draw in _figures(groups, metric, problems)
        for light, dark in [(_png(draw, _LIGHT), _png(draw, _DARK))]
    ]
    text = _text(groups, metric, problems)
    page = _html(groups, metric, problems, figures)
    files = [
        write_atomic(out_dir / "table.csv", _csv(groups).encode()),
        write_atomic(out_dir / "table.txt", (text + "\n").encode()),
        write_json(out_dir / "results.json", _merged(groups, problems)),
        *(write_atomic(out_dir / f"{name}.png", light) for name, _, light, _ in figures),
        write_atomic(out_dir / "index.html", page.encode()),
    ]
    return Summary(
        out_dir=out_dir,
        page=files[-1],
        groups=groups,
        problems=tuple(problems),
        text=f"{text}\n\nreport: {files[-1]}",
        files=tuple(files),
    )


# Which runs belong together.


def _without_duplicates(found: list[Found], problems: list[str]) -> list[Found]:
    """One run for each (name, protocol): the first in the order of --runs."""
    first: dict[tuple[str, str], Found] = {}
    for each in found:
        key = (each.result["run"], each.result["protocol_hash"])
        kept = first.setdefault(key, each)
        if kept is not each:
            same = "the same result" if kept.result == each.result else "another result"
            problems.append(
                f"run {_short(key[0])!r} is there twice: {each.folder} holds {same} and is left"
                f" out, {kept.folder} is used."
            )
    return list(first.values())


def _grouped(found: list[Found], metric: str, problems: list[str]) -> tuple[Group, ...]:
    """Groups by protocol hash, the largest first."""
    by_hash: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_hash[each.result["protocol_hash"]].append(each)
    if len(by_hash) > 1:
        counts = ", ".join(f"{key} ({len(runs)} runs)" for key, runs in by_hash.items())
        problems.append(
            f"{len(by_hash)} protocols among the results: {counts}. Each has its own curve and its"
            " own fit; they are not comparable."
        )
    if not any(metric in each.result["metrics"] for each in found):
        names = sorted({name for each in found for name in each.result["metrics"]})
        problems.append(f"no result holds the metric {metric!r}; found: {', '.join(names) or '-'}.")
    groups = []
    for key, runs in sorted(by_hash.items(), key=lambda item: -len(item[1])):
        runs.sort(key=lambda each: (each.result["gflops"], each.result["run"]))
        fields = {json.dumps(each.result["protocol"], sort_keys=True) for each in runs}
        if len(fields) > 1:
            problems.append(f"protocol {key}: {len(fields)} different protocols carry this hash.")
        steps = sorted({each.result["train"]["steps"] for each in runs})
        if len(steps) > 1:
            shown = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
            problems.append(f"protocol {key}: the fit mixes runs of {shown} training steps.")
        fits = _fits(runs, metric, problems)
        groups.append(Group(key, runs[0].result["protocol"], tuple(runs), fits))
    return tuple(groups)


def _fits(runs: list[Found], metric: str, problems: list[str]) -> tuple[Fit, ...]:
    """All runs, then each seed's where there are several. Unusable values are named."""
    usable = []
    for each in runs:
        value = each.result["metrics"].get(metric)
        if value is None or not math.isfinite(value) or value <= 0:
            problems.append(
                f"run {_short(each.result['run'])!r}: {metric} is"
                f" {'missing' if value is None else value}; left out of the fit"
                f" ({each.folder})."
            )
        else:
            usable.append(each)
    seeds = sorted({each.result["train"]["seed"] for each in usable})
    fits = [_fit("all runs", usable, metric)]
    if len(seeds) > 1:
        for seed in seeds:
            own = [each for each in usable if each.result["train"]["seed"] == seed]
            fits.append(_fit(f"seed {seed}", own, metric))
    return tuple(fits)


def _fit(label: str, runs: list[Found], metric: str) -> Fit:
    """Pearson of log10 Gflops and the metric, Spearman, both power laws."""
    x = np.array([each.result["gflops"] for each in runs])
    y = np.array([each.result["metrics"][metric] for each in runs])
    # Seeds of one model share its distance from the law: they are one group to the bootstrap.
    models = [_model_key(each) for each in runs]
    n_models = len(set(models))
    if n_models < 3:
        return Fit(label, len(runs), n_models, why=f"a law needs 3 models, there are {n_models}")
    try:
        r = pearson(np.log10(x), y)
        law = fit_power_law(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        return Fit(label, len(runs), n_models, why=str(error))
    offset, why = None, ""
    try:
        offset = fit_power_law_offset(x, y, np.random.default_rng(0), groups=models)
    except UserError as error:
        why = str(error)
    interval = pearson_interval(r, n_models)
    rank = spearman(x, y)
    return Fit(label, len(runs), n_models, "", r, interval, rank, law, offset, why)


def _model_key(each: Found) -> tuple[str, str, float]:
    model = each.result["model"]
    return (model["name"], model["block"], each.result["gflops"])


# Numbers and words.


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent: 0.000262, 1.41, 119, 12300."""
    if value is None or math.isnan(value):
        return "NaN" if value is not None else "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    places = max(digits - 1 - exponent, 0)
    if places > 12:
        return f"{value:.{digits}g}"
    return f"{value:.{places}f}"


def _count(value: int) -> str:
    """Parameters as in the paper's tables: 33.1M, 450K, 812."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{_number(value / size)}{suffix}"
    return str(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{_number(seconds, 2)} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _range(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _short(text: str, longest: int = 44) -> str:
    """One printable line of at most `longest` characters: no escape reaches the terminal."""
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, _short(metric.replace("_", " "), 24))


def _law_words(law: PowerLaw, name: str) -> str:
    offset = f"{_number(law.c)} + " if law.c else ""
    return f"{name} ≈ {offset}{_number(law.a)} · Gflops^{_number(-law.b)}"


def _summary_words(group: Group, metric: str) -> str:
    """One or two sentences: the law, its interval and Pearson, or why there are none."""
    fit, name = group.fits[0], _metric_name(metric)
    seeds = len({each.result["train"]["seed"] for each in group.runs})
    counted = f"{_plural(fit.n, 'run')} of {_plural(fit.models, 'model')}"
    if seeds > 1:
        counted += f" with {seeds} seeds"
    if fit.law is None:
        return f"{counted}. No law is fitted: {fit.why.rstrip('.')}."
    law, interval = fit.law, fit.law.b_interval
    if interval.low > 0:
        trend = f"{name} falls as Gflops grow"
    elif interval.high < 0:
        trend = f"{name} grows with Gflops"
    else:
        trend = f"whether {name} falls with Gflops, these runs do not settle"
    offset = ""
    if fit.offset is not None and fit.offset.c > 0:
        offset = (
            f" With an offset: {_law_words(fit.offset, name)}; exponent"
            f" {_range(fit.offset.b_interval)}; R² {_number(fit.offset.r2)}."
        )
    return (
        f"{counted}: {trend}. {_law_words(law, name)}; 95 % interval of the exponent b in"
        f" Gflops^(-b): {_range(interval)}; R² of the logs {_number(law.r2)}. Pearson of log10"
        f" Gflops and {name}: {_number(fit.pearson)} (95 % interval"
        f" {_range(fit.pearson_interval)}); Spearman {_number(fit.spearman)}.{offset}"
    )


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# The table, in four forms.


@dataclass(frozen=True)
class _Column:
    """A heading, the value of a run (sorts the page's table) and how it reads."""

    title: str
    value: Callable[[Found], Any]
    show: Callable[[Any], str]
    numeric: bool = True


def _columns(groups: Sequence[Group], metric: str) -> list[_Column]:
    """The reader's columns, shared by the page and the terminal: the fitted metric first."""
    names = {name for group in groups for each in group.runs for name in each.result["metrics"]}
    shown = [metric, *sorted(names - {metric})]

    def metric_of(name: str) -> Callable[[Found], Any]:
        return lambda each: each.result["metrics"].get(name)

    columns = [
        _Column("run", lambda each: each.result["run"], _short, numeric=False),
        _Column("params", lambda each: each.result["params"], _count),
        _Column("Gflops", lambda each: each.result["gflops"], _number),
        *(_Column(_metric_name(name), metric_of(name), _number) for name in shown),
        _Column("loss", lambda each: each.result["train"]["final_loss"], _number),
        _Column("steps", lambda each: each.result["train"]["steps"], str),
        _Column("train", lambda each: each.result["train"]["seconds"], _duration),
        _Column("seed", lambda each: each.result["train"]["seed"], str),
    ]
    if len(groups) > 1:
        columns.append(
            _Column("protocol", lambda each: each.result["protocol_hash"], _short, numeric=False)
        )
    return columns


def _text(groups: Sequence[Group], metric: str, problems: Sequence[str]) -> str:
    """Aligned columns for a terminal, the laws, the problems."""
    lines: list[str] = []
    columns = _columns(groups, metric)
    for group in groups:
        if len(groups) > 1:
            lines.append(f"protocol {group.protocol_hash}")
        rows = [[column.title for column in columns]]
        rows += [[column.show(column.value(each)) for column in columns] for each in group.runs]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.rjust(width) if column.numeric else cell.ljust(width)
                for cell, width, column in zip(row, widths, columns, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        lines += ["", _summary_words(group, metric)]
        for fit in group.fits[1:]:
            law = fit.why or (
                f"exponent {_number(fit.law.b)} ({_range(fit.law.b_interval)}),"
                f" Pearson {_number(fit.pearson)}"
                if fit.law
                else ""
            )
            lines.append(f"  {fit.label}: {law}")
        lines.append("")
    if problems:
        lines.append(f"Problems ({len(problems)})")
        lines += [f"  - {_short(problem, 400)}" for problem in problems]
    return "\n".join(lines).rstrip()


def _csv(groups: Sequence[Group]) -> str:
    """Every number of every run at full precision, one row a run."""
    rows = []
    for each in (each for group in groups for each in group.runs):
        result = each.result
        row: dict[str, Any] = {"run": result["run"], "protocol_hash": result["protocol_hash"]}
        row |= {f"model.{key}": value for key, value in result["model"].items()}
        row |= {"params": result["params"], "gflops": result["gflops"]}
        row |= {f"train.{key}": value for key, value in result["train"].items()}
        row |= {f"sample.{key}": value for key, value in result["sample"].items()}
        row |= {f"metrics.{key}": value for key, value in result["metrics"].items()}
        rows.append(row | {"folder": str(each.folder)})
    buffer = io.StringIO()
    # A lone surrogate in a name cannot be written; json and the page escape it by themselves.
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return _encodable(buffer.getvalue())


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _merged(groups: Sequence[Group], problems: Sequence[str]) -> dict[str, Any]:
    """results.json: every result with its folder, every fit, every problem."""
    return {
        "schema": 1,
        "results": [
            {**each.result, "folder": str(each.folder)} for group in groups for each in group.runs
        ],
        "fits": [
            {"protocol_hash": group.protocol_hash, **asdict(fit)}
            for group in groups
            for fit in group.fits
        ],
        "problems": list(problems),
    }


# The figures.


@dataclass(frozen=True)
class _Theme:
    background: str
    ink: str
    faint: str
    grid: str


_LIGHT = _Theme("#ffffff", "#1b1f24", "#59636e", "#e4e7eb")
_DARK = _Theme("#14181d", "#e6e9ed", "#9aa4af", "#2b323a")
# Okabe & Ito's colours, told apart by colour-blind readers and visible on both backgrounds.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

Draw = Callable[[_Theme], "Figure"]


def _figures(
    groups: Sequence[Group], metric: str, problems: list[str]
) -> Iterable[tuple[str, str, Draw]]:
    """(file name, caption, draw) of each figure."""
    name = _metric_name(metric)
    shown = groups[:MAX_PANELS]
    left_out = len(groups) - len(shown)
    more = f" {_plural(left_out, 'smaller protocol')} not drawn." if left_out else ""
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
            suffix = f"_{_short(group.protocol_hash, 16)}" if index else ""
            of = f"Protocol {_short(group.protocol_hash, 16)}. " if len(groups) > 1 else ""
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


def _png(draw: Draw, theme: _Theme) -> bytes:
    import matplotlib.pyplot as plt

    style: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 10,
        "legend.frameon": False,
        "text.parse_math": False,  # a run's name may hold a dollar sign
    }
    with plt.rc_context(style):
        figure = draw(theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


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
    size = _short(model["size"], 18)
    return f"{size} {_short(model['block'], 18)}" if several_blocks else size


def _draw_scatter(groups: Sequence[Group], metric: str, theme: _Theme) -> "Figure":
    """One panel a protocol; patch colours and size markers mean the same in all."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    name = _metric_name(metric)
    runs = [each for group in groups for each in group.runs]
    several = _several_blocks(runs)
    rows = _row_names(runs, several)
    patches = sorted({each.result["model"]["patch"] for each in runs}, reverse=True)
    colour = {patch: _COLOURS[i % len(_COLOURS)] for i, patch in enumerate(patches)}
    marker = {row: _MARKERS[i % len(_MARKERS)] for i, row in enumerate(rows)}
    named = len(rows) <= len(_MARKERS)  # beyond that a marker would mean two sizes
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
            ax.set_title(f"protocol {_short(group.protocol_hash, 16)}", loc="left", fontsize=10)
    figure.suptitle(f"{name} against Gflops", x=0.01, ha="left", fontsize=13, fontweight="bold")
    spots = [
        Line2D([], [], ls="", marker="o", ms=8, color=colour[patch], label=str(patch))
        for patch in patches[: len(_COLOURS)]
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
    _left_title(legend)
    if shapes:
        top.add_artist(legend)
        below = 1 - (len(spots) + 1.9) * 0.049
        _left_title(
            top.legend(
                handles=shapes,
                title="depth × width × heads" if any("x" in row for row in rows) else "size",
                loc="upper left",
                bbox_to_anchor=(1.01, below),
                borderaxespad=0,
            )
        )
    return figure


def _left_title(legend: "Legend", size: float = 9) -> None:
    legend.set_alignment("left")
    legend.get_title().set_fontsize(size)


def _law_label(law: PowerLaw, name: str) -> str:
    """The law in matplotlib's mathtext; the name's own dollar signs are none of it."""
    offset = f"{_number(law.c)} + " if law.c else ""
    low, high = _number(law.b_interval.low), _number(law.b_interval.high)
    return (
        rf"{name.replace('$', '')} ≈ {offset}{_number(law.a)} · Gflops$^{{{_number(-law.b)}}}$"
        f"   (b: {low} to {high})"
    )


def _finish_scatter(
    ax: "Axes", group: Group, drawn: Sequence[Found], metric: str, theme: _Theme
) -> None:
    """Scales, laws, floor and the words in the empty upper right corner."""
    name, fit = _metric_name(metric), group.fits[0]
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
    _plain_ticks(ax)
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
        ax.text(0.98, 0.96, f"no law: {_short(fit.why, 60)}", transform=ax.transAxes, ha="right")
    else:
        r = _number(fit.pearson).replace("-", "−")
        legend = ax.legend(
            title=f"Pearson r(log₁₀ Gflops, {name}) = {r}, {_plural(fit.models, 'model')}",
            loc="upper right",
            handlelength=2.6,
            fontsize=10,
        )
        _left_title(legend, 10)
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
            f"real against real images: {_number(floor)}",
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


def _plain_ticks(ax: "Axes") -> None:
    """A few labels on each axis whatever its span, never an exponent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            decades = math.log10(high / low)
            labelled = next(
                (
                    subs
                    for most, subs in ((1.0, (1, 1.5, 2, 3, 5, 7)), (3.0, (1, 2, 5)))
                    if decades < most
                ),
                (1,),
            )
            axis.set_major_locator(LogLocator(subs=labelled))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """0.0001, 0.15, 2, 1000."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


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
            f"{_number(each.result['gflops'])} Gflops, {_metric_name(metric)} {_number(value)}"
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


def _draw_samples(cells: _Cells, theme: _Theme) -> "Figure":
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
            problems.append(f"run {_short(each.result['run'])!r}: {bad} logged losses not finite.")
        keep = np.isfinite(loss) & (loss > 0) & (steps > 0)
        if keep.sum() < 2:
            continue
        smooth = _smooth(steps[keep], loss[keep])
        thin = np.unique(np.geomspace(1, len(smooth), 400).round().astype(int) - 1)
        curves.append(
            _Curve(
                _short(each.result["run"], 32),
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


def _draw_losses(curves: Sequence[_Curve], theme: _Theme) -> "Figure":
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
            label=f"{curve.name} ({_number(curve.gflops)})",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training steps")
    ax.set_ylabel("training loss, smoothed")
    ax.grid(True, which="major", lw=0.7)
    _plain_ticks(ax)
    figure.suptitle("Training loss", x=0.01, ha="left", fontsize=13, fontweight="bold")
    if len(curves) <= MAX_LEGEND:
        _left_title(
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
        _plain_ticks(bar.ax)
    return figure


# The page.


def _html(
    groups: Sequence[Group],
    metric: str,
    problems: Sequence[str],
    figures: Sequence[tuple[str, str, bytes, bytes]],
) -> str:
    import jinja2

    runs = [each for group in groups for each in group.runs]
    columns = _columns(groups, metric)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_PAGE).render(
        title=f"{_metric_name(metric)} against Gflops",
        metric=_metric_name(metric),
        groups=groups,
        words=[_summary_words(group, metric) for group in groups],
        columns=columns,
        table=[[_table_cell(column, each) for column in columns] for each in runs],
        count=len(runs),
        figures=[
            {"name": name, "caption": caption, "light": _data_uri(light), "dark": _data_uri(dark)}
            for name, caption, light, dark in figures
        ],
        problems=problems,
        commands=_distinct(str(each.result["environment"].get("command", "")) for each in runs),
        environments=_environments(runs),
        number=_number,
        range=_range,
        field=_field,
    )
    return _encodable(page)


def _table_cell(column: _Column, each: Found) -> dict[str, Any]:
    value = column.value(each)
    full = str(value) if value is not None else ""
    return {"shown": column.show(value), "key": full, "full": full, "numeric": column.numeric}


def _field(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _distinct(values: Iterable[str]) -> list[str]:
    return [value for value, _ in Counter(value for value in values if value).most_common(8)]


def _environments(runs: Sequence[Found]) -> list[tuple[int, dict[str, Any]]]:
    """(number of runs, fields without the command) of each environment, the commonest first."""
    kept = [
        {key: value for key, value in each.result["environment"].items() if key != "command"}
        for each in runs
    ]
    counted = Counter(json.dumps(fields, sort_keys=True) for fields in kept)
    return [(count, json.loads(text)) for text, count in counted.most_common(4)]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --bg: #ffffff; --ink: #1b1f24; --faint: #59636e; --line: #d9dee3;
  --stripe: #f6f8fa; --mark: #9a3412; --mark-bg: #fff4ec; }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #14181d; --ink: #e6e9ed;
  --faint: #9aa4af; --line: #343c45; --stripe: #1b2027; --mark: #ffb38a; --mark-bg: #2c1f18; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.25rem 4rem; background: var(--bg);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; }
.faint, figcaption { color: var(--faint); font-size: .875rem; }
.scroll { overflow: auto; max-height: 44rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--bg); box-shadow: inset 0 -1px var(--line); }
td.n, th.n { text-align: right; }
tbody tr:nth-child(even) { background: var(--stripe); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: .75rem 0 0; }
.wide { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; max-width: 46rem; }
.problems { background: var(--mark-bg); border-left: 4px solid var(--mark); border-radius: 4px;
  padding: .5rem 1rem; }
.problems h2 { margin: .25rem 0; color: var(--mark); }
.problems ul { margin: .25rem 0; padding-left: 1.2rem; max-height: 20rem; overflow: auto; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1.25rem;
  font-size: .875rem; margin: .5rem 0; }
dt { color: var(--faint); } dd { margin: 0; font-variant-numeric: tabular-nums; }
pre { background: var(--stripe); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; white-space: pre-wrap; font-size: .85rem; margin: .5rem 0; }
@media (max-width: 560px) { body { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.4rem; }
  .wide img { max-width: none; width: 680px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } table { font-size: 8pt; }
  .scroll { overflow: visible; max-height: none; border: 0; } figure, tr { break-inside: avoid; }
  th { position: static; } .problems ul { max-height: none; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for group in groups %}
{% if groups|length > 1 %}<h3>Protocol {{ group.protocol_hash }}</h3>{% endif %}
<p>{{ words[loop.index0] }}</p>
{% endfor %}
<p class="faint">Gflops are multiply-accumulates of one forward pass / 10⁹, as in the DiT paper.
{% if metric == "FD-digits" %}
FD-digits is the Fréchet distance on the features of a small digits classifier; it is not FID and
compares with no published FID.
{% endif %}
{% if groups|length > 1 %}
The results come from {{ groups|length }} protocols; each has its own curve and its own fit.
{% endif %}</p>

{% if problems %}
<section class="problems">
<h2>Problems ({{ problems|length }})</h2>
<ul>
{% for problem in problems %}
<li>{{ problem }}</li>
{% endfor %}
</ul>
</section>
{% endif %}

{% for figure in figures if figure.name == "gflops_vs_fid" %}
{{ picture(figure, title) }}
{% endfor %}

<h2>Fits</h2>
<div class="scroll"><table>
<thead><tr>
{% if groups|length > 1 %}<th>protocol</th>{% endif %}
<th>points</th><th class="n">runs</th><th class="n">models</th>
<th class="n">Pearson (95 %)</th><th class="n">Spearman</th>
<th class="n">a · G^−b: b (95 %)</th><th class="n">R²</th>
<th class="n">c + a · G^−b: b (95 %)</th><th class="n">c</th><th class="n">R²</th>
</tr></thead>
<tbody>
{% for group in groups %}
{% for fit in group.fits %}
<tr>
{% if groups|length > 1 %}<td>{{ group.protocol_hash }}</td>{% endif %}
<td>{{ fit.label }}</td><td class="n">{{ fit.n }}</td><td class="n">{{ fit.models }}</td>
{% if fit.law %}
<td class="n">{{ number(fit.pearson) }} ({{ range(fit.pearson_interval) }})</td>
<td class="n">{{ number(fit.spearman) }}</td>
<td class="n">{{ number(fit.law.b) }} ({{ range(fit.law.b_interval) }})</td>
<td class="n">{{ number(fit.law.r2) }}</td>
{% if fit.offset %}
<td class="n">{{ number(fit.offset.b) }} ({{ range(fit.offset.b_interval) }})</td>
<td class="n">{{ number(fit.offset.c) }}</td><td class="n">{{ number(fit.offset.r2) }}</td>
{% else %}
<td colspan="3">{{ fit.why_no_offset }}</td>
{% endif %}
{% else %}
<td colspan="7">no law: {{ fit.why }}</td>
{% endif %}
</tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
<p class="faint">Pearson is of log₁₀ Gflops and {{ metric }}, its interval Fisher's over the models.
The exponent's interval is a studentised wild bootstrap in which the seeds of one model move
together. R² is of log {{ metric }}.</p>

<h2>Runs</h2>
<div class="scroll"><table id="runs">
<thead><tr>
{% for column in columns %}
<th{% if column.numeric %} class="n"{% endif %}>{{ column.title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table %}
<tr>
{% for cell in row %}
<td{% if cell.numeric %} class="n"{% endif %} data-key="{{ cell.key }}"
 title="{{ cell.full }}">{{ cell.shown }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="faint">{{ count }} run{{ "" if count == 1 else "s" }}. The same numbers at full precision:
table.csv and results.json beside this page.</p>

{% for figure in figures if figure.name != "gflops_vs_fid" %}
{% if loop.first or figure.name == "loss_curves" %}
<h2>{{ "Loss curves" if figure.name == "loss_curves" else "Samples by model" }}</h2>
{% endif %}
{{ picture(figure, figure.caption) }}
{% endfor %}

<h2>Protocol</h2>
{% for group in groups %}
<h3>{{ group.protocol_hash }} ({{ group.runs|length }} runs)</h3>
<dl>
{% for key, value in group.protocol.items() %}
<dt>{{ key }}</dt><dd>{{ field(value) }}</dd>
{% endfor %}
</dl>
{% endfor %}

<h2>Environment</h2>
{% for runs, fields in environments %}
{% if environments|length > 1 %}<h3>{{ runs }} runs</h3>{% endif %}
<dl>
{% for key, value in fields.items() %}
<dt>{{ key }}</dt><dd>{{ field(value) }}</dd>
{% endfor %}
</dl>
{% endfor %}

<h2>Run it again</h2>
{% for command in commands %}
<pre>{{ command }}</pre>
{% else %}
<p>These results keep no command. Each result.json holds the config of its run.</p>
{% endfor %}
<script>
"use strict";
document.querySelectorAll("#runs th").forEach((head, column) => {
  const button = document.createElement("button");
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const body = document.querySelector("#runs tbody");
    const key = (row) => row.cells[column].dataset.key;
    const numeric = head.classList.contains("n");
    const order = (a, b) => {
      if (!numeric) return key(a).localeCompare(key(b), undefined, {numeric: true});
      const x = parseFloat(key(a)), y = parseFloat(key(b));
      if (isNaN(x) || isNaN(y)) return (up ? 1 : -1) * (isNaN(x) - isNaN(y));
      return x - y;
    };
    const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(a, b));
    document.querySelectorAll("#runs th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.replaceChildren(...rows);
  });
});
</script>
</body>
</html>
"""

# Macros come before what uses them.
_PAGE = (
    """{% macro picture(figure, alt) %}
<figure><div class="wide"><picture>
<source media="screen and (prefers-color-scheme: dark)" srcset="{{ figure.dark }}">
<img src="{{ figure.light }}" alt="{{ alt }}"></picture></div>
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endmacro %}
"""
    + _PAGE
)


if __name__ == "__main__":
    cli.run(main)
