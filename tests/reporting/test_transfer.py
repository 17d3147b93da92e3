"""Planted optima are found by width, and runs that do not form one study are refused."""

import json
import math

import pytest

from ditjax import transfer
from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
BEST = {"standard": lambda width: 8e-3 * 32 / width, "mup": lambda width: 4e-3}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(["--config=experiments/small/mup.py"])


def planted(recipe, study, root, parametrization, width, rate, seed, **changes):
    """A run whose loss has its minimum where it is planted."""
    config = dict(recipe)
    config["model"] = {
        **recipe["model"],
        "parametrization": parametrization,
        "size": f"2x{width}x2",
    }
    config["optim"] = {**recipe["optim"], "learning_rate": rate}
    config |= {"seed": seed, "sweep": {"grid": ()}}
    loss = 0.3 * math.exp(0.1 * math.log(rate / BEST[parametrization](width)) ** 2)
    name = f"{parametrization}-{rate}-{seed}"
    folder = study.write_run(root / name, 2, width, 2, 2, seed, config=config, **changes)
    result = json.loads((folder / "result.json").read_text())
    if "train" not in changes:
        result["train"]["final_loss"] = loss
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def small(recipe, study, tmp_path):
    """μP at one width and three rates."""
    for rate in RATES[:3]:
        planted(recipe, study, tmp_path, "mup", 32, rate, 0)
    return tmp_path


def test_planted_optima_are_found(recipe, study, tmp_path, capsys):
    for parametrization in BEST:
        for width in (32, 64, 128):
            for rate in RATES:
                for seed in (0, 1):
                    planted(recipe, study, tmp_path, parametrization, width, rate, seed)
    assert transfer.main([f"--runs={tmp_path}"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "transfer" / "transfer.json").read_text())
    assert len(found["curves"]) == 6
    for curve in found["curves"]:
        best = BEST[curve["parametrization"]](curve["width"])
        assert curve["best_by_seed"] == pytest.approx([best, best], rel=1e-6)
        assert curve["seeds"] == [0, 1]
    assert "standard: the best learning rate goes as width^-1.00, from 0.00800 at 32" in out
    assert "mup: the best learning rate goes as width^" in out
    assert "3 widths, 5 learning rates, 2 seeds." in out
    assert (tmp_path / "transfer" / "transfer.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_diverged_is_reported(small, capsys):
    path = next(small.glob("mup-0.004-0/*/result.json"))
    result = json.loads(path.read_text())
    result["train"]["final_loss"] = None
    path.write_text(json.dumps(result))
    transfer.main([f"--runs={small}"])
    out = capsys.readouterr().out
    assert "1 width, 3 learning rates, 1 seed, 1 diverged." in out
    assert "mup: one width, nothing to compare." in out
    assert "NaN   0.00200" in out  # beside a wall there is no parabola


def test_other_studies_are_refused(small, recipe, study):
    with pytest.raises(UserError, match=r"has no fid: --metric is one of .*final_loss"):
        transfer.main([f"--runs={small}", "--metric=fid"])
    twice = planted(recipe, study, small / "again", "mup", 32, 1e-3, 0)
    with pytest.raises(UserError, match=r"a second run of \('mup', 32, 0\.001, 0\)"):
        transfer.main([f"--runs={small}"])
    other = json.loads((twice / "result.json").read_text())
    other["config"]["seed"] = other["train"]["seed"] = 7
    other["config"]["train"]["batch_size"] = 8
    (twice / "result.json").write_text(json.dumps(other))
    with pytest.raises(
        UserError, match=r"train\.batch_size=16 and .* 8: name runs that differ only in"
    ):
        transfer.main([f"--runs={small}"])
    (small / "empty").mkdir()
    with pytest.raises(UserError, match="no readable result"):
        transfer.main([f"--runs={small / 'empty'}"])


def test_the_study_is_the_same_run_at_its_base(recipe):
    """At the narrowest width of the recipe both parametrizations are the same."""
    c = read(recipe)
    grid = dict(c.sweep.grid)
    width, heads = (int(word) for word in grid["model.size"][0].split("x")[1:])
    assert (c.model.base_width, c.model.base_head_width) == (width, width // heads)
    assert set(grid["model.parametrization"]) == {"standard", "mup"}
    assert changed(c, {"model": {"size": grid["model.size"][-1]}}).model.base_width == width
