"""The evaluation grid from end to end on a tiny run: shared noise, cached cells, one protocol."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from ditjax import grid
from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.diffusion import solvers
from ditjax.errors import UserError
from ditjax.files.atomic import protocol_hash, write_json
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.results import load_samples
from ditjax.sampling.draw import Drawer
from ditjax.tasks import cost_of, diffusion, make_task
from tests.commands.conftest import TINY

AXES = ("--cfg_scale=1,3,4", "--cfg_channels=all,three", "--weights=ema,model")


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compiled samplers, kept from test to test: all of them draw on one mesh."""
    kept: dict = {}
    init = Drawer.__init__

    def with_kept(self, mesh, frozen):
        init(self, mesh, frozen)
        self._programs = kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawer, "__init__", with_kept)
        yield kept


@pytest.fixture(scope="module")
def made(toy, programs, tmp_path_factory):
    """(folder, traces of the sampler) of a grid of 2 weights x 3 scales."""
    traced = []
    denoiser = diffusion.denoiser

    def counted(*args):
        traced.append(args)
        return denoiser(*args)

    out = tmp_path_factory.mktemp("grid")
    programs.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "denoiser", counted)
        assert grid.main([f"--workdir={toy}", *AXES, "--keep_samples", f"--out={out}"]) == 0
    return out, len(traced)


def cells(out):
    return json.loads((out / "grid.json").read_text())["cells"]


def numbers(out):
    """All of a grid but for the time it took."""
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in cells(out)]


def samples(out, **settings):
    (cell,) = [c for c in cells(out) if c["settings"].items() >= settings.items()]
    return load_samples(out / "cells" / cell["name"] / "samples.npz")


def test_a_grid(made, toy):
    out, _ = made
    found = json.loads((out / "grid.json").read_text())
    asked = [(c["settings"]["weights"], c["settings"]["cfg_scale"]) for c in found["cells"]]
    assert asked == [(w, s) for w in ("ema", "model") for s in (1.0, 3.0, 4.0)]
    assert found["varying"] == ["weights", "cfg_scale"]
    assert found["distance"] == "fd_digits"
    values = {c["name"]: c["metrics"]["fd_digits"] for c in found["cells"]}
    assert found["best"] == min(values, key=values.__getitem__)
    assert len(set(values.values())) == 6
    forward = cost_of(opening.recipe_of(toy)).gflops
    for cell in found["cells"]:
        # ddim3: three evaluations, twice where guided
        twice = 1 if cell["settings"]["cfg_scale"] == 1 else 2
        assert cell["sampling_gflops"] == pytest.approx(3 * forward * twice)
        assert cell["protocol_hash"] == protocol_hash(cell["protocol"])
        assert cell["protocol"]["cfg_scale"] == cell["settings"]["cfg_scale"]
        assert cell["step"] == 20
        folder = out / "cells" / cell["name"]
        assert json.loads((folder / "evaluation.json").read_text())["name"] == cell["name"]
        assert (folder / "samples.png").exists()
    rows = list(csv.DictReader((out / "grid.csv").open()))
    assert [float(row["metrics.fd_digits"]) for row in rows] == list(values.values())
    assert {p.name for p in out.iterdir()} == {
        "cells",
        "grid.csv",
        "grid.json",
        "grid.txt",
        "pareto.png",
    }
    assert not (toy / "grid").exists()


PUBLISHED = """
from experiments import digits

def get_config():
    config = digits.get_config()
    steps = (("train.steps", 20), ("sample.weights", "ema"))
    config.sweep.published = (
        ((*steps, ("sample.cfg_scale", 3.0)), "fd_digits", 30.0),
        ((*steps, ("sample.cfg_scale", 1.0)), "accuracy", 0.5),
        ((("train.steps", 21), ("sample.cfg_scale", 4.0)), "fd_digits", 40.0),
    )
    config.sweep.published_protocol = (
        ("image_size", "8"), ("num_classes", "10"), ("steps", "20"), ("labels", "balanced"),
        ("cfg_channels", "three"),
    )
    config.sweep.published_source = "a book"
    return config
"""


