"""The runs as a table: the columns a reader sees, text for a terminal, CSV, merged JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ditjax.files.masking import visible
from ditjax.reporting.analysis import Analysis, conclusion, further
from ditjax.reporting.study import Absent, Group, Plan, published_of
from ditjax.runs.results import Found
from ditjax.scaling.claims import Claim
from ditjax.studies.words import (
    OF_A_METRIC,
    aligned,
    count,
    duration,
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
    """A heading, the value of a run (sorts the page's table) and how it reads.

    `absent`: what is known of a cell without a result.
    """

    title: str
    value: Callable[[Found], Any]
    show: Callable[[Any], str]
    numeric: bool = True
    absent: Callable[[Absent], Any] = _nothing

    def shown_absent(self, cell: Absent) -> str:
        """'-' for what is not known; a word stays a word."""
        known = self.absent(cell)
        return "-" if known is None else known if isinstance(known, str) else self.show(known)


def table_columns(
    groups: Sequence[Group], metric: str, absent: Sequence[Absent] = ()
) -> list[Column]:
    """The reader's columns, shared by the page and the terminal: the fitted metric first.

    Beside a measured value stands the published one, where a cell has any.
    """
    runs = [each for group in groups for each in group.runs]
    names = {name for each in runs for name in each.result["metrics"]}
    shown = [metric, *sorted(n for n in names - {metric} if not n.endswith(OF_A_METRIC))]
    records = [*map(published_of, runs), *(cell.published for cell in absent)]
    published = {name for record in records for name in record}
    columns = [
        Column("run", lambda each: each.result["run"], short, False, lambda cell: cell.name),
        Column("params", lambda each: each.result["params"], count, absent=lambda c: c.params),
        Column("Gflops", lambda each: each.result["gflops"], number, absent=lambda c: c.gflops),
    ]
    for name in [*shown, *sorted(published - set(shown))]:
        if name in shown:
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
    )


def _published(name: str) -> Column:
    return Column(
        f"{metric_name(name)}, published",
        lambda each: published_of(each).get(name),
        number,
        absent=lambda cell: cell.published.get(name),
    )


def terminal_text(
    analyses: Sequence[Analysis], problems: Sequence[str], plan: Plan | None = None
) -> str:
    """Aligned columns for a terminal, the laws, the claims, the problems."""
    lines: list[str] = []
    absent = plan.absent if plan else ()
    groups = [analysis.group for analysis in analyses]
    columns = table_columns(groups, analyses[0].metric, absent)
    for analysis in analyses:
        group = analysis.group
        if len(groups) > 1:
            lines.append(f"protocol {group.protocol_hash}")
        rows = [[column.title for column in columns]]
        rows += [[column.show(column.value(each)) for column in columns] for each in group.runs]
        if analysis is analyses[0]:
            rows += [[short(column.shown_absent(cell)) for column in columns] for cell in absent]
        lines += aligned(rows, [column.numeric for column in columns])
        lines += ["", conclusion(analysis), *further(analysis)]
        for fit in analysis.fits[1:]:
            law = fit.why or (
                f"exponent {number(fit.law.b)} ({interval_words(fit.law.b_interval)}),"
                f" Pearson {number(fit.pearson)}"
                if fit.law
                else ""
            )
            lines.append(f"  {fit.label}: {law}")
        lines += [claim_words(claim) for claim in analysis.claims]
        lines.append("")
    if problems:
        lines.append(f"Problems ({len(problems)})")
        lines += [f"  - {short(problem, 400)}" for problem in problems]
    return "\n".join(lines).rstrip()


def claim_words(claim: Claim) -> str:
    """One indented line."""
    return short(f"  {verdict(claim)}: {claim.text} {claim.figures}", 600)


def verdict(claim: Claim) -> str:
    """In a word or three."""
    return {True: "holds", False: "does not hold", None: "cannot be told"}[claim.holds]


def csv_text(groups: Sequence[Group], absent: Sequence[Absent] = ()) -> str:
    """Every number of every run at full precision, one row a run, then the cells without one."""
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
        row |= {f"published.{key}": value for key, value in published_of(each).items()}
        rows.append(row | {"folder": str(each.folder)})
    for cell in absent:
        row = {"run": cell.name, "state": cell.state, "model.name": cell.model}
        row |= {"params": cell.params, "gflops": cell.gflops}
        rows.append(row | {f"published.{key}": value for key, value in cell.published.items()})
    return csv_of(rows)


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for every key of any row, in the order of their first use."""
    buffer = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    # A lone surrogate in a name cannot be written; json and the page escape it by themselves.
    return encodable(buffer.getvalue())


def _harmless(value: Any) -> Any:
    """An apostrophe for what a spreadsheet would take for a formula; no control characters."""
    if not isinstance(value, str):
        return value
    text = visible(value, keep="\n")
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text != "-" else text


def merged(
    analyses: Sequence[Analysis], problems: Sequence[str], plan: Plan | None = None
) -> dict[str, Any]:
    """results.json: every result with its folder, what was computed of them, every problem."""

    def told(analysis: Analysis, value: Any) -> dict[str, Any]:
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
            told(analysis, fit)
            for analysis in analyses
            for fit in (*analysis.fits, *analysis.others)
        ],
        "extrapolations": [
            told(analysis, analysis.extrapolation)
            for analysis in analyses
            if analysis.extrapolation
        ],
        "isoflop": [
            told(analysis, profile) | {"metric": analysis.isoflop.metric}
            for analysis in analyses
            if analysis.isoflop
            for profile in analysis.isoflop.profiles
        ],
        "claims": [told(analysis, claim) for analysis in analyses for claim in analysis.claims],
        "problems": list(problems),
    }
