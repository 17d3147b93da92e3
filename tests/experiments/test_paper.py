"""The paper's recipes: every published figure is the paper's, of the cell that it is of."""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path

import pytest

from ditjax import cli
from ditjax.config import Config, changed, completed, read, replaced
from ditjax.errors import UserError
from ditjax.machines import costs, topology
from ditjax.reporting.scored import FIELDS
from ditjax.scaling import published as of_scaling
from ditjax.studies.cells import cells
from ditjax.studies.published import published_of
from ditjax.tasks import sampling_gflops
from experiments.paper import published as of_experiments

ROOT = Path(__file__).parents[2]
PAPER = sorted(
    path.stem
    for path in (ROOT / "experiments" / "paper").glob("*.py")
    if path.stem not in ("__init__", "published")
)
ARGUMENTS = [
    *PAPER,
    "table4_longer:512",
    "decoders:ft-mse",
    "decoders:original",
    "fig5_blocks:S/8",
]
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "published.json").read_text(encoding="utf-8"))
METRICS = {
    "fid": "fid",
    "sfid": "sfid",
    "is": "inception_score",
    "precision": "precision",
    "recall": "recall",
}


@functools.cache
def raw(name: str) -> dict:
    name, _, arg = name.partition(":")
    path = ROOT / "experiments" / "paper" / f"{name}.py"
    return cli.load_recipe([f"--config={path}{arg and ':'}{arg}"])


@functools.cache
def recipe(name: str) -> Config:
    """A recipe as the commands read it."""
    return read(raw(name))


def known(name: str, **changes) -> dict[str, float]:
    """What a recipe has of the cell with changes, as `sample={'steps': '16'}`."""
    study = recipe(name)
    cell = changed(study, changes | {"sweep": {"published": ()}})
    found = published_of(study, cell)
    return found["values"] if found else {}


def row(table: str, model: str) -> dict[str, float]:
    (found,) = [r for r in GOLDEN[table] if r["model"] == model]
    return {METRICS[key]: value for key, value in found.items() if key in METRICS}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_says_what_its_figures_are(name):
    c = recipe(name)
    assert c.sweep.grid
    assert c.sweep.title
    assert c.sweep.published
    assert "arXiv 2212.09748" in c.sweep.published_source
    fields = dict(c.sweep.published_protocol)
    assert fields.keys() <= FIELDS.keys()
    # Every field of a protocol is said, or is one that the figures' own keys tell.
    of_keys = {key for keys, _, _ in c.sweep.published for key, _ in keys}
    names = {
        "steps": "train.steps",
        "cfg_scale": "sample.cfg_scale",
        "cfg_channels": "sample.cfg_channels",
        "sampling_steps": "sample.steps",
    }
    assert {names[field] for field in FIELDS.keys() - fields.keys()} <= of_keys
    assert fields["precision"] == fields["seed"] == "not stated"
    assert c.evaluate.features.startswith("inception:")
    assert c.data.name == "imagenet2012"
    topology.parse_topology(c.sweep.topology)


@pytest.mark.parametrize("model", [row["model"] for row in GOLDEN["models"]])
def test_table_4(model):
    (golden,) = [row for row in GOLDEN["models"] if row["model"] == model]
    assert of_scaling.TABLE4_GFLOPS[model] == golden["gflops"]
    size, patch = model.removeprefix("DiT-").split("/")
    assert of_experiments.MODELS[size, int(patch)] == golden["fid50k_400k"]


def test_every_cell_of_table_4_has_its_own_figure():
    study = raw("table4")
    for cell in cells(study):
        assert cell.published is not None
        model = cell.config.model
        fid = of_experiments.MODELS[model.size, model.patch]
        assert cell.published["values"] == {"fid": fid}
        assert not cell.config.sweep.published
        assert cell.config.train.steps == 400_000
    assert len(cells(study)) == len(of_scaling.TABLE4_GFLOPS) == 12


