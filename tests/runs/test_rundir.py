"""A directory belongs to one recipe."""

import json
import os
from typing import Any

import pytest

from ditjax.config import read
from ditjax.data.classes import class_names
from ditjax.errors import UserError
from ditjax.files import atomic
from ditjax.runs import opening, rundir

RECIPE: dict[str, Any] = {
    "seed": 0,
    "task": "diffusion",
    "train": {"steps": 10, "batch_size": 4},
    "autoencoder": {"multipliers": (1, 2)},
}


def begun(folder):
    """A run that has logged something."""
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_the_same_recipe_comes_in_again(tmp_path):
    folder = begun(rundir.open_directory(tmp_path / "a" / "run", RECIPE))
    assert rundir.read_recipe(folder) == json.loads(json.dumps(RECIPE))
    rundir.open_directory(folder, RECIPE)
    rundir.open_directory(folder, {**RECIPE, "train": {"steps": 20, "batch_size": 4}})
    assert rundir.read_recipe(folder)["train"]["steps"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=0, but this command has 1"),
        ({"train": {"steps": 10, "batch_size": 8}}, r"train\.batch_size=4, but this command has 8"),
        (
            {"autoencoder": {"multipliers": (1, 4)}},
            r"autoencoder\.multipliers=\[1, 2\], but this command has \[1, 4\]",
        ),
        ({"model": {"patch": 4}}, r"model\.patch=2, but this command has 4"),
        ({"task": "autoencoder"}, "task='diffusion', but this command has 'autoencoder'"),
        ({"new": 3}, "new=None, but this command has 3"),
    ],
)
def test_another_recipe_does_not(tmp_path, change, message):
    begun(rundir.open_directory(tmp_path, RECIPE))
    with pytest.raises(UserError, match=message):
        rundir.open_directory(tmp_path, {**RECIPE, **change})


@pytest.mark.parametrize("left", [(), ("checkpoints",), ("checkpoints", "log.txt", ".lease")])
def test_one_that_was_refused_before_it_began_makes_room(tmp_path, left):
    rundir.open_directory(tmp_path, RECIPE)
    for name in left:
        (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).touch()
    rundir.open_directory(tmp_path, {**RECIPE, "seed": 1})
    assert rundir.read_recipe(tmp_path)["seed"] == 1
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match="seed=1, but this command has 2"):
        rundir.open_directory(tmp_path, {**RECIPE, "seed": 2})


def test_a_run_of_before_a_key_comes_in_with_what_it_ran_with(tmp_path):
    """A key that a run did not record had its default; before tasks `train` named the network."""
    old: dict[str, Any] = {
        "seed": 0,
        "train": {"network": "dit", "steps": 10, "batch_size": 4},
        "autoencoder": {"multipliers": (1, 2)},
    }
    (begun(tmp_path) / "config.json").write_text(json.dumps(old))
    rundir.open_directory(tmp_path, RECIPE)
    rundir.open_directory(tmp_path, {**RECIPE, "data": {"flip": True}})
    with pytest.raises(UserError, match=r"data\.flip=True, but this command has False"):
        rundir.open_directory(tmp_path, {**RECIPE, "data": {"flip": False}})
    old["train"]["network"] = "autoencoder"
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="task='autoencoder', but this command has 'diffusion'"):
        rundir.open_directory(tmp_path, RECIPE)


def test_what_a_resumed_run_may_change_is_said_by_the_keys(tmp_path):
    """A whole section of them, and one key of a section that is otherwise what is learned."""
    begun(rundir.open_directory(tmp_path, RECIPE))
    changes = {"mesh": {"fsdp": 8}, "sample": {"num": 3}, "model": {"remat": "full"}}
    rundir.open_directory(tmp_path, {**RECIPE, **changes})
    found = rundir.differences(RECIPE, {**RECIPE, **changes}, also=("model.remat", "sample.num"))
    assert list(found) == [("model.remat", "none", "full"), ("sample.num", 64, 3)]


def cosine(steps: int, *restarts: int) -> dict[str, Any]:
    optim = {"schedule": "cosine", "restarts": restarts}
    return {**RECIPE, "optim": optim, "train": {**RECIPE["train"], "steps": steps}}


