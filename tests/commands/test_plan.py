"""python -m ditjax.plan, its devices replaced by simulated CPUs: a node of GPUs has no geometry."""

import json

import jax
import pytest

from ditjax import plan
from ditjax.config import read
from ditjax.errors import UserError
from ditjax.machines import planning, topology
from ditjax.machines.chips import GIB
from ditjax.machines.topology import CHIPS
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task

TINY = (
    "--config=experiments/digits.py:2x32x2/2",
    "--config.model.unroll=1",
    "--config.train.batch_size=16",
    "--config.train.steps=3600",
)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    def devices(machine, slices=1):
        return jax.devices()[: machine.chips]

    for module in (topology, planning):
        monkeypatch.setattr(module, "devices", devices)


@pytest.fixture
def no_stages(monkeypatch):
    """Plans without the table of stages, for tests of the rest."""
    monkeypatch.setattr(plan, "stages_of", lambda *_: [])


def test_weights_that_samples_alone_need_are_not_loaded():
    def missing():
        raise UserError("nowhere")

    task = make_task(read({}))._replace(planned=missing, reads=())
    mesh = make_mesh(8, 1)
    assert planning._held_beside(task, mesh) == (0.0, "")
    assert planning._held_beside(task._replace(reads=("x",)), mesh) == (0.0, "nowhere")