def test_figure_5():
    found = {}
    for cell in cells(raw("fig5_blocks")):
        assert cell.published is not None
        assert (cell.config.model.size, cell.config.model.patch) == ("XL", 2)
        found[cell.config.model.block] = cell.published["values"]["fid"]
    golden = {row["block"]: row["fid50k"] for row in GOLDEN["block_ablation_XL2_400k"]}
    names = {
        "in_context": "in-context",
        "cross_attention": "cross-attention",
        "adaln": "adaLN",
        "adaln_zero": "adaLN-Zero",
    }
    assert {names[block]: fid for block, fid in found.items()} == golden
    assert all(cell.published is None for cell in cells(raw("fig5_blocks:S/8")))


def test_figure_10():
    for golden in GOLDEN["sampling_compute_fid10k"]:
        size, patch = golden["model"].removeprefix("DiT-").split("/")
        model = {"size": size, "patch": int(patch)}
        steps = str(golden["steps"])
        name = "fig10_sampling_compute"
        assert known(name, model=model, sample={"steps": steps}) == {"fid": golden["fid"]}
        assert known(name, model=model, sample={"steps": "16"}) == {}
        c = changed(recipe(name), {"model": model, "sample": {"steps": steps}})
        assert sampling_gflops(c) / 1000 == pytest.approx(golden["tflops"], abs=0.05)
    assert dict(recipe(name).sweep.published_protocol)["num_samples"] == "10000"


@pytest.mark.parametrize("golden", GOLDEN["longer_XL2"], ids=lambda row: str(row["steps"]))
def test_table_4_longer(golden):
    name = f"table4_longer:{golden['resolution']}"
    assert known(name, train={"steps": golden["steps"]}) == {"fid": golden["fid50k"]}
    assert known(name, train={"steps": golden["steps"] + 1}) == {}


@pytest.mark.parametrize("size", [256, 512])
def test_tables_2_and_3(size):
    name = f"imagenet{size}"
    for model, scale in (("", 1.0), ("-G (cfg 1.25)", 1.25), ("-G (cfg 1.5)", 1.5)):
        expected = row(name, f"DiT-XL/2{model}")
        assert len(expected) == 5
        assert known(name, sample={"cfg_scale": scale}) == expected
    assert known(name, sample={"cfg_scale": 1.75}) == {}
    assert known(name, model={"patch": 4}) == {}
    assert dict(recipe(name).sweep.published_protocol)["decoder"] == "ft-EMA"


def test_guided_halfway():
    values = known("imagenet256", train={"steps": 2_352_000}, sample={"cfg_scale": 1.5})
    assert values == {"fid": GOLDEN["guided_at_2352k"]}


def test_guidance():
    for golden in GOLDEN["guidance_channels"]:
        keys = {"cfg_channels": golden["channels"], "cfg_scale": golden["cfg_scale"]}
        assert known("guidance", sample=keys) == {"fid": golden["fid"]}
    assert known("guidance", sample={"cfg_channels": "all", "cfg_scale": 1.5}) == {}
    assert known("guidance", sample={"cfg_scale": 1.0}) == {"fid": 9.62}


@pytest.mark.parametrize("golden", GOLDEN["vae_decoder_cfg1.5"], ids=lambda row: row["decoder"])
def test_decoders(golden):
    name = f"decoders:{golden['decoder'].lower()}"
    expected = {METRICS[key]: value for key, value in golden.items() if key in METRICS}
    assert known(name) == expected
    assert dict(recipe(name).sweep.published_protocol)["decoder"] == golden["decoder"]


def test_the_repeats_are_the_readmes():
    for golden in GOLDEN["readme_pytorch_vs_jax_400k"]:
        jax, *pytorch = of_scaling.REPEATS[golden["model"]]
        assert golden["pytorch"] in pytorch
        assert jax == pytest.approx(golden["jax"], abs=0.05)
        size, patch = golden["model"].removeprefix("DiT-").split("/")
        assert jax == of_experiments.MODELS[size, int(patch)]
    assert sum(len(v) - 1 for v in of_scaling.REPEATS.values()) == 3


