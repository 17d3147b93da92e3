"""Averages beside the EMA: snapshots of a run, killed or not, and samples of what they make."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ditjax import evaluate, grid, train
from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.data import stream
from ditjax.errors import UserError
from ditjax.machines.costs import estimate
from ditjax.machines.topology import parse_topology
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening, snapshots
from ditjax.runs.checkpoint import Checkpoints
from ditjax.sampling.draw import Drawer
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks import cost_of, make_task
from tests.commands.conftest import CutError, cut_after

WORDS = (
    "--config=tests/toys/recipe.py",
    "--config.sample.sampler=ddim",
    "--config.evaluate.val_loss_num=0",
    "--config.train.steps=18",
    "--config.train.sample_every_steps=0",
    "--config.train.evaluate_every_steps=0",
    "--config.train.checkpoint_every_steps=8",
    "--config.train.ema_decay=0.9",
    "--config.train.ema_decays=0.9,",
    "--config.train.average_stds=0.05,0.1,0.2",
    "--config.train.average_every_steps=1",
)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run with 18 snapshots of three widths."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        patch.setenv("DITJAX_DATA", str(data_dir))
        assert train.main([*WORDS, f"--workdir={folder}"]) == 0
    return folder


def saved(folder):
    """{step: digest of the snapshot}."""
    with Checkpoints(folder / "averages", keep=1, read_only=True) as found:
        return {step: found.saved_with(step) for step in found.steps}


def loaded(folder, weights, **keys):
    """The weights of a name, on one device."""
    c = changed(opening.recipe_of(folder), {"train": keys, "sample": {"weights": weights}})
    mesh = make_mesh(1, 1, jax.devices()[:1])
    params, step = opening.load_weights(c, make_task(c), folder, mesh)
    return jax.device_get(params), step


def distance(a, b):
    """‖a - b‖ / ‖b‖ over all parameters."""
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_a_killed_run_resumes_with_the_same_snapshots(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(stream, "train_batches", cut_after(13))
        with pytest.raises(CutError):
            train.main([*WORDS, f"--workdir={folder}"])
    assert sorted(saved(folder)) == list(range(1, 14))
    capsys.readouterr()
    assert train.main([*WORDS, f"--workdir={folder}"]) == 0
    again = "resumes at step 8; later snapshots are removed and written again: 9, 10, 11 and 2 more"
    assert again in capsys.readouterr().err
    assert saved(folder) == saved(whole)
    assert [position["updates"] for position, _ in saved(whole).values()] == list(range(1, 19))
    for weights in ("ema", "ema:0.9"):
        assert distance(loaded(folder, weights)[0], loaded(whole, weights)[0]) == 0


def test_averages_that_are_kept(whole):
    ema, kept = loaded(whole, "ema")[0], loaded(whole, "ema:0.9")[0]
    assert 0 <= distance(kept, ema) < 1e-5
    assert distance(loaded(whole, "power:0.1")[0], ema) > 1e-3


def test_a_width_that_was_not_kept_is_made_on_any_mesh(whole):
    kept, _ = loaded(whole, "power:0.2")
    made, step = loaded(whole, "power:0.2", average_stds=(0.05, 0.1))
    assert step == 18
    assert 0 < distance(made, kept) < 3e-4 < 3e-3 < distance(made, loaded(whole, "power:0.1")[0])
    keys = {"train": {"average_stds": (0.05, 0.1)}, "sample": {"weights": "power:0.2"}}
    how = snapshots.combination(changed(opening.recipe_of(whole), keys), whole, 18)
    split = opening.put_on_mesh(made, make_mesh(2, 4), (("in/kernel", (None,) * 3 + ("fsdp",)),))
    again = snapshots.make_average(whole, how, split)
    assert again["params"]["in"]["kernel"].sharding.shard_shape((3, 3, 1, 8)) == (3, 3, 1, 2)
    assert distance(jax.device_get(again), made) == 0


def test_samples_of_it_and_what_they_record(whole, tmp_path, monkeypatch):
    kept: dict = {}  # compiled samplers: all of them draw on one mesh
    init = Drawer.__init__

    def with_kept(self, mesh, frozen):
        init(self, mesh, frozen)
        self._programs = kept

    monkeypatch.setattr(Drawer, "__init__", with_kept)
    pipeline = Pipeline.from_pretrained(whole, weights="power:0.130", precision="fast")
    record = pipeline(num=8, batch_size=32, quiet=True).record
    assert record["sample"]["weights"] == "power:0.13"
    average = record["average"]
    assert average["std"] == 0.13
    assert average["profile_error"] < 0.01
    digests = {str(step): digest for step, (_, digest) in saved(whole).items()}
    assert average["snapshots"] == digests
    words = [f"--workdir={whole}", "--weights=ema,power:0.1,power:0.13", f"--out={tmp_path}"]
    assert grid.main(words) == 0
    cells = {
        c["settings"]["weights"]: c
        for c in json.loads((tmp_path / "grid.json").read_text())["cells"]
    }
    assert set(cells) == {"ema", "power:0.1", "power:0.13"}
    assert "average" not in cells["ema"]
    assert cells["power:0.1"]["average"]["snapshots"] == {"18": digests["18"]}
    assert cells["power:0.13"]["average"] == average
    assert cells["power:0.13"]["protocol"]["weights"] == "power:0.13"
    assert len({c["metrics"]["fd_halves"] for c in cells.values()}) == 3
    assert evaluate.main([f"--workdir={whole}", "--config.sample.weights=power:0.13"]) == 0
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["average"] == average
    assert found["metrics"]["fd_halves"] == cells["power:0.13"]["metrics"]["fd_halves"]


def test_snapshots_that_are_missing(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "averages" / "9")
    shutil.rmtree(folder / "averages" / "5")
    assert loaded(folder, "power:0.13")[1] == 18
    shutil.rmtree(folder / "averages" / "7")
    with pytest.raises(UserError, match=r"holds 15 snapshots up to step 18: 'power:0.13'.* 16;"):
        loaded(folder, "power:0.13")
    assert loaded(folder, "power:0.1")[1] == 18
    c = changed(opening.recipe_of(folder), {"sample": {"weights": "power:0.1"}})
    with pytest.raises(UserError, match="holds no snapshot of step 7: it has 1, 2"):
        opening.load_weights(c, make_task(c), folder, make_mesh(-1, 1), 7)
    shutil.rmtree(folder / "averages")
    with pytest.raises(UserError, match="averages does not exist: train on to the first snapshot"):
        loaded(folder, "power:0.1")


def test_snapshots_that_are_too_far_apart(whole, monkeypatch):
    monkeypatch.setattr(snapshots, "LARGEST_ERROR", 1e-3)
    with pytest.raises(UserError, match=r"'power:0.025' is missed by \d+%, expected at most 0%"):
        loaded(whole, "power:0.025")


def test_a_damaged_snapshot_is_not_used(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    position = folder / "averages" / "9" / "position" / "metadata"
    position.write_text(position.read_text().replace("9", "8"))
    with pytest.raises(UserError, match=r"snapshot 9 in .* is damaged: position/metadata is not"):
        loaded(folder, "power:0.13")


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("sample", {"weights": "power:0.3"}, "a width from 0.025 to 0.25"),
        ("sample", {"weights": "power:wide"}, "expected 'ema', 'model', 'ema:DECAY'"),
        ("sample", {"weights": "modle"}, "Did you mean 'model'?"),
        ("sample", {"weights": "ema:1.0"}, "a decay from 0 to below 1"),
        ("sample", {"weights": "ema:0.99"}, "the run keeps 'ema', 'model': expected one of these."),
        ("sample", {"weights": "power:0.1"}, "by config.train.average_stds and ema_decays"),
        ("train", {"average_stds": (0.3,)}, "expected each from 0.025 to 0.25"),
        ("train", {"ema_decays": (0.9, 0.9)}, "expected each value once"),
        ("train", {"average_stds": (0.1,)}, "makes none in 4000 steps: .* expected 1 to 250"),
        (
            "train",
            {"average_stds": (0.1,), "average_every_steps": 251},
            "makes 15 snapshots in 4000 steps: .* at least 16; expected 1 to 250",
        ),
    ],
)
def test_what_no_run_has(section, keys, message):
    c = read(load_recipe(["--config=digits"]))
    with pytest.raises(UserError, match=message):
        changed(c, {section: keys})


def test_training_refuses_weights_that_its_state_does_not_hold(tmp_path):
    words = [*WORDS, f"--workdir={tmp_path / 'run'}", "--config.sample.weights=power:0.13"]
    with pytest.raises(UserError, match=r"'power:0.13', which is made of a run's snapshots: train"):
        train.main(words)
    assert not (tmp_path / "run").exists()


def test_a_study_counts_their_memory():
    c, topology = read(load_recipe(["--config=base:XL/2"])), parse_topology("v5e:4x4")
    more = changed(
        c,
        {"train": {"average_stds": (0.05, 0.1), "average_every_steps": 1000, "ema_decays": (0.9,)}},
    )
    extra = estimate(more, topology).needed - estimate(c, topology).needed
    assert extra == 3 * 4 * cost_of(c).parameters