def test_published_figures_stand_beside_their_cells(made, toy, tmp_path, capsys):
    out = tmp_path / "grid"
    shutil.copytree(made[0], out)
    recipe = tmp_path / "book.py"
    recipe.write_text(PUBLISHED)
    words = [f"--workdir={toy}", *AXES, "--keep_samples", f"--out={out}"]
    assert grid.main([*words, f"--published={recipe}"]) == 0
    free, guided = json.loads((out / "grid.json").read_text())["scored"]
    assert (guided["metric"], guided["published"]) == ("fd_digits", 30.0)
    assert guided["cell"].endswith("weights=ema cfg_scale=3")
    (cell,) = [
        c
        for c in cells(out)
        if c["settings"]["weights"] == "ema" and c["settings"]["cfg_scale"] == 3
    ]
    assert guided["measured"] == cell["metrics"]["fd_digits"]
    assert guided["verdict"] == "not comparable", "all channels and not three"
    assert (free["metric"], free["verdict"]) == ("accuracy", "noise unknown")
    text = (out / "grid.txt").read_text()
    assert "published: figures of others (a book); measured: ours." in text
    assert "labels: ours uniform, published balanced (all)" in text
    assert text in capsys.readouterr().out
    assert numbers(out) == numbers(made[0]), "a cell was drawn again"
    recipe.write_text("from experiments.digits import get_config")
    with pytest.raises(UserError, match="published is empty; expected a recipe"):
        grid.main([*words, f"--published={recipe}"])


def test_a_scale_or_other_weights_compile_nothing_anew(made):
    assert made[1] == 2, "one sampler without guidance, one with"


def test_what_comes_to_the_same_or_is_illegal_is_told_in_a_line(made, toy, capsys):
    """Without guidance 'three' is 'all'; with it, digits have no three channels."""
    assert grid.main([f"--workdir={toy}", *AXES, f"--out={made[0]}", "--dry_run"]) == 0
    told = capsys.readouterr()
    same, illegal = told.err.strip().splitlines()
    assert "2 cells left out as repeated: " in same
    assert same.endswith("weights=ema cfg_channels=three cfg_scale=1 is weights=ema cfg_scale=1")
    assert "4 cells left out as illegal: config.sample.cfg_channels is 'three'" in illegal
    assert [line.split()[-1] for line in told.out.splitlines()[1:]] == ["yes"] * 6


def test_a_run_that_guides_itself_scores_as_without_guidance(made, toy, tmp_path):
    """RUN@STEP is the weak network: here the run's own last checkpoint."""
    words = (f"--workdir={toy}", "--cfg_scale=3", f"--out={tmp_path}")
    assert grid.main([*words, f"--config.sample.guide={toy}@20"]) == 0
    (cell,) = cells(tmp_path)
    free = next(each for each in cells(made[0]) if each["settings"]["cfg_scale"] == 1.0)
    assert cell["metrics"]["fd_digits"] == free["metrics"]["fd_digits"]
    assert cell["protocol"]["guide"] == cell["params_sha256"]
    assert cell["sampling_gflops"] == pytest.approx(2 * free["sampling_gflops"])
    with pytest.raises(UserError, match="no checkpoint of step 7: it has 20"):
        grid.main([*words, f"--config.sample.guide={toy}@7"])


def test_a_finished_cell_is_not_drawn_again(made, toy, monkeypatch):
    monkeypatch.setattr(
        Drawer, "__call__", lambda *a, **k: pytest.fail("a finished cell was drawn")
    )
    out, before = made[0], numbers(made[0])
    assert grid.main([f"--workdir={toy}", *AXES, f"--out={out}", "--keep_samples"]) == 0
    assert numbers(out) == before


