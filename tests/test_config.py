"""A recipe says everything, and anything else is refused in one line with the remedy."""

import copy
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ditjax.cli import _one_line, load_recipe, parse, parser
from ditjax.config import (
    Config,
    as_tree,
    check_used,
    completed,
    fixed_keys,
    hints,
    is_free,
    leaf_keys,
    migrated,
    read,
    schema,
)
from ditjax.errors import UserError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECIPES = sorted(p.stem for p in EXPERIMENTS.glob("*.py") if p.stem != "__init__")
DIGITS = "--config=experiments/digits.py"


def digits() -> dict:
    return load_recipe([DIGITS])


def changed(**values) -> dict:
    """The digits recipe with dotted keys (written a__b) changed."""
    recipe = copy.deepcopy(digits())
    for key, value in values.items():
        *groups, leaf = key.split("__")
        node = recipe
        for group in groups:
            node = node[group]
        node[leaf] = value
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_legal(name):
    recipe = importlib.import_module(f"experiments.{name}").get_config()
    assert isinstance(read(recipe.to_dict()), Config)


def test_base_is_the_paper():
    c = read(importlib.import_module("experiments.base").get_config().to_dict())
    assert (c.model.size, c.model.patch, c.model.block) == ("XL", 2, "adaln_zero")
    assert (c.train.batch_size, c.train.steps, c.train.ema_decay) == (256, 400_000, 0.9999)
    o = c.optim
    assert (o.learning_rate, o.b1, o.b2, o.weight_decay) == (1e-4, 0.9, 0.999, 0.0)
    assert (o.warmup_steps, o.clip_norm) == (0, 0.0)
    assert (c.sample.sampler, c.sample.steps, c.sample.cfg_channels) == ("ddpm", "250", "three")
    assert (c.input_size, c.input_channels, c.autoencoder.scale) == (32, 4, 0.18215)


def test_read_gives_back_what_it_was_given():
    c = read(changed(optim__learning_rate=3))
    assert c.optim.learning_rate == 3.0
    assert isinstance(c.optim.learning_rate, float)
    assert [key for key, _ in c.sweep.grid] == ["model.size", "model.patch"]
    assert c.sweep.grid[1][1] == (4, 2, 1)
    assert not c.latent
    assert (c.input_size, c.input_channels) == (8, 1)


