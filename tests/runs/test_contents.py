"""A run is on the content of its data set and its autoencoder, wherever they lie."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditjax.config import Config, as_tree, merged, read
from ditjax.data import latents, source
from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.runs import contents, opening, rundir
from ditjax.studies import cells

AUTOENCODER = {"autoencoder": {"w": np.ones(3, np.float32)}}
OTHER = {"autoencoder": {"w": np.zeros(3, np.float32)}}


def recipe(name: str, data_dir: Path, **autoencoder: str) -> Config:
    return read(
        {
            "data": {"name": str(name), "image_size": 16, "data_dir": str(data_dir)},
            "autoencoder": {"kind": "kl" if autoencoder else "none", **autoencoder},
        }
    )


@lease.scope()
def opened(workdir: Path, c: Config, frozen=None) -> Path:
    """A run that has begun; again: one that resumes."""
    source.prepare(c.data.name, c.data.data_dir)
    opening.open_run(workdir, c, frozen)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    return workdir


@pytest.fixture
def photos(tmp_path):
    for name in ("robin", "wren"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = np.full((8, 8, 3), len(name), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "0.png")
    return tmp_path / "photos"


def encoded(folder, metadata="ab"):
    writer = latents.LatentWriter(
        folder, "train", (2, 2, 4), ("a",), 1, {"images": "x/1", "autoencoder_sha256": metadata}
    )
    moments = np.zeros((2, 2, 2, 4), np.float32)
    for shard in writer.missing():
        row = latents.LatentRecord(mean=moments, log_variance=moments, label=0)
        writer.write(shard, [row])
    writer.finish()
    return folder


def test_a_folder_that_is_moved_copied_or_spelled_otherwise(photos, tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    opened(run, recipe(f"folder:{photos}", data))
    (tmp_path / "link").symlink_to(photos)
    copy = shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for place in (f"{photos}/", f"{tmp_path}/x/../photos", tmp_path / "link", copy):
        opened(run, recipe(f"folder:{place}", data))
        assert f"is 'folder:{place}': the same content" in capsys.readouterr().err
    moved = photos.rename(tmp_path / "moved")
    opened(run, recipe(f"folder:{moved}", data))
    # On another machine, with data prepared anew.
    opened(run, recipe(f"folder:{copy}", tmp_path / "other data"))


def test_a_run_of_before_contents_were_recorded(photos, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    opened(run, recipe(f"folder:{photos}", data))
    (run / "contents.json").unlink()
    moved = photos.rename(tmp_path / "moved")
    opened(run, recipe(f"folder:{moved}", data))
    assert contents.read_contents(run) == contents.data_contents(recipe(f"folder:{moved}", data))


def test_other_content_is_refused(photos, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    name = f"folder:{photos}"
    opened(run, recipe(name, data))
    other = shutil.copytree(photos, tmp_path / "other")
    Image.new("RGB", (8, 8)).save(other / "wren" / "0.png")
    with pytest.raises(UserError, match=f"data.name='{name}', but this command has 'folder:"):
        opened(run, recipe(f"folder:{other}", data))
    # In the same place: the remedy of the refusal to read it is followed.
    Image.new("RGB", (8, 8)).save(photos / "wren" / "0.png")
    next((data / "image_folder").glob("photos-*.json")).unlink()
    with pytest.raises(UserError, match=r"config\.data\.name held 'image_folder/.* now: restore"):
        opened(run, recipe(name, data))


def test_a_recipe_that_never_began_leaves_no_contents(photos, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    opened(run, recipe(f"folder:{photos}", data))
    (run / "metrics.jsonl").unlink()
    opened(run, recipe("digits", data))
    assert contents.read_contents(run) == {"data.name": "digits/1.0.0"}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("digits", "digits:1.0.0"),
        ("digit_scenes/20", "digit_scenes/20:1.0.0"),
        ("digit_scenes/20", "digit_scenes/20-seed0"),
    ],
)
def test_another_spelling_of_a_prepared_set(tmp_path, before, now):
    data, run = tmp_path / "data", tmp_path / "run"
    opened(run, recipe(before, data))
    opened(run, recipe(now, data))
    with pytest.raises(UserError, match="but this command has 'digit_scenes/30'"):
        opened(run, recipe("digit_scenes/30", data))


def test_latents(tmp_path):
    run, place = tmp_path / "run", encoded(tmp_path / "l")
    opened(run, recipe(f"latents:{place}", tmp_path, path="ae"))
    opened(run, recipe(f"latents:{tmp_path}/run/../l/", tmp_path, path="ae"))
    moved = place.rename(tmp_path / "moved")
    opened(run, recipe(f"latents:{moved}", tmp_path, path="ae"))
    other = encoded(tmp_path / "other", "cd")
    with pytest.raises(UserError, match="but this command has 'latents:"):
        opened(run, recipe(f"latents:{other}", tmp_path, path="ae"))
    encoded(place, "cd")
    with pytest.raises(UserError, match=r"whose config\.data\.name held 'latents of x/1, "):
        opened(run, recipe(f"latents:{place}", tmp_path, path="ae"))


def test_an_autoencoder(tmp_path):
    run, name = tmp_path / "run", f"latents:{encoded(tmp_path / 'l')}"
    (tmp_path / "a").mkdir()

    def at(path, frozen=None):
        return opened(run, recipe(name, tmp_path, path=str(path)), frozen)

    at(tmp_path / "a", AUTOENCODER)
    at(f"{tmp_path}/x/../a/")  # the same place, whatever lies there
    at(tmp_path / "b", AUTOENCODER)
    with pytest.raises(UserError, match=r"autoencoder\.path='.*a', but this command has '.*b'"):
        at(tmp_path / "b", OTHER)
    with pytest.raises(UserError, match=r"autoencoder\.path='.*a', but this command has '.*b'"):
        at(tmp_path / "b")
    with pytest.raises(UserError, match=r"whose config\.autoencoder\.path held"):
        at(tmp_path / "a", OTHER)


def test_a_study(photos, tmp_path):
    data, root = tmp_path / "data", tmp_path / "study"
    first = recipe(f"folder:{photos}", data)
    opened(root / "runs" / "one", first)
    moved = photos.rename(tmp_path / "moved")
    now = recipe(f"folder:{moved}", data)
    source.prepare(now.data.name, data)
    study = cells.cells(merged(as_tree(now), {"sweep": {"seeds": (0,)}}))
    cells.check_same_study(root, as_tree(first), as_tree(now), study)
    cells.check_result(study[0], root / "runs" / "one", {"config": as_tree(first)})
    with pytest.raises(UserError, match=r"data\.name"):
        cells.check_same_study(root, as_tree(first), as_tree(recipe("digits", data)), study)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_record_is_no_record(tmp_path, text, capsys):
    (tmp_path / rundir.CONTENTS_FILE).write_text(text)
    assert contents.read_contents(tmp_path) == {}
    assert "contents.json is damaged: what the run began with is not" in capsys.readouterr().err


def test_features_of_a_file_that_is_moved(tmp_path):
    """Any other place whose content is on record: what a task's `open_rows` reads."""
    key, same = "align.teacher", {"align.teacher": "5ac3"}
    contents.record_contents(tmp_path, same)
    assert contents.same_content(tmp_path, same)(key, "file:a.npz", "file:/moved/a.npz")
    assert not contents.same_content(tmp_path, {key: "77"})(key, "file:a.npz", "file:b.npz")
    assert not contents.same_content(tmp_path, {})(key, "file:a.npz", "none")
