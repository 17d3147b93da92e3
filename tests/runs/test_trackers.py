"""Trackers: fed beside a run, which they can neither stop nor delay."""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ditjax import config
from ditjax.errors import UserError
from ditjax.runs import trackers
from ditjax.runs.log import MetricsLog
from ditjax.runs.trackers import FedAside, check_tracker, open_tracker
from tests.toys import tracker as toy

NAME = "tests.toys.tracker.Kept"
RUN = trackers.TrackedRun(Path("run"), "id", {})
SECRET = "hf_" + "a" * 30


def tracked(folder, name=NAME, step=0):
    return MetricsLog(folder, step, tracker=open_tracker(name, folder, {"data": {"name": SECRET}}))


def steps(folder):
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_tracker_is_given_the_numbers_in_order_and_one_id_for_all_starts(tmp_path, monkeypatch):
    opened: list[toy.Kept] = []
    monkeypatch.setattr(toy, "OPENED", opened)
    with tracked(tmp_path) as log:
        log.scalars(1, {"loss": 0.5, "word": "x", "bad": [1]})
        log.image(1, "samples", np.zeros((2, 3, 3), np.uint8))
        log.scalars(2, {"loss": 0.25})
    with tracked(tmp_path, step=1) as log:
        log.scalars(2, {"loss": 0.25})
    first, second = opened
    assert first.rows == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert first.pictures == [(1, "samples", (2, 3, 3))]
    assert first.closed
    assert second.closed
    assert first.run.id == second.run.id
    assert first.run.name == tmp_path.name
    assert first.run.recipe == {"data": {"name": "***"}}
    assert steps(tmp_path) == [1, 2]
    with tracked(tmp_path / ".." / "other"):
        pass
    assert opened[2].run.id != first.run.id


class Lost(toy.Kept):
    """One whose connection is lost at step 2, and which would end the process at its end."""

    def scalars(self, step, values):
        if step >= 2:
            raise ConnectionError(f"no route to host; token={SECRET}")
        super().scalars(step, values)

    def close(self):
        raise SystemExit(1)


def test_a_lost_connection_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    with MetricsLog(tmp_path, 0, tracker=FedAside("mine", lambda: Lost(RUN))) as log:
        for step in range(1, 5):
            log.scalars(step, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [
        "tracker mine: no route to host; token=***; the run goes on, and its metrics.jsonl has"
        " every line",
        "tracker mine: no route to host; token=***; values that it did not take: 3",
    ]


def test_one_that_cannot_be_opened(tmp_path, capsys):
    def fail():
        raise OSError("no such project")

    with MetricsLog(tmp_path, 0, tracker=FedAside("mine", fail)) as log:
        log.scalars(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("tracker mine: no such project; the run goes on")
    assert last.endswith("no such project; values that it did not take: 1")


def test_one_that_hangs_delays_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "PENDING", 2)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    entered, never = threading.Event(), threading.Event()

    class Hanging(toy.Kept):
        def scalars(self, step, values):
            entered.set()
            never.wait()

    with MetricsLog(tmp_path, 0, tracker=FedAside("mine", lambda: Hanging(RUN))) as log:
        log.scalars(1, {"loss": 1.0})
        entered.wait()
        began = time.monotonic()
        for step in range(2, 7):  # two of them wait, three are left out
            log.scalars(step, {"loss": 1.0})
        assert time.monotonic() - began < 15
    said = capsys.readouterr().err
    never.set()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert said.splitlines() == [
        "tracker mine: it does not answer; the run goes on, and its metrics.jsonl has every line",
        "tracker mine: it does not answer; values that it did not take: 6",
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'ditjax\[{name}\]', or set"):
        check_tracker(name)


def test_names():
    check_tracker("none")
    check_tracker(NAME)
    with pytest.raises(UserError, match=r"train.tracker: 'wandbb': .* Did you mean 'wandb'"):
        config.read({"train": {"tracker": "wandbb"}})


def test_wandb_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="no wandb: pip install 'ditjax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    check_tracker("wandb")
    for step in (0, 1):
        with tracked(tmp_path, "wandb", step) as log:
            log.scalars(step + 1, {"loss": 0.5})
            log.image(step + 1, "samples", np.zeros((8, 8, 3), np.uint8))
    assert "did not take" not in capsys.readouterr().err
    written = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    ids = json.loads((tmp_path / "tracker.json").read_text())
    assert len(written) == 2
    assert {path.stem for path in written} == {f"run-{ids['wandb']}"}
    for path in (tmp_path / "wandb").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    assert b"loss" in written[0].read_bytes()


def test_wandb_without_a_key(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="no wandb: pip install 'ditjax[wandb]'")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no key of it: run `wandb login`, or set WANDB_MODE"):
        check_tracker("wandb")


def test_trackio_on_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="no trackio: pip install 'ditjax[trackio]'")
    check_tracker("trackio")
    for step in (0, 1):
        with tracked(tmp_path / "run", "trackio", step) as log:
            log.scalars(step + 1, {"loss": 0.5})
    assert "did not take" not in capsys.readouterr().err
    runs = trackio.Api().runs("ditjax")
    ids = json.loads((tmp_path / "run" / "tracker.json").read_text())
    assert [run.name for run in runs] == [f"run-{ids['trackio']}"]
