"""Training from weights by command: its report, its record, its resume and its refusals."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ditjax import convert, evaluate, grid, sample, train
from ditjax.cli import load_recipe
from ditjax.config import read, replaced
from ditjax.data import stream
from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import adapting, make_task, resolved
from ditjax.tasks.adapters import open_adapter
from ditjax.weights import networks, reading, writing
from tests.commands.conftest import TINY, CutError, cut_after

SHORT = (*TINY, "--config.train.steps=4", "--config.train.checkpoint_every_steps=2")
LORA = ("--config.adapt.kind=lora", "--config.adapt.rank=2", "--config.train.log_every_steps=1")


FEW = ("--config.evaluate.num_samples=16", "--config.evaluate.guided_scale=0")


def trained(workdir):
    c = opening.recipe_of(workdir)
    params, _ = opening.load_weights(c, make_task(c), workdir, make_mesh(-1, 1))
    return jax.device_get(params)


@pytest.fixture(scope="module")
def lora(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    assert (
        train.main([*SHORT, *LORA, f"--config.adapt.base={finished}", f"--workdir={workdir}"]) == 0
    )
    return workdir


def test_a_file_of_diffusers_is_a_base_with_its_numerics(finished, tmp_path, capsys):
    convert.main([f"--weights={finished}", "--to=diffusers", f"--out={tmp_path / 'theirs'}"])
    capsys.readouterr()
    run = [*SHORT, f"--config.adapt.base={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}"]
    run += ["--config.optim.learning_rate=1e-30", "--config.sample.weights=model"]
    assert train.main(run) == 0
    told = capsys.readouterr().err
    for line in (
        "config.model.frequency_shift is 1, as the base was trained, not 0",
        "copied 21: blocks/adaln/linear/bias",
        "adapted 0",
        "note: config.train.ema_decay=0.995 over 4 steps leaves 98% of the base",
    ):
        assert line in told
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recipe["model"]["frequency_shift"], recipe["model"]["norm2_eps"]) == (1, 1e-6)
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    assert record["sha256"] == recipe["adapt"]["sha256"]
    assert len(record["copied"]) == 21
    # Steps that move nothing end where they started.
    expected = reading.load_network(tmp_path / "theirs").leaves
    for path, leaf in flatten(trained(tmp_path / "run")["params"]).items():
        np.testing.assert_array_equal(leaf, expected[path])
    # A run that trains everything resumes without its base.
    (tmp_path / "theirs").rename(tmp_path / "elsewhere")
    assert train.main(run) == 0


def test_what_weights_do_not_show_is_as_the_base_was_trained(tmp_path, capsys):
    own = {"norm": "rms", "rope": True, "attention_hops": 2}
    own |= {"parametrization": "mup", "base_width": 16, "base_head_width": 8}
    base = read(load_recipe([*TINY, *(f"--config.model.{k}={v}" for k, v in own.items())]))
    params = jax.device_get(jax.jit(make_task(base).init)(jax.random.key(0)))
    writing.write_ditjax(tmp_path / "base.safetensors", networks.from_run(base, params))
    c = read(load_recipe([*TINY, f"--config.adapt.base={tmp_path / 'base.safetensors'}"]))
    found = resolved(c, tmp_path / "run").model
    assert {name: getattr(found, name) for name in own} == own
    told = capsys.readouterr().err
    assert "config.model.rope is True, as the base was trained, not False" in told


def test_lora_resumes_to_the_bit_and_saves_factors_alone(finished, lora, tmp_path):
    run = [*SHORT, *LORA, f"--config.adapt.base={finished}", f"--workdir={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "train_batches", cut_after(3))
        with pytest.raises(CutError):
            train.main(run)
    assert train.main(run) == 0
    found, expected = trained(tmp_path), trained(lora)
    assert found.keys() == {"lora"}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_base_is_refused_with_both_hashes(finished, lora, tmp_path):
    moved = jax.tree.map(lambda leaf: leaf + 1, trained(finished))
    network = networks.from_run(opening.recipe_of(finished), moved)
    other = writing.write_ditjax(tmp_path / "other.safetensors", network)
    ours = json.loads((lora / "config.json").read_text())["adapt"]["sha256"]
    for command in (
        lambda: train.main([*SHORT, *LORA, f"--config.adapt.base={other}", f"--workdir={lora}"]),
        lambda: sample.main(
            [f"--workdir={lora}", f"--config.adapt.base={other}", f"--out={tmp_path / 'x'}"]
        ),
    ):
        with pytest.raises(UserError, match=rf"SHA-256 [0-9a-f]{{64}}, and .* of {ours}"):
            command()


def test_a_run_of_lora_converts_to_the_merged_network(finished, lora, tmp_path):
    convert.main([f"--weights={lora}", "--to=ditjax", f"--out={tmp_path / 'm.safetensors'}"])
    merged = reading.load_network(tmp_path / "m.safetensors").leaves
    c = opening.recipe_of(finished)
    base, _ = opening.load_weights(c, make_task(c), finished, make_mesh(-1, 1))
    base = flatten(jax.device_get(base)["params"])
    assert merged.keys() == base.keys()
    moved = {path for path, leaf in base.items() if not np.array_equal(merged[path], leaf)}
    assert moved == {
        f"blocks/{layer}/kernel"
        for layer in ("attn/qkv", "attn/out", "mlp/in", "mlp/out", "adaln/linear")
    }


def test_a_run_of_lora_converts_to_adapters(lora, tmp_path, capsys):
    """To each layout, and from one to another: the factors and their scale, to the bit."""
    expected = open_adapter(lora)
    assert {(m.rank, m.scale) for m in expected.modules.values()} == {(2, 8.0)}
    source = lora
    for target in ("peft", "peft_release", "lora"):
        out = tmp_path / target
        assert convert.main([f"--weights={source}", f"--to={target}", f"--out={out}"]) == 0
        assert capsys.readouterr().out.startswith("LoRA of rank 2, 1,600 parameters of float32")
        if target != "lora":
            assert open_adapter(out).sha256 == expected.sha256
        source = out
    found = open_adapter(out).modules
    for product, (a, b, scale) in expected.modules.items():  # the scale is in B
        np.testing.assert_array_equal(found[product].a, a)
        np.testing.assert_array_equal(found[product].b, b * scale)


def test_what_is_no_adapter_is_not_converted_to_one(finished, lora, tmp_path):
    def refused(words, source, *more):
        with pytest.raises(UserError, match=words):
            convert.main([f"--weights={source}", "--to=peft", f"--out={tmp_path / 'out'}", *more])
        assert not (tmp_path / "out").exists()

    refused("is a run of config.adapt.kind 'full': expected a run of LoRA", finished)
    refused(
        "--which is for weights files, and .* is an adapter for --to=peft", lora, "--which=model"
    )
    refused("--class_names=none: an adapter names no classes", lora, "--class_names=none")
    refused("--step=4 is for runs", tmp_path, "--step=4")
    for name, changes in (
        ("config.json", {"adapt": {"train": "y_embedder"}}),
        ("start.json", {"adapted": {"y_embedder/table": "rows"}}),
    ):
        run = tmp_path / name.partition(".")[0]
        (run / "checkpoints").mkdir(parents=True)
        for file in ("config.json", "start.json"):
            tree = json.loads((lora / file).read_text())
            for key, value in changes.items() if file == name else ():
                tree[key] = tree[key] | value
            (run / file).write_text(json.dumps(tree))
        refused("is more than its base with factors .*y_embedder", run)


def test_a_run_of_lora_is_an_adapter_of_its_base(finished, lora, tmp_path, capsys):
    """sample, grid and evaluate merge it; the weights are those of the run, and it is on record."""
    words = [f"--config.sample.adapters={lora}", "--config.sample.num=8", "--config.seed=1"]
    out = tmp_path / "drawn"
    assert sample.main([f"--workdir={finished}", *words, f"--out={out}"]) == 0
    adapter = open_adapter(lora)
    line = f"adapter: {lora}, LoRA of rank 2 (ditjax), scale 1, SHA-256 {adapter.sha256}"
    assert line in capsys.readouterr().err
    record = json.loads((out / "samples.json").read_text())
    assert record["adapters"] == record["protocol"]["adapters"] == [[adapter.sha256, 1.0]]

    c = opening.recipe_of(lora)
    merged, _ = opening.network_weights(c, make_task(c), lora, make_mesh(-1, 1))
    digest = opening.digest(merged)
    assert evaluate.main([f"--workdir={finished}", *words[:1], *FEW]) == 0
    scored = json.loads((finished / "evaluation.json").read_text())
    assert scored["protocol"]["adapters"] == [[adapter.sha256, 1.0]]
    (finished / "evaluation.json").unlink()
    cells = tmp_path / "grid"
    assert grid.main([f"--workdir={finished}", *words[:1], *FEW, f"--out={cells}"]) == 0
    (cell,) = json.loads((cells / "grid.json").read_text())["cells"]
    assert (cell["params_sha256"], cell["protocol_hash"]) == (digest, scored["protocol_hash"])


def test_adapters_are_refused_where_they_cannot_be_used(finished, lora, tmp_path):
    def refused(words, command, *more):
        with pytest.raises(UserError, match=words) as error:
            command.main([*more])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    out = f"--out={tmp_path / 'out'}"
    refused(
        "this run trained only a part .* base, .*finished",
        sample,
        f"--workdir={lora}",
        f"--adapter={lora}",
        out,
    )
    ours = json.loads((lora / "config.json").read_text())["adapt"]["sha256"]
    other = [f"--workdir={finished}", "--config.sample.weights=model", f"--adapter={lora}", out]
    refused(f"beside weights of SHA-256 {ours}, and these are of [0-9a-f]{{64}}", sample, *other)
    refused(
        "adapters is '.*', which training does not use",
        train,
        *SHORT,
        f"--config.sample.adapters={lora}",
        f"--workdir={tmp_path / 'out'}",
    )
    refused(
        "none does not exist",
        grid,
        f"--workdir={finished}",
        f"--config.sample.adapters={tmp_path}/none",
        out,
    )
    refused(
        "none does not exist",
        evaluate,
        f"--workdir={finished}",
        f"--config.sample.adapters={tmp_path}/none",
    )
    for scale in ("nan", "inf", "-1e39"):
        refused(
            rf"has '.*:{scale}': expected PATH or PATH:SCALE, a finite",
            sample,
            f"--workdir={finished}",
            f"--config.sample.adapters={lora}:{scale}",
            out,
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.adapt.kind=lora"], "config.adapt.base is ''"),
        (["--config.adapt.base=x", "--config.adapt.rank=4"], "config.adapt.kind is 'full'"),
        (
            ["--config.adapt.base=x", "--config.adapt.kind=lora", "--config.adapt.alpha=nan"],
            "finite",
        ),
        (["--config.adapt.base=x", "--config.adapt.classes=(0,1,2)"], "has 3 classes and"),
        (["--config.adapt.base=x", "--config.adapt.classes=(-2,)"], "or -1, for each class"),
        (["--config.adapt.base=x", "--config.adapt.skip=("], "a regular expression"),
        (["--config.adapt.base=x", "--config.adapt.kind=partial"], "config.adapt.train is ''"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(words, expected):
    with pytest.raises(UserError) as error:
        read(load_recipe([*TINY, *words]))
    assert expected in str(error.value)


def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(finished, tmp_path):
    wide = [*SHORT, "--config.model.size=1x64x2", f"--config.adapt.base={finished}"]
    with pytest.raises(UserError, match=r"blocks/attn/qkv/kernel is \(1, 64"):
        train.main([*wide, f"--workdir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()


def test_classes_that_begin_as_others_of_the_base(capsys):
    """Equal numbers of classes do not make them the same; a base without names states nothing."""
    c = read(load_recipe([*TINY, "--config.adapt.base=x"]))
    same = tuple((str(k),) for k in range(10))
    base = networks.LoadedNetwork(c, {}, "ditjax", (Path("x"),))
    five = replaced(c, adapt=dataclasses.replace(c.adapt, classes=(0, 1, 2, 3, 4, -1, -1, 1, 8, 9)))
    for recipe, names, words in (
        (c, None, ""),
        (c, same, ""),
        (c, same[:5], ""),  # the graft refuses it
        (c, (*same[:8], ("cat",), ("dog",)), "of 10 classes 2 begin as others of the base: class"),
        (c, (*same[:8], ("cat",), ("dog",)), " 8 (8) as cat, 9 (9) as dog; config.adapt.classes"),
        (five, same, "of 10 classes 1 begin as others of the base: class 7 (7) as 1;"),
    ):
        adapting._report_classes(recipe, base._replace(class_names=names))
        told = capsys.readouterr().err
        assert words in told
        assert bool(words) == ("note:" in told)


def test_heads_of_a_recipe_are_no_flag(finished, tmp_path):
    """Heads that a file states are refused by the graft, which says what does not fit."""
    out = tmp_path / "x.safetensors"
    convert.main([f"--weights={finished}", "--to=ditjax", f"--out={out}"])
    c = read(load_recipe([*TINY, f"--config.adapt.base={out}", "--config.model.size=1x32x4"]))
    assert adapting.read_base(c).config.model.size == "1x32x2"
    with pytest.raises(UserError, match=r"--heads is 4, and .*, states 2: remove --heads"):
        convert.main([f"--weights={out}", "--to=ditjax", f"--out={out}", "--heads=4"])
