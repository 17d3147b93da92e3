"""Time a report on 200 made-up runs: `python -m tests.reporting.many [--runs=200]`."""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ditjax import report
from ditjax.files.atomic import protocol_hash
from tests.reporting.conftest import write_plan
from tests.sample_files import save_samples

PATCHES = (8, 4, 2, 1)
SEEDS = 5
LINES = 400  # logged by a run, 20 of them evaluations


def write_many(root: Path, runs: int = 200, side: int = 32, lines: int = LINES) -> None:
    """Write models of 4 patches and 5 seeds with losses, evaluations and samples; 12 are absent."""
    (root / "runs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = root / "samples.npz"
    save_samples(samples, rng.integers(0, 256, (16, side, side, 3), np.uint8))
    names = []
    for number in range(runs):
        index, seed = divmod(number, SEEDS)
        names.append(_write_run(root / "runs", 2 + index // 4, PATCHES[index % 4], seed, lines))
        os.link(samples, root / "runs" / names[-1] / "samples.npz")
    names += [f"DiT-missing-{i}" for i in range(12)]
    write_plan(root, [(name, {}) for name in names], title=f"{runs} runs, made up")


def _write_run(root: Path, depth: int, patch: int, seed: int, lines: int) -> str:
    width, batch, tokens = 32 * depth, 16, (32 // patch) ** 2
    gflops = depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2) / 1e9
    noise = np.random.default_rng([depth, patch, seed]).normal(size=lines + 1)
    size, protocol = f"{depth}x{width}x{depth}", {"metric": "FD-digits", "num": 1000}

    def law(step: float, luck: float) -> float:
        return float(5 + 40 * gflops**-0.15 * step**-0.2 * math.exp(0.03 * luck))

    name = f"DiT-{size}-p{patch}-seed{seed}"
    distance = law(10 * lines, float(noise[-1]))
    result: dict[str, Any] = {
        "schema": 1,
        "run": name,
        "model": {
            "name": f"DiT-{size}/{patch}",
            "size": size,
            "depth": depth,
            "width": width,
            "heads": depth,
            "patch": patch,
            "block": "adaln_zero",
            "tokens": tokens,
        },
        "params": depth * 18 * width**2,
        "gflops": gflops,
        "train": {
            "steps": 10 * lines,
            "batch_size": batch,
            "images": 10 * lines * batch,
            "seconds": 60.0,
            "learning_rate": 1e-3,
            "final_loss": 0.1 * distance,
            "seed": seed,
        },
        "sample": {
            "num": 1000,
            "sampler": "ddim",
            "steps": 25,
            "eta": 1.0,
            "cfg_scale": 1.0,
            "cfg_channels": "all",
            "seed": 0,
            "seconds": 1.0,
        },
        "metrics": {
            "fd_digits": distance,
            "fd_digits_low": 0.9 * distance,
            "accuracy": 0.9,
            "val_loss": 0.01 * distance,
            "precision_digits": 0.6,
            "recall_digits": 0.7,
        },
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        "environment": {"command": "python -m ditjax.sweep --config=made_up.py", "jax": "0"},
        "config": {"seed": seed, "model": {"size": size, "patch": patch}},
    }
    folder = root / name
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    logged = []
    for i in range(1, lines + 1):
        line: dict[str, Any] = {"step": 10 * i, "loss": 0.1 * law(10 * i, float(noise[i]))}
        if i % max(1, lines // 20) == 0:
            line |= {"eval/fd_digits": law(10 * i, float(noise[i])), "eval/protocol_hash": "a" * 12}
        logged.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(logged) + "\n")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--side", type=int, default=32, help="pixels of the samples")
    parser.add_argument("--out", help="folder to keep the study in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(arguments.out or temporary) / "study"
        write_many(root, arguments.runs, arguments.side)
        wall, cpu = time.perf_counter(), time.process_time()
        summary = report.make_report([root], root / "report")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{len(summary.groups[0].runs)} runs: {wall:.1f} s ({cpu:.1f} s of a core),", end=" ")
        print(f"the page has {summary.page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
