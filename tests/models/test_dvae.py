"""The discrete VAE: beside openai/DALL-E, its relaxation and its likelihood."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models.dvae import (
    DVAE,
    Laplace,
    kl_to_uniform,
    laplace_nll,
    mapped_pixels,
    normal_nll,
    relaxed_codes,
    unmapped_pixels,
)
from ditjax.weights.dvae import load_dvae, write_dvae
from ditjax.weights.torch_file import write_torch
from tests.text_encoders import relative

GOLDENS = Path(__file__).parent.parent / "goldens" / "dvae.npz"


@pytest.fixture(scope="module")
def theirs():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(theirs, tmp_path_factory):
    """The pickled modules of the release's kind, read without PyTorch."""
    folder = tmp_path_factory.mktemp("dvae")
    for part in ("encoder", "decoder"):
        (folder / f"{part}.pkl").write_bytes(theirs[part].tobytes())
    return load_dvae(folder)


def test_dall_e_computes_the_same(theirs, loaded):
    assert loaded.config == (12, 4, 6, 4, 2, 3)

    @jax.jit
    def outputs(params, x):
        def apply(*args, method):
            return DVAE(loaded.config).apply({"params": params}, *args, method=method)

        logits, codes = apply(x, method="logits"), apply(x, method="codes")
        p = apply(jax.nn.one_hot(codes, 12), method="decode")
        return logits, codes, jnp.concatenate(p, axis=-1), apply(codes, method="images")

    x = 2 * theirs["x"] - 1
    logits, codes, stats, images = outputs(loaded.params, x)
    assert relative(logits, theirs["out/logits"]) < 5e-6
    np.testing.assert_array_equal(codes, theirs["out/codes"])
    assert relative(stats, theirs["out/stats"]) < 5e-6
    assert relative((images + 1) / 2, theirs["out/image"]) < 5e-6


def test_weights_are_written_as_they_were_read(loaded, tmp_path):
    write_dvae(tmp_path, loaded.params)
    again = load_dvae(tmp_path)
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_what_is_no_discrete_vae_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no encoder\.pkl and no encoder\.pt"):
        load_dvae(tmp_path)
    for part in ("encoder", "decoder"):
        write_torch(tmp_path / f"{part}.pt", {"blocks.input.w": np.ones((2, 3), np.float32)})
    with pytest.raises(UserError, match="is no discrete VAE"):
        load_dvae(tmp_path)


def test_a_cold_relaxation_is_a_draw_of_the_distribution():
    """Maddison et al. 2016: argmax(logits + g) is q, and τ -> 0 gives it one-hot."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    gumbel = jax.random.gumbel(jax.random.key(0), (4000, 1, 1, 3))
    each = jnp.broadcast_to(logits, gumbel.shape)
    cold = relaxed_codes(each, gumbel, jnp.full(4000, 1e-3))
    np.testing.assert_allclose(cold.sum(-1), 1, rtol=1e-5)
    assert float((cold.max(-1) > 0.999).mean()) > 0.99
    np.testing.assert_allclose(cold.mean((0, 1, 2)), [0.5, 0.3, 0.2], atol=0.03)
    warm = relaxed_codes(each, gumbel, jnp.full(4000, 1e4))
    np.testing.assert_allclose(warm, 1 / 3, atol=1e-2)


def test_the_density_of_pixels_integrates_to_one():
    """exp(-nll) is a density of y in (0, 1)."""
    y = np.linspace(1e-5, 1 - 1e-5, 200_001)
    x = 2 * (y - 0.1) / 0.8 - 1  # y is `mapped_pixels` of x
    p = Laplace(jnp.float32(0.4), jnp.float32(-0.7))
    density = np.exp(-np.asarray(laplace_nll(jnp.asarray(x, jnp.float32), p), np.float64))
    assert abs(np.trapezoid(density, y) - 1) < 2e-3


def test_the_normal_density_is_that_of_the_decoded_pixel():
    p = Laplace(jnp.float32(0.4), jnp.float32(-0.7))
    decoded, x = float(unmapped_pixels(jax.nn.sigmoid(p.location))), np.linspace(-3, 3, 20_001)
    expected = np.exp(-((x - decoded) ** 2) / (2 * 0.25**2)) / (0.25 * np.sqrt(2 * np.pi))
    found = np.exp(-np.asarray(normal_nll(jnp.asarray(x, jnp.float32), p, 0.25)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Beyond black and white the mean is not clipped: there is a gradient that brings it back.
    far = Laplace(jnp.float32(8.0), jnp.float32(0.0))
    gradient = jax.grad(lambda p: normal_nll(jnp.float32(1.0), p, 0.25))(far)
    assert float(gradient.location) > 0
    assert float(gradient.log_scale) == 0


def test_pixels_are_mapped_there_and_back():
    x = jnp.linspace(-1, 1, 11)
    np.testing.assert_allclose(mapped_pixels(x)[jnp.array([0, 10])], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(unmapped_pixels(mapped_pixels(x)), x, atol=1e-6)
    np.testing.assert_array_equal(unmapped_pixels(jnp.array([0.0, 1.0])), [-1, 1])


def test_the_kl_is_zero_of_uniform_codes_and_ln_k_of_one():
    logits = jnp.stack([jnp.zeros(8), 100 * jnp.eye(8)[3]])
    np.testing.assert_allclose(kl_to_uniform(logits), [0, np.log(8)], atol=1e-6)