@pytest.mark.usefixtures("no_stages")
def test_a_plan_says_what_a_step_needs_and_costs(tmp_path, capsys):
    args = [*TINY, "--topology=h100:8", "--mesh=data=2,fsdp=4", f"--out={tmp_path}"]
    assert plan.main(args) == 0
    text = capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["label"] == "compiled, not run"
    assert made["command"].startswith("python -m ditjax.plan --config=experiments/digits.py")
    assert str(tmp_path) not in made["command"]
    assert made["mesh"]["data"] == 2
    assert made["mesh"]["fsdp"] == 4
    for words in ("compiled, not run", "mesh data=2 fsdp=4", "fits: ", "all-gather", "3,600 steps"):
        assert words in text
    # What is sent is the table's sum, in all its forms.
    assert made["wire_bytes"] == sum(row["wire_bytes"] for row in made["collectives"])
    assert made["wire_bytes_a_parameter"] == made["wire_bytes"] / made["parameters"]
    # Eight H100 for as many hours as 3,600 steps take seconds.
    step = made["roofline"]["step_seconds"]["sequential"]
    assert made["cost"]["chip_hours"]["sequential"] == pytest.approx(8 * step)
    # fp32 parameters, average and two moments, a quarter each: all kernels split.
    whole = 16 * made["parameters"]
    assert whole / 4 < made["memory"]["state_bytes"] < 1.15 * whole / 4

    # The same program is not compiled again, whatever does not change it.
    compiled = list((tmp_path / "compiled").glob("*.json"))
    assert len(compiled) == 1
    told = json.loads(compiled[0].read_text())
    compiled[0].write_text(json.dumps(told | {"peak_bytes": 2.0 * GIB}))
    assert plan.main([*args, "--json", "--steps=7", "--price=3.5"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cost"]["price_a_chip_hour"] == 3.5
    assert again["memory"]["peak_bytes"] == 2 * GIB
    assert again["steps"] == 7


def test_the_sampler_is_compiled_and_every_stage_has_its_cost(tmp_path, capsys):
    changes = ("--config.sample.batch_size=16", "--config.sample.cfg_scale=2")
    args = [*TINY, *changes, "--topology=h100:1"]
    args += ["--compile=sample", "--price=2", "--share=0.5", "--steps=10"]
    assert plan.main([*args, f"--out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    # The average in float32 on each device, and what a sampler needs beside it.
    assert made["memory"]["state_bytes"] == pytest.approx(4 * made["parameters"], rel=0.2)
    assert made["memory"]["peak_bytes"] > made["memory"]["state_bytes"]
    assert "of which the weights are" in text
    stages = {each["name"]: each for each in made["stages"]}
    assert list(stages) == ["train", "sample", "evaluate"]
    forward = stages["train"]["gflops"] / 3
    assert stages["train"]["number"] == 160
    assert stages["train"]["source"] == "closed form"
    assert stages["sample"]["item"].startswith("sample: 25 x ")
    assert "25 of them twice" in stages["sample"]["item"]
    assert stages["sample"]["gflops"] == pytest.approx(50 * forward, rel=0.02)
    assert stages["evaluate"]["gflops"] == pytest.approx(forward, rel=0.02)
    # An H100 at half of what it can do, for as long.
    flops = 2e9 * stages["sample"]["gflops"] * stages["sample"]["number"]
    peak = CHIPS["h100"].rates.device_flops("float32", "default")
    assert stages["sample"]["hours"] == pytest.approx(flops / (0.5 * peak) / 3600)
    for words in ("on h100:1, 1 chip, at 50% of the products' peak (not run):", "price"):
        assert words in text


def told(peak_bytes, seconds):
    """What a compiler says, for tests of what is made of it."""
    row = {"type": "all-gather", "axes": ["fsdp"], "group": 2, "calls": 1, "wire_bytes": 1e9}
    return {
        "peak_bytes": peak_bytes,
        "temporary_bytes": 0.0,
        "seconds": 0.0,
        "scattered": 0.75,
        "collectives": [{**row, "seconds": seconds}],
    }


@pytest.mark.usefixtures("no_stages")
def test_too_large_says_by_how_much_and_what_is_large_enough(tmp_path, capsys, monkeypatch):
    """A step needs half as much again as its state: two devices cannot, four cannot, eight can."""
    seen = []

    def compiled(c, topology, mesh, lower, state, cache):
        seen.append(mesh.shape["fsdp"])
        return told(1.5 * planning._shard_bytes(state), 1.0)

    monkeypatch.setattr(planning, "_compiled", compiled)
    hbm = 0.3 * 16 * 50_000  # the tiny network's parameters, average and moments: about 16 bytes
    small = CHIPS["h100"]._replace(hbm_gib=hbm / GIB)
    monkeypatch.setitem(CHIPS, "h100", small)
    args = [*TINY, "--topology=h100:1", "--mesh=data=1", f"--out={tmp_path}"]
    assert plan.main(args) == 1
    text = capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["memory"]["over_bytes"] == made["memory"]["peak_bytes"] - hbm > 0
    assert "does not fit: " in text
    assert "over by " in text
    assert made["smallest"]["topology"] == "h100:8"
    assert "smallest h100 that fits: h100:8, 8 chips, mesh fsdp=8: fits" in text
    # What was asked for is always compiled; of the others, only what the state leaves room for.
    assert seen == [1, 4, 8]
    # Splitting may be enough, where there are devices to split over.
    assert plan.main([*TINY, "--topology=h100:8", "--mesh=data=8"]) == 1
    assert "smallest h100 that fits: h100:8, 8 chips, mesh fsdp=8: fits" in capsys.readouterr().out


def test_a_search_ranks_what_fits(tmp_path, capsys, monkeypatch):
    """Faster without fsdp, but the larger batch does not fit."""

    def compiled(c, topology, mesh, lower, state, cache):
        fits = c.train.batch_size == 16
        return told(1e6 if fits else 1e12, mesh.shape["fsdp"] if fits else 0.1)

    monkeypatch.setattr(planning, "_compiled", compiled)
    args = [*TINY, "--topology=h100:2", "--search", "--limit=100", "--batches=16,32,3"]
    assert plan.main([*args, f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    order = [
        (each["mesh"]["fsdp"], each["batch_size"], each["memory"]["fits"])
        for each in found["search"]
        if each["mesh"].get("tensor", 1) == 1
    ]
    assert order[:3] == [(1, 16, True)] * 3  # one for each remat
    assert order[3:6] == [(2, 16, True)] * 3
    # Of each remat one: its activations alone are too large, on any mesh.
    assert [each[1:] for each in order[6:]] == [(32, False)] * 3
    assert any("remat none with batch 32: the activations" in why for why in found["skipped"])
    assert any("batch_size is 3" in why for why in found["skipped"])
    text = capsys.readouterr().out
    assert "Ranked by images/s" in text
    assert text.count("does not fit") == sum(not each["memory"]["fits"] for each in found["search"])


@pytest.mark.usefixtures("no_stages")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5e:99"], "v5e has no shape"),
        (["--topology=h100:8", "--mesh=fsdp"], "AXIS=SIZE"),
        (["--topology=h100:8", "--mesh=fsdb=8"], "Did you mean 'mesh.fsdp'"),
        (["--topology=h100:8", "--mesh=data=1,fsdp=3"], "does not fill 8"),
        (["--topology=h100:8", "--search", "--limit=0"], "at least 1"),
        (["--topology=h100:8", "--share=0"], "a share above 0"),
        (["--topology=h100:8", "--search", "--images=9"], "no effect with --search"),
        (["--topology=h100:8", "--limit=3"], "--limit: no effect without --search: remove it"),
        (["--topology=h100:8", "--search", "--batches=a"], "512,1024"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    with pytest.raises(UserError) as error:
        plan.main([*TINY, *flags])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (198.98G) exceeds available HBM (15.75G).",
            198.98 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.05G of 15.75G"
            " hbm. Exceeded hbm capacity by 1.30G.",
            17.05 * GIB,
        ),
        ("INTERNAL: something else (198.98G)", None),
    ],
)
def test_the_compilers_own_figures(message, expected):
    assert planning.bytes_needed(message) == expected
