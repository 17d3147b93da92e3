"""How a study stands, in each of its states, and that looking changes nothing."""

import json
import math
import os
import signal
import time

import pytest

from ditjax import sweep
from ditjax.cli import load_recipe
from ditjax.errors import StoppedError, UserError
from ditjax.files import lease
from ditjax.files.lease import Holder, Lease
from ditjax.runs import rundir
from ditjax.runs.results import write_result
from ditjax.studies import status
from ditjax.studies.cells import cells
from tests.commands.conftest import TINY
from tests.runs.test_results import a_result

WORDS = [*TINY, "--config.sweep.grid=(('model.patch',(4,8)),)", "--config.sweep.seeds=(0,1,2,3)"]


@pytest.fixture(scope="module")
def study():
    return cells(load_recipe(WORDS))


@pytest.fixture
def folder(tmp_path, study):
    """Of the first cell."""
    path = tmp_path / "runs" / study[0].name
    path.mkdir(parents=True)
    return path


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def seen(study, tmp_path, **flags):
    before = contents(tmp_path)
    states = status.read_states(study, tmp_path, **flags)
    assert contents(tmp_path) == before, "looking changed something"
    return states


def log(folder, *rows):
    lines = [json.dumps(dict(zip(("step", "seconds", "loss"), row, strict=False))) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def done(root, cell, **changes):
    result = a_result(run=cell.name, config=cell.recipe, **changes)
    result["train"]["steps"] = cell.config.train.steps
    write_result(root / "runs" / cell.name, result)


def test_nothing_is_there(study, tmp_path):
    states = seen(study, tmp_path / "none")
    assert {(each.stage, each.step, each.words) for each in states} == {("not run", 0, "")}
    assert status.totals(states) == "8 cells: 8 not run; 0 % of the training is done"


def test_done_says_its_distance(study, tmp_path):
    done(tmp_path, study[0], metrics={"accuracy": 0.9, "fd_x_floor": 1, "fd_x": 4.25})
    done(tmp_path, study[1], metrics={"psnr": 30.0})
    first, second, *rest = seen(study, tmp_path)
    assert (first.stage, first.step, first.words) == ("done", 20, "fd x 4.25")
    assert (second.stage, second.words) == ("done", "psnr 30.0")
    assert {each.stage for each in rest} == {"not run"}


def test_running_says_how_fast_and_where(study, tmp_path, folder):
    held = Lease(folder / lease.FILE, "the cell")
    try:
        (state,) = seen(study[:1], tmp_path)
        assert (state.stage, state.step) == ("running", 0)
        assert state.words.startswith("starts, process")
        log(folder, (5, 40.0), (10, 41.0), (15, 42.0))
        (state,) = seen(study[:1], tmp_path)
        assert (state.step, state.rate, state.left) == (15, 5.0, 1.0)  # compiling left out
        assert f"process {os.getpid()} on " in state.words
        line = status.status_text([state]).splitlines()[1]
        assert line.split()[2:7] == ["running", "15/20", "5/s", "0:01", "process"]
        log(folder, (10, 41.0), (20, 43.0))
        (state,) = seen(study[:1], tmp_path)
        assert state.words.startswith("evaluates, process")
    finally:
        held.release()


def test_a_holder_on_another_machine_is_told_by_its_lease_moving(
    study, tmp_path, folder, monkeypatch
):
    file = folder / lease.FILE
    holder = Holder("far", "elsewhere", 7, "1", "then", "token")

    def move(turn):
        file.write_text(json.dumps({**holder._asdict(), "turn": f"{turn:012}"}) + "\n")

    move(0)
    (folder / "log.txt").write_text("trains\n")
    (state,) = status.read_states(study[:1], tmp_path)
    assert (state.stage, state.words) == ("running", "starts, process 7 on far, since then")
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.05)
    (state,) = status.read_states(study[:1], tmp_path, waits=True)
    assert state.stage == "failed"
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 5.0)
    monkeypatch.setattr("time.sleep", lambda _: move(1))
    (state,) = status.read_states(study[:1], tmp_path, waits=True)
    assert state.stage == "running"


