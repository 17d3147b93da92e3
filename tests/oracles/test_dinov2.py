"""DINOv2 beside transformers' Dinov2Model, on random weights."""

import jax
import numpy as np
import pytest

from ditjax.models.dinov2 import DinoV2
from ditjax.weights.dinov2 import load_dinov2
from tests import dinov2_files as tiny
from tests.oracles import dinov2


@pytest.mark.parametrize("side", [tiny.GRID * tiny.PATCH, tiny.SIDE, 3 * tiny.PATCH])
def test_the_class_token_is_that_of_transformers(tmp_path, side):
    found = load_dinov2(dinov2.save_folder(tmp_path / "dino"), side)
    x = np.random.default_rng(1).standard_normal((2, side, side, 3)).astype(np.float32)
    ours = jax.jit(DinoV2(found.config).apply)({"params": found.params}, x)
    theirs = dinov2.class_token(x)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_golden_file_is_what_they_compute():
    with np.load("tests/goldens/dinov2.npz") as kept:
        for name, value in dinov2.goldens().items():
            np.testing.assert_allclose(value, kept[name], rtol=1e-4, atol=1e-5)
