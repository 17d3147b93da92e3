"""Table, plots and laws from any number of result.json, and one HTML page that holds them all.

    python -m ditjax.report --runs=DIR[,DIR...] [--out=DIR/report] [--metric=fd_digits]

Results of different protocols never share a curve: each protocol hash is a group with its own
panel and its own fit. What is wrong with a result is named, on the page and in the terminal; a
run with something wrong is never silently averaged in or dropped.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ditjax import cli
from ditjax.errors import UserError
from ditjax.files.atomic import write_atomic, write_json
from ditjax.reporting.analysis import Analysis, analysed
from ditjax.reporting.curves import Logs
from ditjax.reporting.figures import pictures
from ditjax.reporting.latex import latex_text
from ditjax.reporting.page import MAX_GROUPS, Study, render_page
from ditjax.reporting.samples import sample_cells
from ditjax.reporting.sampling import read_sampled, sampling_claim
from ditjax.reporting.scored import scored_csv, scored_rows, scored_text
from ditjax.reporting.study import (
    Group,
    chosen_metric,
    group_by_protocol,
    read_plan,
    without_duplicates,
)
from ditjax.reporting.table import claim_words, csv_text, merged, terminal_text
from ditjax.runs.results import find_results


@dataclass(frozen=True)
class Summary:
    """What a report found and wrote. `text` is the terminal's version of the page."""

    out_dir: Path
    page: Path
    groups: tuple[Group, ...]
    analyses: tuple[Analysis, ...]
    problems: tuple[str, ...]
    text: str
    files: tuple[Path, ...]


def main(argv: list[str]) -> int:
    """The command: prints the table and where the page is. UserErrors propagate."""
    parser = cli.parser("report", "Table, plots, fits and a page of finished runs.", config=False)
    parser.add_argument("--runs", required=True, help="folders of sweeps or runs, comma-separated")
    parser.add_argument("--out", help="folder of the report (default: report/ in the first folder)")
    parser.add_argument("--metric", help="the metric fitted (default: fid, else fd_digits)")
    arguments = parser.parse_args(argv)
    folders = [Path(folder) for folder in arguments.runs.split(",") if folder]
    if not folders:
        raise UserError("--runs is empty: expected one or more folders, comma-separated.")
    out_dir = Path(arguments.out) if arguments.out else folders[0] / "report"
    print(make_report(folders, out_dir, metric=arguments.metric).text)
    return 0


def make_report(
    run_dirs: Sequence[str | Path], out_dir: str | Path, *, metric: str | None = None
) -> Summary:
    """Reads every result.json below `run_dirs` and writes the report into `out_dir`.

    `metric` is what laws are fitted to: where None, fid if a result has it, else fd_digits.
    Files: index.html, table.csv, table.tex, table.txt, results.json, gflops_vs_fid.png,
    loss_curves.png, samples_by_model.png (samples_by_model_HASH.png for further protocols), and
    scored.csv where cells have published figures.
    Raises UserError where there is no result to report or `out_dir` cannot be written.
    """
    out_dir = Path(out_dir)
    found, problems = find_results(run_dirs)
    if not found:
        where = ", ".join(map(str, run_dirs))
        more = f" {len(problems)} problems, the first: {problems[0]}" if problems else ""
        raise UserError(f"no readable result.json below {where}: run a sweep first.{more}")
    found = without_duplicates(found, problems)
    metric = metric or chosen_metric(found)
    plan = read_plan(run_dirs, found, problems)
    groups = group_by_protocol(found, metric, problems)
    runs = [each for group in groups for each in group.runs]
    logs = Logs(runs, problems)
    analyses = tuple(analysed(group, metric, logs, problems) for group in groups)
    sampled = tuple(read_sampled(run_dirs, runs, metric, problems))
    cells = tuple(sample_cells(group, metric, problems) for group in groups[:MAX_GROUPS])
    claim = sampling_claim(sampled) if sampled else None
    listed = {"cells": plan.cells} if plan else None
    scored = tuple(scored_rows([each.result for each in runs], listed))
    study = Study(analyses, plan, logs, sampled, claim, scored, cells, tuple(problems))
    drawn = pictures(analyses, [first for first, _ in cells], logs.losses())
    text = terminal_text(analyses, problems, plan)
    if claim:
        text += f"\n\n{claim_words(claim)}"
    if scored:
        text += f"\n\n{scored_text(scored)}"
    record = merged(analyses, problems, plan)
    record["sampling_claim"] = asdict(claim) if claim else None
    record["scored"] = [asdict(row) for row in scored]
    page = render_page(study)
    files = [
        write_atomic(out_dir / "table.csv", csv_text(groups, study.absent).encode()),
        *([write_atomic(out_dir / "scored.csv", scored_csv(scored).encode())] if scored else []),
        write_atomic(out_dir / "table.tex", latex_text(groups, metric, study.absent).encode()),
        write_atomic(out_dir / "table.txt", (text + "\n").encode()),
        write_json(out_dir / "results.json", record),
        *(write_atomic(out_dir / f"{picture.name}.png", picture.png) for picture in drawn),
        write_atomic(out_dir / "index.html", page.encode()),
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


if __name__ == "__main__":
    cli.run(main)