BAD = [
    ({"optim__learning_rate": float("nan")}, r"config\.optim\.learning_rate is nan: .* finite"),
    ({"optim__learning_rate": float("inf")}, "finite"),
    ({"optim__learning_rate": -1e-3}, r"is -0\.001: expected greater than 0"),
    ({"optim__learning_rate": "fast"}, "of type str: expected a number"),
    ({"optim__spike_factor": 0.5}, r"spike_factor is 0\.5: expected 0, or greater than 1"),
    ({"train__max_bad_steps": -1}, "expected at least 0"),
    ({"train__batch_size": -1}, "expected at least 1"),
    ({"train__batch_size": 0}, "expected at least 1"),
    ({"train__batch_size": 64.0}, "of type float: expected an integer"),
    ({"train__batch_size": True}, "of type bool: expected an integer"),
    ({"train__batch_size": 2**80}, "below 2"),
    ({"data__flip": 1}, "expected True or False"),
    ({"train__ema_decay": 1.0}, "from 0 to below 1"),
    (
        {"train__evaluate_every_steps": 5, "evaluate__features": "none"},
        r"evaluate_every_steps is 5 and config\.evaluate\.features is 'none': set",
    ),
    ({"train__keep_every_steps": 3000}, r"is 3000 and .*every_steps is 2000: .* multiple"),
    ({"model__patch": 3}, r"model\.patch is 3: .* 8x8 .*: 1, 2, 4, 8"),
    (
        {"task": "diffusin"},
        r"config\.task: 'diffusin': expected one of .* Did you mean 'diffusion'",
    ),
    ({"task": "no.such.module"}, r"config\.task: cannot import 'no\.such\.module'"),
    ({"task": "os.path"}, r"config\.task: 'os\.path': the module defines no TASK"),
    ({"model__kind": "dot"}, r"config\.model\.kind: 'dot': expected one of .* Did you mean 'dit'"),
    (
        {"sample__sampler": "dimm"},
        r"sampler: 'dimm': expected one of 'ddpm', 'ddim', 'euler',",
    ),
    ({"diffusion__loss": "hybrid2"}, r"loss: 'hybrid2': expected one of .* Did you mean 'hybrid'"),
    ({"model__size": "XXL"}, r"model\.size: model size 'XXL' is unknown: .* XL"),
    ({"model__size": "4x96x5"}, "96 is not divisible by 5 heads"),
    ({"model__size": "4x6x3"}, "not divisible by 4"),
    ({"model__size": "0x96x3"}, "at least 1"),
    ({"model__block": "adaln-zero"}, "expected one of 'adaln_zero'"),
    ({"autoencoder__multipliers": ()}, "not empty"),
    ({"autoencoder__multipliers": (1, 2.5)}, "is 2.5, of type float"),
    ({"autoencoder__kind": "kl", "autoencoder__groups": 7}, "not divisible into 7 groups"),
    ({"autoencoder__kind": "kl", "data__image_size": 9, "model__patch": 1}, "multiple of 8"),
    ({"diffusion__variance": "fixed_small"}, "L_vlb would train nothing"),
    ({"diffusion__loss": "simple"}, "nothing would train the variance"),
    ({"model__label_dropout": 0.0}, "guidance needs the null label"),
    ({"sample__cfg_channels": "three"}, "has 1 channel"),
    ({"optim__warmup_steps": 4000}, "warm-up must end before"),
    ({"sweep__grid": (("model.sizes", ("S",)),)}, "Did you mean 'model.size'"),
    ({"sweep__grid": (("model.patch", ()),)}, "expected its values"),
    ({"sweep__grid": (("model.patch", (1, 1)),)}, "twice"),
    ({"sweep__grid": (("model.patch", (1,)), ("model.patch", (2,)))}, "a key appears twice"),
    ({"sweep__grid": ("model.patch",)}, "expected pairs"),
    ({"optim": 3}, "expected a group of keys"),
    ({"optim__learning_rate": 10**400}, "expected a finite number"),
    ({"optim__learning_rate": 1e39}, "as float32 holds it"),
    ({"optim__eps": 1e-50}, r"is 1e-50: .* as float32 holds it"),
    ({"optim__b2": 1 - 1e-9}, "to below 1, in float32 too"),
    ({"seed": 2**32}, "at most 4294967295"),
    ({"evaluate__seed": 2**32}, "at most 4294967295"),
    ({"train__steps": 2**31}, "at most 2147483647"),
    ({"train__batch_size": 2**40}, "at most 16777216"),
    ({"evaluate__num_samples": 10**9}, "at most 999999999"),
    ({"evaluate__val_loss_num": 1}, "expected 0, or greater than 1"),
    ({"data__image_size": 2**50}, "at most 16384"),
    ({"data__channels": 1.0}, r"is 1\.0: expected one of 1, 3"),
    ({"data__channels": True}, "is True: expected one of 1, 3"),
    ({"data__name": "a\nb"}, "control characters"),
    ({"data__name": "x" * 5000}, "5000 characters long: expected at most 4096"),
    ({"data__name": "\ud800"}, "control characters"),
    ({"data__name": "latents:x"}, "encoded latents, and the recipe trains on pixels"),
    ({"data__max_damaged": -1}, "expected at least 0"),
    ({"autoencoder__multipliers": (1,) * 13}, "1 to 12 numbers"),
    ({"autoencoder__multipliers": (1, 0)}, "each at least 1"),
    ({"model__mlp_ratio": 65}, "at most 64"),
    ({"model__mlp_ratio": 1e-3}, "with width 96, the MLP would have no hidden unit"),
    ({"data__image_size": 4096, "model__patch": 1}, "16777216 tokens; expected at most 1048576"),
    ({"diffusion__timesteps": 20}, "linear schedule needs at least 21"),
    ({"diffusion__timesteps": 10**6}, "at most 100000"),
    ({"train__microbatches": 3}, r"microbatches=3 does not .*=16: .*: 1, 2, 4, 8, 16\."),
    ({"mesh__fsdp": -1}, r"config\.mesh\.data and config\.mesh\.fsdp are -1 \(data is, .*only one"),
    ({"sweep__grid": (("model.patch", ("x",)),)}, r"grid: config\.model\.patch is 'x', of type"),
    ({"sweep__grid": (("optim.learning_rate", (1, 1.0)),)}, "twice"),
    (
        {
            "sweep__grid": (
                ("seed", tuple(range(101))),
                ("model.patch", (1,)),
                ("train.steps", tuple(range(1, 101))),
            )
        },
        "has 10100 cells: expected at most 10000",
    ),
    ({"sweep__seeds": tuple(range(1250))}, "has 11250 cells"),
    ({"sweep__lists": (("model.patch", 4),)}, r"holds \('model.patch', 4\): expected a run's"),
    ({"sweep__lists": ((("model.patches", 4),),)}, r"lists names .* Did you mean 'model.patch'"),
    ({"sweep__lists": ((("model.block", "adalm"),),)}, "lists: config.model.block is 'adalm': exp"),
    ({"sweep__lists": ((("seed", 1), ("seed", 2)),)}, "a key appears twice"),
    ({"sweep__lists": ((("sweep.grid", ()),),)}, "expected a key of a recipe"),
    ({"sweep__lists": ((("model.patch", 4),),)}, "lists sets model.patch, which config.sweep.grid"),
    ({"sweep__zips": (("seed", (1, 2)),)}, "zips holds 'seed': expected pairs"),
    ({"sweep__zips": ((),)}, "expected axes that are walked together"),
    (
        {"sweep__zips": ((("optim.b1", (0.9,)), ("optim.b2", (0.9, 0.99))),)},
        "walks 1 of optim.b1, 2 of optim.b2 together: expected the same number",
    ),
    ({"sweep__zips": ((("seed", (1,)), ("seed", (2,))),)}, "zips sets seed, which config.sweep"),
    ({"sweep__seeds": 3}, r"seeds is 3: expected integers, such as \(0, 1\)"),
    ({"sweep__seeds": (1, -1)}, r"seeds: config\.seed is -1: expected at least 0"),
    ({"sweep__seeds": (1, True)}, "of type bool"),
    ({"sweep__seeds": (1, 1)}, "a seed appears twice"),
    ({"sweep__seeds": (1,), "sweep__grid": (("seed", (1,)),)}, "seeds sets seed, which"),
    ({"sweep__budget": ("hours", 3)}, "a unit of steps, images, gflops and a number above 0"),
    ({"sweep__budget": ("steps", 2.5)}, "whole but for gflops"),
    ({"sweep__budget": ("gflops", float("nan"))}, "a number above 0"),
    ({"sweep__budget": ("gflops", 0)}, "a number above 0"),
    ({"sweep__budget": ("gflops", True)}, "a number above 0"),
    ({"sweep__budget": ("steps",)}, "expected \\(UNIT, NUMBER\\)"),
    ({"sweep__budget": "steps"}, "expected \\(UNIT, NUMBER\\)"),
    (
        {"sweep__budget": ("steps", 9), "sweep__grid": (("train.steps", (5,)),)},
        "budget sets train.steps, which config.sweep.grid sets already",
    ),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(v)[1:50] for v, _ in BAD])