def test_cells_share_their_noise_and_labels(toy, monkeypatch):
    """Whatever sampler, steps and guidance: sample i starts from the same x_T."""
    c = opening.recipe_of(toy)
    mesh = make_mesh(-1, 1)
    params, _ = opening.load_weights(c, make_task(c), toy, mesh)
    for name in ("ddpm", "ddim"):
        given = solvers.SAMPLERS[name]._replace(solve=lambda denoise, o, times, x_T, *a, **k: x_T)
        monkeypatch.setitem(solvers.SAMPLERS, name, given)
    drawer = Drawer(mesh, {})
    monkeypatch.setattr(drawer, "_programs", {})
    drawn = [
        drawer.whole(changed(c, {"sample": settings}), params, 40, seed=0)
        for settings in (
            {},
            {
                "sampler": "ddpm",
                "steps": "7",
                "cfg_scale": 3.0,
                "cfg_interval": (0.2, 0.6),
                "batch_size": 16,
            },
        )
    ]
    one, other = drawn
    np.testing.assert_array_equal(other.images, one.images)
    np.testing.assert_array_equal(other.label, one.label)
    assert len({image.tobytes() for image in one.images}) == 40


def test_guidance_on_the_whole_interval_is_guidance(made, toy, tmp_path):
    """The same cell, bit for bit; and an interval that holds every step, to a rounding."""
    words = [f"--workdir={toy}", "--cfg_scale=3", "--weights=model", f"--out={tmp_path}"]
    assert grid.main([*words, "--keep_samples", "--cfg_interval=0:1,0:0.9999,0.2:0.6"]) == 0
    whole = {"weights": "model", "cfg_scale": 3.0, "cfg_interval": [0.0, 1.0]}
    plain, label = samples(made[0], **whole)
    images, again = samples(tmp_path, **whole)
    np.testing.assert_array_equal(images, plain)
    np.testing.assert_array_equal(again, label)
    (ours,) = [cell for cell in numbers(tmp_path) if cell["settings"].items() >= whole.items()]
    assert ours in numbers(made[0])
    # ddim3 steps at 0, 334, 668: all of them lie below 0.9999, one lies from 0.2 to 0.6.
    nearly, _ = samples(tmp_path, cfg_interval=[0.0, 0.9999])
    assert np.abs(nearly.astype(int) - plain).max() <= 1
    part, _ = samples(tmp_path, cfg_interval=[0.2, 0.6])
    unguided, _ = samples(made[0], weights="model", cfg_scale=1.0)
    assert (part != plain).any()
    assert (part != unguided).any()
    assert [cell["sampling_gflops"] / ours["sampling_gflops"] for cell in cells(tmp_path)] == [
        pytest.approx(1),
        pytest.approx(1),
        pytest.approx(4 / 6),
    ]


def test_a_stale_or_damaged_cell_is_done_again_and_others_are_not(made, toy, tmp_path, capsys):
    out = tmp_path / "grid"
    shutil.copytree(made[0], out)
    before = numbers(out)
    old = {"seed": 5, "reference_sha256": "1" * 64}
    for k, change in enumerate(
        (
            {"params_sha256": "0" * 64, "step": 10},
            None,
            {"protocol": before[2]["protocol"] | old, "protocol_hash": "0123456789ab"},
        )
    ):
        path = out / "cells" / before[k]["name"] / "evaluation.json"
        record = {**json.loads(path.read_text()), "metrics": {"fd_digits": 0.0}}
        path.write_text(json.dumps(record | change) if change else path.read_text()[:100])
    stamp = {cell["name"]: _stamp(out, cell) for cell in before}
    assert grid.main([f"--workdir={toy}", *AXES, f"--out={out}"]) == 0
    err = capsys.readouterr().err
    assert f"{before[0]['name']} is stale (step 10, now 20, params_sha256 000000000000, now" in err
    assert f"{before[2]['name']} is stale (reference_sha256 111111111111, now" in err
    assert "seed 5, now 0): it is computed again." in err
    assert "is not a complete cell (JSONDecodeError" in err
    assert numbers(out) == before
    again = [cell["name"] for cell in before if _stamp(out, cell) != stamp[cell["name"]]]
    assert again == [cell["name"] for cell in before[:3]]
    assert not list(out.rglob("*.npz")), "samples go unless they are asked for"
    assert len(list(out.rglob("samples.png"))) == 6


def _stamp(out, cell):
    return (out / "cells" / cell["name"] / "evaluation.json").stat().st_mtime_ns


