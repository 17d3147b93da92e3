"""The tables of names against the programs that they speak of, element by element."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditjax.config import read
from ditjax.weights import layouts
from ditjax.weights.layouts import DIT_DIFFUSERS, DIT_RELEASE
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state
from tests.weight_files import assert_same, diffusers_state, golden, release_shapes

TABLE = "pos_embed"


def dit_leaves(depth=2, width=48, heads=3, patch=4, classes=10, channels=4, mlp_ratio=4.0):
    """Our leaves by path, written out: what `models/dit.py` makes."""
    L, D, H, p = depth, width, heads, patch
    d, M, out = D // H, int(D * mlp_ratio), p * p * 2 * channels
    return {
        "x_embedder/kernel": (p * p * channels, D),
        "x_embedder/bias": (D,),
        "t_embedder/in/kernel": (256, D),
        "t_embedder/in/bias": (D,),
        "t_embedder/out/kernel": (D, D),
        "t_embedder/out/bias": (D,),
        "y_embedder/table": (classes + 1, D),
        "blocks/attn/qkv/kernel": (L, D, 3, H, d),
        "blocks/attn/qkv/bias": (L, 3, H, d),
        "blocks/attn/out/kernel": (L, D, D),
        "blocks/attn/out/bias": (L, D),
        "blocks/mlp/in/kernel": (L, D, M),
        "blocks/mlp/in/bias": (L, M),
        "blocks/mlp/out/kernel": (L, M, D),
        "blocks/mlp/out/bias": (L, D),
        "blocks/adaln/linear/kernel": (L, D, 6, D),
        "blocks/adaln/linear/bias": (L, 6, D),
        "final_layer/adaln/linear/kernel": (D, 2, D),
        "final_layer/adaln/linear/bias": (2, D),
        "final_layer/linear/kernel": (D, out),
        "final_layer/linear/bias": (out,),
    }


def autoencoder_leaves(width=32, multipliers=(1, 2, 4, 4), blocks=2, groups=32):
    return shapes_of(
        read(
            {
                "task": "autoencoder",
                "autoencoder": {
                    "base_width": width,
                    "multipliers": multipliers,
                    "res_blocks": blocks,
                    "groups": groups,
                },
            }
        )
    )


def test_the_leaves_are_the_networks():
    c = read({"model": {"size": "2x48x3", "patch": 4}, "data": {"num_classes": 10}})
    assert shapes_of(c) == dit_leaves()


def test_names_and_shapes_of_the_release():
    expected = release_shapes()
    del expected[TABLE]
    assert layouts.expected_shapes(DIT_RELEASE, dit_leaves(), patch=4) == expected


@pytest.mark.parametrize("kind", ["dit", "autoencoder"])
def test_names_and_shapes_of_diffusers(kind):
    """As diffusers itself gave them."""
    expected = {name: tuple(shape) for name, shape in golden(f"{kind}_shapes").items()}
    if kind == "dit":
        ours = layouts.expected_shapes(DIT_DIFFUSERS, dit_leaves(), patch=4, depth=2)
    else:
        leaves = autoencoder_leaves(16, (1, 2), groups=8)
        ours = layouts.expected_shapes(layouts.autoencoder_layout(leaves, "diffusers"), leaves)
    assert ours == expected


# Of a checkpoint of Stable Diffusion 1, first_stage_model, at its width.
LDM_SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.1.norm2.bias": (128,),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.down.3.block.0.conv1.weight": (512, 512, 3, 3),
    "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.norm.weight": (512,),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.proj_out.bias": (512,),
    "encoder.mid.block_2.norm1.weight": (512,),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid.attn_1.v.weight": (512, 512, 1, 1),
    "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.0.block.2.norm1.weight": (128,),
    "decoder.norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
LDM_ABSENT = (
    "encoder.down.0.block.0.nin_shortcut.weight",
    "encoder.down.3.downsample.conv.weight",
    "decoder.up.0.upsample.conv.weight",
    "decoder.up.2.block.0.nin_shortcut.weight",
    "decoder.up.4.block.0.conv1.weight",
    "encoder.down.0.block.2.conv1.weight",
)


def test_names_of_latent_diffusion():
    leaves = autoencoder_leaves(128)
    shapes = layouts.expected_shapes(layouts.autoencoder_layout(leaves, "ldm"), leaves)
    assert {name: shapes.get(name) for name in LDM_SHAPES} == LDM_SHAPES
    assert not shapes.keys() & set(LDM_ABSENT)
    assert len(shapes) == len(leaves) == 248


def test_old_attention_names_of_diffusers():
    leaves = autoencoder_leaves(16, (1, 2), groups=8)
    old = layouts.expected_shapes(layouts.autoencoder_layout(leaves, "diffusers_old"), leaves)
    new = layouts.expected_shapes(layouts.autoencoder_layout(leaves, "diffusers"), leaves)
    at = "encoder.mid_block.attentions.0."
    assert {name.removeprefix(at) for name in old if name.startswith(at)} == {
        f"{name}.{leaf}"
        for name in ("group_norm", "query", "key", "value", "proj_attn")
        for leaf in ("weight", "bias")
    }
    assert {k for k in old if ".attentions." not in k} == {
        k for k in new if ".attentions." not in k
    }


# Values.


def release_leaves():
    shapes = release_shapes()
    del shapes[TABLE]
    state = seeded_state(shapes, 0)
    return state, layouts.to_ours(DIT_RELEASE, state, dit_leaves())


def test_values_of_the_release():
    """By the definition: y = W x + b there, x W here, with the axes that we keep apart."""
    state, leaves = release_leaves()
    H, d, D, p, C = 3, 16, 48, 4, 4
    for i in range(2):
        qkv = state[f"blocks.{i}.attn.qkv.weight"]
        for part in range(3):
            for h in range(H):
                rows = slice(part * D + h * d, part * D + (h + 1) * d)
                np.testing.assert_array_equal(
                    leaves["blocks/attn/qkv/kernel"][i, :, part, h], qkv[rows].T
                )
                np.testing.assert_array_equal(
                    leaves["blocks/attn/qkv/bias"][i, part, h],
                    state[f"blocks.{i}.attn.qkv.bias"][rows],
                )
        adaln = state[f"blocks.{i}.adaLN_modulation.1.weight"]
        for part in range(6):
            np.testing.assert_array_equal(
                leaves["blocks/adaln/linear/kernel"][i, :, part],
                adaln[part * D : (part + 1) * D].T,
            )
        np.testing.assert_array_equal(
            leaves["blocks/mlp/in/kernel"][i], state[f"blocks.{i}.mlp.fc1.weight"].T
        )
    kernel = state["x_embedder.proj.weight"]
    for row in range(p):
        for column in range(p):
            for channel in range(C):
                np.testing.assert_array_equal(
                    leaves["x_embedder/kernel"][(row * p + column) * C + channel],
                    kernel[:, channel, row, column],
                )


def test_values_of_diffusers_are_those_of_the_release():
    """to_q, to_k and to_v are the rows of qkv."""
    state = diffusers_state("dit")
    leaves = layouts.to_ours(DIT_DIFFUSERS, state, dit_leaves())
    names = [f"transformer_blocks.1.attn1.to_{part}.weight" for part in "qkv"]
    release = layouts.to_theirs(DIT_RELEASE, leaves, patch=4)
    np.testing.assert_array_equal(
        release["blocks.1.attn.qkv.weight"], np.concatenate([state[name] for name in names])
    )
    np.testing.assert_array_equal(release["x_embedder.proj.weight"], state["pos_embed.proj.weight"])
    np.testing.assert_array_equal(
        release["final_layer.adaLN_modulation.1.weight"], state["proj_out_1.weight"]
    )
    np.testing.assert_array_equal(
        release["t_embedder.mlp.2.weight"],
        state["transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.weight"],
    )


def test_values_of_an_autoencoder():
    state = diffusers_state("autoencoder")
    leaves_of = autoencoder_leaves(16, (1, 2), groups=8)
    leaves = layouts.to_ours(layouts.autoencoder_layout(leaves_of, "diffusers"), state, leaves_of)
    np.testing.assert_array_equal(
        leaves["decoder/conv_in/kernel"][1, 2, 3], state["decoder.conv_in.weight"][:, 3, 1, 2]
    )
    at = "encoder/mid_block/attentions_0"
    np.testing.assert_array_equal(
        leaves[f"{at}/to_k/kernel"],
        state[f"{at}/to_k".replace("/", ".").replace("s_0", "s.0") + ".weight"].T,
    )
    np.testing.assert_array_equal(
        leaves[f"{at}/group_norm/scale"], state["encoder.mid_block.attentions.0.group_norm.weight"]
    )
    # Latent diffusion's last level is diffusers' first in the decoder; its matrices are 1x1.
    ldm = layouts.to_theirs(layouts.autoencoder_layout(leaves_of, "ldm"), leaves)
    np.testing.assert_array_equal(
        ldm["decoder.up.1.block.0.conv1.weight"],
        state["decoder.up_blocks.0.resnets.0.conv1.weight"],
    )
    np.testing.assert_array_equal(
        ldm["decoder.mid.attn_1.proj_out.weight"][:, :, 0, 0],
        state["decoder.mid_block.attentions.0.to_out.0.weight"],
    )
    np.testing.assert_array_equal(
        ldm["encoder.mid.block_2.norm1.weight"],
        state["encoder.mid_block.resnets.1.norm1.weight"],
    )


DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])


@given(
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    head=st.sampled_from([4, 8]),
    patch=st.integers(1, 4),
    classes=st.integers(1, 5),
    channels=st.integers(1, 5),
    ratio=st.sampled_from([1.0, 2.5, 4.0]),
    dtype=DTYPES,
    diffusers=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_dit_there_and_back(
    depth, heads, head, patch, classes, channels, ratio, dtype, diffusers
):
    ours = dit_leaves(depth, heads * head, heads, patch, classes, channels, ratio)
    layout = DIT_DIFFUSERS if diffusers else DIT_RELEASE
    leaves = {name: x.astype(dtype) for name, x in seeded_state(ours, 1).items()}
    theirs = layouts.to_theirs(layout, leaves, patch=patch, depth=depth)
    shapes = layouts.expected_shapes(layout, ours, patch=patch, depth=depth)
    assert {name: x.shape for name, x in theirs.items()} == shapes
    assert_same(layouts.to_ours(layout, theirs, ours), leaves)


@given(
    width=st.sampled_from([4, 8]),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    names=st.sampled_from(["diffusers", "diffusers_old", "ldm"]),
    dtype=DTYPES,
)
@settings(max_examples=10, deadline=None)
def test_any_autoencoder_there_and_back(width, multipliers, blocks, names, dtype):
    ours = autoencoder_leaves(width, tuple(multipliers), blocks, groups=4)
    leaves = {name: x.astype(dtype) for name, x in seeded_state(ours, 1).items()}
    layout = layouts.autoencoder_layout(ours, names)
    theirs = layouts.to_theirs(layout, leaves)
    assert {name: x.shape for name, x in theirs.items()} == layouts.expected_shapes(layout, ours)
    assert len(theirs) == len(leaves), "two leaves of one name"
    assert_same(layouts.to_ours(layout, theirs, ours), leaves)


def test_what_is_written_is_views_and_what_is_read_is_not():
    state, leaves = release_leaves()
    for name, x in layouts.to_theirs(DIT_RELEASE, leaves, patch=4).items():
        assert any(np.shares_memory(x, leaf) for leaf in leaves.values()), name
    for path, leaf in leaves.items():
        assert not any(np.shares_memory(leaf, x) for x in state.values()), path
        assert leaf.flags.c_contiguous or leaf.flags.owndata, path


def test_copies_that_differ_are_refused():
    state = diffusers_state("dit")
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name].copy()
    state[name][3, 7] = np.nan
    with pytest.raises(ValueError, match=name):
        layouts.to_ours(DIT_DIFFUSERS, state, dit_leaves())
    # The same NaN in each is no difference.
    state[name.replace("blocks.1", "blocks.0")] = state[name]
    leaves = layouts.to_ours(DIT_DIFFUSERS, state, dit_leaves())
    assert np.isnan(leaves["y_embedder/table"]).sum() == 1
