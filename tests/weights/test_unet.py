"""Files of guided-diffusion's U-Net, whose names are spelled out here from its code."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from ditjax import convert
from ditjax.errors import UserError
from ditjax.models import unet
from ditjax.weights import layouts, reading
from tests.seeded import seeded_state

# unet.py's UNetModel(model_channels=64, num_res_blocks=1, channel_mult=(1, 2),
# attention_resolutions={2}, num_heads_channels=64, resblock_updown=True, num_classes=5), 6 outputs.
# Block: its input and output channels.
RES = {
    "input_blocks.1.0": (64, 64),
    "input_blocks.2.0": (64, 64),  # halves the resolution
    "input_blocks.3.0": (64, 128),
    "middle_block.0": (128, 128),
    "middle_block.2": (128, 128),
    "output_blocks.0.0": (256, 128),
    "output_blocks.1.0": (192, 128),
    "output_blocks.1.2": (128, 128),  # doubles it
    "output_blocks.2.0": (192, 64),
    "output_blocks.3.0": (128, 64),
}
ATTENTION = ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1")


def shapes():
    """The state dict: 32 groups, time embedding 4 * 64."""
    found = {
        "time_embed.0.weight": (256, 64),
        "time_embed.0.bias": (256,),
        "time_embed.2.weight": (256, 256),
        "time_embed.2.bias": (256,),
        "label_emb.weight": (5, 256),
        "input_blocks.0.0.weight": (64, 3, 3, 3),
        "input_blocks.0.0.bias": (64,),
        "out.0.weight": (64,),
        "out.0.bias": (64,),
        "out.2.weight": (6, 64, 3, 3),
        "out.2.bias": (6,),
    }
    for name, (into, out) in RES.items():
        for part, shape in (
            ("in_layers.0", (into,)),
            ("in_layers.2", (out, into, 3, 3)),
            ("emb_layers.1", (2 * out, 256)),
            ("out_layers.0", (out,)),
            ("out_layers.3", (out, out, 3, 3)),
            *([("skip_connection", (out, into, 1, 1))] if into != out else []),
        ):
            found[f"{name}.{part}.weight"] = shape
            found[f"{name}.{part}.bias"] = (shape[0],)
    for name in ATTENTION:
        for part, shape in (("norm", (128,)), ("qkv", (384, 128, 1)), ("proj_out", (128, 128, 1))):
            found[f"{name}.{part}.weight"] = shape
            found[f"{name}.{part}.bias"] = (shape[0],)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adm") / "adm.safetensors"
    save_file(seeded_state(shapes(), 0), path)
    return path


def test_its_architecture_is_read(file):
    network = reading.load_network(file)
    m = network.config.model
    assert (m.kind, m.width, m.multipliers, m.res_blocks) == ("unet", 64, (1.0, 2.0), 1)
    assert (m.attention_factors, m.head_width, m.groups) == ((2,), 64, 32)
    c = network.config
    assert (c.data.image_size, c.data.num_classes, m.label_dropout) == (16, 5, 0.0)
    assert c.diffusion.variance == "learned_range"
    assert "taken for images of 16x16, with the linear schedule and heads of 64" in " ".join(
        network.notes
    )


def test_rows_of_queries_keys_and_values(file):
    """QKVAttentionLegacy's rows are ordered (head, q k v, d)."""
    theirs = seeded_state(shapes(), 0)
    leaves = reading.load_network(file).leaves
    ours = leaves["middle_0_attention/qkv/kernel"]  # [C, 3, H, d]
    rows = theirs["middle_block.1.qkv.weight"][:, :, 0]
    for head in range(2):
        for part in range(3):
            first = (3 * head + part) * 64
            np.testing.assert_array_equal(ours[:, part, head].T, rows[first : first + 64])
            np.testing.assert_array_equal(
                leaves["middle_0_attention/qkv/bias"][part, head],
                theirs["middle_block.1.qkv.bias"][first : first + 64],
            )


def test_there_and_back(file, tmp_path):
    out = tmp_path / "again.pt"
    assert "classes: 5, no null label" in convert.convert(str(file), "adm", str(out))
    again = reading.load_network(out)
    first = reading.load_network(file)
    assert again.config == first.config
    assert again.leaves.keys() == first.leaves.keys()
    for name, leaf in first.leaves.items():
        np.testing.assert_array_equal(again.leaves[name], leaf)


def test_the_network_of_64_pixels_has_another_order_and_schedule():
    """README of guided-diffusion: --noise_schedule cosine --use_new_attention_order True."""
    k = unet.UNetKeys(width=192, multipliers=(1.0, 2.0, 3.0, 4.0), res_blocks=3)
    leaves = {"middle_0_attention/qkv/kernel": (768, 3, 12, 64)}
    (rule,) = layouts.unet_layout(k, leaves, "adm")
    assert (rule.theirs, rule.kind) == (("middle_block.1.qkv.weight",), "linear_as_conv1d")
    assert layouts.adm_of_64(k)
    assert not layouts.adm_of_64(unet.UNetKeys())


@pytest.mark.parametrize(
    ("tensor", "shape", "match"),
    [
        ("input_blocks.0.0.weight", (64, 6, 3, 3), "has 6 channels in and 6 out|reads 6 channels"),
        ("out.2.weight", (4, 64, 3, 3), "has 3 channels in and 4 out: expected 3, or 6"),
    ],
)
def test_other_channels_are_refused(tensor, shape, match, tmp_path):
    state = seeded_state({**shapes(), tensor: shape, "out.2.bias": (shape[0],)}, 0)
    save_file(state, tmp_path / "adm.safetensors")
    with pytest.raises(UserError, match=match):
        reading.load_network(tmp_path / "adm.safetensors")


@pytest.mark.parametrize("target", ["release", "sit", "diffusers"])
def test_programs_that_have_no_unet(file, target, tmp_path):
    with pytest.raises(UserError, match="has no U-Net-64: expected a DiT"):
        convert.convert(str(file), target, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("leave", "match"),
    [
        ("label_emb.weight", "has no label_emb.weight: it is an unconditional U-Net, a classifier"),
        ("output_blocks.1.2.in_layers.2.weight", "4 output blocks|missing|resblock_updown"),
        ("middle_block.1.qkv.weight", r"middle_block\.1\.qkv\.weight"),
    ],
)
def test_what_is_missing_is_named(leave, match, tmp_path):
    state = seeded_state(shapes(), 0)
    del state[leave]
    save_file(state, tmp_path / "adm.safetensors")
    with pytest.raises(UserError, match=match):
        reading.load_network(tmp_path / "adm.safetensors")


@pytest.mark.parametrize(("name", "value"), [("heads", 4), ("numerics", "diffusers")])
def test_choices_that_it_does_not_leave_open(file, name, value):
    with pytest.raises(
        UserError, match=f"--{name} is {value}, and .*, a U-Net-64, has none: remove"
    ):
        reading.load_network(file, **{name: value})