def test_illegal_values_are_refused(values, message):
    with pytest.raises(UserError, match=message) as error:
        read(changed(**values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ("0", "expected a number of steps"),
        ("ddim999", "no integer stride"),
        ("1001", "at most 1000"),
        ("9" * 4000, "expected a number of steps"),
        ("", "expected a number of steps"),
    ],
)
def test_sampling_steps_are_checked_with_the_recipe(steps, match):
    """And not at the first sample grid, hours later."""
    with pytest.raises(UserError, match=match):
        parse(parser("x", ""), [DIGITS, f"--config.sample.steps={steps}"])


def test_a_hostile_name_cannot_write_to_the_terminal():
    assert _one_line(UserError("no tensor a\x1b[2J\nb\u202e \ud800é")) == (
        "no tensor a\\x1b[2J b\\u202e \\ud800é"
    )


def test_unknown_keys():
    recipe = changed(optim__learning_rat=1.0)
    with pytest.raises(
        UserError, match=r"learning_rat is not a key .* Did you mean 'learning_rate'"
    ):
        read(recipe)


def test_a_key_left_out_has_the_papers_value():
    paper = read({})
    assert read(completed({})) == paper
    whole = as_tree(paper)
    for key in leaf_keys(schema()):
        recipe = copy.deepcopy(whole)
        *groups, leaf = key.split(".")
        node = recipe
        for group in groups:
            node = node[group]
        del node[leaf]
        assert read(recipe) == paper, key


