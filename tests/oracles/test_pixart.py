"""PixArt-α beside diffusers: the golden file anew, and our folders there."""

import numpy as np
import pytest
from diffusers import PixArtTransformer2DModel

from ditjax.weights.reading import load_network
from ditjax.weights.writing import write_diffusers
from tests.oracles import pixart
from tests.weights.test_pixart import GOLDEN


@pytest.mark.parametrize("kind", pixart.TYPES)
def test_the_golden_file_is_what_they_compute(kind):
    with np.load(GOLDEN) as kept:
        found = pixart.output(kind, pixart.pixart(kind))
        np.testing.assert_allclose(found, kept[f"{kind}/output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", pixart.TYPES)
def test_a_folder_of_ours_is_theirs_to_the_bit(kind, tmp_path):
    network = pixart.pixart(kind)
    network.save_pretrained(tmp_path / "theirs")
    write_diffusers(tmp_path / "ours", load_network(tmp_path / "theirs"))
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(pixart.output(kind, again), pixart.output(kind, network))