def test_no_other_recipe_has_published_figures():
    for path in (ROOT / "experiments").rglob("*.py"):
        if path.stem != "__init__" and path.parent.name != "paper":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
            if hasattr(module, "get_config"):
                study = completed(module.get_config().to_dict())["sweep"]
                assert not study["published"], name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": {"image_size": 32}, "autoencoder": {"kind": "none"}}, "image_size 256"),
        ({"data": {"num_classes": 10}}, "num_classes 1000 .* and config.data.num_classes is 10"),
    ],
)
def test_figures_of_imagenet_are_none_of_digits(changes, match):
    with pytest.raises(UserError, match=match):
        changed(recipe("table4"), changes | {"model": {"patch": 8}})


# Numbers of a header's paragraph that begins with 'Published'. Figure 9's ends are table 4's.
@pytest.mark.parametrize("name", [name for name in PAPER if name != "fig9_training_compute"])
def test_the_figures_of_a_header_are_those_on_record(name):
    header = " ".join((importlib.import_module(f"experiments.paper.{name}").__doc__ or "").split())
    said = header.partition("Published")[2].partition("Hardware and hours")[0]
    module = importlib.import_module(f"experiments.paper.{name}")
    arguments = {"table4_longer": ["256", "512"], "decoders": ["ft-mse", "ft-ema", "original"]}
    figures = {
        f"{value:.2f}"
        for arg in arguments.get(name, [None])
        for _, _, value in module.get_config(arg).sweep.published
    }
    words = {f"{float(word):.2f}" for word in re.findall(r"(?<![\w.-])\d*\.\d+(?![\w.]*\d)", said)}
    assert figures <= words, f"{name} does not tell {sorted(figures - words)}"


HOURS = re.compile(
    r"on (?:a )?(?P<topology>[\w:]+) \((?P<chips>\d+) chips\),"
    r"(?: (?P<best>[\d.]+) hours of training at best \((?P<worst>[\d.]+) with nothing hidden\))?"
    r"(?:(?: and)? (?P<sampling>[\d.]+) hours of sampling)?"
)


@pytest.mark.parametrize("name", PAPER)
def test_the_hours_of_a_header_are_the_estimates(name):
    header = " ".join((importlib.import_module(f"experiments.paper.{name}").__doc__ or "").split())
    said = HOURS.search(header)
    assert said, f"{name} tells no hours"
    c = recipe(name)
    machine = topology.parse_topology(said["topology"])
    assert machine.chips == int(said["chips"])
    assert c.sweep.topology == said["topology"]
    assert said["best"] or said["sampling"]
    if said["best"]:
        found = [costs.estimate(cell.config, machine) for cell in cells(raw(name))]
        if name == "table4_longer":  # one run that goes on
            found = found[-1:]
        for bound in ("best", "worst"):
            total = sum(getattr(each, bound) for each in found)
            assert float(said[bound]) == pytest.approx(total, rel=0.005)
    if said["sampling"]:
        assert float(said["sampling"]) == pytest.approx(
            sum(costs.sampling_hours(each, machine) for each in drawn(name, c)), rel=0.005
        )


def drawn(name: str, c: Config) -> list[Config]:
    """The sample sets that a header counts."""

    def at(cell: Config, **sample) -> Config:
        return replaced(cell, sample=dataclasses.replace(cell.sample, **sample))

    if name == "fig10_sampling_compute":
        steps = importlib.import_module(f"experiments.paper.{name}").STEPS
        return [at(cell.config, steps=n) for cell in cells(raw(name)) for n in steps]
    if name in ("imagenet256", "imagenet512"):
        return [at(c, cfg_scale=scale) for scale in (1.0, 1.25, 1.5)]
    if name == "guidance":
        return [at(c, cfg_scale=1.0)] + [
            at(c, cfg_scale=s, cfg_channels=k) for s in (1.25, 1.375, 1.5) for k in ("three", "all")
        ]
    if name == "decoders":
        return [c]
    return [cell.config for cell in cells(raw(name))]
