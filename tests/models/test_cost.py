"""The closed forms against the published tables; tests/models checks them against the network."""

import pytest

from ditjax.flops import paper_table
from ditjax.models.dit import (
    PAPER_PATCHES,
    PAPER_SIZES,
    Size,
    forward_macs,
    gflops,
    paper_shape,
    parse_size,
    trainable_parameters,
)
from ditjax.models.network import training_flops
from ditjax.scaling.published import TABLE4_GFLOPS

# Recomputed from the public release's model, position table excluded.
PARAMETERS = {
    "DiT-S/8": 33142016,
    "DiT-S/4": 32920448,
    "DiT-S/2": 32865056,
    "DiT-B/8": 130869248,
    "DiT-B/4": 130426496,
    "DiT-B/2": 130315808,
    "DiT-L/8": 458578432,
    "DiT-L/4": 457988224,
    "DiT-L/2": 457840672,
    "DiT-XL/8": 675664640,
    "DiT-XL/4": 675000704,
    "DiT-XL/2": 674834720,
}


def models():
    return [(name, patch) for name in PAPER_SIZES for patch in PAPER_PATCHES]


@pytest.mark.parametrize(("name", "patch"), models())
def test_the_twelve_models(name, patch):
    shape = paper_shape(PAPER_SIZES[name], patch)
    assert trainable_parameters(shape) == PARAMETERS[f"DiT-{name}/{patch}"]
    assert gflops(shape) == pytest.approx(TABLE4_GFLOPS[f"DiT-{name}/{patch}"], abs=0.02)


@pytest.mark.parametrize(
    ("block", "published_gflops", "published_millions"),
    # DiT Fig. 5 and its table; the paper counts the frozen position table (256 x 1152) as well.
    [
        ("in_context", 119.37, 449.5),
        ("cross_attention", 137.62, 598.2),
        ("adaln", 118.56, 600.8),
        ("adaln_zero", 118.64, 675.1),
    ],
)
def test_the_four_blocks(block, published_gflops, published_millions):
    shape = paper_shape(PAPER_SIZES["XL"], 2)._replace(block=block)
    assert gflops(shape) == pytest.approx(published_gflops, abs=0.02)
    millions = (trainable_parameters(shape) + 256 * 1152) / 1e6
    assert millions == pytest.approx(published_millions, abs=0.06)


def test_512_pixels():
    assert gflops(paper_shape(PAPER_SIZES["XL"], 2, 512)) == pytest.approx(524.6, abs=0.02)


def test_training_is_three_forwards_of_two_flops():
    shape = paper_shape(PAPER_SIZES["S"], 8)
    assert training_flops(forward_macs(shape), 256) == pytest.approx(
        3 * 2 * gflops(shape) * 1e9 * 256
    )


def test_the_command_prints_all_twelve_beside_published():
    table = paper_table()
    for (name, patch), count in zip(models(), PARAMETERS.values(), strict=True):
        (line,) = [row for row in table.splitlines() if row.startswith(f"DiT-{name}/{patch} ")]
        assert f"{count:,}" in line
        assert line.endswith(f"{TABLE4_GFLOPS[f'DiT-{name}/{patch}']:.2f}")


def test_sizes():
    assert parse_size("XL") == Size(28, 1152, 16)
    assert parse_size("4x96x3") == Size(4, 96, 3)
