"""The report as one HTML page, page.html.jinja, that needs no network."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ditjax.files.masking import visible
from ditjax.reporting.analysis import Analysis, conclusion, further
from ditjax.reporting.curves import Logs
from ditjax.reporting.looks import Encoding
from ditjax.reporting.plots import Panel, panels
from ditjax.reporting.samples import PAGE_BYTES, Cells, data_uri
from ditjax.reporting.sampling import Sampled
from ditjax.reporting.scored import Scored, shared
from ditjax.reporting.study import Absent, Family, Plan, families, model_key
from ditjax.reporting.svg import glyph
from ditjax.reporting.table import Column, table_columns, verdict
from ditjax.runs.results import Found
from ditjax.scaling.claims import Claim
from ditjax.studies.words import encodable, interval_words, metric_name, number, plural, short

MAX_GROUPS = 4  # protocols drawn; the table holds all


@dataclass(frozen=True)
class Study:
    """All that a page shows. `cells` are the samples of the first MAX_GROUPS groups, with notes."""

    analyses: tuple[Analysis, ...]
    plan: Plan | None
    logs: Logs
    sampled: tuple[Sampled, ...]
    sampling: Claim | None
    scored: tuple[Scored, ...]
    cells: tuple[tuple[Cells | None, str], ...]
    problems: tuple[str, ...]

    @property
    def metric(self) -> str:
        return self.analyses[0].metric

    @property
    def runs(self) -> list[Found]:
        return [each for analysis in self.analyses for each in analysis.group.runs]

    @property
    def absent(self) -> tuple[Absent, ...]:
        return self.plan.absent if self.plan else ()


def render_page(study: Study) -> str:
    """Every string is escaped, the images are data URIs, and nothing is loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ditjax", "reporting"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs, metric = study.runs, metric_name(study.metric)
    groups = [analysis.group for analysis in study.analyses]
    columns = table_columns(groups, study.metric, study.absent)
    looks = Encoding(runs)
    rows = {id(each): i for i, each in enumerate(runs)}
    spent = _Budget(PAGE_BYTES)
    page = environment.get_template("page.html.jinja").render(
        title=(study.plan.title if study.plan else "") or f"{metric} against Gflops",
        metric=metric,
        lead=_lead(study),
        without=_without_result(study.absent),
        sections=[_section(study, i, looks, rows) for i in range(len(groups))],
        sampling=study.sampling,
        verdict=verdict,
        key=_key(looks),
        columns=columns,
        table=[_row(columns, each) for each in runs],
        absent=[_absent_row(columns, cell) for cell in study.absent],
        models=_models(study),
        scored=study.scored,
        differences=shared(study.scored),
        count=len(runs),
        samples=[
            _sample_section(study, cells, note, rows, spent) for cells, note in study.cells if cells
        ],
        cut=spent.cut,
        problems=study.problems,
        commands=_distinct(str(each.result["environment"].get("command", "")) for each in runs),
        environments=_environments(runs),
        number=number,
        interval=interval_words,
        plural=plural,
        metric_name=metric_name,
        field=_field,
        sha256=_sha256,
    )
    return encodable(page)


def _shown(value: Any) -> Any:
    """What the template puts in: no text of a result turns the direction of the page's own."""
    return visible(value, keep="\n") if type(value) is str else value


def _lead(study: Study) -> str:
    """What was run: cells, models, seeds, protocols."""
    runs = study.runs
    models = len({model_key(each) for each in runs})
    seeds = len({each.result["train"]["seed"] for each in runs})
    words = f"{plural(len(runs), 'run')} of {plural(models, 'model')}, {plural(seeds, 'seed')}"
    if len(study.analyses) > 1:
        words += f", {len(study.analyses)} protocols"
    if study.plan:
        left = len(study.plan.absent)
        words += f". The study has {plural(len(study.plan.cells), 'cell')}"
        words += f", {left} of them without a result" if left else ", all with a result"
    return f"{words}. Training took {_hours(runs)} in all."