def test_killed_in_a_cell_it_goes_on_to_the_same_table(finished, tmp_path):
    """SIGKILL in the second cell: its parts are kept, the first cell is not drawn again."""
    words = [f"--workdir={finished}", "--cfg_scale=3,4", "--weights=model", "--num=200"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "ditjax.grid", *words, f"--out={out}"],
        stdout=subprocess.DEVNULL,
        stderr=(log := tmp_path / "log").open("wb"),
        env=os.environ,
    )
    deadline = time.monotonic() + 120
    while len(parts := list(out.glob("cells/*cfg_scale_4*/samples.npz.parts/0*.npz"))) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = out.glob("cells/*/evaluation.json")
    assert not (out / "grid.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (first, *parts)}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        call = Drawer.__call__

        def counted(self, c, params, ranges, **k):
            drawn.extend(ranges)
            return call(self, c, params, ranges, **k)

        patch.setattr(Drawer, "__call__", counted)
        assert grid.main([*words, f"--out={out}"]) == 0
    assert sum(stop - start for start, stop in drawn) <= 200 - 40 * len(parts)
    assert first.stat().st_mtime_ns == kept[first]
    whole = tmp_path / "whole"
    assert grid.main([*words, f"--out={whole}"]) == 0
    assert numbers(out) == numbers(whole)
    assert (out / "pareto.png").read_bytes() == (whole / "pareto.png").read_bytes()


def test_runs_of_one_protocol_share_a_grid(made, toy, tmp_path, capsys):
    """Two runs of one name; of another image count or seed they are refused before any drawing."""
    other = tmp_path / "other" / toy.name
    shutil.copytree(toy, other)
    words = [f"--workdir={toy},{other}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="a grid of 2 runs needs --out"):
        grid.main(words[:1])
    recipe = json.loads((other / "config.json").read_text())
    recipe["evaluate"]["seed"] = 1
    (other / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=r"has seed=1, and .* 0: such numbers cannot be compared"):
        grid.main(words)
    assert not list((tmp_path / "out").rglob("*.npz"))
    assert grid.main([*words, "--config.evaluate.seed=0"]) == 0
    first, second = cells(tmp_path / "out")
    assert first["metrics"] == second["metrics"]
    assert first["run"] != second["run"]
    assert first["run"].endswith(toy.name)
    assert "2 runs: FD-digits of 40 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            ["--cfg_scale=1,two"],
            "--cfg_scale=1,two: 'two' is not a value of this axis; expected a comma",
        ),
        (["--cfg_scale="], "--cfg_scale=: '' is not a value"),
        (["--cfg_scale=nan"], "'nan' is not a value"),
        (["--cfg_scale=1,-2"], r"cfg_scale is -2.0: expected at least 0"),
        (["--cfg_interval=0.3"], "'0.3' is not a value of this axis; .* LOW:HIGH"),
        (["--cfg_interval=0.7:0.3", "--cfg_scale=1,2"], "expected .low, high. with"),
        (["--sampler=ddim,dpm"], "config.sample.sampler: 'dpm': expected one of"),
        (["--steps=ddim25,ddim499"], "no integer stride over 1000 timesteps gives 499"),
        (["--steps=3+4+5,1001"], "1001 steps asked"),
        (["--cfg_channels=three", "--cfg_scale=2"], "'three' and the input has 1"),
        (["--num=1"], "num_samples is 1: expected at least 2"),
        (["--num=many"], "invalid int value"),
        (["--config=experiments/digits.py"], "a grid uses each run's recipe"),
        (["--config.sample.cfg_scal=2"], "with a key of the recipe"),
        (["--cfg_scales=2"], "is not a flag of this command. Did you mean '--cfg_scale'"),
        (["--features=none"], "config.evaluate.features is 'none'"),
        (["--workdir=/nowhere"], "/nowhere is not a run directory"),
        (["--workdir="], "--workdir=: expected one or more paths"),
        (["--out=README.md"], "--out=README.md is a file"),
    ],
)
def test_a_users_mistake_is_one_line(toy, tmp_path, words, match):
    with pytest.raises(UserError, match=match) as raised:
        grid.main([f"--workdir={toy}", f"--out={tmp_path}", *words])
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_runs_of_one_name_get_their_parents():
    folders = [Path(p) for p in ("/s/a/x", "/s/b/x", "/t/b/x", "/t/y", "/u/d e")]
    assert grid._names(folders) == ["a_x", "s_b_x", "t_b_x", "y", "d_e"]
    with pytest.raises(UserError, match="has the name of another run"):
        grid._names([Path("/a b"), Path("/a:b")])


