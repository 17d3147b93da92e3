"""The train command: what it leaves, that it resumes exactly, and how it refuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ditjax import convert, sample, train
from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.data import prefetch, stream
from ditjax.errors import StoppedError, UserError
from ditjax.files import lease
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import make_task
from tests.commands.conftest import TINY, TOY, CutError, cut_after
from tests.toys import tracker


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without its clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def ema(workdir: Path):
    c = opening.recipe_of(workdir)
    params, step = opening.load_weights(c, make_task(c), workdir, make_mesh(-1, 1))
    return jax.device_get(params), step


def test_what_a_run_leaves(finished):
    assert [row["step"] for row in lines(finished)] == [5, 10, 15, 20]
    assert {"loss", "mse", "vlb", "grad_norm"} <= lines(finished)[0].keys()
    assert len(list(finished.glob("events.out.tfevents.*"))) == 1
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["20"]
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 20
    assert "blocks/attn/qkv/kernel" in (finished / "parameters.txt").read_text()
    with Image.open(finished / "samples" / "0000020.png") as grid:
        assert grid.size == ((8 * 8 + 7) * 4, (8 * 8 + 7) * 4)


def test_the_same_command_resumes_exactly(finished, tmp_path, capsys, monkeypatch):
    # A cosine schedule knows its end: a run is cut by leaving its loop, not by another recipe. A
    # tracker, which the finished run has not, changes nothing.
    cut = [*TINY, f"--workdir={tmp_path}", "--config.train.tracker=tests.toys.tracker.Kept"]
    opened: list[tracker.Kept] = []
    monkeypatch.setattr(tracker, "OPENED", opened)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "train_batches", cut_after(13))
        with pytest.raises(CutError):
            train.main(cut)
    assert [row["step"] for row in lines(tmp_path)] == [5, 10]
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 13, "loss": 1.0}\n{"step": 14, "lo')  # beyond the checkpoint, and torn
    assert train.main(cut) == 0
    assert lines(tmp_path) == lines(finished)
    expected, step = ema(finished)
    resumed, resumed_step = ema(tmp_path)
    assert step == resumed_step == 20
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    # A finished run stays as it is.
    assert train.main(cut) == 0
    assert lines(tmp_path) == lines(finished)
    assert "20 steps, loss" in capsys.readouterr().out
    assert [[step for step, _ in each.rows] for each in opened] == [[5, 10], [15, 20], []]
    assert len({each.run.id for each in opened}) == 1


def test_the_rate_of_the_last_update_is_logged(finished):
    rates = [row["learning_rate"] for row in lines(finished)]
    peak, ends = 5e-3, [4, 9, 14, 19]
    expected = [peak * (1 + np.cos(np.pi * (k - 2) / 18)) / 2 for k in ends]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_finished_run_is_extended_as_if_its_recipe_had_said_so_from_the_start(finished, tmp_path):
    extended = tmp_path / "extended"
    shutil.copytree(finished, extended)
    more = [*TINY, "--config.train.steps=30", "--config.optim.restarts=20,"]
    assert train.main([*more, f"--workdir={extended}"]) == 0
    assert train.main([*more, f"--workdir={tmp_path / 'whole'}"]) == 0
    assert lines(extended) == lines(tmp_path / "whole")
    peak = 5e-3
    assert [row["learning_rate"] for row in lines(extended)][-2:] == pytest.approx(
        [peak * (1 + np.cos(np.pi * (k - 2) / 8)) / 2 for k in (4, 9)], rel=1e-5
    )
    with pytest.raises(UserError, match=r"train.steps=20, but this command has 30, and optim"):
        train.main([*TINY, f"--workdir={finished}", "--config.train.steps=30"])


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    words = [*TOY, f"--workdir={tmp_path}", "--config.optim.schedule=constant"]
    assert train.main([*words, "--config.train.steps=4"]) == 0
    with pytest.raises(UserError, match=r"config.train.steps is 3, and the run .* has done 4"):
        train.main([*words, "--config.train.steps=3"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_told_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(finished, tmp_path):
    real = prefetch.ahead

    def telling(*args):
        for step, batch in enumerate(real(*args), start=1):
            if step == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    words = [*TINY, f"--workdir={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ahead", telling)
        with pytest.raises(StoppedError, match=r"stopped at step 1[2-4] by SIGTERM") as stopped:
            train.main(words)
    assert stopped.value.status == 0
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"at step {saved.name} " in str(stopped.value)
    assert [row["step"] for row in lines(tmp_path)] == [5, 10]
    assert train.main(words) == 0
    # The interval that was cut has the mean of all of its steps.
    assert lines(tmp_path) == lines(finished)
    for a, b in zip(jax.tree.leaves(ema(finished)), jax.tree.leaves(ema(tmp_path)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_told_to_stop_before_the_first_step_nothing_is_saved(tmp_path):
    real = opening.open_run

    def telling(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_run", telling)
        with pytest.raises(StoppedError, match="stopped at step 0 by SIGTERM"):
            train.main([*TOY, f"--workdir={tmp_path}"])
    assert not list((tmp_path / "checkpoints").iterdir())


@lease.scope()
def test_a_process_that_is_not_the_first_only_reads_the_directory(tmp_path, monkeypatch):
    recipe = load_recipe(list(TINY))
    opening.open_run(tmp_path, read(recipe))
    path = tmp_path / "config.json"
    before = path.read_bytes(), path.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(opening, "is_primary", lambda: False)
        recipe["train"]["log_every_steps"] += 1
        opening.open_run(tmp_path, read(recipe))
        assert (path.read_bytes(), path.stat().st_ino) == before
        recipe["seed"] += 1
        with pytest.raises(UserError, match=r"holds a run with seed=0, but this command has 1"):
            opening.open_run(tmp_path, read(recipe))


def test_neither_a_profile_nor_what_is_ahead_changes_a_run(finished, tmp_path):
    words = [*TINY, f"--workdir={tmp_path}", "--config.train.prefetch=0"]
    assert train.main([*words, "--profile_steps=3:4"]) == 0
    assert lines(tmp_path) == lines(finished)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    # The steps are named in it, by their number.
    assert b"train" in trace.read_bytes()
    with pytest.raises(UserError, match=r"--profile_steps=19:20: the run is at step 20 already"):
        train.main([*words, "--profile_steps=19:20"])


def refused(words, tmp_path, match):
    with pytest.raises(UserError, match=match) as error:
        train.main([*TINY, f"--workdir={tmp_path / 'run'}", *words])
    assert "\n" not in str(error.value)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--config.data.name=digit"], r"'digit' is unknown.* Did you mean 'digits'"),
        (["--config.data.split=training"], r"no such split.*test, train"),
        (["--config.data.num_classes=12"], r"num_classes is 12, but data set 'digits' has 10"),
        (
            ["--config.train.batch_size=12"],
            r"batch_size is 12: not divisible .* fsdp = 8",
        ),
        (["--config.train.microbatches=3"], r"microbatches=3 does not .*=16: .* 1, 2, 4, 8, 16\."),
        (["--config.train.microbatches=4"], r"= 16 / 4 is 4: not divisible .* fsdp = 8"),
        (["--config.sample.steps=ddim999"], "no integer stride over 1000"),
        (
            ["--config.train.evaluate_every_steps=5", "--config.sample.batch_size=12"],
            r"config\.sample\.batch_size is 12: not divisible .* fsdp = 8",
        ),
        (["--profile_steps=4:3"], "'4:3': expected A:B"),
        (["--profile_steps=19:21"], r"--profile_steps=19:21: the run ends at step 20: name"),
        (["--config.mesh.data=3"], r"mesh data=3, fsdp=1 does not fill 8"),
        (["--config.data.name=folder:/nowhere"], "no folder '/nowhere'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(words, match, tmp_path):
    assert not refused(words, tmp_path, match).joinpath("checkpoints").exists()


def test_another_recipe_in_the_same_directory_is_refused(finished):
    before = lines(finished)
    with pytest.raises(UserError, match=r"optim\.learning_rate=0\.005, but this command has 0\.1"):
        train.main([*TINY, f"--workdir={finished}", "--config.optim.learning_rate=0.1"])
    with pytest.raises(UserError, match=r"holds a run with seed=0"):
        train.main([*TINY, f"--workdir={finished}", "--config.seed=1"])
    assert lines(finished) == before


def test_a_workdir_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below"):
        with pytest.raises(UserError, match=str(file)):
            train.main([*TINY, f"--workdir={workdir}"])


def test_a_workdir_is_required():
    with pytest.raises(UserError, match="--workdir"):
        train.main(list(TINY))


def one_damaged_of(count, tmp_path):
    """So many images of two classes, of which the dog of number 1 is cut."""
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i * 80).save(folder / f"{i}.png")
    bad = tmp_path / "images" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])


def test_a_damaged_image_is_named(tmp_path):
    one_damaged_of(3, tmp_path)
    refused(
        [f"--config.data.name=folder:{tmp_path / 'images'}", "--config.data.num_classes=2"],
        tmp_path,
        r"dog/1\.png is not a sound image",
    )


def test_damaged_images_are_skipped_up_to_the_cap(tmp_path, capsys):
    one_damaged_of(4, tmp_path)
    words = [
        *TOY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.name=folder:{tmp_path / 'images'}",
        "--config.data.num_classes=2",
        "--config.train.steps=4",
        "--config.optim.schedule=constant",
    ]
    assert train.main([*words, "--config.data.max_damaged=1"]) == 0
    (line,) = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert "(dog/1.png) is damaged" in line
    assert f"warning: {line}\n" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is damaged .*or set config\.data"):
        train.main([*words, "--config.train.steps=6"])


def test_a_folder_of_images_trains(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (11, 9, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    words = [
        f"--config.data.name=folder:{tmp_path / 'images'}",
        "--config.data.num_classes=2",
        "--config.data.channels=3",
        "--config.data.flip=True",
        "--config.train.steps=4",
    ]
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    assert train.main([*TOY, f"--workdir={run}", *words]) == 0
    assert lines(run)[-1]["step"] == 4
    # The names of the classes are recorded with the run, and travel with its weights.
    assert json.loads((run / "classes.json").read_text()) == {"classes": ["cat", "dog"]}
    weights = tmp_path / "run.safetensors"
    assert convert.main([f"--weights={run}", "--to=ditjax", f"--out={weights}"]) == 0
    for source in (f"--workdir={run}", f"--weights={weights}"):
        asked = [source, f"--out={drawn}", "--steps=ddim2", "--num=8"]
        assert sample.main([*asked, "--classes=Dog,0"]) == 0
        assert json.loads((drawn / "samples.json").read_text())["classes"] == [1, 0]
        with pytest.raises(UserError, match=r"holds 'robin': expected .* or names, separated"):
            sample.main([*asked, "--classes=robin"])
    # A class number keeps its meaning, or the run is refused.
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "wolf")
    with pytest.raises(UserError, match=r"whose class 0 is 'cat', but class 0 of .* is 'dog'"):
        train.main([*TOY, f"--workdir={run}", *words, f"--config.data.data_dir={tmp_path}"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    said = r"steps 2 to \d+, \d in a row, were skipped: .* loss (nan|inf), .*, lower config\.optim"
    with pytest.raises(UserError, match=said):
        train.main(
            [
                *TOY,
                f"--workdir={tmp_path}",
                "--config.optim.learning_rate=1e30",
                "--config.optim.warmup_steps=0",
            ]
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ema(tmp_path)[0]))