def test_failed_and_stopped_say_why(study, tmp_path, folder):
    log(folder, (5, 1.0))
    status.record_ending(folder, status.FAILED, "no\nroom\x1b[2J")
    (state,) = seen(study[:1], tmp_path)
    assert (state.stage, state.step, state.words) == ("failed", 5, r"no room\x1b[2J")
    status.record_ending(folder, status.STOPPED, "stopped at step 5 by SIGTERM")
    assert seen(study[:1], tmp_path)[0].stage == "stopped"
    status.clear_ending(folder)
    (folder / "log.txt").write_text("trains\nKilled\n\n")
    (state,) = seen(study[:1], tmp_path)
    assert state.stage == "failed"
    assert state.words == "ended without a message; its log: Killed"
    for text in ("{", "[]", '{"how": "done", "line": ""}'):
        (folder / rundir.ENDED_FILE).write_text(text)
        assert seen(study[:1], tmp_path)[0].words == state.words, "no ending of ours"


def test_a_cell_told_to_stop_in_its_evaluation_has_stopped(study, tmp_path, folder, monkeypatch):
    def told(cell, folder):
        log(folder, (20, 2.0, 0.5))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(sweep, "_train_and_evaluate", told)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(
            StoppedError, match="stopped by SIGTERM: run the same command again to resume"
        ):
            sweep.run_cell(study[0], tmp_path)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    (state,) = seen(study[:1], tmp_path)
    assert (state.stage, state.words) == (
        "stopped",
        "stopped by SIGTERM: run the same command again to resume",
    )


def test_a_cell_of_a_sweep_that_lives_starts(study, tmp_path, folder):
    (folder / "log.txt").write_text("")
    states = seen(study[:1], tmp_path)
    assert states[0].stage == "failed"
    status.record_failures(states, tmp_path)  # as the sweep does before it begins
    held = Lease(tmp_path / sweep.LEASE, "the study")
    try:
        assert seen(study[:1], tmp_path)[0].stage == "failed"
        status.clear_ending(folder)  # as it does when it starts the cell
        assert seen(study[:1], tmp_path)[0].stage == "running"
    finally:
        held.release()


def test_results_that_are_none(study, tmp_path):
    done(tmp_path, study[0])
    path = tmp_path / "runs" / study[0].name / "result.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    other = study[1]._replace(recipe={**study[1].recipe, "data": {"name": "other"}})
    done(tmp_path, other)
    first, second = seen(study[:2], tmp_path)
    assert first.stage == second.stage == "failed"
    assert first.words.startswith("result.json is not whole JSON")
    assert second.words.startswith("holds a run with data.")
    status.record_failures([first, second], tmp_path)
    assert not list(tmp_path.rglob(rundir.ENDED_FILE)), "what they hold says it"


def test_totals(study):
    cell, other = study[0], study[1]
    states = [
        status.State(cell, status.DONE, 20),
        status.State(other, status.RUNNING, 10, rate=0.5),
        status.State(study[2], status.FAILED, 0),
        status.State(study[3], status.STOPPED, 10),
    ]
    # 10 steps are left here, 30 elsewhere; all four cost the same.
    assert status.totals(states) == (
        "4 cells: 1 done, 1 running, 1 failed, 1 stopped; 50 % of the training is done, 1:20 left"
        " of it at the current rate"
    )
    assert math.isnan(states[2].left)
    lines = status.status_text(states, failed=True).splitlines()
    assert len(lines) == 3
    assert study[2].name in lines[1]
    assert lines[2] == status.totals(states)


def test_the_plan_has_its_totals(study):
    states = [status.State(cell, status.NOT_RUN) for cell in study]
    states[0] = states[0]._replace(stage=status.DONE)
    *_, last = status.plan_text(states).splitlines()
    work = [cell.training_gflops for cell in study]
    assert last.startswith(f"8 cells, 7 to run: {sum(work[1:]):.4g} of {sum(work):.4g} training")


def test_the_command_needs_no_recipe_and_the_directory_of_a_study(study, tmp_path, folder, capsys):
    with pytest.raises(UserError, match="holds no study that has begun"):
        sweep.main(["--status", f"--workdir={tmp_path}"])
    rundir.open_study(tmp_path, load_recipe(WORDS), {})
    done(tmp_path, study[0], metrics={"fd_digits": 4.25})
    before = contents(tmp_path)
    for words in ([], WORDS, ["--watch=1", "--cells=0"]):
        assert sweep.main(["--status", f"--workdir={tmp_path}", *words]) == 0
        out = capsys.readouterr().out
        assert f"   0  {study[0].name}  done" in out
        assert "FD-digits 4.25" in out
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match=r"holds a study with train\.batch_size=16"):
        sweep.main(["--status", f"--workdir={tmp_path}", *WORDS, "--config.train.batch_size=8"])
