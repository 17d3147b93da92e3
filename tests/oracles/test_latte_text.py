"""Latte of texts beside diffusers: the golden file, ours on their weights, our folder there."""

import numpy as np
import torch
from diffusers import LatteTransformer3DModel

from ditjax.weights.reading import load_network
from ditjax.weights.writing import write_diffusers
from tests.oracles import latte_text
from tests.text_encoders import relative
from tests.weights.test_latte_text import GOLDEN, computed


def test_the_golden_file_is_what_they_compute():
    with np.load(GOLDEN) as kept:
        found = latte_text.output(latte_text.latte_text())
        np.testing.assert_allclose(found, kept["output"], rtol=1e-4, atol=1e-5)


def test_ours_computes_the_same_on_random_weights(tmp_path):
    """Within 1e-5 of the largest output, on weights as diffusers draws them, and tables of both."""
    torch.manual_seed(0)
    network = LatteTransformer3DModel(**latte_text.CONFIG).eval()
    network.save_pretrained(tmp_path)
    found = computed(load_network(tmp_path), latte_text.inputs())
    assert relative(found, latte_text.output(network).transpose(0, 2, 3, 4, 1)) < 1e-5


def test_a_folder_of_ours_is_theirs_to_the_bit(tmp_path):
    network = latte_text.latte_text()
    network.save_pretrained(tmp_path / "theirs")
    write_diffusers(tmp_path / "ours", load_network(tmp_path / "theirs"))
    again = LatteTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(latte_text.output(again), latte_text.output(network))
