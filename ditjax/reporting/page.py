"""The report as one HTML page, page.html.jinja, that needs no network."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ditjax.io.results import Found
from ditjax.masking import visible
from ditjax.reporting.figures import Picture
from ditjax.reporting.study import Group, conclusion
from ditjax.reporting.table import Column, table_columns
from ditjax.reporting.words import encodable, interval_words, metric_name, number


def render_page(
    groups: Sequence[Group], metric: str, problems: Sequence[str], pictures: Sequence[Picture]
) -> str:
    """Every string is escaped, the images are data URIs, and nothing is loaded from elsewhere."""
    import jinja2

    runs = [each for group in groups for each in group.runs]
    columns = table_columns(groups, metric)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ditjax", "reporting"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        title=f"{metric_name(metric)} against Gflops",
        metric=metric_name(metric),
        groups=groups,
        words=[conclusion(group, metric) for group in groups],
        columns=columns,
        table=[[_table_cell(column, each) for column in columns] for each in runs],
        count=len(runs),
        figures=pictures,
        problems=problems,
        commands=_distinct(str(each.result["environment"].get("command", "")) for each in runs),
        environments=_environments(runs),
        number=number,
        range=interval_words,
        field=_field,
        data_uri=_data_uri,
        sha256=_sha256,
    )
    return encodable(page)


def _shown(value: Any) -> Any:
    """What the template puts in: no text of a result turns the direction of the page's own."""
    return visible(value, keep="\n") if type(value) is str else value


def _table_cell(column: Column, each: Found) -> dict[str, Any]:
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


def _sha256(script: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
