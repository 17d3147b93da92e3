"""The task of the discrete VAE: its schedules, its loss, its score, and its use, frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import read
from ditjax.errors import UserError
from ditjax.models.dvae import DVAE, DvaeConfig, laplace_nll, normal_nll, relaxed_codes
from ditjax.tasks.dvae import code_use, cosine_between, make, neighbour_bits
from ditjax.training import program
from ditjax.training.step import init_state, make_step
from tests.seeded import seeded_params

TINY: dict[str, Any] = {
    "task": "dvae",
    "model": {"codes": 8, "width": 4, "init_width": 4, "groups": 2, "blocks_per_group": 1},
    "dvae": {"kl_weight": 1.0, "kl_steps": 6, "tau_steps": 8},
    "data": {"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10, "flip": False},
    "optim": {"learning_rate": 1e-2},
    "train": {"batch_size": 8, "steps": 40, "evaluate_every_steps": 0, "ema_decay": 0.5},
}
DVAE_TINY = DVAE(DvaeConfig(8, 4, 4, 2, 1, 1))  # that of TINY


def recipe(**changes):
    return read({**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in changes.items()}})


@pytest.fixture(scope="module")
def task():
    return make(recipe())


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    squares = np.repeat(np.repeat(rng.uniform(-1, 1, (8, 2, 2, 1)), 4, axis=1), 4, axis=2)
    return jnp.asarray(squares, jnp.float32)


def test_schedules_are_half_cosines():
    at = [float(cosine_between(1.0, 0.0625, 100, jnp.int32(s))) for s in (0, 50, 100, 1000)]
    np.testing.assert_allclose(at, [1, (1 + 0.0625) / 2, 0.0625, 0.0625], rtol=1e-6)
    rising = [float(cosine_between(0.0, 6.6, 10, jnp.int32(s))) for s in range(11)]
    assert rising[0] == 0
    assert np.all(np.diff(rising) > 0)


@pytest.fixture(scope="module")
def trained(task, images):
    """The state after each of a few steps from step 0, and from a state of a later step."""
    c = recipe()
    tx, key = program.optimizer_of(c), jax.random.key(0)
    step = jax.jit(make_step(task.draw, task.loss, tx, 0.5, key, anneal=task.anneal))
    params = seeded_params(task.init)
    state, losses = init_state(params, tx), []
    batch = {"x0": images, "label": jnp.zeros(8, jnp.int32)}
    for _ in range(12):
        state, metrics = step(state, {}, batch)
        losses.append({name: float(value) for name, value in metrics.items()})
    return losses, state


def test_a_few_steps_lower_the_loss_along_the_schedule(trained):
    losses, _ = trained
    assert losses[-1]["nll"] < losses[0]["nll"] - 0.02
    expected = [cosine_between(1.0, 0.0625, 8, jnp.int32(s)) for s in range(12)]
    np.testing.assert_allclose([each["temperature"] for each in losses], expected, rtol=1e-6)
    assert all(0 <= each["kl_share"] <= 1 for each in losses)


def test_the_weight_of_the_kl_rises_from_nothing(trained):
    """At step 0 the loss is the likelihood alone; from step 6 on it is that and the whole KL."""
    losses, _ = trained
    for step, each in enumerate(losses):
        weight = cosine_between(0.0, 1.0, 6, jnp.int32(step))
        # 4 x 4 places of 8 codes, and 64 values
        kl = each["kl_share"] * np.log(8) * 16 / 64
        np.testing.assert_allclose(each["loss"], each["nll"] + weight * kl, rtol=1e-4, atol=1e-6)
    assert losses[0]["loss"] == losses[0]["nll"]


def test_the_likelihood_may_be_normal(task, images):
    """With `normal_std` the loss is that of squares; without it, of the logit-Laplace."""
    normal = make(recipe(dvae={"normal_std": 0.25}))
    params, key = seeded_params(task.init), jax.random.key(0)
    drawn = task.anneal(task.draw({"x0": images}, key), jnp.int32(3))
    apply: Any = DVAE_TINY.apply
    logits = apply(params, images, method="logits")
    z = relaxed_codes(logits, drawn["gumbel"], drawn["temperature"])
    p = apply(params, z, method="decode")
    for each, nll in ((normal, normal_nll(images, p, 0.25)), (task, laplace_nll(images, p))):
        total, metrics = each.loss(params, {}, drawn)
        np.testing.assert_allclose(metrics["nll"], nll.mean(), rtol=1e-5)
        kl = drawn["kl_weight"][0] * metrics["kl_share"] * np.log(8) * 16 / 64
        np.testing.assert_allclose(total, metrics["nll"] + kl, rtol=1e-5)


def test_the_score_is_of_hard_codes(task, images, trained):
    params = trained[1].params
    (score,) = task.scores
    found = jax.jit(lambda x: score.measure(params, {}, None, {"image": x}))(images)
    assert found["codes"].shape == (8, 4, 4)
    flat = np.square(images - images.mean((1, 2, 3), keepdims=True)).mean((1, 2, 3))
    np.testing.assert_allclose(found["psnr_mean_colour_db"], 10 * np.log10(4 / flat), rtol=1e-5)
    used = score.summary({name: np.asarray(each) for name, each in found.items()})
    assert 1 <= used["code_perplexity"] <= used["codes_used"] <= 8


def test_use_of_codes():
    assert code_use(np.array([0, 0, 0]), 4) == {"codes_used": 1, "code_perplexity": 1}
    found = code_use(np.arange(4).repeat(3), 8)
    assert found["codes_used"] == 4
    assert abs(found["code_perplexity"] - 4) < 1e-12


def test_bits_of_codes_by_their_neighbours():
    # Each code is the sum of those to its left and above, of three: nothing is left to say.
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (400, 6, 6))
    for i in range(1, 6):
        for j in range(1, 6):
            codes[:, i, j] = (codes[:, i - 1, j] + codes[:, i, j - 1]) % 3
    bits = neighbour_bits(codes, 3)
    np.testing.assert_allclose(bits, 11 / 36 * np.log2(3), atol=0.02)  # the first row and column
    assert abs(neighbour_bits(rng.integers(0, 3, (400, 6, 6)), 3) - np.log2(3)) < 0.02


def test_what_does_not_go_together_is_one_line():
    for changes, message in (
        ({"data": {"image_size": 9}}, "2 groups need a multiple of 2"),
        ({"model": {"width": 6}}, "expected a multiple of 4"),
        ({"dvae": {"tau_end": 2.0}}, "tau_end is 2.0: expected at most 1"),
        ({"dvae": {"normal_std": -0.1}}, "normal_std is -0.1: expected at least 0"),
        ({"data": {"name": "latents:x"}}, "name a data set of images"),
    ):
        with pytest.raises(UserError) as error:
            recipe(**changes)
        assert message in str(error.value)