def _hours(runs: Sequence[Found]) -> str:
    hours = sum(each.result["train"]["seconds"] for each in runs) / 3600
    return f"{number(hours, 2)} hours"


MAX_ABSENT = 12  # names of cells without a result in the summary


def _without_result(absent: Sequence[Absent]) -> str:
    """Which cells, by their state; '' where all have a result."""
    by_state: dict[str, list[str]] = {}
    for cell in absent:
        by_state.setdefault(cell.state, []).append(short(cell.name))
    words = []
    for state, names in by_state.items():
        more = f" and {len(names) - MAX_ABSENT} more" if len(names) > MAX_ABSENT else ""
        words.append(f"{state[0].upper()}{state[1:]}: {', '.join(names[:MAX_ABSENT])}{more}.")
    return " ".join(words)


@dataclass(frozen=True)
class _Section:
    """One protocol's words, plots and fits."""

    analysis: Analysis
    words: list[str]
    panels: list[Panel]


def _section(study: Study, index: int, looks: Encoding, rows: dict[int, int]) -> _Section:
    analysis = study.analyses[index]
    drawn: list[Panel] = []
    if index < MAX_GROUPS:
        sampled, absent = (study.sampled, study.absent) if index == 0 else ((), ())
        drawn = panels(analysis, study.logs, rows, looks, sampled, absent)
    return _Section(analysis, [conclusion(analysis), *further(analysis)], drawn)


def _key(looks: Encoding) -> list[tuple[str, list[tuple[str, str]]]]:
    """(what it stands for, (markup, words) of each value) of colours and markers."""
    made = []
    for kind, (title, values) in (("", looks.colours), ("plain", looks.markers)):
        if values:
            made.append((title, [(glyph(look, kind), words) for words, look in values]))
    return made


def _row(columns: Sequence[Column], each: Found) -> list[dict[str, Any]]:
    return [_cell(column, column.value(each), column.show) for column in columns]


def _absent_row(columns: Sequence[Column], cell: Absent) -> list[dict[str, Any]]:
    return [
        _cell(column, column.absent(cell), lambda _, column=column: column.shown_absent(cell))
        for column in columns
    ]


def _cell(column: Column, value: Any, show: Any) -> dict[str, Any]:
    full = str(value) if value is not None else ""
    return {"shown": show(value), "key": full, "full": full, "numeric": column.numeric}


def _models(study: Study) -> list[Family]:
    """Models with several seeds, and all others beside them; [] where there is one seed."""
    found = [
        family
        for analysis in study.analyses
        for family in families(analysis.group.runs, study.metric)
    ]
    return found if any(len(family.runs) > 1 for family in found) else []


class _Budget:
    """Bytes that images may still take; `cut` counts those left out."""

    def __init__(self, most: int) -> None:
        self._left = most
        self.cut = 0

    def spend(self, text: str) -> str:
        """The text, or '' where it is more than is left."""
        if len(text) > self._left:
            self.cut += 1
            return ""
        self._left -= len(text)
        return text


def _sample_section(
    study: Study, cells: Cells, note: str, rows: dict[int, int], budget: _Budget
) -> dict[str, Any]:
    """Rows of cells: the image, its words, the number of its run."""
    group = next(
        analysis.group
        for analysis in study.analyses
        if any(each is run for run in cells.runs.values() for each in analysis.group.runs)
    )
    made = []
    for name in cells.rows:
        line = []
        for patch in cells.columns:
            images = cells.images.get((name, patch))
            uri = "" if images is None else budget.spend(data_uri(images))
            line.append(
                {
                    "patch": patch,
                    "uri": uri,
                    "small": images is not None and max(images.shape[1:3]) <= 32,
                    "words": cells.words.get((name, patch), ""),
                    "run": rows.get(id(cells.runs.get((name, patch)))) if uri else None,
                }
            )
        made.append((name, line))
    return {"hash": group.protocol_hash, "rows": made, "columns": len(cells.columns), "note": note}


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


def _sha256(script: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
