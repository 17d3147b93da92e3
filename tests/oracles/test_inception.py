"""FID's Inception against torch-fidelity and pytorch-fid themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.models.inception import INPUT_SIDE, FIDInception, preprocess
from tests.models.test_inception import from_torch, relative, shapes
from tests.oracles.inception import (
    GAIN,
    layout,
    pytorch_fid_features,
    torch_fidelity_features,
)
from tests.seeded import seeded_images, seeded_state

SIZES = ((32, 32), (256, 256), (299, 299), (400, 400), (97, 640), (1, 3))
FEATURES = {"tf1": torch_fidelity_features, "pytorch-fid": pytorch_fid_features}


def test_layout_is_that_of_torch_fidelity():
    image = jax.ShapeDtypeStruct((1, INPUT_SIDE, INPUT_SIDE, 3), jnp.float32)
    assert shapes(FIDInception(), image) == layout()


@pytest.fixture(scope="module")
def state():
    return seeded_state(layout(), 1, GAIN)


@pytest.fixture(scope="module")
def network():
    return jax.jit(FIDInception().apply)


@pytest.mark.parametrize("convention", ["tf1", "pytorch-fid"])
def test_features(state, network, convention):
    variables = from_torch(state)
    for seed, (H, W) in enumerate(SIZES):
        images = seeded_images((2, H, W, 3), seed)
        theirs = FEATURES[convention](state, images)
        ours = network(variables, preprocess(jnp.asarray(images), convention))
        for name, value in theirs.items():
            got = getattr(ours, name)
            assert got.shape == value.shape
            assert relative(got, value) <= 1e-4, (name, H, W)
            assert np.mean(value != 0) > 0.2


def test_white_noise_and_flat_pictures(network):
    # Extremes of what a uint8 picture can hold.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    images[1] = 255
    state = seeded_state(layout(), 3, GAIN)
    theirs = torch_fidelity_features(state, images)
    ours = network(from_torch(state), preprocess(jnp.asarray(images)))
    for name, value in theirs.items():
        assert relative(getattr(ours, name), value) <= 1e-4, name