def autoencoder(**sections) -> dict:
    kept = {"data": {"image_size": 16}, "train": {"sample_every_steps": 0}}
    return {"task": "autoencoder", **kept, **sections}


def test_a_task_has_its_own_keys_alone():
    c = read(autoencoder())
    assert c.model.kind == "autoencoder"
    assert not {"diffusion", "sample"} & {key.partition(".")[0] for key in leaf_keys(type(c))}
    for sections, message in (
        ({"sample": {"num": 4}}, r"config\.sample is not a key of a recipe"),
        ({"model": {"patch": 2}}, r"config\.model\.patch is not a key"),
        ({"autoencoder": {"kind": "none"}}, "set it to 'kl'"),
        ({"train": {"evaluate_every_steps": 5}, "evaluate": {"features": "digits"}}, "Set it to 0"),
        ({"data": {"name": "latents:x", "image_size": 16}}, "name a data set of images"),
    ):
        with pytest.raises(UserError, match=message):
            read(autoencoder(**sections))


def test_runs_of_before_tasks_are_migrated():
    old = json.loads(json.dumps(digits()))
    del old["task"], old["model"]["kind"]
    old["train"]["network"] = "dit"
    assert read(migrated(old)) == read(digits())
    for section, key, value in (("train", "max_bad_steps", 0), ("train", "evaluate_num", 1000)):
        older = copy.deepcopy(old)
        del older[section][key]
        assert getattr(getattr(read(migrated(older)), section), key) == value
    old["train"] |= {"network": "autoencoder", "evaluate_every_steps": 0}
    old["sweep"]["grid"] = ()
    old["autoencoder"]["kind"] = "kl"
    c = read(migrated(old))
    assert (c.task, c.model.kind, c.data.name) == ("autoencoder", "autoencoder", "digits")
    new = as_tree(read(digits()))
    assert migrated(new) == new


def test_what_a_resumed_run_may_change():
    free = {key for key in leaf_keys(schema()) if is_free(schema(), key)}
    assert {"mesh.data", "sample.steps", "train.steps", "model.unroll", "data.threads"} <= free
    assert not free & {"seed", "task", "model.size", "data.name", "optim.learning_rate"}
    assert not is_free(schema(), "model.sizes")


def test_a_key_that_another_one_depends_on_is_not_free():
    assert fixed_keys(as_tree(read({}))) == {}
    cosine = as_tree(read({"optim": {"schedule": "cosine"}}))
    assert fixed_keys(cosine) == {"train.steps": "optim.schedule='cosine'"}
    assert fixed_keys({"optim": {"schedule": "cosine"}, "train": 3}) == fixed_keys(cosine)


def test_what_a_value_fixes_are_keys_of_a_recipe():
    named = [
        key
        for group in hints(schema()).values()
        for each in (dataclasses.fields(group) if dataclasses.is_dataclass(group) else ())
        for keys in each.metadata["fixes"].values()
        for key in keys
    ]
    assert "train.steps" in named
    assert set(named) <= set(leaf_keys(schema()))