def test_another_end_of_a_cosine_is_another_recipe(tmp_path):
    begun(rundir.open_directory(tmp_path, cosine(20)))
    for steps in (10, 40):
        with pytest.raises(
            UserError,
            match=rf"train.steps=20, but this command has {steps}, and optim.schedule='cosine'"
            r" depends on it: .*--config.optim.restarts=20,\.",
        ):
            rundir.open_directory(tmp_path, cosine(steps))
    # The first schedule must stay what it was, whether it is over or not.
    for restarts in [(10,), (30,), (10, 20)]:
        with pytest.raises(UserError, match=r"optim.restarts=\[\], but .*restarts=20,\."):
            rundir.open_directory(tmp_path, cosine(40, *restarts))
    assert rundir.read_recipe(tmp_path)["train"]["steps"] == 20


def test_a_run_is_extended_by_a_new_schedule_and_that_is_recorded(tmp_path):
    begun(rundir.open_directory(tmp_path, cosine(20)))
    for steps, restarts in [(40, (20,)), (50, (20, 40))]:
        for _ in range(2):
            rundir.open_directory(tmp_path, cosine(steps, *restarts))
        recorded = rundir.read_recipe(tmp_path)
        assert recorded["optim"]["restarts"] == list(restarts)
        assert recorded["train"]["steps"] == steps
    with pytest.raises(UserError, match=r"optim.restarts=\[20, 40\], but .* has \[\]"):
        rundir.open_directory(tmp_path, cosine(20))


def test_the_steps_of_a_constant_rate_are_free(tmp_path):
    begun(rundir.open_directory(tmp_path, RECIPE))
    rundir.open_directory(tmp_path, {**RECIPE, "train": {**RECIPE["train"], "steps": 99}})


def test_a_damaged_schedule_is_refused_in_one_line(tmp_path):
    begun(rundir.open_directory(tmp_path, cosine(20)))
    for damage in ({"optim": 3}, {"optim": {"restarts": 5}}, {"train": {"steps": "x"}}):
        recorded = {**cosine(20), **damage}
        (tmp_path / "config.json").write_text(json.dumps(recorded))
        with pytest.raises(UserError, match="holds a run with"):
            rundir.open_directory(tmp_path, cosine(20))


