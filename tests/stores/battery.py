"""Runs on gs:// that are killed by SIGKILL: `python -m tests.stores.battery --trials=50`.

The oracle is that of `tests/faults`: nothing is lost if the union of the steps over all restarts
is an unbroken run's, bit for bit. The unbroken run is on a disk, so that a store must also give the
same results. A third of the trials is killed at a random moment of a save.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from ditjax.files import store
from tests.faults import harness
from tests.faults.harness import INTERVAL, STEPS, Battery, LostError, Run, check
from tests.stores.servers import BUCKET, google, set_in_environment


class StoreRun(Run):
    """A run whose directory is on the store; what its processes say is on this machine."""

    @property
    def workdir(self) -> Path:
        return store.place(f"gs://{BUCKET}/{self.folder.name}")


def judge(run: Run, reference: Run) -> int:
    """The most steps that a restart lost; LostError for anything that should not be lost."""
    lost = harness._judge_process(
        [children[0] for children in run.starts], reference.starts[0][0], 0.0, INTERVAL
    )
    harness.check_epochs(run)
    harness._check_log(run, reference, 0.0)
    steps = sorted(
        int(path.name)
        for path in run.checkpoints.iterdir()
        if (path / "commit_success.txt").is_file()
    )
    names = sorted(int(path.name) for path in run.checkpoints.iterdir())
    check(names == steps, f"torn checkpoints were left: {names}, whole are {steps}")
    check(steps == harness.saved(reference.checkpoints), f"checkpoints {steps}")
    left = [path.name for path in run.workdir.iterdir() if path.name == "metrics"]
    check(not left, "parts of the log were left")
    return lost


def trial(battery: Battery, rng: random.Random, number: int) -> tuple[int, str]:
    """Kill a run once or twice, finish it, and judge. Returns (steps lost, how it was killed)."""
    reference = battery.unbroken()
    run = StoreRun(battery, battery.folder("store"), "1")
    how = []
    for _ in range(rng.choice((1, 1, 2))):
        (child,) = run.start(pace=0.05)
        if number % 3 == 0:
            step = INTERVAL * rng.randint(1, STEPS // INTERVAL)
        else:
            step = rng.randint(1, STEPS - 1)
        child.until(lambda child=child, step=step: child.last() >= step, f"step {step}")  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.6))
        child.kill(signal.SIGKILL)
        child.wait()
        folders = [path for path in run.checkpoints.iterdir() if path.name.isdecimal()]
        torn = any(not (path / "commit_success.txt").is_file() for path in folders)
        how.append(f"at step {child.last()}{', a save cut in two' if torn else ''}")
    run.finish()
    return judge(run, reference), "; ".join(how)


def main() -> int:
    """Print a line a trial, and the totals."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    args = parser.parse_args()
    failed, most, torn = 0, 0, 0
    with (
        tempfile.TemporaryDirectory() as root,
        google() as environment,
        set_in_environment(environment),
        Battery(Path(root)) as battery,
    ):
        for number in range(args.first, args.first + args.trials):
            began = time.monotonic()
            try:
                lost, how = trial(battery, random.Random(f"{args.seed} {number}"), number)
                most, torn = max(most, lost), torn + how.count("cut in two")
                words = f"{lost} steps repeated, killed {how}"
            except (LostError, OSError, ValueError) as error:
                failed += 1
                words = f"LOST: {error}"
            print(f"{number:3} {time.monotonic() - began:5.1f} s {words}", flush=True)
    print(json.dumps({"trials": args.trials, "lost": failed, "most": most, "torn": torn}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
