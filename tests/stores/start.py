"""Seconds from a command to its first step, on a disk and on gs://: `python -m tests.stores.start`.

The digits demo, its data prepared and its programs compiled before. Disk and store alternate, so
that a ratio compares neighbours in time. The server is fake-gcs-server on loopback, on the same
cores: the store's figure has its work in it, and no network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.stores.servers import BUCKET, google, set_in_environment

BAR = 1.1  # times as long as on a disk


def seconds_to_first_step(workdir: str) -> float:
    """Start a run in a new directory, and end it when it has logged its first step."""
    command = [sys.executable, "-m", "ditjax.train", "--config=digits", f"--workdir={workdir}"]
    began = time.monotonic()
    with subprocess.Popen(
        [*command, "--config.train.log_every_steps=1"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("train "):
                took = time.monotonic() - began
                process.kill()
                return took
    raise RuntimeError("".join(said[-20:]))


def main() -> int:
    """Print the medians and their ratio. Returns 1 if it is above the bar."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        google() as environment,
        set_in_environment({**environment, "JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache"}),
    ):
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        roots = {"disk": str(Path(scratch) / "runs"), "gs://": f"gs://{BUCKET}/start"}
        found: dict[str, list[float]] = {name: [] for name in roots}
        for trial in range(-1, args.trials):  # the first one compiles, and is not counted
            for name, root in list(roots.items())[:: -1 if trial % 2 else 1]:
                took = seconds_to_first_step(f"{root}/{trial + 1}")
                if trial >= 0:
                    found[name].append(took)
    ratio = median(found["gs://"]) / median(found["disk"])
    for name, values in found.items():
        print(f"{name:6} {median(values):6.2f} s (of {', '.join(f'{v:.2f}' for v in values)})")
    print(f"ratio  {ratio:6.3f}, at most {BAR}")
    return int(ratio > BAR)


if __name__ == "__main__":
    sys.exit(main())
