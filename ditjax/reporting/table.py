"""The runs as a table: the columns that a reader sees, text for a terminal, CSV and JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ditjax.errors import printable
from ditjax.files.durations import duration
from ditjax.reporting.analysis import Analysis, conclusion, findings
from ditjax.reporting.paired import paired_text
from ditjax.reporting.study import Absent, Group, StudyPlan, bits_per_dim, published_figures
from ditjax.runs.results import Found
from ditjax.scaling.claims import Claim
from ditjax.studies.words import (
    OF_A_METRIC,
    aligned,
    count,
    encodable,
    interval_words,
    metric_name,
    number,
    short,
)


def _nothing(cell: Absent) -> Any:
    return None


@dataclass(frozen=True)
class Column:
    """A column: its heading, the value of a run, by which the page sorts, and how it reads.

    `absent` is what is known about a cell without a result. A metric beside the fitted one is said
    once below a terminal's table if all runs agree, such as the score of persistence.
    """

    title: str
    value: Callable[[Found], Any]
    show: Callable[[Any], str]
    numeric: bool = True
    absent: Callable[[Absent], Any] = _nothing
    beside: bool = False

    def shown_absent(self, cell: Absent) -> str:
        """How a cell without a result reads: '-' where nothing is known, words as they are."""
        known = self.absent(cell)
        return "-" if known is None else known if isinstance(known, str) else self.show(known)


def table_columns(
    groups: Sequence[Group], metric: str, absent: Sequence[Absent] = ()
) -> list[Column]:
    """The columns of the page and the terminal, the fitted metric first.

    A published figure is beside the measured one.
    """
    runs = [each for group in groups for each in group.runs]
    names = {name for each in runs for name in each.result["metrics"]}
    shown = [metric, *sorted(n for n in names - {metric} if not n.endswith(OF_A_METRIC))]
    records = [*map(published_figures, runs), *(cell.published for cell in absent)]
    published = {name for record in records for name in record}
    columns = [
        Column("run", lambda each: each.result["run"], short, False, lambda cell: cell.name),
        Column("params", lambda each: each.result["params"], count, absent=lambda c: c.params),
        Column("Gflops", lambda each: each.result["gflops"], number, absent=lambda c: c.gflops),
    ]
    for name in [*shown, *sorted(published - set(shown))]:
        if name == "val_vlb" != metric and any(bits_per_dim(each) is not None for each in runs):
            columns.append(Column("bits/dim", bits_per_dim, number))
        elif name in shown:
            columns.append(_measured(name, metric))
        if name in published:
            columns.append(_published(name))
    columns += [
        Column("loss", lambda each: each.result["train"]["final_loss"], number),
        Column("steps", lambda each: each.result["train"]["steps"], str),
        Column("train", lambda each: each.result["train"]["seconds"], duration),
        Column("seed", lambda each: each.result["train"]["seed"], str),
    ]
    if len(groups) > 1:
        columns.append(
            Column("protocol", lambda each: each.result["protocol_hash"], short, numeric=False)
        )
    return columns


def _measured(name: str, metric: str) -> Column:
    return Column(
        metric_name(name),
        lambda each: each.result["metrics"].get(name),
        number,
        absent=(lambda cell: cell.state) if name == metric else _nothing,
        beside=name != metric,
    )


def _published(name: str) -> Column:
    return Column(
        f"{metric_name(name)}, published",
        lambda each: published_figures(each).get(name),
        number,
        absent=lambda cell: cell.published.get(name),
    )


def _agreed(column: Column, runs: Sequence[Found]) -> bool:
    return len(runs) > 1 and len({column.value(each) for each in runs}) == 1


def report_text(
    analyses: Sequence[Analysis], problems: Sequence[str], plan: StudyPlan | None = None
) -> str:
    """The report for a terminal: aligned columns, the laws, the claims, the problems."""
    lines: list[str] = []
    absent = plan.absent if plan else ()
    groups = [analysis.group for analysis in analyses]
    every = table_columns(groups, analyses[0].metric, absent)
    runs = [each for group in groups for each in group.runs]
    same = [each for each in every if each.beside and _agreed(each, runs)]
    columns = [each for each in every if each not in same]
    for analysis in analyses:
        group = analysis.group
        if len(groups) > 1:
            lines.append(f"protocol {group.protocol_hash}")
        rows = [[column.title for column in columns]]
        rows += [[column.show(column.value(each)) for column in columns] for each in group.runs]
        if analysis is analyses[0]:
            rows += [[short(column.shown_absent(cell)) for column in columns] for cell in absent]
        lines += aligned(rows, [column.numeric for column in columns])
        if same and analysis is analyses[0]:
            words = (f"{each.title} {each.show(each.value(runs[0]))}" for each in same)
            lines.append(f"The same in all runs: {', '.join(words)}.")
        lines += ["", conclusion(analysis), *findings(analysis)]
        for fit in analysis.fits[1:]:
            law = fit.why or (
                f"exponent {number(fit.law.b)} ({interval_words(fit.law.b_interval)}),"
                f" Pearson {number(fit.pearson)}"
                if fit.law
                else ""
            )
            lines.append(f"  {fit.label}: {law}")
        lines += [f"  arms: {pair.words}" for pair in analysis.slopes]
        lines += [f"  {tuned.words}" for tuned in analysis.tuned]
        lines += ["", *paired_text(analysis.paired).splitlines()] if analysis.paired else []
        lines += [claim_words(claim) for claim in analysis.claims]
        lines.append("")
    if problems:
        lines.append(f"Problems ({len(problems)})")
        lines += [f"  - {short(problem, 400)}" for problem in problems]
    return "\n".join(lines).rstrip()


def claim_words(claim: Claim) -> str:
    """A claim on one indented line."""
    return short(f"  {verdict(claim)}: {claim.text} {claim.figures}", 600)


def verdict(claim: Claim) -> str:
    """Whether a claim holds, in words."""
    return {True: "holds", False: "does not hold", None: "undecided"}[claim.holds]


def runs_csv(groups: Sequence[Group], absent: Sequence[Absent] = ()) -> str:
    """Every number at full precision: one row a run, then one row a cell without a result."""
    rows = []
    for each in (each for group in groups for each in group.runs):
        result = each.result
        row: dict[str, Any] = {"run": result["run"], "state": "measured"}
        row |= {"protocol_hash": result["protocol_hash"]}
        row |= {f"model.{key}": value for key, value in result["model"].items()}
        row |= {"params": result["params"], "gflops": result["gflops"]}
        row |= {f"train.{key}": value for key, value in result["train"].items()}
        row |= {f"sample.{key}": value for key, value in result["sample"].items()}
        row |= {f"metrics.{key}": value for key, value in result["metrics"].items()}
        row |= {f"published.{key}": value for key, value in published_figures(each).items()}
        rows.append(row | {"folder": str(each.folder)})
    for cell in absent:
        row = {"run": cell.name, "state": cell.state, "model.name": cell.model}
        row |= {"params": cell.params, "gflops": cell.gflops}
        rows.append(row | {f"published.{key}": value for key, value in cell.published.items()})
    return csv_of(rows)


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a column for every key of any row in order of first use."""
    buffer = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    # A lone surrogate in a name cannot be encoded.
    return encodable(buffer.getvalue())


