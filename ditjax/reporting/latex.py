"""The table of a study for a paper: LaTeX with booktabs, seeds as mean ± standard deviation."""

import math
from collections.abc import Sequence

from ditjax.errors import printable
from ditjax.reporting.study import Absent, Family, Group, families, published_figures, usable
from ditjax.studies.words import METRIC_NAMES, count, encodable, metric_name, number

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "∞": r"$\infty$",
    "-": "{-}",  # no ligature, and no part of a name reads as a rule
}
_LONG = 40  # rows that fit on a page


def escaped(text: str, longest: int = 60) -> str:
    """Escape a name for LaTeX, so that it is no command and no comment, on one line."""
    line = printable(text)
    line = line if len(line) <= longest else f"{line[: longest - 3]}..."
    return "".join(_SPECIAL.get(char, char) for char in line)


def latex_text(groups: Sequence[Group], metric: str, absent: Sequence[Absent] = ()) -> str:
    """One row for each model and recipe, and one for each run without a usable metric.

    Needs \\usepackage{booktabs}, and longtable if there are many rows.
    """
    several = len(groups) > 1
    published = any(
        metric in record
        for record in (
            *(published_figures(each) for group in groups for each in group.runs),
            *(cell.published for cell in absent),
        )
    )
    heads = ["model", "block", "parameters", "Gflops", "steps", "seeds", metric_name(metric)]
    heads += ["published"] if published else []
    rows: list[str] = []
    for group in groups:
        if several:
            rows.append(
                rf"\multicolumn{{{len(heads)}}}{{l}}{{protocol {escaped(group.protocol_hash)}}} \\"
            )
        made = {id(family.runs[0]): family for family in families(group.runs, metric)}
        for each in group.runs:
            family = made.get(id(each))
            if family is None and usable(each, metric):
                continue  # a further seed of a family
            model, train = each.result["model"], each.result["train"]
            cells = [escaped(model["name"])]
            cells += [escaped(str(model["block"])) if "block" in model else "--"]
            cells += [count(each.result["params"]), number(each.result["gflops"])]
            cells += [str(train["steps"])]
            cells += [str(len(family.runs)) if family else "1", _measured(family)]
            if published:
                cells.append(_known(published_figures(each).get(metric)))
            rows.append(" & ".join(cells) + r" \\")
    for cell in absent:
        known = [escaped(cell.model or cell.name), "--"]
        known += [count(cell.params) if cell.params else "--", _known(cell.gflops), "--", "0"]
        known += [escaped(cell.state), *([_known(cell.published.get(metric))] if published else [])]
        rows.append(" & ".join(known) + r" \\")
    return encodable(_framed(heads, rows, metric))


def _framed(heads: Sequence[str], rows: Sequence[str], metric: str) -> str:
    columns = "ll" + "r" * (len(heads) - 2)
    head = " & ".join(escaped(each) for each in heads) + r" \\"
    note = "mean and standard deviation of the seeds; lower is better"
    if metric in METRIC_NAMES and metric != "fid":
        note += f"; {metric_name(metric)} is not FID"
    lines = [f"% needs booktabs{' and longtable' if len(rows) > _LONG else ''}; {note}"]
    if len(rows) > _LONG:
        lines += [rf"\begin{{longtable}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        lines += [r"\endhead", r"\bottomrule", r"\endfoot", *rows, r"\end{longtable}"]
    else:
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        lines += [*rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _measured(family: Family | None) -> str:
    if family is None:
        return "NaN"
    spread = f" $\\pm$ {number(family.deviation, 2)}" if math.isfinite(family.deviation) else ""
    return f"{number(family.mean)}{spread}"


def _known(value: float | None) -> str:
    return "--" if value is None else number(value)
