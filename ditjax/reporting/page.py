"""The report as one HTML page, from page.html.jinja. It needs no network."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ditjax.errors import printable
from ditjax.reporting.analysis import GFLOPS, Analysis, conclusion, findings
from ditjax.reporting.curves import Logs
from ditjax.reporting.looks import Encoding
from ditjax.reporting.paired import PAIRED_NOTE, paired_words
from ditjax.reporting.plots import GroupPlots, Plot
from ditjax.reporting.samples import PAGE_BYTES, Cells, data_uri
from ditjax.reporting.sampling import Sampled
from ditjax.reporting.scored import Scored, shared
from ditjax.reporting.study import Absent, Family, StudyPlan, families, model_key
from ditjax.reporting.style import MARKERS, variable
from ditjax.reporting.table import Column, table_columns, verdict
from ditjax.runs.results import Found
from ditjax.scaling.claims import Claim
from ditjax.studies.ladder import ScoredPrediction, reliability
from ditjax.studies.words import encodable, interval_words, metric_name, number, plural, short

MAX_GROUPS = 4  # protocols with plots; the table has all


@dataclass(frozen=True)
class Study:
    """Everything that a page shows. `cells`: samples of the first MAX_GROUPS groups, and notes."""

    analyses: tuple[Analysis, ...]
    plan: StudyPlan | None
    logs: Logs
    sampled: tuple[Sampled, ...]
    sampling: Claim | None
    scored: tuple[Scored, ...]
    cells: tuple[tuple[Cells | None, str], ...]
    predictions: tuple[ScoredPrediction, ...]
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
    """Render the page. Every string is escaped, images are data URIs, and nothing is loaded."""
    runs, metric = study.runs, metric_name(study.metric)
    groups = [analysis.group for analysis in study.analyses]
    columns = table_columns(groups, study.metric, study.absent)
    looks = Encoding(runs)
    rows = {id(each): i for i, each in enumerate(runs)}
    spent = _Budget(PAGE_BYTES)
    page = page_template("page.html.jinja").render(
        title=(study.plan.title if study.plan else "") or f"{metric} against Gflops",
        metric=metric,
        lead=_lead(study),
        without=_without_result(study.absent),
        sections=[_section(study, i, looks, rows) for i in range(len(groups))],
        sampling=study.sampling,
        verdict=verdict,
        keys=looks.keys(),
        markers=MARKERS,
        variable=variable,
        columns=columns,
        table=[[_cell(one, one.value(each), one.show) for one in columns] for each in runs],
        absent=[_absent_row(columns, cell) for cell in study.absent],
        models=_models(study),
        scored=study.scored,
        predictions=study.predictions,
        reliability=reliability(study.predictions),
        differences=shared(study.scored),
        count=len(runs),
        samples=[
            _sample_section(study, cells, note, rows, spent) for cells, note in study.cells if cells
        ],
        cut=spent.cut,
        problems=study.problems,
        commands=_distinct(str(each.result["environment"].get("command", "")) for each in runs),
        environments=_environments(runs),
        paired_words=paired_words,
        paired_note=PAIRED_NOTE,
        number=number,
        interval=interval_words,
        plural=plural,
        metric_name=metric_name,
        field=lambda value: value if isinstance(value, str) else json.dumps(value),
        sha256=_sha256,
    )
    return encodable(page)


def page_template(name: str) -> Any:
    """A template of this folder, which escapes every string."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ditjax", "reporting"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """A value as the template shows it, without characters that would change the page's text."""
    return printable(value, keep="\n") if type(value) is str else value


def _lead(study: Study) -> str:
    """What was run: runs, models, seeds, protocols and cells of the plan."""
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
    hours = sum(each.result["train"]["seconds"] for each in runs) / 3600
    return f"{words}. Training took {number(hours, 2)} hours in all."


MAX_ABSENT = 12  # cells without a result that the summary names


def _without_result(absent: Sequence[Absent]) -> str:
    """The cells without a result, by their state; '' if there are none."""
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
    """The sentences and plots of one protocol; `hero` is the wide drawing of the first plot."""

    analysis: Analysis
    words: list[str]
    hero: str
    plots: list[Plot]


def _section(study: Study, index: int, looks: Encoding, rows: dict[int, int]) -> _Section:
    analysis = study.analyses[index]
    words = [conclusion(analysis), *findings(analysis)]
    if index >= MAX_GROUPS:
        return _Section(analysis, words, "", [])
    sampled, absent = ((), ()) if index else (study.sampled, study.absent)
    group = GroupPlots(analysis, looks, rows, absent)
    hero = group.cost(GFLOPS, named=True).svg(analysis.group.protocol_hash, wide=True)
    return _Section(analysis, words, hero, group.every(study.logs, sampled))


def _absent_row(columns: Sequence[Column], cell: Absent) -> list[dict[str, Any]]:
    return [
        _cell(column, column.absent(cell), lambda _, column=column: column.shown_absent(cell))
        for column in columns
    ]


def _cell(column: Column, value: Any, show: Any) -> dict[str, Any]:
    key = str(value) if value is not None else ""
    return {"shown": show(value), "key": key, "numeric": column.numeric}


def _models(study: Study) -> list[Family]:
    """The models over their seeds; [] if every model has a single seed."""
    found = [
        family
        for analysis in study.analyses
        for family in families(analysis.group.runs, study.metric)
    ]
    return found if any(len(family.runs) > 1 for family in found) else []


class _Budget:
    """The bytes that images may still take; `cut` counts the images left out."""

    def __init__(self, most: int) -> None:
        self._left = most
        self.cut = 0

    def spend(self, text: str) -> str:
        """The text, or '' if it is longer than what is left."""
        if len(text) > self._left:
            self.cut += 1
            return ""
        self._left -= len(text)
        return text


def _sample_section(
    study: Study, cells: Cells, note: str, rows: dict[int, int], budget: _Budget
) -> dict[str, Any]:
    """Rows of cells: the image, its words and the row of its run in the table."""
    group = next(
        analysis.group
        for analysis in study.analyses
        if any(each is run for run in cells.runs.values() for each in analysis.group.runs)
    )
    made = []
    for name in cells.rows:
        line = []
        for patch in cells.patches_of(name):
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


def _distinct(values: Iterable[str]) -> list[str]:
    return [value for value, _ in Counter(value for value in values if value).most_common(8)]


def _environments(runs: Sequence[Found]) -> list[tuple[int, dict[str, Any]]]:
    """(number of runs, fields without the command) of each environment, the most common first."""
    kept = [
        {key: value for key, value in each.result["environment"].items() if key != "command"}
        for each in runs
    ]
    counted = Counter(json.dumps(fields, sort_keys=True) for fields in kept)
    return [(count, json.loads(text)) for text, count in counted.most_common(4)]


def _sha256(script: str) -> str:
    """The name of a script in a Content-Security-Policy, which then allows no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
