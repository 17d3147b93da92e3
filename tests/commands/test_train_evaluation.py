"""Evaluation while training: in the log, compiled once, and the best kept beside the latest."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ditjax import convert, evaluate, sample, sweep, train
from ditjax.cli import load_recipe
from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.evaluation.evaluator import Evaluator
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.checkpoint import Step
from ditjax.runs.log import Progress
from ditjax.sampling.pipeline import open_source
from ditjax.studies.cells import cells
from ditjax.tasks import make_task
from ditjax.weights import networks, reading
from tests.commands.conftest import TOY
from tests.sampling.test_pipeline import traces

DISTANCES = (30.0, 10.0, math.nan, 20.0)  # at steps 5, 10, 15 and 20, in the place of the real
SLOW_SECONDS = 2.0  # added to the second evaluation: what a loaded machine does not add by itself
SMALL = (
    *TOY,
    "--config.evaluate.guided_scale=0.0",
    "--config.train.keep_checkpoints=1",
    "--config.train.evaluate_num=24",
    "--config.evaluate.val_loss_num=30",
)


class Watched(NamedTuple):
    folder: Path
    compiled: list[tuple[int, int]]  # programs compiled in the process, around each evaluation
    traced: list[Any]  # one for each tracing of the sampler
    seen: list[str]  # the digests of the parameters that were evaluated
    clock: list[tuple[float, float]]  # when each evaluation began and ended, in seconds
    said: list[str]  # lines above the progress


class Neighbour:
    """In the place of a measured study: says at what step which scores were shown to it."""

    def lines(self, step, metrics, protocol):
        return [f"{step} {sorted(metrics)} of {protocol['num_samples']}"]


@pytest.fixture(scope="module")
def watched(data_dir, tmp_path_factory) -> Watched:
    """A cell of a sweep, evaluated four times while it trains and then by its recipe."""
    compiles: list[str] = []
    compiled, seen, clock, said, told = [], [], [], [], iter(DISTANCES)
    real = Evaluator.in_memory

    def in_memory(self, c, params, num):
        assert num == 24
        before, began = len(compiles), time.monotonic()
        found = real(self, c, params, num)
        compiled.append((before, len(compiles)))
        assert math.isfinite(found.metrics["fd_digits"])
        seen.append(opening.digest(params))
        if len(seen) == 2:
            time.sleep(SLOW_SECONDS)
        clock.append((began, time.monotonic()))
        return found._replace(metrics={**found.metrics, "fd_digits": next(told)})

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        patch.chdir(Path(__file__).parent.parent.parent)
        patch.setattr(Evaluator, "in_memory", in_memory)
        patch.setattr(train, "shipped_beside", lambda c: Neighbour())
        patch.setattr(Progress, "print_line", lambda self, line: said.append(line))
        traced = traces(patch)
        words = [*SMALL, "--config.train.evaluate_every_steps=5"]
        words += ["--config.sweep.grid=(('model.width',(8,)),)"]
        (cell,) = cells(load_recipe(words))
        workdir = tmp_path_factory.mktemp("study")
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            sweep.run_cell(cell, workdir)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    return Watched(workdir / "runs" / cell.name, compiled, traced, seen, clock, said)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_nothing_is_compiled_after_the_first_evaluation(watched):
    assert len(watched.compiled) == 4
    first, *others = watched.compiled
    assert first[0] < first[1]
    assert [after - before for before, after in others] == [0, 0, 0]
    # One sampler for those of 24 samples and for the 40 after the training.
    assert len(watched.traced) == 1


def test_the_log(watched):
    found = rows(watched.folder)
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    assert all(row["loss"] > 0 for row in found)
    np.testing.assert_array_equal([row["eval/fd_digits"] for row in found], DISTANCES)
    assert all(0 <= row["eval/accuracy"] <= 1 for row in found)
    assert len({row["eval/protocol_hash"] for row in found}) == 1
    # Twenty steps learn something, of the very pairs that the result's own loss is of.
    losses = [row["eval/val_loss"] for row in found]
    assert losses[-1] < losses[0]
    assert all(0 < row["eval/val_loss_stderr"] < row["eval/val_loss"] for row in found)
    result = json.loads((watched.folder / "result.json").read_text())
    assert result["metrics"]["val_loss"] == losses[-1]
    assert result["protocol"]["val_loss_num"] == 30
    # Its seconds, and the training's own, whose clock stands still meanwhile.
    began, ended = np.array(watched.clock).T
    took = np.diff([0.0, *(row["eval/seconds"] for row in found)])
    np.testing.assert_allclose(took, ended - began, atol=SLOW_SECONDS / 2)
    trained = np.diff([row["seconds"] for row in found])
    np.testing.assert_allclose(trained, (began[1:] - ended[:-1]), atol=SLOW_SECONDS / 2)
    (events,) = watched.folder.glob("events.out.tfevents.*")
    for name in (b"eval/fd_digits", b"eval/accuracy", b"eval/seconds", b"loss"):
        assert name in events.read_bytes()


def test_each_evaluation_is_put_beside_a_measured_study(watched):
    scores = "['fd_digits', 'val_loss'] of 24"
    assert watched.said == [f"{step} {scores}" for step in (5, 10, 15, 20)]


def test_the_best_checkpoint_is_kept_beside_the_latest(watched):
    assert steps_of(watched.folder) == [10, 20]
    config = opening.recipe_of(watched.folder)
    cases: tuple[tuple[Step, int], ...] = (("best", 10), ("latest", 20), (10, 10))
    for asked, step in cases:
        params, found = opening.load_weights(
            config, make_task(config), watched.folder, make_mesh(-1, 1), asked
        )
        assert found == step
        assert opening.digest(params) == watched.seen[step // 5 - 1]


def test_a_resume_keeps_the_best_and_the_clock(watched, tmp_path, monkeypatch):
    shutil.copytree(watched.folder, tmp_path, dirs_exist_ok=True)
    seen = []
    real = Evaluator.in_memory

    def in_memory(self, c, params, num):
        seen.append(opening.digest(params))
        return real(self, c, params, num)

    monkeypatch.setattr(Evaluator, "in_memory", in_memory)
    words = ["--config.train.steps=23", "--config.optim.restarts=20,"]
    words += ["--config.train.evaluate_every_steps=23", "--config.sample.weights=model"]
    assert train.main([*SMALL, f"--workdir={tmp_path}", *words]) == 0
    *_, before, last = rows(tmp_path)
    assert (before["step"], last["step"]) == (20, 23)
    assert last["eval/seconds"] > before["eval/seconds"]
    assert last["seconds"] > before["seconds"]
    # Another protocol: of the parameters themselves. The best of each is there.
    assert last["eval/protocol_hash"] != before["eval/protocol_hash"]
    assert steps_of(tmp_path) == [10, 23]
    config = changed(opening.recipe_of(tmp_path), {"sample": {"weights": "model"}})
    params, step = opening.load_weights(
        config, make_task(config), tmp_path, make_mesh(-1, 1), "best"
    )
    assert step == 23
    assert seen == [opening.digest(params)]


def test_commands_take_a_step(watched, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watched.folder, run)
    words = [f"--workdir={run}", "--config.sample.num=8", f"--out={tmp_path}", "--step=best"]
    assert sample.main(words) == 0
    assert json.loads((tmp_path / "samples.json").read_text())["step"] == 10
    assert evaluate.main([f"--workdir={run}", "--step=10"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["step"] == 10
    out = tmp_path / "best.safetensors"
    assert convert.main([f"--weights={run}", "--to=ditjax", f"--out={out}", "--step=best"]) == 0
    config = opening.recipe_of(run)
    params, _ = opening.load_weights(config, make_task(config), run, make_mesh(-1, 1), 10)
    leaves, expected = reading.load_network(out).leaves, networks.from_run(config, params).leaves
    assert leaves.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(leaves[name], value)
    cases: tuple[tuple[Step, str], ...] = (("best", watched.seen[1]), ("latest", watched.seen[3]))
    for step, digest in cases:
        source = open_source(run, step=step)
        assert opening.digest(source.load(source.config, make_mesh(-1, 1))[0]) == digest


def test_steps_that_are_refused(watched, tmp_path):
    npz = watched.folder / "samples.npz"
    out = f"--out={tmp_path / 'x'}"
    words = "expected latest, best or a"
    cases: list[tuple[Any, list[str], str]] = [
        (sample, [f"--workdir={watched.folder}", "--step=7"], "of step 7: it has 10, 20"),
        (sample, [f"--workdir={watched.folder}", "--step=newest"], words),
        (sample, [f"--weights={npz}", "--step=best"], "best is for runs, and .* is not a run"),
        (evaluate, [f"--workdir={watched.folder}", "--step=-1"], words),
        (evaluate, [f"--samples={watched.folder}", "--step=15"], "of step 15: it has 10, 20"),
        (evaluate, [f"--samples={npz}", "--step=10"], "10 is for runs, and .* is not a run"),
        (convert, [f"--weights={watched.folder}", "--to=ditjax", out, "--step=3"], "of step 3"),
        (convert, [f"--weights={npz}", "--to=ditjax", out, "--step=3"], "3 is for runs, and"),
    ]
    for command, arguments, match in cases:
        with pytest.raises(UserError, match=match) as error:
            command.main(arguments)
        assert "\n" not in str(error.value)


def test_features_that_are_not_there_are_refused_before_anything_is_written(tmp_path):
    words = [*SMALL, "--config.train.evaluate_every_steps=5", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"none\.pth"):
        train.main([*words, f"--config.evaluate.features=inception:{tmp_path}/none.pth"])
    assert not (tmp_path / "run").exists()
