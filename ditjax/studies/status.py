"""The state of a study, read from its directory on any machine, without changing anything.

A cell is done if it has a result, and running while a process holds its lease. Otherwise
`ended.json` or the last line of its log says how it ended.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ditjax.errors import FaultError, UserError, one_line
from ditjax.files import atomic, lease
from ditjax.files.durations import clock
from ditjax.runs import results, rundir
from ditjax.runs.log import newest_metrics
from ditjax.studies.cells import Cell, check_result
from ditjax.studies.words import OF_A_METRIC, aligned, metric_name, number

LEASES = ".sweep*.lease"  # leases of the processes that start cells

DONE, RUNNING, FAILED, STOPPED, NOT_RUN = "done", "running", "failed", "stopped", "not run"
SILENT = "ended without a message"
_STATES = (DONE, RUNNING, FAILED, STOPPED, NOT_RUN)
_ENDINGS = (FAILED, STOPPED)
_INTERVALS = 8  # logged intervals that a rate is computed from
_LONGEST = 160  # characters of a printed line


class State(NamedTuple):
    """The state of one cell: training step, rate in steps/s (NaN if unknown), and a remark."""

    cell: Cell
    stage: str
    step: int = 0
    rate: float = math.nan
    words: str = ""

    @property
    def left(self) -> float:
        """Remaining seconds of training at this rate; NaN if unknown."""
        steps = self.cell.config.train.steps - self.step
        return steps / self.rate if self.rate > 0 else math.nan

    @property
    def share(self) -> float:
        """The finished share of training, 0 to 1."""
        return 1.0 if self.stage == DONE else min(1.0, self.step / self.cell.config.train.steps)


def read_states(study: Iterable[Cell], workdir: Path, *, waits: bool = False) -> list[State]:
    """Return the state of each cell.

    With `waits`, up to 15 seconds are spent to find out whether processes on other machines live.
    """
    folders = [(cell, workdir / rundir.RUNS / cell.name) for cell in study]
    sweeps = sorted(workdir.glob(LEASES))
    files = [*sweeps, *(folder / lease.FILE for _, folder in folders)]
    held = lease.holders(files, lease.PATIENCE_SECONDS if waits else 0.0)
    sweeping = any(file in held for file in sweeps)
    return [
        _state(cell, folder, held.get(folder / lease.FILE), sweeping) for cell, folder in folders
    ]


def _state(cell: Cell, folder: Path, holder: lease.Holder | None, sweeping: bool) -> State:
    bad = ""
    try:
        if (folder / results.RESULT_FILE).exists():
            found = results.read_result(folder)
            check_result(cell, folder, found)
            return State(cell, DONE, found["train"]["steps"], words=_metric(found["metrics"]))
    except (UserError, FaultError) as error:
        bad = str(error)
    step, rate = _pace(folder)
    if holder:
        doing = "" if 0 < step < cell.config.train.steps else "evaluates, " if step else "starts, "
        return State(cell, RUNNING, step, rate, f"{doing}{holder}")
    if bad:
        return State(cell, FAILED, step, words=_shorten(bad, folder))
    if ending := read_ending(folder):
        return State(cell, ending["how"], step, words=_shorten(ending["line"], folder))
    if not any(
        (folder / name).exists()
        for name in (rundir.LOG_FILE, results.METRICS_FILE, rundir.RECIPE_FILE)
    ):
        return State(cell, NOT_RUN)
    if sweeping:
        return State(cell, RUNNING, step, words="starts")
    words = _shorten(f"{SILENT}; its log: {last_line(folder)}", folder)
    return State(cell, FAILED, step, words=words)


def record_ending(folder: Path, how: str, line: str) -> None:
    """Record how a cell without a result ended. A full disk is ignored."""
    record = {"how": how, "line": one_line(line)[:2000]}
    with contextlib.suppress(OSError, UserError, FaultError):
        atomic.write_json(folder / rundir.ENDED_FILE, record)


def record_failures(states: Iterable[State], workdir: Path) -> None:
    """Record failures that are visible only while no sweep runs, before one starts."""
    for each in states:
        folder = workdir / rundir.RUNS / each.cell.name
        known = (folder / results.RESULT_FILE).exists() or read_ending(folder)
        if each.stage == FAILED and not known:
            record_ending(folder, FAILED, each.words)


def clear_ending(folder: Path) -> None:
    """Remove the record of how a cell ended, because it starts or resumes."""
    with contextlib.suppress(OSError):
        (folder / rundir.ENDED_FILE).unlink(missing_ok=True)


def read_ending(folder: Path) -> dict[str, str] | None:
    """Return {'how': 'failed' or 'stopped', 'line': ...}, or None if nothing legible exists."""
    with contextlib.suppress(OSError, ValueError, FaultError):
        found = atomic.load_json(folder / rundir.ENDED_FILE)
        if isinstance(found, dict) and found.get("how") in _ENDINGS:
            return {"how": found["how"], "line": str(found.get("line", ""))}
    return None


def last_line(folder: Path) -> str:
    """Return the last line of a cell's log, 'empty' or 'none'."""
    with contextlib.suppress(OSError), (folder / rundir.LOG_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 14)))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "empty")
    return "none"


