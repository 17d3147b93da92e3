"""libtpu itself: the train step compiled for TPUs that are not here."""

import json

import pytest

from ditjax import plan
from ditjax.machines import topology
from ditjax.machines.chips import GIB

pytest.importorskip("libtpu")

TINY = (
    "--config=experiments/base.py",
    "--config.model.size=2x64x2",
    "--config.model.dtype=bfloat16",
    "--config.train.batch_size=8",
    "--topology=v5e:2x2",
)


def test_fsdp_on_four_chips(tmp_path):
    """Both stacks of kernels go out twice and their gradients come back scattered."""
    assert plan.main([*TINY, "--mesh=data=1,fsdp=4", f"--out={tmp_path}"]) == 0
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["label"] == "compiled, not run"
    assert "libtpu" in made["versions"]
    assert made["gradients_by_reduce_scatter"] > 0.9
    sent = {row["type"]: row["wire_bytes"] for row in made["collectives"]}
    layers = 2 * (3 + 1 + 4 + 4) * 64 * 64  # qkv, out and the MLP of two layers; 2 bytes, 3/4 sent
    assert sent["reduce-scatter"] == pytest.approx(2 * layers * 3 / 4, rel=0.1)
    assert sent["all-gather"] == pytest.approx(2 * 2 * layers * 3 / 4, rel=0.2)


def test_too_large_is_said_by_the_compiler(tmp_path, capsys):
    """Two layers of 9.7 billion parameters on one chip; for the test's sake no other is tried."""
    one = [*TINY, "--config.model.size=2x16384x128", "--topology=v5e:1x1", "--mesh=data=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "smallest_that_fits", lambda *_: None)
        assert plan.main([*one, f"--out={tmp_path}"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["memory"]["over_bytes"] > made["memory"]["state_bytes"] - 16 * GIB
    assert "no shape of v5e from this one on" in text


@pytest.mark.parametrize("chip", [name for name in topology.CHIPS if name != "h100"])
def test_every_generation_has_its_devices(chip):
    smallest, *_ = topology.SHAPES[chip]
    for name in (f"{chip}:{smallest}", f"{chip}:{topology.SHAPES[chip][-1]}"):
        machine = topology.parse_topology(name)
        found = topology.devices(machine)
        assert len(found) == machine.chips * machine.chip.cores
    assert len(topology.devices(topology.parse_topology(f"{chip}:{smallest}"), slices=2)) == 2 * (
        topology.parse_topology(f"{chip}:{smallest}").chips * machine.chip.cores
    )
