"""unCLIP's prior beside diffusers: a random one anew, and what it reads of ours."""

import numpy as np
from diffusers import PriorTransformer

from ditjax.weights.prior import load_prior, write_prior
from tests.oracles import prior
from tests.weights.test_prior import GOLDENS


def test_the_golden_file_is_what_it_computes():
    kept, found = np.load(GOLDENS), prior.outputs(prior.random_prior())
    for name, value in found.items():
        np.testing.assert_allclose(value, kept[f"out/{name}"], rtol=1e-4, atol=1e-5)


def test_diffusers_reads_what_we_write(tmp_path):
    """Every output to the bit, after a way through our leaves."""
    model = prior.random_prior()
    model.save_pretrained(tmp_path / "theirs")
    found = load_prior(tmp_path / "theirs")
    write_prior(tmp_path / "ours", *found[:4])
    again = prior.outputs(PriorTransformer.from_pretrained(tmp_path / "ours").eval())
    for name, value in prior.outputs(model).items():
        np.testing.assert_array_equal(again[name], value)
