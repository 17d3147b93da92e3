"""A directory belongs to one recipe."""

import json

import pytest

from ditjax.errors import UserError
from ditjax.io import rundir

RECIPE = {"seed": 0, "train": {"steps": 10, "batch_size": 4}, "multipliers": (1, 2)}


def test_the_same_recipe_comes_in_again(tmp_path):
    folder = rundir.open_run(tmp_path / "a" / "run", RECIPE)
    assert rundir.read_recipe(folder) == json.loads(json.dumps(RECIPE))
    rundir.open_run(folder, RECIPE)
    rundir.open_run(folder, {**RECIPE, "train": {"steps": 20, "batch_size": 4}})
    assert rundir.read_recipe(folder)["train"]["steps"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=0, this command says 1"),
        ({"train": {"steps": 10, "batch_size": 8}}, r"train\.batch_size=4, this command says 8"),
        ({"multipliers": (1, 4)}, r"multipliers=\[1, 2\], this command says \[1, 4\]"),
        ({"new": 3}, "new=None, this command says 3"),
    ],
)
def test_another_recipe_does_not(tmp_path, change, message):
    rundir.open_run(tmp_path, RECIPE)
    with pytest.raises(UserError, match=message):
        rundir.open_run(tmp_path, {**RECIPE, **change})


def test_damage_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        rundir.open_run(tmp_path, RECIPE)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no recipe"):
        rundir.read_recipe(tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        rundir.read_recipe(tmp_path / "none")


def test_a_study_is_not_a_run(tmp_path):
    rundir.open_study(tmp_path / "study", RECIPE)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is a single run's"):
        rundir.open_study(tmp_path / "run", RECIPE)
