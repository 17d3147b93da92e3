"""Clips through the commands: trained, drawn into files, and scored."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditjax import evaluate, sample, train
from ditjax.reporting.samples import data_uri
from ditjax.runs.results import read_record_scores

TINY = (
    "--config=small/video",
    "--config.model.size=2x16x2",
    "--config.data.name=moving_digits/20",
    "--config.train.steps=2",
    "--config.train.batch_size=8",
    "--config.optim.warmup_steps=0",
    "--config.sample.sampler=ddim",
    "--config.sample.steps=2",
    "--config.sample.batch_size=16",
    "--config.evaluate.num_samples=16",
    "--config.evaluate.val_loss_num=8",
)


def test_clips_are_trained_drawn_and_scored(own_data, tmp_path):
    run = str(tmp_path / "run")
    assert train.main([*TINY, f"--workdir={run}"]) == 0

    assert sample.main([f"--workdir={run}", "--num=3", "--classes=1,2,3"]) == 0
    drawn = tmp_path / "run" / "drawn"
    with np.load(drawn / "samples.npz") as file:
        found = file["arr_0"]
    assert (found.shape, found.dtype) == ((3, 8, 16, 16, 1), np.uint8)
    # A row of its frames for each clip, pixels twice as large; and the grid in motion.
    assert Image.open(drawn / "samples.png").size == (2 * (8 * 16 + 7), 2 * (3 * 16 + 2))
    moving: Any = Image.open(drawn / "samples.gif")
    assert (moving.size, moving.n_frames) == ((2 * (3 * 16 + 2), 2 * 16), 8)
    assert data_uri(found).startswith("data:image/gif;base64,")

    assert evaluate.main([f"--workdir={run}", f"--out={tmp_path / 'scores.json'}"]) == 0
    record = json.loads((tmp_path / "scores.json").read_text())
    pairs = read_record_scores(tmp_path / "run", record["protocol_hash"])
    assert pairs["val_loss"].mean() == pytest.approx(record["metrics"]["val_loss"], rel=1e-5)
    assert {"fd_clips", "motion_error", "identity", "accuracy", "val_loss"} <= set(
        record["metrics"]
    )
    assert record["protocol"]["metric"] == "FD-clips"
    assert record["protocol"]["frames"] == [8, 1]
