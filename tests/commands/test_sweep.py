"""The grid: its cells, running them in processes, taking up again, and what fails."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditjax import sweep, train
from ditjax.cli import load_recipe
from ditjax.errors import StoppedError, UserError
from ditjax.files.lease import Lease
from ditjax.parallel import stopping
from ditjax.runs.results import find_results, read_result, write_result
from ditjax.studies import status
from ditjax.studies.cells import by_work, cells
from tests.commands.conftest import TINY, TOY
from tests.files.test_masking import SECRETS
from tests.runs.test_results import a_result
from tests.test_docs import check_command

ONE = "--config.sweep.grid=(('model.patch',(4,)),)"
GRID = "--config.sweep.grid=(('model.size',('1x32x2',)),('model.patch',(4,8)),('seed',(0,1)))"


def test_a_grid_that_cannot_run(tmp_path):
    for words, match in (
        (["--config.sweep.grid=()"], "is empty"),
        (["--config.sweep.grid=(('model.patch',(4,3)),)"], r"cell 1 .*patch is 3"),
        ([GRID, "--index=4"], "cells 0 to 3"),
        ([GRID, "--jobs=0"], "at least 1"),
        ([GRID, "--models=1x32x2/2"], r"no cell of this study .* Its models: 1x32x2/4, 1x32x2/8"),
        ([GRID, "--cells=4"], "cells 0 to 3"),
        ([GRID, "--shard=2/2"], "counted from 0"),
        ([GRID, "--index=1", "--shard=0/2"], "--index=1 runs one cell: leave --shard out"),
        ([GRID, "--index=1", "--dry_run"], "leave --dry_run out"),
        ([GRID, "--status", "--dry_run"], "--dry_run and --status exclude .* give one of them"),
        ([GRID, "--print_commands", "--dry_run"], "give one of them"),
        ([GRID, "--index=1", "--print_commands"], "leave --print_commands out"),
        ([GRID, "--watch=5"], "together with --status"),
        ([GRID, "--status", "--watch=0"], "1 to 86400 seconds"),
        ([GRID, "--distributed"], "train one cell in several processes"),
    ):
        with pytest.raises(UserError, match=match):
            sweep.main([*TINY, f"--workdir={tmp_path / 'study'}", *words])
    assert not (tmp_path / "study").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    assert sweep.main([*TINY, GRID, f"--workdir={tmp_path / 's'}", "--dry_run"]) == 0
    table = capsys.readouterr().out
    assert table.count("DiT-1x32x2-p") == table.count("not run") == 4
    assert "4 cells, 4 to run" in table
    assert sweep.main([*TINY, GRID, f"--workdir={tmp_path / 's'}", "--dry_run", "--cells=1-2"]) == 0
    assert capsys.readouterr().out.count("DiT-1x32x2-p") == 2
    assert not (tmp_path / "s").exists()


def test_commands_for_a_queue_are_one_line_a_cell(tmp_path, capsys, monkeypatch):
    workdir, read = tmp_path / "a study", status.read_states
    one_done = lambda *a: [  # noqa: E731
        each._replace(stage=status.DONE) if each.cell.number == 1 else each for each in read(*a)
    ]
    monkeypatch.setattr(status, "read_states", one_done)
    words = [*TINY, GRID, f"--workdir={workdir}", "--print_commands"]
    assert sweep.main([*words, "--cells=0-2"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    # What is more work comes first: patch 4 before 8.
    assert [line[-1] for line in lines] == ["--index=0", "--index=2"]
    for line in lines:
        assert line[:3] == ["python", "-m", "ditjax.sweep"]
        assert line[3:-1] == [*TINY, GRID, f"--workdir={workdir}"]
        check_command(["sweep", *line[3:]])
    assert not workdir.exists()


CELL = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[2]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("trains", flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_a_sweep_that_is_told_to_stop_tells_its_cells_and_waits_for_them(tmp_path, monkeypatch):
    saved = [tmp_path / "0", tmp_path / "1"]

    def start(cell, workdir, argv, cpus, told, logs):
        command = [sys.executable, "-S", "-c", CELL, "60", str(saved[cell.number])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        if cell.number == waiting[-1].number:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return sweep._Job(cell, process, cpus)

    waiting = by_work(cells(load_recipe([*TINY, GRID]))[:2])
    monkeypatch.setattr(sweep, "_start", start)
    with (
        pytest.raises(StoppedError, match="stopped by SIGTERM") as stopped,
        stopping.raise_on_sigterm(),
    ):
        sweep.run_cells(waiting, tmp_path, [], 2)
    assert stopped.value.status == 143
    assert [path.read_text() for path in saved] == ["saved", "saved"]
    assert [each.stage for each in status.read_states(waiting, tmp_path)] == ["stopped", "stopped"]


def test_a_cell_that_was_stopped_is_not_done(tmp_path, monkeypatch, capfd):
    def start(cell, workdir, argv, cpus, told, logs):
        process = subprocess.Popen([sys.executable, "-S", "-c", ""])
        return sweep._Job(cell, process, cpus)

    some = cells(load_recipe([*TINY, GRID]))[:1]
    monkeypatch.setattr(sweep, "_start", start)
    assert sweep.run_cells(some, tmp_path, [], 1) == some
    assert f"{some[0].name} stopped before its end" in capfd.readouterr().err
    assert status.read_states(some, tmp_path)[0].stage == "stopped"


def test_a_cell_that_was_killed_has_failed(tmp_path, monkeypatch, capfd):
    def start(cell, workdir, argv, cpus, told, logs):
        folder = workdir / "runs" / cell.name
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("trains\n")
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]
        )
        return sweep._Job(cell, process, cpus)

    some = cells(load_recipe([*TINY, GRID]))[:1]
    monkeypatch.setattr(sweep, "_start", start)
    assert sweep.run_cells(some, tmp_path, [], 1) == some
    assert f"{some[0].name} FAILED (status -9): trains" in capfd.readouterr().err
    (state,) = status.read_states(some, tmp_path)
    assert (state.stage, state.words) == ("failed", "ended by SIGKILL; its log: trains")


def test_machines_share_a_directory(tmp_path, monkeypatch, capfd):
    """Each runs its shard, under a lease of its own; what has failed is run by itself."""
    ran: list[list[int]] = []
    holds: list[str] = []

    def run(grid, workdir, argv, jobs, command):
        ran.append([cell.number for cell in grid])
        holds.extend(path.name for path in workdir.glob(status.LEASES))
        for cell in grid:
            if cell.number != breaks:
                write_result(
                    workdir / "runs" / cell.name, a_result(run=cell.name, config=cell.recipe)
                )
            else:
                status.record_ending(workdir / "runs" / cell.name, status.FAILED, "no luck")
        assert argv == [*TINY, GRID, f"--workdir={workdir}"]
        assert shlex.split(command)[2:] == ["ditjax.sweep", *TINY, GRID, told, "--workdir=DIR"]
        return [cell for cell in grid if cell.number == breaks]

    monkeypatch.setattr(sweep, "run_cells", run)
    monkeypatch.setattr("ditjax.report.make_report", lambda *_: SimpleNamespace(text="a report"))
    words, study = [*TINY, GRID, "--workdir", str(tmp_path)], tmp_path / "sweep.json"
    held = Lease(tmp_path / sweep.LEASE, "the whole study")
    breaks = 3
    for told in ("--shard=0/2", "--shard=1/2"):
        status_of_it = sweep.main([*TINY, GRID, told, "--workdir", str(tmp_path)])
        assert status_of_it == (3 in ran[-1])
    held.release()
    assert sorted(ran[0] + ran[1]) == [0, 1, 2, 3]
    assert len(set(holds)) == 3
    said = capfd.readouterr().err
    assert said.count("failed: see") == 1
    assert "the same command with --failed" in said
    breaks = -1
    before = study.read_bytes()
    told = "--failed"
    for expected in ([3], None):
        assert sweep.main([*TINY, GRID, told, *words[-2:]]) == 0
        if expected:
            assert ran.pop() == expected
    assert len(ran) == 2, "nothing is left that has failed"
    assert capfd.readouterr().out.endswith("no cell has failed\n")
    assert study.read_bytes() == before
    assert json.loads(before)["command"].endswith(" --workdir=DIR")
    assert [cell["number"] for cell in json.loads(before)["cells"]] == [0, 1, 2, 3]
    assert str(tmp_path) not in before.decode()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_from_end_to_end(tmp_path, capfd, monkeypatch):
    grid = "--config.sweep.grid=(('model.width',(4,8)),)"
    words = [*TOY, grid, "--config.evaluate.guided_scale=0.0"]
    # Of an autoencoder that pixels do not need: any text.
    words += [f"--config.autoencoder.path=s3://me:{SECRETS[0]}@host/{SECRETS[1]}"]
    monkeypatch.setenv("CANARY_TOKEN", SECRETS[2])
    study = cells(load_recipe(words))
    broken, finished = (tmp_path / "runs" / cell.name for cell in study)
    broken.mkdir(parents=True)
    recipe = {**study[0].recipe, "autoencoder": {**study[0].recipe["autoencoder"], "path": "else"}}
    (broken / "config.json").write_text(json.dumps(recipe))
    (broken / "metrics.jsonl").write_text('{"step": 5}\n')
    words += ["--workdir", str(tmp_path), "--jobs=2"]
    assert sweep.main(words) == 1
    said = capfd.readouterr().err
    assert "Conv-4-seed0 FAILED (status 2): error: " in said
    assert "this command has 's3://***@host/***'" in said
    results, problems = find_results([tmp_path / "runs"])
    assert [found.folder for found in results] == [finished]
    assert sweep.main([*words[:-1], "--status"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["0", study[0].name, "failed", "0/20"]
    assert lines[1].split(maxsplit=4)[4].startswith("holds a run with autoencoder.path='else'")
    assert lines[2].split()[:5] == ["1", study[1].name, "done", "20/20", "FD-digits"]
    before, recorded = contents(finished), (tmp_path / "sweep.json").read_bytes()

    (broken / "config.json").unlink()
    assert sweep.main([*words, "--failed"]) == 0
    assert (tmp_path / "sweep.json").read_bytes() == recorded
    out = capfd.readouterr().out
    assert out.count("Conv-") >= 2
    results, problems = find_results([tmp_path / "runs"])
    assert (len(results), problems) == (2, [])
    assert contents(finished) == before, "a finished cell was touched"
    for path, data in contents(tmp_path).items():
        for secret in SECRETS:
            assert secret.encode() not in data, path
        if path.suffix == ".json" and path.parent.name != "report":
            assert str(tmp_path).encode() not in data, f"{path} says where it lies"
    assert not list(tmp_path.rglob("*lease*"))
    assert not list(tmp_path.rglob("ended.json"))
    result = read_result(broken)
    assert result["model"] == {"name": "Conv-4", "width": 4}
    assert result["train"]["steps"] == 20
    assert result["sample"]["steps"] == 3
    command = result["environment"]["command"]
    assert shlex.split(command)[:4] == ["python", "-m", "ditjax.sweep", TOY[0]]
    assert shlex.split(command)[-3:] == ["--workdir=DIR", "--jobs=2", "--failed"]
    for name in ("index.html", "table.csv", "gflops_vs_fid.png", "samples_by_model.png"):
        assert (tmp_path / "report" / name).stat().st_size > 100

    first, path = read_result(broken), broken / "result.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sweep.run_cell(study[0], tmp_path)
    again = read_result(broken)
    assert again["metrics"] == first["metrics"]
    assert {**again["train"], "seconds": 0} == {**first["train"], "seconds": 0}


def test_a_study_is_one_sweeps_and_a_cell_one_process(tmp_path):
    words = [*TINY, GRID, f"--workdir={tmp_path}"]
    name = "DiT-1x32x2-p4-seed0"
    held = Lease(tmp_path / sweep.LEASE, "the study")
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
        sweep.main(words)
    held.release()
    held = Lease(tmp_path / "runs" / name / ".lease", "the cell")
    with pytest.raises(UserError, match=f"{name} is in use by process {os.getpid()} on"):
        sweep.main([*words, "--index=0"])
    with pytest.raises(UserError, match=f"{name} is in use by process {os.getpid()} on"):
        train.main([*TINY, f"--workdir={tmp_path / 'runs' / name}"])
    held.release()
    assert list(tmp_path.rglob("*")) == []


def test_a_recipe_changed_while_its_sweep_runs_is_found_by_its_cells(tmp_path, monkeypatch):
    monkeypatch.setenv(sweep._CELL, "DiT-1x32x2-p4-seed1")
    words = [*TINY, GRID.replace("(0,1)", "(5,0,1)"), f"--workdir={tmp_path}", "--index=1"]
    with pytest.raises(UserError, match=r"cell 1 was DiT-1x32x2-p4-seed1 and is now .*seed0\. St"):
        sweep.main(words)
    assert list(tmp_path.rglob("*")) == []


def test_the_result_of_another_recipe_is_no_result(tmp_path):
    (cell,) = cells(load_recipe([*TINY, ONE]))
    folder = tmp_path / "runs" / cell.name
    write_result(folder, a_result(config=cell.recipe))
    sweep.run_cell(cell, tmp_path)
    assert os.listdir(folder) == ["result.json"]
    (other,) = cells(load_recipe([*TINY, ONE, "--config.optim.learning_rate=1.0"]))
    with pytest.raises(UserError, match=r"learning_rate=0\.005, but this command has 1\.0"):
        sweep.run_cell(other, tmp_path)


ORPHAN = """
import time
from ditjax import sweep
sweep._exit_with_parent()
print("here", flush=True)
time.sleep(60)
"""


def test_a_cell_ends_with_the_sweep_that_started_it():
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN],
        cwd=Path(__file__).parent.parent.parent,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        _, said = process.communicate(timeout=30)  # closes its input
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM
    assert said == "the sweep of this cell is gone: the cell stops\n"
