"""A base on another network: its output at step 0, and a place for every leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path

from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models import dit
from ditjax.models.embed import sincos_position_embedding
from ditjax.models.grafting import End, Join, graft
from ditjax.models.network import Conditions, Inputs
from ditjax.parallel.rules import path_of

KEYS = dit.DiTKeys(size="1x16x2", patch=2)
BASE = Inputs(shape=(4, 4, 1), out_channels=1, num_classes=3)


def apply(inputs, leaves, x, label, keys=KEYS):
    t, conditions = jnp.array([3, 500]), Conditions(label=jnp.array(label))
    program = jax.jit(dit.module(keys, inputs).apply)
    return program({"params": unflatten(leaves)}, x, t, conditions)


def initial(inputs, keys=KEYS):
    """Values of a network's leaves, of the label table's size."""
    conditions = Conditions(label=jnp.zeros((1,), jnp.int32))
    x, label = jnp.zeros((1, *inputs.shape)), conditions.label
    init = dit.module(keys, inputs).init
    tree = jax.eval_shape(lambda key: init(key, x, label, conditions), jax.random.key(1))
    rng = np.random.default_rng(1)
    shapes = {path_of(path): leaf.shape for path, leaf in tree_leaves_with_path(tree["params"])}
    return {p: rng.normal(0, 0.02, shape).astype(np.float32) for p, shape in shapes.items()}


@pytest.fixture(scope="module")
def base():
    """No weight is zero, so that every one of them is seen in the output."""
    rng = np.random.default_rng(0)
    return {k: rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in initial(BASE).items()}


def grafted(base, inputs, classes=(), keys=KEYS, skip=""):
    fresh = initial(inputs, keys)
    shapes = {path: leaf.shape for path, leaf in fresh.items()}
    join = Join(End(KEYS, BASE), End(keys, inputs), classes)
    found = graft(base, shapes, lambda path: fresh[path], dit.NETWORK.grafts, join, skip)
    listed = [*found.copied, *found.adapted, *found.fresh]
    assert sorted(listed) == sorted(found.leaves) == sorted(shapes)
    assert {path: leaf.shape for path, leaf in found.leaves.items()} == shapes
    return found


IMAGES = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)


def test_the_same_network_is_copied_to_the_bit(base):
    found = grafted(base, BASE)
    assert sorted(found.copied) == sorted(base)
    assert [found.adapted, found.fresh, found.unused] == [{}, [], []]
    for path, leaf in base.items():
        np.testing.assert_array_equal(found.leaves[path], leaf)


def test_channels_and_variances_leave_the_output_at_step_0(base):
    """New inputs are not read and new outputs are zero, whatever the other channels hold."""
    expected = apply(BASE, base, IMAGES[..., :1], [0, 3])
    found = grafted(base, Inputs((4, 4, 3), 6, 3))
    assert set(found.adapted) == {
        "x_embedder/kernel",
        "final_layer/linear/kernel",
        "final_layer/linear/bias",
    }
    out = apply(Inputs((4, 4, 3), 6, 3), found.leaves, IMAGES, [0, 3])
    # Longer products are summed in another order.
    np.testing.assert_allclose(out[..., :1], expected, rtol=0, atol=1e-6 * abs(expected).max())
    assert not out[..., 1:].any()
    # A variance alone leaves the sums as they are: to the bit.
    learned = Inputs((4, 4, 1), 2, 3)
    out = apply(learned, grafted(base, learned).leaves, IMAGES[..., :1], [0, 3])
    np.testing.assert_array_equal(out[..., :1], expected)
    assert not out[..., 1:].any()


def test_variances_keep_their_place_among_more_channels(base):
    """[ε of C channels | variances of C channels], each with the new channels after the old."""
    learned = Inputs((4, 4, 1), 2, 3)
    leaves = {**base, "final_layer/linear/bias": np.arange(8, dtype=np.float32)}
    leaves["final_layer/linear/kernel"] = np.zeros((16, 8), np.float32)
    shapes = {path: leaf.shape for path, leaf in initial(Inputs((4, 4, 3), 6, 3)).items()}
    ends = Join(End(KEYS, learned), End(KEYS, Inputs((4, 4, 3), 6, 3)))
    found = graft(leaves, shapes, lambda path: np.zeros(()), dit.NETWORK.grafts, ends)
    bias = found.leaves["final_layer/linear/bias"].reshape(4, 6)
    np.testing.assert_array_equal(bias[:, [0, 3]], np.arange(8).reshape(4, 2))
    assert not bias[:, [1, 2, 4, 5]].any()


def test_classes_take_the_rows_that_they_name(base):
    found = grafted(base, BASE._replace(num_classes=4), classes=(2, -1, 0, -1))
    table, rows = found.leaves["y_embedder/table"], base["y_embedder/table"]
    np.testing.assert_array_equal(table[[0, 2, 4]], rows[[2, 0, 3]])  # the last is the null label
    mean = rows[:3].mean(axis=0)
    assert 0.005 < np.abs(table[[1, 3]] - mean).std() < 0.04
    assert not np.array_equal(table[1], table[3])
    assert "2 of 4 classes from the base's 3; 2 new" in found.adapted["y_embedder/table"]
    no_null = dit.DiTKeys(size="1x16x2", patch=2, label_dropout=0.0)
    found = grafted(base, BASE, keys=no_null)
    np.testing.assert_array_equal(found.leaves["y_embedder/table"], rows[:3])
    assert found.adapted["y_embedder/table"] == "null row unused"


def test_leaves_without_a_place_are_named_together(base):
    normed = dit.DiTKeys(size="1x16x2", patch=2, qk_norm=True)
    odd = {**base, "odd/kernel": np.zeros(2)}
    with pytest.raises(UserError) as error:
        grafted(odd, BASE, keys=normed)
    for name in ("blocks/attn/q_norm/scale", "blocks/attn/k_norm/scale", "odd/kernel"):
        assert name in str(error.value)
    found = grafted(odd, BASE, keys=normed, skip="_norm/|odd")
    assert found.fresh == ["blocks/attn/k_norm/scale", "blocks/attn/q_norm/scale"]
    assert found.unused == ["odd/kernel"]


@pytest.mark.parametrize(
    ("inputs", "keys", "classes", "words"),
    [
        (BASE._replace(num_classes=5), {}, (), "the base has 3 classes and the recipe 5"),
        (BASE, {}, (0, 1, 3), "names class 3, and the base has classes 0 to 2"),
        (BASE, {"patch": 4}, (), "patches of 2x2 and the recipe of 4x4"),
        (BASE, {"size": "2x16x2"}, (), r"blocks/attn/qkv/kernel is (2, 16, 3, 2, 8), and (1,"),
    ],
)
def test_what_does_not_fit_is_refused(base, inputs, keys, classes, words):
    with pytest.raises(UserError) as error:
        grafted(base, inputs, classes, dit.DiTKeys(**{"size": "1x16x2", "patch": 2, **keys}))
    assert words in str(error.value)


def test_positions_of_another_resolution_span_the_grid_of_the_base(base):
    own = sincos_position_embedding(16, 4, 4)
    np.testing.assert_array_equal(sincos_position_embedding(16, 4, 4, 4), own)
    fine = sincos_position_embedding(16, 8, 8, 4).reshape(8, 8, 16)
    np.testing.assert_array_equal(fine[::2, ::2], own.reshape(4, 4, 16))
    half = fine[1, 2, 8:]  # row 1 of 8 is at 0.5, column 2 at 1
    omega = 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(half, [*np.sin(omega / 2), *np.cos(omega / 2)], atol=1e-6)
    # The network takes them: its parameters are those of any size.
    keys = dit.DiTKeys(size="1x16x2", patch=2, position_grid=2)
    inputs, images = Inputs((8, 8, 1), 1, 3), IMAGES[..., :1].repeat(2, 1).repeat(2, 2)
    far, near = (apply(inputs, base, images, [0, 1], each) for each in (KEYS, keys))
    assert np.abs(near - far).max() > 0.01