def _harmless(value: Any) -> Any:
    """Text without control characters, an apostrophe before what a spreadsheet would compute."""
    if not isinstance(value, str):
        return value
    text = printable(value, keep="\n")
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text != "-" else text


def report_record(
    analyses: Sequence[Analysis], problems: Sequence[str], plan: StudyPlan | None = None
) -> dict[str, Any]:
    """The contents of results.json: every result and its folder, all analyses, every problem."""

    def of(analysis: Analysis, value: Any) -> dict[str, Any]:
        return {"protocol_hash": analysis.group.protocol_hash, **asdict(value)}

    return {
        "schema": 1,
        "title": plan.title if plan else "",
        "results": [
            {**each.result, "folder": str(each.folder)}
            for analysis in analyses
            for each in analysis.group.runs
        ],
        "without_result": [asdict(cell) for cell in (plan.absent if plan else ())],
        "fits": [
            of(analysis, fit) for analysis in analyses for fit in (*analysis.fits, *analysis.others)
        ],
        "joint": [of(analysis, analysis.joint) for analysis in analyses],
        "extrapolations": [
            of(analysis, analysis.extrapolation) for analysis in analyses if analysis.extrapolation
        ],
        "isoflop": [
            of(analysis, profile) | {"metric": analysis.isoflop.metric}
            for analysis in analyses
            if analysis.isoflop
            for profile in analysis.isoflop.profiles
        ],
        "slopes": [of(analysis, pair) for analysis in analyses for pair in analysis.slopes],
        "paired": [of(analysis, row) for analysis in analyses for row in analysis.paired],
        "ranks": [of(analysis, pair) for analysis in analyses for pair in analysis.ranks],
        "tuned": [of(analysis, each) for analysis in analyses for each in analysis.tuned],
        "claims": [of(analysis, claim) for analysis in analyses for claim in analysis.claims],
        "problems": list(problems),
    }