def _pace(folder: Path) -> tuple[int, float]:
    """Return (newest step, steps/s over the newest log lines); (0, NaN) before the first line."""
    points: list[tuple[int, float]] = []
    for line in newest_metrics(folder, _INTERVALS + 1):
        step, seconds = line.get("step"), line.get("seconds")
        if type(step) is int and isinstance(seconds, int | float):
            points.append((step, seconds))
    if not points:
        return 0, math.nan
    (first, began), (last, now) = points[0], points[-1]
    if len(points) == 1:
        first, began = 0, 0.0
    return last, (last - first) / (now - began) if now > began else math.nan


def _metric(metrics: Mapping[str, float]) -> str:
    """Return the distance that the study measures, or else the first metric, as text."""
    names = [name for name in metrics if not name.endswith(OF_A_METRIC)]
    distances = [name for name in names if name == "fid" or name.startswith("fd_")]
    # Prefers fd_digits to fd_digits_floor.
    name = min(distances, key=len) if distances else next(iter(names), "")
    return f"{metric_name(name)} {number(metrics[name])}" if name else ""


def _shorten(line: str, folder: Path) -> str:
    """Return one short line without the cell's folder, which the reader knows."""
    line = one_line(line).replace(f"{folder}{os.sep}", "").replace(f"{folder} ", "")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def status_text(states: Sequence[State], failed: bool = False) -> str:
    """Return one line per cell, or per failed cell with `failed`, and the totals of all."""
    rows = [["cell", "run", "state", "step", "rate", "left", ""]]
    for each in states:
        if failed and each.stage != FAILED:
            continue
        trains = each.stage == RUNNING and 0 < each.step < each.cell.config.train.steps
        steps = f"{each.step}/{each.cell.config.train.steps}" if each.stage != NOT_RUN else ""
        rate = f"{each.rate:.3g}/s" if trains and each.rate > 0 else ""
        left = clock(each.left) if rate else ""
        words = [str(each.cell.number), each.cell.name, each.stage, steps, rate, left, each.words]
        rows.append(words)
    lines = aligned(rows, [True, False, False, True, True, True, False])
    return "\n".join([*lines, totals(states)])


def totals(states: Sequence[State]) -> str:
    """Summarize: '9 cells: 4 done, 5 not run; 61 % of the training is done, 0:34 left of it'."""
    counts = Counter(each.stage for each in states)
    parts = ", ".join(f"{counts[name]} {name}" for name in _STATES if counts[name])
    work = sum(each.cell.training_gflops for each in states)
    done = sum(each.cell.training_gflops * each.share for each in states)
    speed = sum(
        each.cell.training_gflops * each.rate / each.cell.config.train.steps
        for each in states
        if each.stage == RUNNING and each.rate > 0 and each.left > 0
    )
    line = f"{len(states)} cells: {parts}; {100 * done / work:.0f} % of the training is done"
    if done < work and speed > 0:
        line += f", {clock((work - done) / speed)} left of it at the current rate"
    return line


def plan_text(states: Sequence[State]) -> str:
    """Return what would run: one line per cell with its cost, and the totals."""
    titles = ["cell", "run", "model", "parameters", "Gflops", "training Gflops", "state"]
    rows = [titles]
    for each in states:
        cell = each.cell
        words = [str(cell.number), cell.name, cell.model, f"{cell.params:,}"]
        rows.append([*words, f"{cell.gflops:.4g}", f"{cell.training_gflops:.4g}", each.stage])
    left = [each for each in states if each.stage != DONE]
    lines = aligned(rows, [True, False, False, True, True, True, False])
    work = [sum(each.cell.training_gflops for each in some) for some in (states, left)]
    return "\n".join(
        [
            *lines,
            f"{len(states)} cells, {len(left)} to run: {work[1]:.4g} of {work[0]:.4g} training"
            " Gflops (multiply-accumulates; each image takes 3 forward passes)",
        ]
    )
