"""Every command on a folder of images: trained, evaluated meanwhile and after, gridded, swept."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ditjax import evaluate, grid, sweep, train
from ditjax.data.records import load_arrays
from ditjax.errors import UserError
from tests.commands.conftest import TOY


@pytest.fixture(scope="session")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of two classes as PNGs, with a split to validate on."""
    folder = tmp_path_factory.mktemp("some data") / "robin.s"
    for split, count in (("train", 60), ("val", 30)):
        rows = load_arrays("digits", f"train[:{5 * count}]", data_dir)
        chosen = [i for i, label in enumerate(rows["label"]) if label < 2][:count]
        for i in chosen:
            place = folder / split / ("robin", "wren")[rows["label"][i]] / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rows["image"][i, :, :, 0]).save(place)
    return folder


def words(folder: Path) -> list[str]:
    return [
        *TOY,
        f"--config.data.name=folder:{folder}",
        "--config.data.num_classes=2",
        "--config.evaluate.split=val",
        "--config.evaluate.val_loss_num=16",
        "--config.train.evaluate_num=40",
    ]


@pytest.fixture(scope="module")
def run(folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that was scored while it trained."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        patch.chdir(Path(__file__).parent.parent.parent)
        every = "--config.train.evaluate_every_steps=10"
        assert train.main([*words(folder), every, f"--workdir={workdir}"]) == 0
    return workdir


def test_it_is_scored_while_it_trains(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/fd_digits" in row] == [10, 20]


def test_it_is_evaluated_against_its_training_split(run, folder, capsys):
    assert evaluate.main([f"--workdir={run}"]) == 0
    record = json.loads((run / "evaluation.json").read_text())
    assert record["reference"] == f"folder:{folder}/train, 8x8"
    assert record["protocol"]["reference_count"] == 60
    assert record["protocol"]["val_loss_data"].endswith("/2.0.0/val")
    named = [f"--workdir={run}", f"--reference=folder:{folder}/train"]
    assert evaluate.main(named) == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert again["protocol_hash"] == record["protocol_hash"]
    assert not list(run.glob("evaluation-*"))
    capsys.readouterr()
    assert evaluate.main([f"--workdir={run}", f"--reference=folder:{folder}/val"]) == 0
    other = json.loads((run / "evaluation.json").read_text())
    assert other["protocol"]["reference_count"] == 30
    # What was scored before is not lost.
    kept = run / f"evaluation-{again['protocol_hash']}.json"
    assert f"is kept as {kept}" in capsys.readouterr().err
    assert json.loads(kept.read_text()) == again


def test_a_grid(run, tmp_path):
    assert grid.main([f"--workdir={run}", "--cfg_scale=1", f"--out={tmp_path}"]) == 0
    (cell,) = json.loads((tmp_path / "grid.json").read_text())["cells"]
    assert cell["protocol"]["reference_count"] == 60


def test_a_sweep(folder, tmp_path):
    few = ("--config.evaluate.val_loss_num=0", "--config.evaluate.guided_scale=0")
    one = "--config.sweep.grid=(('seed', (0,)),)"
    assert sweep.main([*words(folder), *few, one, f"--workdir={tmp_path}"]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["protocol"]["reference_count"] == 60


def test_its_own_images_are_scored_as_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    named = [f"--samples={folder / 'train'}", f"--reference=folder:{folder}", "--features=digits"]
    assert evaluate.main([*named, f"--out={out}"]) == 0
    assert json.loads(out.read_text())["metrics"]["fd_digits"] == pytest.approx(0, abs=1e-6)
    told = capsys.readouterr().err
    assert f"samples: 60 images of 8x8 in {folder / 'train'}; nothing left out" in told


def test_a_class_that_is_missing_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for split in ("train", "val"):
        for file in (copy / split / "wren").iterdir():
            file.rename(file.with_suffix(".heic"))
    expected = r"has 1 class \(robin\) and, left out: files.* folders without images 2 \(train/wren"
    with pytest.raises(UserError, match=expected):
        train.main([*words(copy), f"--workdir={tmp_path / 'run'}"])
