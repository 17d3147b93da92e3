"""What a user adds from outside is trained, sampled, evaluated, swept and planned as ours is."""

import json
from pathlib import Path

import numpy as np
import pytest

from ditjax import cli, evaluate, flops, grid, sample, sweep, train
from ditjax.config import as_tree, changed, read
from ditjax.errors import UserError
from ditjax.runs.results import load_samples
from ditjax.tasks import cost_of, make_task

RECIPE = "--config=tests/toys/recipe.py"

pytestmark = pytest.mark.usefixtures("own_data")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """A run of the toy recipe, by the ordinary command."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        patch.setenv("DITJAX_DATA", str(data_root))
        assert train.main([RECIPE, f"--workdir={folder}"]) == 0
    return folder


def test_it_is_trained_and_evaluated_on_the_way(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"root", "eval/fd_halves", "eval/val_loss"} <= rows[-1].keys()
    assert (trained / "samples" / "0000020.png").is_file()


def test_it_is_sampled_and_evaluated(trained, tmp_path):
    assert sample.main([f"--workdir={trained}", f"--out={tmp_path}", "--num=32"]) == 0
    images, label = load_samples(tmp_path / "samples.npz")
    assert images.shape == (32, 8, 8, 1)
    assert set(np.asarray(label)) == {0, 1}
    assert evaluate.main([f"--workdir={trained}"]) == 0
    record = json.loads((trained / "evaluation.json").read_text())
    assert {"fd_halves", "kd_halves", "precision_halves", "val_loss"} <= record["metrics"].keys()
    assert record["protocol"]["metric"] == "FD-halves"
    assert record["protocol"]["sampler"] == "tests.toys.functions.twice"


def test_it_is_gridded_and_swept(trained, tmp_path):
    words = ["--sampler=ddim,tests.toys.functions.twice", "--num=32", f"--out={tmp_path / 'grid'}"]
    assert grid.main([f"--workdir={trained}", *words]) == 0
    cells = json.loads((tmp_path / "grid" / "grid.json").read_text())["cells"]
    assert len(cells) == 2
    study = tmp_path / "study"
    short = ["--config.train.steps=10", "--config.train.checkpoint_every_steps=5"]
    assert sweep.main([RECIPE, *short, f"--workdir={study}", "--jobs=1"]) == 0
    results = {
        path.parent.name: json.loads(path.read_text()) for path in study.rglob("result.json")
    }
    assert set(results) == {"Conv-4-seed0", "Conv-8-seed0"}
    for width, result in zip((4, 8), (results[name] for name in sorted(results)), strict=True):
        assert result["model"] == {"name": f"Conv-{width}", "width": width}
        assert result["metrics"]["fd_halves"] > 0
    assert "Conv-8" in (study / "report" / "index.html").read_text()


def test_its_cost_is_known(capsys):
    c = read(cli.load_recipe([RECIPE]))
    shapes = make_task(c).init
    import jax

    tree = jax.eval_shape(shapes, jax.random.key(0))
    assert cost_of(c).parameters == sum(x.size for x in jax.tree.leaves(tree))
    assert flops.main([RECIPE]) == 0
    assert "Conv-8" in capsys.readouterr().out
    assert sweep.main([RECIPE, "--workdir=x", "--dry_run", "--topology=v5e:2x2"]) == 0
    assert "chip-hours" in capsys.readouterr().out


def test_a_network_of_a_study_may_be_another():
    """model.kind is an axis, and keys of either network are legal in the study."""
    from ditjax.studies.cells import cells

    lists = (
        (("model.kind", "dit"), ("model.size", "1x32x2")),
        (("model.kind", "tests.toys.network"), ("model.width", 4)),
    )
    c = changed(read(cli.load_recipe([RECIPE])), {"sweep": {"grid": (), "lists": lists}})
    study = cells(as_tree(c))
    assert [cell.model for cell in study] == ["DiT-1x32x2/2", "Conv-4"]
    assert len({cell.name for cell in study}) == 2


def test_a_task_of_its_own(tmp_path, capsys):
    words = [
        "--config.optim.learning_rate=0.05",
        "--config.data.name=tests.toys.data.Sides",
        "--config.data.image_size=8",
        "--config.data.channels=1",
        "--config.data.num_classes=2",
        "--config.train.steps=60",
        "--config.train.batch_size=16",
        "--config.train.log_every_steps=20",
        "--config.evaluate.split=test",
        "--config.brightness.weight=2",
    ]
    recipe = tmp_path / "mine.py"
    recipe.write_text("def get_config():\n    return {'task': 'tests.toys.task'}\n")
    run = tmp_path / "run"
    assert train.main([f"--config={recipe}", *words, f"--workdir={run}"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == pytest.approx(2 * rows[-1]["mse"])
    assert rows[-1]["mse"] < rows[0]["mse"]
    assert evaluate.main([f"--workdir={run}"]) == 0
    record = json.loads((run / "evaluation.json").read_text())
    assert 0 < record["metrics"]["mse"] < 0.1
    with pytest.raises(UserError, match="is a run of a Brightness, which draws no samples"):
        sample.main([f"--workdir={run}"])
    assert flops.main([f"--config={recipe}", *words]) == 0
    assert "Brightness" in capsys.readouterr().out
