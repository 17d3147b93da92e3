"""The runs as a table: the columns a reader sees, text for a terminal, CSV, merged JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ditjax.io.results import Found
from ditjax.masking import visible
from ditjax.reporting.study import Group, conclusion
from ditjax.reporting.words import (
    OF_A_METRIC,
    count,
    duration,
    encodable,
    interval_words,
    metric_name,
    number,
    short,
)


@dataclass(frozen=True)
class Column:
    """A heading, the value of a run (sorts the page's table) and how it reads."""

    title: str
    value: Callable[[Found], Any]
    show: Callable[[Any], str]
    numeric: bool = True


def table_columns(groups: Sequence[Group], metric: str) -> list[Column]:
    """The reader's columns, shared by the page and the terminal: the fitted metric first."""
    names = {name for group in groups for each in group.runs for name in each.result["metrics"]}
    shown = [metric, *sorted(n for n in names - {metric} if not n.endswith(OF_A_METRIC))]

    def metric_of(name: str) -> Callable[[Found], Any]:
        return lambda each: each.result["metrics"].get(name)

    columns = [
        Column("run", lambda each: each.result["run"], short, numeric=False),
        Column("params", lambda each: each.result["params"], count),
        Column("Gflops", lambda each: each.result["gflops"], number),
        *(Column(metric_name(name), metric_of(name), number) for name in shown),
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


def terminal_text(groups: Sequence[Group], metric: str, problems: Sequence[str]) -> str:
    """Aligned columns for a terminal, the laws, the problems."""
    lines: list[str] = []
    columns = table_columns(groups, metric)
    for group in groups:
        if len(groups) > 1:
            lines.append(f"protocol {group.protocol_hash}")
        rows = [[column.title for column in columns]]
        rows += [[column.show(column.value(each)) for column in columns] for each in group.runs]
        lines += aligned(rows, [column.numeric for column in columns])
        lines += ["", conclusion(group, metric)]
        for fit in group.fits[1:]:
            law = fit.why or (
                f"exponent {number(fit.law.b)} ({interval_words(fit.law.b_interval)}),"
                f" Pearson {number(fit.pearson)}"
                if fit.law
                else ""
            )
            lines.append(f"  {fit.label}: {law}")
        lines.append("")
    if problems:
        lines.append(f"Problems ({len(problems)})")
        lines += [f"  - {short(problem, 400)}" for problem in problems]
    return "\n".join(lines).rstrip()


def csv_text(groups: Sequence[Group]) -> str:
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
    return csv_of(rows)


def aligned(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """A line a row: numeric columns end where their titles do, the others begin there."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


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


def merged(groups: Sequence[Group], problems: Sequence[str]) -> dict[str, Any]:
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
