"""python -m ditjax.report: table, plots and scaling laws of finished runs, on one HTML page.

    python -m ditjax.report --runs=DIR[,DIR...] [--out=DIR/report] [--metric=fd_digits]

Results of different protocols never share a curve: each protocol hash is a group with its own plots
and fits. Every problem with a result is listed on the page and in the terminal, so that no faulty
run is silently averaged in or dropped.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.errors import UserError, first_few
from ditjax.files.atomic import write_atomic, write_json, write_text
from ditjax.files.paths import split_paths
from ditjax.files.store import place
from ditjax.reporting.analysis import Analysis, analyse
from ditjax.reporting.curves import Logs
from ditjax.reporting.figures import pictures
from ditjax.reporting.latex import latex_text
from ditjax.reporting.page import MAX_GROUPS, Study, render_page
from ditjax.reporting.paired import paired_csv_rows
from ditjax.reporting.samples import sample_cells
from ditjax.reporting.sampling import read_sampled, sampling_claim
from ditjax.reporting.scored import scored_csv, scored_rows, scored_text
from ditjax.reporting.study import (
    Group,
    default_metric,
    group_by_protocol,
    read_plan,
    without_duplicates,
    without_implausible,
)
from ditjax.reporting.table import claim_words, csv_of, report_record, report_text, runs_csv
from ditjax.runs.results import find_results
from ditjax.studies.ladder import read_predictions, reliability
from ditjax.studies.measured import against_words, compare_with, read_measured
from ditjax.studies.words import plural


@dataclass(frozen=True)
class Summary:
    """The content and files of a report. `text` is the page's version for a terminal."""

    out_dir: Path
    page: Path
    groups: tuple[Group, ...]
    analyses: tuple[Analysis, ...]
    problems: tuple[str, ...]
    text: str
    files: tuple[Path, ...]


def main(argv: list[str]) -> int:
    """Print the table and the path of the page. Raises UserError."""
    parser = cli.parser(
        "report", "Write a table, plots and fits of finished runs, on one HTML page.", config=False
    )
    parser.add_argument("--runs", required=True, help="folders of sweeps or runs, comma-separated")
    parser.add_argument("--out", help="output folder (default: report/ in the first folder)")
    parser.add_argument(
        "--metric", help="metric to fit laws to (default: fid if present, else fd_digits)"
    )
    parser.add_argument(
        "--tuned",
        default="",
        metavar="KEY,..",
        help="compare arms at each model's best value of these keys, as optim.learning_rate",
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="NAME",
        help="say which runs lie where the seeds of a measured study lay: small_scaling, or another"
        " one that ships, or a report's results.json",
    )
    arguments = parser.parse_args(argv)
    measured = read_measured(arguments.against) if arguments.against else None
    folders = split_paths(arguments.runs, "--runs")
    out_dir = place(arguments.out) if arguments.out else folders[0] / "report"
    tuned = tuple(key for key in arguments.tuned.split(",") if key)
    summary = make_report(folders, out_dir, metric=arguments.metric, tuned=tuned)
    print(summary.text)
    if measured:
        runs = [each for group in summary.groups for each in group.runs]
        notes: list[str] = []
        beside = compare_with(measured, runs, summary.analyses[0].metric, notes)
        print("\n".join(["", *notes, against_words(measured.name, beside)]))
    return 0


def make_report(
    run_dirs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    metric: str | None = None,
    tuned: Sequence[str] = (),
) -> Summary:
    """Read every result.json below `run_dirs` and write the report into `out_dir`.

    Laws are fitted to `metric`; if it is None, to fid if a result has it, else to fd_digits. Arms
    are compared at each model's best values of the keys `tuned`. The
    files are index.html, table.csv, table.tex, table.txt, results.json, gflops_vs_fid.png,
    loss_curves.png, samples_by_model.png (samples_by_model_HASH.png for further protocols), and
    scored.csv if cells have published figures, and paired.csv and paired.png if there are arms.
    Raises UserError if there is no result or `out_dir` cannot be written.
    """
    out_dir = place(out_dir)
    found, problems = find_results(run_dirs)
    if not found:
        where = ", ".join(map(str, run_dirs))
        more = f" {plural(len(problems), 'problem')}: {first_few(problems)}" if problems else ""
        raise UserError(f"no readable result.json below {where}: run a sweep first.{more}")
    found = without_implausible(without_duplicates(found, problems), problems)
    metric = metric or default_metric(found)
    plan = read_plan(run_dirs, found, problems)
    groups = group_by_protocol(found, metric, problems)
    runs = [each for group in groups for each in group.runs]
    logs = Logs(runs, problems)
    order = [cell["name"] for cell in plan.cells] if plan else []
    analyses = tuple(analyse(group, metric, logs, problems, tuned, order) for group in groups)
    sampled = tuple(read_sampled(run_dirs, runs, metric, problems))
    cells = tuple(sample_cells(group, metric, problems) for group in groups[:MAX_GROUPS])
    claim = sampling_claim(sampled) if sampled else None
    listed = {"cells": plan.cells} if plan else None
    scored = tuple(scored_rows([each.result for each in runs], listed))
    paired = paired_csv_rows([row for each in analyses for row in each.paired])
    told = read_predictions(run_dirs, runs, problems)
    study = Study(analyses, plan, logs, sampled, claim, scored, cells, told, tuple(problems))
    text = _text(study)
    page = render_page(study)
    files = [
        write_text(out_dir / "table.csv", runs_csv(groups, study.absent)),
        *([write_text(out_dir / "scored.csv", scored_csv(scored))] if scored else []),
        *([write_text(out_dir / "paired.csv", csv_of(paired))] if paired else []),
        write_text(out_dir / "table.tex", latex_text(groups, metric, study.absent)),
        write_text(out_dir / "table.txt", text + "\n"),
        write_json(out_dir / "results.json", _record(study)),
        *(write_atomic(out_dir / name, png) for name, png in pictures(study).items()),
        write_text(out_dir / "index.html", page),
    ]
    return Summary(
        out_dir=out_dir,
        page=files[-1],
        groups=groups,
        analyses=analyses,
        problems=tuple(problems),
        text=f"{text}\n\nreport: {files[-1]}",
        files=tuple(files),
    )


def _text(study: Study) -> str:
    """The report for a terminal."""
    parts = [report_text(study.analyses, study.problems, study.plan)]
    parts += [claim_words(study.sampling)] if study.sampling else []
    parts += [scored_text(study.scored)] if study.scored else []
    if study.predictions:
        parts.append(
            "\n".join(["Registered predictions", *(each.words for each in study.predictions)])
        )
        parts += [words] if (words := reliability(study.predictions)) else []
    return "\n\n".join(parts)


def _record(study: Study) -> dict[str, Any]:
    """The content of results.json."""
    return {
        **report_record(study.analyses, study.problems, study.plan),
        "evaluations": study.logs.rows(),
        "sampling_claim": asdict(study.sampling) if study.sampling else None,
        "scored": [asdict(row) for row in study.scored],
        "predictions": [{**asdict(each), "inside": each.inside} for each in study.predictions],
    }


if __name__ == "__main__":
    cli.run(main)