def test_damage_is_named(tmp_path):
    (begun(tmp_path) / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        rundir.open_directory(tmp_path, RECIPE)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no recipe"):
        rundir.read_recipe(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        rundir.read_recipe(tmp_path / "none")


def test_a_study_is_not_a_run(tmp_path):
    for _ in range(2):
        rundir.open_study(tmp_path / "study", RECIPE, {"cells": [1]})
    assert sorted(os.listdir(tmp_path / "study")) == ["config.json", "sweep.json"]
    written = (tmp_path / "study" / "sweep.json").stat().st_ino
    rundir.open_study(tmp_path / "study", {**RECIPE, "new": 1}, {"cells": [1]})
    assert (tmp_path / "study" / "sweep.json").stat().st_ino == written, "it says the same"
    assert rundir.read_recipe(tmp_path / "study")["new"] == 1
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a single run"):
        rundir.open_study(tmp_path / "run", RECIPE, {})


def test_what_a_dead_writer_left_goes(tmp_path):
    for name in (".config.json.0a1b2c3d.tmp", "samples/.0000020.png.0a1b2c3d.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
    (tmp_path / "samples" / "0000010.png").write_text("kept")
    rundir.tidy(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "samples",
        "samples/0000010.png",
    ]


def test_names_of_runs():
    assert rundir.legal_name("DiT-4x96x3-p1-seed0") == "DiT-4x96x3-p1-seed0"
    assert rundir.legal_name("../a b/é") == "x.._a_b__"
    assert rundir.legal_name("") == "x"
    one, other = (rundir.legal_name("a" * 200 + end) for end in "xy")
    assert len(one) == len(other) == 128
    assert one[:115] == other[:115]
    assert one != other


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".x", "-x", "a\n", "é", "a" * 129])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(UserError, match="expected 1 to 128 ASCII letters"):
        rundir.inside(tmp_path, name)


def test_a_link_out_of_the_root_is_refused(tmp_path):
    root = tmp_path / "study"
    (root / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    assert rundir.inside(root, "new") == root / "new"
    assert rundir.inside(tmp_path / "link", "there") == tmp_path / "link" / "there"
    (root / "out").symlink_to(tmp_path)
    (root / "other").symlink_to(root / "there" / "deep")
    for name in ("out", "other"):
        with pytest.raises(UserError, match=f"{name} is a link to .*, outside of .*: remove it"):
            rundir.inside(root, name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nests more than 100 deep"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nests too deep"),
        (b"\xff", "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_recipes_that_nest_too_deep_or_are_no_text(tmp_path, content, match):
    (begun(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json is damaged: .*{match}"):
        rundir.open_directory(tmp_path, RECIPE)


def test_a_recipe_is_of_a_bounded_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(b'{"seed": 0}' + b" " * 100)
    assert rundir.read_recipe(tmp_path) == {"seed": 0}
    monkeypatch.setattr(atomic.load_json, "__defaults__", (50,))
    with pytest.raises(UserError, match="it has more than 50 bytes"):
        rundir.read_recipe(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        rundir.read_recipe(tmp_path)


def test_the_names_of_the_classes_are_recorded_at_the_first_start(tmp_path):
    rundir.open_directory(tmp_path, RECIPE, classes=["robin", "wren"])
    assert rundir.read_classes(tmp_path) == ["robin", "wren"]
    # It has not begun: another recipe and other classes may still take its place.
    rundir.open_directory(tmp_path, {**RECIPE, "seed": 1}, classes=["wren", "token=abcdefgh1"])
    begun(tmp_path)
    rundir.open_directory(tmp_path, {**RECIPE, "seed": 1}, classes=["wren", "token=abcdefgh1"])
    rundir.open_directory(tmp_path, {**RECIPE, "seed": 1})
    for classes, k in ((["wren", "owl"], 1), (["wren"], 1), (["robin", "wren"], 0)):
        with pytest.raises(UserError, match=rf"holds a run whose class {k} is "):
            rundir.open_directory(tmp_path, {**RECIPE, "seed": 1}, classes=classes)


def test_a_run_of_before_classes_were_recorded_records_them_when_it_resumes(tmp_path):
    begun(rundir.open_directory(tmp_path, RECIPE))
    assert rundir.read_classes(tmp_path) is None
    rundir.open_directory(tmp_path, RECIPE, classes=["robin", "wren"])
    assert rundir.read_classes(tmp_path) == ["robin", "wren"]


def test_damaged_names_of_classes_are_refused(tmp_path):
    c = read({"data": {"num_classes": 2}})
    for text, match in [
        ("[", "is not JSON"),
        ('{"classes": 3}', "holds no list of names"),
        ('{"classes": [1, 2]}', "holds no list of names"),
        ('{"classes": ["a"]}', "names 1 classes, and the run has 2"),
    ]:
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(UserError, match=match):
            opening.class_names_of(tmp_path, c)


@pytest.mark.parametrize(
    ("name", "classes", "known"),
    [
        ("imagenet2012", 1000, True),
        ("imagenet2012:5.1.0", 1000, True),
        ("imagenet2012_subset", 1000, False),
        ("folder:/data/mine", 1000, False),
        ("imagenet2012", 10, False),
    ],
)
def test_an_old_run_has_imagenets_names_if_it_is_imagenets(tmp_path, name, classes, known):
    c = read({"data": {"name": name, "num_classes": classes}})
    assert opening.class_names_of(tmp_path, c) == (class_names() if known else None)


@pytest.mark.parametrize(
    "recipe",
    [
        {"task": "os.path"},
        {"diffusion": {"loss": "os.system"}},
        {"data": {"name": "subprocess.Popen"}},
        {"evaluate": {"features": "pickle.loads"}},
        {"model": {"kind": "code.interact"}},
        {"sample": {"sampler": "shutil.rmtree"}},
    ],
)
def test_a_recorded_recipe_names_no_module_of_python(recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=r"config\.json names '\w+\.\w+' as config\..*do not use"):
        rundir.read_recipe(tmp_path)


def test_a_module_that_a_recorded_recipe_imports_is_named(tmp_path, capsys):
    recipe = {"task": "my_package.my_task", "evaluate": {"reference": "statistics.npz"}}
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    assert rundir.read_recipe(tmp_path) == recipe
    path = tmp_path / "config.json"
    assert capsys.readouterr().err == (
        f"note: {path} names 'my_package.my_task' as config.task: this module is imported\n"
    )
    # What the command has imported already, because its own recipe names it, is no news.
    path.write_text(json.dumps({"task": "ditjax.tasks.diffusion"}))
    rundir.read_recipe(tmp_path)
    assert capsys.readouterr().err == ""
