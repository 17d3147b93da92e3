"""A synthetic study to report on, and a reader of the page."""

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ditjax import report
from ditjax.files.atomic import protocol_hash
from ditjax.runs.results import write_result
from tests.sample_files import save_samples

SIZES = ((2, 48, 2), (3, 72, 3), (4, 96, 3))
PROTOCOL = {"features": "digits", "num": 100}


def write_run(root, depth, width, heads, patch, seed=0, fd=None, **changes):
    """One run of a planted law FD = 0.2·Gflops^(-0.5)."""
    tokens = (8 // patch) ** 2
    gflops = depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2) / 1e9
    size = f"{depth}x{width}x{heads}"
    noise = np.random.default_rng([depth, patch, seed]).normal()
    result: Any = {
        "schema": 1,
        "run": f"DiT-{size}-p{patch}-seed{seed}",
        "model": {
            "name": f"DiT-{size}/{patch}",
            "size": size,
            "depth": depth,
            "width": width,
            "heads": heads,
            "patch": patch,
            "block": "adaln_zero",
            "tokens": tokens,
        },
        "params": depth * 18 * width**2,
        "gflops": gflops,
        "train": {
            "steps": 200,
            "batch_size": 8,
            "images": 1600,
            "seconds": 9.0,
            "learning_rate": 1e-3,
            "final_loss": 0.2,
            "seed": seed,
        },
        "sample": {
            "num": 100,
            "sampler": "ddim",
            "steps": 10,
            "eta": 0.0,
            "cfg_scale": 1.0,
            "cfg_channels": "all",
            "seed": 0,
            "seconds": 1.0,
        },
        "metrics": {
            "fd_digits": fd if fd is not None else 0.2 * gflops**-0.5 * math.exp(0.05 * noise),
            "accuracy": 0.9,
            "fd_digits_floor": 0.4,
        },
        "protocol": PROTOCOL,
        "protocol_hash": protocol_hash(PROTOCOL),
        "environment": {"command": "python -m ditjax.sweep --config=experiments/digits.py"},
        "config": {},
    } | changes
    folder = root / f"DiT-{size}-p{patch}-seed{seed}"
    write_result(folder, result)
    lines = [json.dumps({"step": s, "loss": 1 / s}) for s in range(1, 50)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    save_samples(folder / "samples.npz", np.full((12, 8, 8, 1), 16 * patch, np.uint8))
    return folder


def write_plan(root, cells, title="A study", **changes):
    """sweep.json, as a sweep writes it; `cells` are (name, changes)."""
    listed = [
        {
            "number": number,
            "name": name,
            "model": "DiT-9x96x3/1",
            "overrides": {},
            "params": 123456,
            "gflops": 0.5,
            "training_gflops": 9.0,
            "published": None,
        }
        | own
        for number, (name, own) in enumerate(cells)
    ]
    study = {"schema": 1, "title": title, "command": "python -m ditjax.sweep", "cells": listed}
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.json").write_text(json.dumps(study | changes))


def write_curves(folders, protocol="aaaa"):
    """Evaluations along training in each run's metrics.jsonl: 30·step^(-0.3)·Gflops^(-0.1)."""
    for folder in folders:
        gflops = json.loads((folder / "result.json").read_text())["gflops"]
        lines = [
            {
                "step": step,
                "loss": step**-0.1,
                "eval/fd_digits": 30 * step**-0.3 * gflops**-0.1,
                "eval/protocol_hash": protocol,
            }
            for step in range(10, 210, 10)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_study(root, seeds=(0,), **changes):
    return [
        write_run(root, *size, patch, seed, **changes)
        for size in SIZES
        for patch in (4, 2, 1)
        for seed in seeds
    ]


class Page(HTMLParser):
    """Tags with their attributes, the visible text, the cells of all tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.cells, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="session")
def study() -> SimpleNamespace:
    """Runs of 3 sizes by 3 patches, as a sweep would leave them."""
    return SimpleNamespace(
        sizes=SIZES,
        protocol=PROTOCOL,
        write_run=write_run,
        write=write_study,
        write_plan=write_plan,
        write_curves=write_curves,
    )


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    return Page


@pytest.fixture(scope="session")
def nine(study, tmp_path_factory):
    """The report on one seed of the study."""
    root = tmp_path_factory.mktemp("nine")
    study.write(root)
    return report.make_report([root], root / "report")


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Make reports without PNGs, which take most of their time, for tests of the rest."""
    monkeypatch.setattr(report, "pictures", lambda *_: {})
