"""The two digit classifiers: shapes at the door, and that they are built unlike each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models.classifier import DigitsConvNet, DigitsMixer

NETWORKS: list[Any] = [(DigitsConvNet(), 64), (DigitsMixer(), 48)]


def drawn(network: Any) -> Any:
    """Variables with every bias at work; drawn by NumPy, as compiling `init` takes seconds."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), tree
    )


@pytest.mark.parametrize(("network", "width"), NETWORKS)
def test_logits_are_linear_in_the_features_and_no_image_sees_its_batch(network, width):
    x = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1), minval=-1.0)
    variables, apply = drawn(network), jax.jit(network.apply)
    features, logits = apply(variables, x)
    assert features.shape == (5, width)
    assert logits.shape == (5, 10)
    head = variables["params"]["logits"]
    np.testing.assert_allclose(
        logits, features @ head["kernel"] + head["bias"][None, :], rtol=1e-4, atol=1e-4
    )
    beside_others = apply(variables, x.at[:3].set(1.0)).features
    np.testing.assert_allclose(beside_others[3:], features[3:], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(beside_others[:3] - features[:3]).max()) > 1e-2


def test_the_mixer_reads_2x2_patches_row_by_row():
    """With identity weights in the patch embedding, token n holds the patch at (n // 4, n % 4)."""
    x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    network: Any = DigitsMixer(width=4, blocks=0)
    variables = drawn(network)
    variables["params"]["patches"] = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    variables["params"]["positions"] = jnp.zeros((1, 16, 4))
    _, seen = network.apply(variables, x, capture_intermediates=True)
    tokens = seen["intermediates"]["patches"]["__call__"][0]
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 8, 9])
    np.testing.assert_array_equal(tokens[0, 6], [20, 21, 28, 29])


@pytest.mark.parametrize(("network", "width"), NETWORKS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 8, 8, 3), (2, 32, 32, 1)])
def test_other_image_shapes_are_refused(network, width, shape):
    with pytest.raises(UserError, match=r"\[batch, 8, 8, 1\]"):
        network.init(jax.random.key(0), jnp.zeros(shape))