def test_a_run_named_twice(toy, tmp_path):
    with pytest.raises(UserError, match="names a run twice"):
        grid.main([f"--workdir={toy},{toy}/", f"--out={tmp_path}"])


def test_a_sweeps_directory_is_its_runs(toy, tmp_path, capsys):
    for name in ("a", "b"):
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(toy / "config.json", folder)
    words = [f"--workdir={tmp_path}", f"--out={tmp_path / 'g'}", "--dry_run", "--steps=ddim3,5"]
    assert grid.main(words) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition("-")[0] for line in lines] == ["a", "a", "b", "b"]
    assert not (tmp_path / "g").exists()


def test_the_files_are_of_the_cells_on_disk(tmp_path):
    """Planted: the cheapest is not the best, and one distance could not be computed (null)."""
    run = grid.Run("r", Path("x"), read(load_recipe(TINY)))
    cells, _ = grid.plan([run], {"steps": ("ddim5", "ddim10", "ddim25", "ddim50")})
    for cell, value in zip(cells, (30.0, 20.0, None, 25.0), strict=True):
        record = {
            "name": cell.name,
            "run": "r",
            "step": 1,
            "params_sha256": "0",
            "protocol_hash": "0",
            "settings": cell.settings,
            "protocol": {},
            "sampling_gflops": cell.gflops,
            "seconds": 1.0,
            "metrics": {"fd_digits": value},
        }
        write_json(tmp_path / "cells" / cell.name / "evaluation.json", record)
    shared = {"metric": "FD-digits", "num_samples": 40, "labels": "uniform", "seed": 0}
    text = grid._report(cells, tmp_path, shared, "fd_digits", "digits/train")
    assert (tmp_path / "grid.txt").read_text() == text + "\n"
    found = json.loads((tmp_path / "grid.json").read_text())
    names = [cell.name for cell in cells]
    assert found["front"] == names[:2]
    assert found["best"] == names[1]
    assert found["varying"] == ["steps"]
    assert [cell["metrics"]["fd_digits"] for cell in found["cells"]] == [30.0, 20.0, None, 25.0]
    (row,) = [line for line in text.splitlines() if line.startswith("*+")]
    assert " ddim10 " in row


def test_names_tell_cells_apart_and_are_legal(toy):
    run = grid.Run("a b:c", Path("x"), opening.recipe_of(toy))
    plan = grid.plan(
        [run],
        {
            "cfg_scale": (2.0, 2.0000001),
            "steps": ("10,15,20", ",".join(["3"] * 100)),
            "cfg_interval": ((0.0, 0.5), (0.0, 0.51)),
        },
    )
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == 8
    for name in names:
        assert len(name) <= 200
        assert not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"
        )


def test_runs_share_frozen_weights_only_where_these_are_the_same(monkeypatch):
    """Another base, control, or image that is given: each is drawn with its own."""
    c = read(load_recipe(list(TINY)))
    changes: list[dict] = [{}, {"seed": 3}]
    changes += [{"adapt": {"base": base, "kind": "lora"}} for base in ("runs/a", "runs/b")]
    branch = {"adapt": {"base": "runs/a", "kind": "control"}, "model": {"label_dropout": 0.1}}
    changes += [{**branch, "control": {"blocks": 1, "others": x}} for x in ((), ("runs/x",))]
    changes += [{"given": {"kind": "low", "side": side}} for side in (2, 4)]
    runs = [grid.Run(str(k), Path(), changed(c, each)) for k, each in enumerate(changes)]
    monkeypatch.setattr(grid, "Evaluator", lambda c, mesh, frozen: object())
    task = types.SimpleNamespace(frozen=lambda mesh: {})
    monkeypatch.setattr(grid, "make_task", lambda c: task)
    made = grid.open_scorers(runs)
    assert made["0"] is made["1"]
    assert len({id(scorer) for scorer in made.values()}) == 7
