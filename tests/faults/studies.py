"""Rows 13 and 14: sweeps that are killed, and two in one directory."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.faults.harness import DIT, Battery, Child, Outcome, Trial, check, files

CELLS = ("DiT-1x32x2-p4-seed0", "DiT-1x32x2-p8-seed0")
SWEEP = (
    *DIT,
    "--config.sweep.grid=(('model.size',('1x32x2',)),('model.patch',(4,8)))",
    "--config.evaluate.guided_scale=0.0",
)
# What a result says of the machine's clock, not of the cell.
_CLOCK = ("seconds", "date", "command")


def _sweep(battery: Battery, folder: Path, *more: str) -> Child:
    """The sweep of folder/study, as it is typed."""
    # On 8 devices: what it compiles is compiled for other tests, too.
    words = ("sweep", *SWEEP, f"--workdir={folder / 'study'}", *more)
    return battery.command(folder, *words, devices=8)


def _results(study: Path) -> dict[str, Any]:
    """What each cell found, without its clock."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(v) for key, v in value.items() if not key.endswith(_CLOCK)}
        return value

    return {
        cell: timeless(json.loads((study / "runs" / cell / "result.json").read_text()))
        for cell in CELLS
        if (study / "runs" / cell / "result.json").exists()
    }


def unbroken_study(battery: Battery) -> Path:
    """A sweep of two cells that nothing disturbed."""

    def make() -> Path:
        battery.unbroken()
        folder = battery.folder("study")
        child = _sweep(battery, folder)
        check(child.wait() == 0, child.said()[-500:])
        return folder / "study"

    return battery.once("study", make)


def _cell_process(parent: Child) -> int:
    """The id of a process that the sweep started for a cell; 0 for none yet."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            mine = int(stat.rpartition(")")[2].split()[1]) == parent.pid
            if mine and any(word.startswith(b"--index=") for word in words):
                return int(entry.name)
    return 0


def killed_sweep(trial: Trial) -> Outcome:
    """Row 13: the first cell is done; parent or child is killed somewhere in the second."""
    whole = unbroken_study(trial.battery)
    folder = trial.battery.folder("sweep")
    study = folder / "study"
    shutil.copytree(whole, study)
    shutil.rmtree(study / "report", ignore_errors=True)
    done, hurt = trial.rng.sample(CELLS, 2)
    shutil.rmtree(study / "runs" / hurt)
    untouched = files(study / "runs" / done)
    parent = _sweep(trial.battery, folder)
    log = study / "runs" / hurt / "metrics.jsonl"
    began = trial.rng.random() < 0.8  # otherwise while it starts
    parent.until(log.exists if began else (study / "runs" / hurt).exists, "the second cell")
    trial.pause(2.0)
    child = _cell_process(parent)
    number, who = trial.rng.choice(
        ((signal.SIGKILL, "parent"), (signal.SIGKILL, "cell"), (signal.SIGTERM, "parent"))
    )
    if who == "parent":
        parent.kill(number)
    elif child:
        os.kill(child, number)
    status = parent.wait()
    check(status != 0 or not child or who == "parent", "a cell was killed and the sweep says 0")
    again = _sweep(trial.battery, folder)
    status = again.wait()
    check(status == 0, f"status {status} of the same command again: {again.said()[-300:]!r}")
    after = files(study / "runs" / done)
    touched = [name for name in untouched if after.get(name) != untouched[name]]
    check(not touched, f"the finished cell's {', '.join(touched[:3])} changed")
    check(_results(study) == _results(whole), "a result is not the unbroken sweep's")
    expected = (whole / "report" / "table.csv").read_text()
    table = (study / "report" / "table.csv").read_text()
    check(_timeless(table) == _timeless(expected), "the table is not the unbroken sweep's")
    stray = [p for p in study.rglob("*") if re.search(r"tmp|partial", p.name)]
    check(not stray, f"left behind: {', '.join(map(str, stray[:3]))}")
    return Outcome(0, f"{who} by {signal.Signals(number).name}")


def _timeless(table: str) -> list[list[str]]:
    """A CSV table without its seconds, and without where it lies."""
    head, *rows = (line.split(",") for line in table.splitlines())
    kept = [i for i, name in enumerate(head) if "seconds" not in name and name != "folder"]
    return [[row[i] for i in kept if i < len(row)] for row in (head, *rows)]


def two_sweeps(trial: Trial) -> Outcome:
    """Row 14: the second is refused, naming the holder; every other first comes to its table."""
    ends = trial.number % 2 == 1
    folder = trial.battery.folder("two")
    study = folder / "study"
    hurt = trial.rng.choice(CELLS) if ends else CELLS[0]
    if ends:
        whole = unbroken_study(trial.battery)
        shutil.copytree(whole, study)
        shutil.rmtree(study / "runs" / hurt)
    first = _sweep(trial.battery, folder)
    first.until((study / "runs" / hurt).exists, "the first sweep's cell")
    trial.pause(1.0)
    second = _sweep(trial.battery, folder)
    status = second.wait()
    check(status == 2, f"status {status} of the second: {second.said()[-300:]!r}")
    check(str(first.pid) in second.error(), f"the holder is not named: {second.error()!r}")
    check(first.status is None, "the first ended before the second was refused")
    if not ends:
        first.kill(signal.SIGTERM)
        first.wait()
        return Outcome(0, "refused")
    status = first.wait()
    check(status == 0, f"status {status} of the first: {first.said()[-300:]!r}")
    logs = [(root / "runs" / hurt / "metrics.jsonl").read_text() for root in (study, whole)]
    steps = [re.findall(r'"step": (\d+)', text) for text in logs]
    check(steps[0] == steps[1], "two wrote the cell's log")
    check(_results(study) == _results(whole), "a result is not the unbroken sweep's")
    return Outcome(0, "refused, and the first ended well")
