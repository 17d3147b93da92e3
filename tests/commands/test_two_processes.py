"""Two processes of four devices each are one run: the same as one process of eight."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ditjax import cli, grid, sample, sweep, train
from ditjax.errors import UserError
from ditjax.runs.results import load_samples
from tests.commands.conftest import TINY
from tests.commands.pair import CELL, DRAWN, GRID, STUDY, TRAINED

ROOT = Path(__file__).parent.parent.parent
NINE_STEPS = ("--config.train.steps=9", "--config.mesh.data=8", "--config.mesh.fsdp=1")
SECONDS = 600  # far more than a loaded machine needs


def scalars(workdir):
    """Of metrics.jsonl: {step: its line}."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def losses(workdir):
    return np.array([line["loss"] for _, line in sorted(scalars(workdir).items())])


def wait(condition, processes):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), "one ended"
        time.sleep(0.1)


class Pair:
    """What two processes left: their directory, and what each said and ended with."""

    def __init__(self, folder, data_dir):
        self.workdir = folder / "run"
        self.study, self.grid = folder / "run-study", folder / "run-grid"
        outputs = [folder / f"{i}.txt" for i in range(2)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
        processes = []
        for i, output in enumerate(outputs):
            command = [
                sys.executable,
                "-m",
                "tests.commands.pair",
                str(self.workdir),
                f"--coordinator=127.0.0.1:{port}",
                "--processes=2",
                f"--process={i}",
            ]
            env = {**os.environ, "XLA_FLAGS": flags, "DITJAX_DATA": str(data_dir)}
            with output.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        try:
            wait(lambda: all("checked" in output.read_text() for output in outputs), processes)
            log = folder / "run-long" / "metrics.jsonl"
            wait(lambda: log.exists() and len(log.read_text().splitlines()) > 1, processes)
            processes[0].send_signal(signal.SIGKILL)
            began = time.monotonic()
            self.status = processes[1].wait(SECONDS)
            self.seconds = time.monotonic() - began
        except BaseException as error:
            error.add_note("\n".join(output.read_text()[-3000:] for output in outputs))
            raise
        finally:
            for process in processes:
                process.kill()
                process.wait()
        self.said = [output.read_text() for output in outputs]


@pytest.fixture(scope="module")
def pair(data_dir, alone, tmp_path_factory):  # after it: the data set is prepared, and seen
    return Pair(tmp_path_factory.mktemp("pair"), data_dir)


def run_alone(command, words, workdir, data_dir):
    """Run a command in this process; return its work directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        patch.chdir(ROOT)
        assert command.main([*words, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """The work directory of the same run in one process, its state on every device, 9 steps."""
    return run_alone(train, [*TRAINED, *NINE_STEPS], tmp_path_factory.mktemp("alone"), data_dir)


@pytest.fixture(scope="module")
def study(data_dir, tmp_path_factory):
    """The directory of the same study, of which one process ran the same cell."""
    words = [*STUDY, "--config.mesh.data=8", "--config.mesh.fsdp=1"]
    return run_alone(sweep, words, tmp_path_factory.mktemp("study"), data_dir)


def test_two_processes_train_as_one(pair, alone):
    np.testing.assert_allclose(losses(pair.workdir), losses(alone)[:6], rtol=1e-5)
    ours, theirs = scalars(pair.workdir)[6], scalars(alone)[6]
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


def test_the_first_process_writes_what_is_written_once(pair):
    names = sorted(path.name for path in pair.workdir.iterdir())
    events = [name for name in names if name.startswith("events.")]
    assert len(events) == 1
    assert [name for name in names if name not in events] == [
        "checkpoints",
        "classes.json",
        "config.json",
        "contents.json",
        "drawn",
        "metrics.jsonl",
        "parameters.txt",
    ]
    assert [line["step"] for line in scalars(pair.workdir).values()] == [1, 2, 3, 4, 5, 6]
    assert len((pair.workdir / "metrics.jsonl").read_text().splitlines()) == 6
    first, second = pair.said
    assert "6 steps, loss" in first
    assert "16 images in" in first
    assert "6 steps" not in second
    assert "16 images" not in second


def test_one_process_goes_on_from_the_checkpoint_of_two(pair, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(pair.workdir, workdir)
    assert train.main([*TRAINED, *NINE_STEPS, f"--workdir={workdir}"]) == 0
    np.testing.assert_allclose(losses(workdir)[6:], losses(alone)[6:], rtol=1e-5)
    assert sample.main([*DRAWN, f"--workdir={workdir}", "--step=6", f"--out={tmp_path}/d"]) == 0
    theirs, labels = load_samples(pair.workdir / "drawn" / "samples.npz")
    ours, our_labels = load_samples(tmp_path / "d" / "samples.npz")
    np.testing.assert_array_equal(our_labels, labels)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert ours.std() > 10


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_cell_of_a_study_is_evaluated_as_by_one(pair, study):
    ours, theirs = (folder / CELL for folder in (pair.study, study))
    logged, expected = scalars(ours)[3], scalars(theirs)[3]
    assert {name for name in logged if name.startswith("eval/")} == {
        name for name in expected if name.startswith("eval/")
    }
    for found, wanted in (
        ({"fd": logged["eval/fd_digits"]}, {"fd": expected["eval/fd_digits"]}),
        (result(ours)["metrics"], result(theirs)["metrics"]),
    ):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    assert result(ours)["protocol_hash"] == result(theirs)["protocol_hash"]
    assert not (pair.study / "runs" / "Conv-8-seed0").exists()


def test_a_grid_is_that_of_one(pair, study, tmp_path):
    assert grid.main([*GRID, f"--workdir={study / CELL}", f"--out={tmp_path}"]) == 0
    ours, theirs = (
        json.loads((folder / "grid.json").read_text())["cells"] for folder in (pair.grid, tmp_path)
    )
    assert [cell["settings"] for cell in ours] == [cell["settings"] for cell in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["protocol_hash"] == b["protocol_hash"]
        assert a["metrics"]["fd_digits"] == pytest.approx(b["metrics"]["fd_digits"], rel=1e-3)


def test_a_process_that_is_killed_ends_the_other_with_one_clear_line(pair):
    assert pair.status == 1
    assert pair.seconds < 30
    clear = [line for line in pair.said[1].splitlines() if line.startswith("error: ")]
    assert clear == [
        f"error: process 0 of 2 ({socket.gethostname()}) is gone, so this run ends: find the"
        " cause there, then run the same command on all again to resume from the newest checkpoint"
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--coordinator=10.0.0.1:1"], "--processes and --process missing"),
        (["--processes=2", "--process=0"], "--coordinator missing"),
        (["--distributed", "--process=0"], "remove --coordinator, --processes and"),
        (["--distributed"], "JAX detected no other processes"),
        (["--coordinator=here", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=h:99999", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=h:1", "--processes=2", "--process=2"], "numbered from 0 to 1"),
        (["--coordinator=h:1", "--processes=2", "--process=-1"], "numbered from 0 to 1"),
        (["--coordinator=h:1", "--processes=0", "--process=0"], "0 processes"),
        (["--coordinator=h:1", "--processes=x", "--process=0"], "invalid int value"),
    ],
)
def test_flags_that_name_no_process(flags, told, tmp_path):
    with pytest.raises(UserError, match=told):
        train.main([*TINY, f"--workdir={tmp_path}/run", *flags])
    assert not (tmp_path / "run").exists()


def test_one_process_of_one_needs_no_other(tmp_path):
    parser = cli.parser("train", "")
    cli.add_processes(parser)
    args, _ = cli.parse(
        parser, [*TINY, "--coordinator=127.0.0.1:1", "--processes=1", "--process=0"]
    )
    assert args.processes == 1


def test_what_a_scheduler_tells_jax_is_taken(monkeypatch):
    from ditjax.parallel import processes

    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "node[007-009]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    place = processes.detect_place(10)
    assert (place.host, place.count, place.index) == ("node007", 3, 2)
    assert place.device_ids == (0,)