@pytest.mark.parametrize(
    ("optim", "match"),
    [
        ({"restarts": (10,)}, "a constant rate needs no restart"),
        ({"schedule": "cosine", "restarts": (100,)}, "from step 100 to 100 must be longer"),
        ({"schedule": "cosine", "restarts": (50, 40)}, "from step 50 to 40"),
        ({"schedule": "cosine", "restarts": (0,)}, "from step 0 to 0"),
        ({"schedule": "cosine", "restarts": (10,), "warmup_steps": 20}, "longer than .*=20"),
        ({"schedule": "cosine", "restarts": "10"}, "a list of int"),
        ({"schedule": "cosine", "restarts": (1.5,)}, "expected an integer"),
    ],
)
def test_restarts_that_make_no_schedule(optim, match):
    with pytest.raises(UserError, match=match):
        read({"optim": optim, "train": {"steps": 100}})


def test_a_study_from_the_command_line():
    words = (
        "lists=((('model.patch',4),),())",
        "seeds=0,1",
        "budget='gflops',1e6",
        "grid=()",
        "zips=((('optim.b1',(.8,.9)),('optim.b2',(.9,.99))),)",
    )
    _, config = parse(parser("x", ""), [DIGITS, *(f"--config.sweep.{word}" for word in words)])
    assert config.sweep.lists == ((("model.patch", 4),), ())
    assert config.sweep.zips == ((("optim.b1", (0.8, 0.9)), ("optim.b2", (0.9, 0.99))),)
    assert (config.sweep.seeds, config.sweep.budget) == ((0, 1), ("gflops", 1e6))
    old = digits()
    for key in ("lists", "zips", "seeds", "budget"):
        del old["sweep"][key]
    assert read(old) == read(digits())


@pytest.mark.parametrize(
    "words",
    [
        ["--config=digits:2x32x2/4", "--config.train.steps=20_000"],
        ["--config", "digits:2x32x2/4", "--config.train.steps", "20k"],
        ["--config", "experiments/digits.py:2x32x2/4", "--config.train.steps=2e4"],
    ],
)
def test_ways_to_say_the_same(words):
    _, config = parse(parser("x", ""), words)
    assert (config.model.size, config.train.steps) == ("2x32x2", 20_000)


def test_a_recipe_elsewhere_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text("SEED = 7\n")
    (tmp_path / "digits.py").write_text(
        "from neighbour_of_mine import SEED\nfrom ditjax.recipes import digits\n"
        "def get_config():\n    c = digits.get_config()\n    c.seed = SEED\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    _, config = parse(parser("x", ""), ["--config=digits.py"])
    assert (config.seed, config.data.name) == (7, "digits")


def test_overrides():
    args, config = parse(
        parser("x", ""),
        [f"{DIGITS}:2x32x2/4", "--config.train.steps=700", "--config.data.flip=True"],
    )
    assert (config.model.size, config.model.patch) == ("2x32x2", 4)
    assert (config.train.steps, config.data.flip) == (700, True)
    assert args.recipe["train"]["steps"] == 700


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --config=NAME given"),
        ([DIGITS, DIGITS], "2 --config=NAME given"),
        (["--config=digit"], "recipe 'digit' does not exist: .* Did you mean 'digits'"),
        ([DIGITS, "--config.task=autoencoder"], "task=autoencoder: the recipe's is 'diffusion'"),
        ([DIGITS, "--config.train.steps"], "expected --config.KEY=VALUE, or --config.KEY VALUE"),
        (["--config=experiments/digit.py"], "'experiments/digit.py' does not exist"),
        ([DIGITS, "--config.optim.lr=1"], "expected --config.KEY=VALUE"),
        ([DIGITS, "--config.model.path=1"], "Did you mean 'model.patch'"),
        ([DIGITS, "--config.train.steps=ten"], r"steps=ten: expected an integer, such as"),
        ([DIGITS, "--config.train.steps=1.5"], "steps=1.5: expected an integer"),
        ([DIGITS, "--config.data.flip=maybe"], "flip=maybe: expected True or False"),
        ([DIGITS, "--config.optim.b1=x"], "b1=x: expected a number"),
        ([DIGITS, "--config.sweep.grid=((1"], "expected a Python tuple"),
        (["--config=base:2x32x2"], "^--config=base:2x32x2: .* SIZE/PATCH, such as '2x32x2/2'"),
        (["--config=experiments/digits.py:2x32x2"], "^--config=.* SIZE/PATCH, such as '2x32x2/2'"),
        (["--config=digits:2x32x2/"], "^--config=digits:2x32x2/: '2x32x2/': expected SIZE/PATCH"),
        (["--config=digits:/2"], "^--config=digits:/2: '/2': expected SIZE/PATCH, such as 'XL/2'"),
        (["--config=digits:2x32x2/1" + 5000 * "0"], "^--config=digits:.*: expected SIZE/PATCH"),
        (["--config=imagenet256:2x32x2"], "none of the paper's twelve models: expected SIZE/PATCH"),
        (["--config=small/mup:2x32x2"], "recipe 'small/mup' takes nothing after a colon"),
        (["--config=digits_latent:x"], "^--config=digits_latent:x: digits_latent takes 'autoenc"),
        ([DIGITS, "--config.data.data_dir=None"], "data_dir=None: expected a text; give nothing"),
        ([DIGITS, "--config.evaluate.reference=null"], "reference=null: expected a text"),
        ([DIGITS, "--config.train"], "expected --config.KEY=VALUE"),
        ([DIGITS, "--confg.train.steps=1"], "'--confg.train.steps=1' is not a flag"),
        ([DIGITS, "stray"], "'stray' is not a flag"),
    ],
)
def test_bad_command_lines(words, message):
    with pytest.raises(UserError, match=message):
        parse(parser("x", ""), words)


