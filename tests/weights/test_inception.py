"""FID's Inception out of a PyTorch state dict."""

import jax
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.weights import layouts
from ditjax.weights.inception import inception_layout, inception_shapes, load_inception
from ditjax.weights.torch_file import write_torch
from tests.models.test_inception import from_torch
from tests.seeded import seeded_state


@pytest.fixture(scope="module")
def state():
    return seeded_state(layouts.expected_shapes(inception_layout(), inception_shapes()), 0)


def test_there_and_back(state, tmp_path):
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.array(7)
        for name in state
        if name.endswith("running_var")
    }
    write_torch(tmp_path / "inception.pth", {**state, **counters})
    read = load_inception(tmp_path / "inception.pth")
    assert read.files == (tmp_path / "inception.pth",)
    # The rule as the tests of the network write it, without the tables of io/layouts.py.
    jax.tree.map(np.testing.assert_array_equal, read.params, from_torch(state))
    leaves = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(read.params["params"])
    }
    again = layouts.to_theirs(inception_layout(), leaves)
    assert again.keys() == state.keys()
    assert len(again) == 94 * 5 + 2
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_6d.branch1x1.bn.bias"), "1 missing: Mixed_6d.branch1x1.bn.bias"),
        (lambda s: s.update({"AuxLogits.fc.bias": np.zeros(8, np.float32)}), "1 extra: AuxLogits"),
        # The Inception-v3 of model libraries has 1,000 classes.
        (
            lambda s: s.update({"fc.bias": np.zeros(1000, np.float32)}),
            r"fc.bias is \(1000,\), not \(1008,\)",
        ),
        (
            lambda s: s.update({k: v.astype(np.float16) for k, v in s.items()}),
            "is of float16: FID's Inception is of float32",
        ),
    ],
)
def test_what_is_no_fid_inception(state, tmp_path, change, message):
    changed = dict(state)
    change(changed)
    write_torch(tmp_path / "inception.pth", changed)
    with pytest.raises(UserError, match=message):
        load_inception(tmp_path / "inception.pth")
