"""The rows of the battery, and how their trials are run and told."""

import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import inputs, studies, training
from tests.faults.harness import Battery, LostError, Outcome, Trial


@dataclass(frozen=True)
class Row:
    """One fault: its number in the table of faults, its name, and how it is tried."""

    number: int
    fault: str
    run: Callable[[Trial], Outcome]
    quick: Sequence[int] = (0,)  # the trials that ordinary tests make; none if they have their own

    @property
    def name(self) -> str:
        return self.run.__name__


ROWS = (
    Row(1, "SIGKILL in a step", training.killed_mid_step),
    Row(2, "SIGKILL while a checkpoint is written", training.killed_while_saving),
    Row(3, "SIGTERM, one process", training.terminated, ()),
    Row(3, "SIGTERM, two processes", training.terminated_pair),
    Row(4, "a second SIGTERM, or the grace ends", training.out_of_grace),
    Row(5, "a checkpoint's files damaged", training.damaged_checkpoint),
    Row(6, "disk full", training.full_disk),
    Row(7, "damaged records or images", inputs.damaged_records, (1,)),
    Row(8, "NaN in a batch", training.poisoned, ()),
    Row(9, "devices and shapes that do not divide", inputs.illegal_mesh),
    Row(10, "recipes that cannot be", inputs.illegal_recipe),
    Row(11, "weights that do not fit", inputs.other_weights),
    Row(12, "weights that run code", inputs.running_weights),
    Row(13, "a sweep killed, parent or cell", studies.killed_sweep, ()),
    Row(14, "two sweeps in one directory", studies.two_sweeps),
    Row(15, "one of two processes killed or stopped", training.peer_lost, ()),
    Row(16, "other devices: 8 to 1, 1 to 2x2x2", training.other_mesh, ()),
    Row(17, "a torn line in a log", training.torn_log),
    Row(18, "SIGKILL while fine-tuning with LoRA", training.killed_finetuning, ()),
)


@dataclass
class Tally:
    """What came of a row's trials."""

    row: Row
    trials: int = 0
    survived: int = 0
    steps_lost: int = 0
    lost: list[str] = field(default_factory=list)  # what, of each trial that was not survived
    notes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # with what other rows use, too, when this row is the first to ask

    def told(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "row": self.row.number,
            "fault": self.row.fault,
            "trials": self.trials,
            "survived": self.survived,
            "steps_lost": self.steps_lost,
            "lost": self.lost,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
        }


def attempt(battery: Battery, row: Row, number: int, seed: int) -> Outcome:
    """One trial, the same for the same numbers but for what a clock decides."""
    return row.run(Trial(battery, random.Random(f"{seed} {row.name} {number}"), number))


def run(
    battery: Battery,
    rows: Iterable[Row],
    trials: int,
    seed: int,
    jobs: int,
    tell: Callable[[Tally], None],
) -> list[Tally]:
    """All trials of all rows, row after row, `jobs` at once; `tell` hears of each row."""
    tallies = []
    with ThreadPoolExecutor(jobs) as pool:
        for row in rows:
            tally, lock = Tally(row), threading.Lock()
            used = battery.zygote.used()
            tallies.append(tally)

            def one(number: int, tally: Tally = tally, lock: threading.Lock = lock) -> None:
                began = time.monotonic()
                try:
                    outcome = attempt(battery, tally.row, number, seed)
                    lost = ""
                except Exception as error:
                    outcome = Outcome()
                    lost = f"trial {number}: {str(error) or type(error).__name__}"
                with lock:
                    tally.trials += 1
                    tally.seconds += time.monotonic() - began
                    if lost:
                        tally.lost.append(lost)
                        return
                    tally.survived += 1
                    tally.steps_lost = max(tally.steps_lost, outcome.steps_lost)
                    if outcome.note:
                        tally.notes[outcome.note] = tally.notes.get(outcome.note, 0) + 1

            futures = [pool.submit(one, number) for number in range(trials)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                battery.close()  # what still waits for a child then hears of its end
                raise
            tally.cpu_seconds = battery.zygote.used() - used
            tell(tally)
    return tallies


BROKEN_TRIALS = (0, 12, 1, 24, 13, 2)  # not every trial meets what is broken
HEAD = f"{'row':>3}  {'fault':<40} {'trials':>6} {'survived':>8} {'steps lost':>10}  anything lost"


def line(tally: Tally) -> str:
    """A row of the printed table."""
    what = "nothing" if not tally.lost else f"{len(tally.lost)}: {tally.lost[0]}"
    return (
        f"{tally.row.number:>3}  {tally.row.fault:<40} {tally.trials:>6} {tally.survived:>8}"
        f" {tally.steps_lost:>10}  {what[:200]}"
    )


def untested(battery: Battery, rows: Iterable[Row], seed: int) -> list[str]:
    """Rows that say nothing of a product that is broken where they look: there must be none."""
    silent = []
    for row in rows:
        battery.breaks = row.name
        for number in BROKEN_TRIALS:
            try:
                attempt(battery, row, number, seed)
            except LostError as lost:
                print(f"{row.number:>3}  {row.name}: {lost}", flush=True)
                break
        else:
            silent.append(row.name)
    return silent


def clean(root: Path, failed: bool) -> None:
    """Removes the directories of a battery; of one that lost something they stay, to be read."""
    if failed:
        print(f"what was lost is in {root}", file=sys.stderr)
    else:
        shutil.rmtree(root, ignore_errors=True)
