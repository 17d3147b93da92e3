"""Runs on gs:// give what they give on a disk, also when they are killed and resumed."""

import json
import random
from pathlib import Path

import pytest

from ditjax import evaluate, train
from ditjax.errors import UserError
from ditjax.files import store
from ditjax.runs.results import read_metrics
from tests.commands.conftest import TINY
from tests.faults.harness import Battery
from tests.stores import battery

pytestmark = pytest.mark.parametrize("server", ["gs"], indirect=True)


def timeless(workdir: Path) -> list[dict[str, float]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_and_its_scores_are_those_of_a_disk(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DITJAX_DATA", str(tmp_path / "data"))
    here = tmp_path / "run"
    for workdir in (root, here):
        assert train.main([*TINY, f"--workdir={workdir}"]) == 0
        assert evaluate.main([f"--workdir={workdir}"]) == 0
    assert timeless(root) == timeless(here)
    ours, theirs = (json.loads((x / "evaluation.json").read_text()) for x in (root, here))
    assert ours["metrics"] == theirs["metrics"]
    assert ours["protocol_hash"] == theirs["protocol_hash"]
    names = {path.name for path in root.iterdir() if "tfevents" not in path.name}
    expected = {path.name for path in here.iterdir() if "tfevents" not in path.name}
    assert {name for name in names if name[0] != "."} == expected
    assert train.main([*TINY, f"--workdir={root}"]) == 0  # nothing is left to do


def test_a_damaged_checkpoint_is_set_aside(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DITJAX_DATA", str(tmp_path / "data"))
    flags = [*TINY, "--config.train.keep_checkpoints=2", f"--workdir={root}"]
    train.main(flags)
    (root / "checkpoints" / "20" / "digests" / "metadata").write_text('{"state": ')
    train.main(flags)
    assert "checkpoint 20" in capsys.readouterr().err
    assert (root / "checkpoints" / "20" / "commit_success.txt").is_file()  # saved again from 10
    store.remove_tree(root / "checkpoints")
    with pytest.raises(UserError, match=r"does not exist: train first"):
        evaluate.main([f"--workdir={root}"])


def test_a_killed_run_loses_nothing(server, tmp_path):
    with Battery(tmp_path) as started:
        lost, how = battery.trial(started, random.Random(0), 0)
    assert lost <= 2 * 4, how
