"""The discrete VAE beside openai/DALL-E: a random one anew, and what it reads of ours."""

import numpy as np
import torch

from ditjax.weights.dvae import load_dvae, write_dvae
from tests.models.test_dvae import GOLDENS
from tests.oracles import dvae


def test_the_golden_file_is_what_it_computes():
    kept, found = np.load(GOLDENS), dvae.outputs(*dvae.random_parts())
    for name, value in found.items():
        np.testing.assert_allclose(value, kept[f"out/{name}"], rtol=1e-5, atol=1e-6)


def test_dall_e_reads_what_we_write(tmp_path):
    """Every output to the bit, after a way through our leaves."""
    parts = dvae.random_parts()
    (tmp_path / "theirs").mkdir()
    for name, part in zip(("encoder", "decoder"), parts, strict=True):
        torch.save(part, tmp_path / "theirs" / f"{name}.pkl")
    write_dvae(tmp_path / "ours", load_dvae(tmp_path / "theirs").params)
    expected = dvae.outputs(*parts)
    again = dvae.random_parts()
    for name, part in zip(("encoder", "decoder"), again, strict=True):
        with torch.no_grad():
            for leaf in part.parameters():
                leaf.zero_()
        part.load_state_dict(torch.load(tmp_path / "ours" / f"{name}.pt"))
    for name, value in dvae.outputs(*again).items():
        np.testing.assert_array_equal(value, expected[name])