def test_a_recipe_that_fails_is_named_with_its_line(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"mine.py' failed at .*mine.py:2: ZeroDivisionError"):
        load_recipe([f"--config={recipe}"])
    recipe.write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match=r"returned a int: expected a ConfigDict or a dict"):
        load_recipe([f"--config={recipe}"])
    recipe.write_text("def get_config():\n    return {'seed': 7}\n")
    assert read(load_recipe([f"--config={recipe}"])) == read({"seed": 7})


def command(*words: str, cwd: Path = EXPERIMENTS.parent) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_mistake_is_one_line_and_status_2():
    done = command("ditjax.flops", DIGITS, "--config.model.patch=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: config.model.patch is 3")


def test_importing_everything_imports_no_tensorflow_and_no_torch():
    code = (
        "import pkgutil, importlib, sys, ditjax\n"
        "for m in pkgutil.walk_packages(ditjax.__path__, 'ditjax.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert len([m for m in sys.modules if m.startswith('ditjax.')]) > 30\n"
        "print([m for m in ('tensorflow', 'torch', 'sklearn', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXPERIMENTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_recipes_work_from_any_directory(tmp_path):
    """As after `pip install`: ditjax can be imported, experiments cannot."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ditjax").symlink_to(EXPERIMENTS.parent / "ditjax")
    done = subprocess.run(
        [sys.executable, "-m", "ditjax.flops", f"--config={EXPERIMENTS / 'digits.py'}"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib"), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "64 tokens" in done.stdout


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("train.lr", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("train.learning_rate", "optim.learning_rate"),
        ("optim.wd", "optim.weight_decay"),
        ("train.bs", "train.batch_size"),
        ("data.batch_size", "train.batch_size"),
        ("model.widht", ""),
        ("optim.warmup", "optim.warmup_steps"),
        ("train.cfg_scale", "sample.cfg_scale"),
        ("train.seeds", "sweep.seeds"),
        ("train.ema", "train.ema_decay"),
        ("data.batch", "train.batch_size"),
        ("sample.scale", "sample.cfg_scale"),
    ],
)
def test_an_unknown_key_is_led_to_the_right_one(word, meant):
    with pytest.raises(UserError) as refused:
        load_recipe([DIGITS, f"--config.{word}=1"])
    if meant:
        assert repr(meant) in str(refused.value).partition("Did you mean")[2]
    else:
        assert "train.network" not in str(refused.value)


def test_an_unknown_key_of_a_recipe_and_an_unknown_flag_are_led_there_too():
    with pytest.raises(UserError, match=r"mean 'config.optim.learning_rate'"):
        read({"train": {"lr": 1e-3}})
    with pytest.raises(UserError, match=r"mean 'config.optim.learning_rate'"):
        read({"learning_rate": 1e-3})
    with pytest.raises(UserError, match=r"mean '--config.optim.learning_rate'"):
        parse(parser("train", ""), [DIGITS, "--lr=1e-3"])
    with pytest.raises(UserError, match=r"Did you mean '--config\.tokens\.candidates'"):
        parse(parser("train", ""), ["--config=small/dalle", "--candidates=4"])
    with pytest.raises(UserError, match=r"mean '--config.train.batch_size'"):
        parse(parser("train", ""), [DIGITS, "--train.batch_size=1e-3"])


def test_fsdp_for_the_rest_says_what_to_add():
    with pytest.raises(UserError, match=r"give them all to fsdp, add --config.mesh.data=1\.$"):
        parse(parser("train", ""), [DIGITS, "--config.mesh.fsdp=-1"])
    words = [DIGITS, "--config.mesh.fsdp=-1", "--config.mesh.data=1"]
    assert parse(parser("train", ""), words)[1].mesh.fsdp == -1
    with pytest.raises(UserError, match=r"add --config.mesh.data=1 --config.mesh.fsdp=1\."):
        read({"mesh": {"fsdp": -1, "tensor": -1}})


UNUSED = [
    (("sample.sampler=ddpm", "sample.eta=0.5"), r"sample\.sampler is 'ddpm'"),
    (
        ("sample.cfg_scale=1", "evaluate.guided_scale=0", "sample.cfg_channels=all"),
        r"sample\.cfg_scale is 1\.0",
    ),
    (("evaluate.guided_scale=1", "sample.cfg_interval=(0.1,0.5)"), r"sample\.cfg_scale is 1\.0"),
    (("evaluate.guided_scale=0", "evaluate.guided_num=9"), r"evaluate\.guided_scale is 0\.0"),
    (("train.evaluate_every_steps=0", "train.evaluate_num=9"), r"train\.evaluate_every_steps is 0"),
    (("model.base_width=64",), r"model\.parametrization is 'standard'"),
    (("model.attention_alpha=0.5",), r"model\.attention_hops is 0"),
    (("autoencoder.path=x",), r"autoencoder\.kind is 'none'"),
]


@pytest.mark.parametrize(("given", "why"), UNUSED)
def test_a_key_that_another_one_makes_void_is_found(given, why):
    c = read(load_recipe([DIGITS, *(f"--config.{word}" for word in given)]))
    last = given[-1].partition("=")[0]
    with pytest.raises(UserError, match=rf"config\.{last} has no effect: config\.{why}; rem"):
        check_used(c, [last])


def test_a_key_that_a_study_gives_a_meaning_is_taken():
    grid = "--config.sweep.grid=(('model.parametrization',('standard','mup')),)"
    check_used(read(load_recipe([DIGITS, grid])), ["model.base_width"])
    check_used(read(digits()), ["sample.eta", "seed", "sample.cfg_channels"])  # of ddim, guided


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            "model.kind=unet",
            r"'model\.size', which .* not have\. Name .* --config\.sweep\.grid=\(\)",
        ),
        ("sweep.grid=(('model.patsh', (2,)),)", r"not have\. Did you mean 'model\.patch'\? Name"),
        ("model=dit", r"model is a group of keys: expected one of them, such as model\.kind"),
        ("train.average_stds=0.05", r"is 0\.05: expected a list of float, .*such as \(0\.05,\)"),
        ("control.others=runs/a", r"expected texts in a Python tuple, such as \('runs/a',\)"),
        ("sample.adapters=a:2,b,a", "sample.adapters names 'a' twice: add its scales"),
    ],
)
def test_the_remedy_of_a_value(words, match):
    with pytest.raises(UserError, match=match):
        read(load_recipe(["--config=digits", f"--config.{words}"]))
