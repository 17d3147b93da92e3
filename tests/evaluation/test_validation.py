"""The validation loss is DDPM's Eq. 14 at pairs that nothing but (seed, index) decides."""

import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ditjax import evaluate
from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.data import records, source, stream
from ditjax.data.names import Split
from ditjax.diffusion import samplers
from ditjax.errors import UserError
from ditjax.evaluation import validation
from ditjax.evaluation.evaluator import Evaluator
from ditjax.evaluation.validation import Validator, held_out_means
from ditjax.models.autoencoder import sample_posterior
from ditjax.models.network import Conditions
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import autoencoder, make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training import keys
from ditjax.training.task import ValidationScore
from ditjax.weights.networks import decoder_recipe
from tests.seeded import seeded_params

pytestmark = pytest.mark.usefixtures("own_data")
NUM, HELD_OUT = 37, 20  # no multiple of a batch, and more pairs than images


@functools.cache
def recipe(file="digits.py:1x32x2/4"):
    words = (
        f"--config=experiments/{file}",
        "--config.model.unroll=1",
        "--config.sample.batch_size=16",
        "--config.sample.steps=ddim3",
        f"--config.evaluate.split=test[:{HELD_OUT}]",
        f"--config.evaluate.val_loss_num={NUM}",
    )
    return read(load_recipe(words))


@functools.cache
def params(c):
    """Far from the start, so that timesteps, labels and variance channels matter."""
    return seeded_params(make_task(c).init)


def on(devices):
    return Validator(make_mesh(devices, 1, jax.devices()[:devices]), {})


def pair(c, i):
    """(record, t, keys) of pair i, from the definitions."""
    epoch, k = divmod(i, HELD_OUT)
    record = stream.epoch_order(c.evaluate.seed, epoch, HELD_OUT)[k]
    shift = int(np.random.SeedSequence(c.evaluate.seed).generate_state(1)[0])
    t = (int(f"{i:032b}"[::-1], 2) + shift) % 2**32 * 1000 >> 32
    key = jax.random.fold_in(keys.stream(c.evaluate.seed, keys.VALIDATE), i)
    return record, t, key.reshape(1)


def by_hand(c, params, n, x0_of=lambda x, key: x):
    """(mse f64[n], vlb f64[n]): one pair at a time, everything but the network in NumPy."""
    rows = records.load_arrays("digits", c.evaluate.split, image_size=c.data.image_size)
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_bar = np.cumprod(1 - betas)
    model = denoiser_module(c)
    apply = jax.jit(model.apply)
    found = []
    for i in range(n):
        record, t, key = pair(c, i)
        x0 = np.asarray(x0_of(rows["image"][record] / np.float32(127.5) - np.float32(1), key))
        eps = np.asarray(samplers.initial_noise(key, x0.shape)[0], np.float64)
        a, before = alphas_bar[t], alphas_bar[t - 1] if t else 1.0
        x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
        out = apply(
            params,
            x_t.astype(np.float32)[None],
            np.array([t], np.int32),
            Conditions(label=rows["label"][record].reshape(1)),
        )
        predicted, v = np.split(np.asarray(out, np.float64)[0], 2, axis=-1)
        # Nichol & Dhariwal Eqs. 6 and 15; no t is 0 here, whose term is another.
        assert t
        smallest = betas[t] * (1 - before) / (1 - a)
        log_variance = (v + 1) / 2 * np.log(betas[t]) + (1 - v) / 2 * np.log(smallest)
        weight = math.sqrt(before) * betas[t] / (1 - a)  # of x0 in the posterior's mean
        gap = weight * math.sqrt(1 / a - 1) * (eps - predicted)  # of the two means
        ratio = np.log(smallest) - log_variance
        kl = 0.5 * (np.exp(ratio) - 1 - ratio + gap**2 / np.exp(log_variance))
        found.append((np.square(eps - predicted).mean(), kl.mean() / math.log(2)))
    return np.array(found).T


def test_it_is_the_mean_over_the_pairs_one_by_one():
    c = recipe()
    mse, vlb = by_hand(c, params(c), NUM)
    found, each = on(1).scored(c, params(c))
    assert found.keys() == {"val_loss", "val_loss_stderr", "val_vlb", "val_vlb_stderr"}
    np.testing.assert_allclose(each["val_loss"], mse, rtol=1e-4)
    np.testing.assert_allclose(found["val_loss"], mse.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["val_vlb"], vlb.mean(), rtol=1e-4)
    steps = np.diff(mse[np.argsort([pair(c, i)[1] for i in range(NUM)])])
    error = math.sqrt(np.mean(steps**2) / 2 / NUM)
    np.testing.assert_allclose(found["val_loss_stderr"], error, rtol=1e-4)
    # Fewer pairs are the first of these.
    few = changed(c, {"evaluate": {"val_loss_num": 21}})
    np.testing.assert_allclose(on(1)(few, params(c))["val_loss"], mse[:21].mean(), rtol=1e-5)


def test_devices_batches_and_calls_change_nothing_and_the_seed_does():
    c = recipe()
    eight, own = on(8), on(1)(c, params(c))
    larger = changed(c, {"sample": {"batch_size": 40}})
    for found in (eight(c, params(c)), eight(larger, params(c)), eight(c, params(c))):
        for name, value in own.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5)
    other = eight(changed(c, {"evaluate": {"seed": 1}}), params(c))
    assert abs(other["val_loss"] / own["val_loss"] - 1) > 1e-3
    # The seed of the training is none of its own.
    assert eight(changed(c, {"seed": 7}), params(c)) == eight(c, params(c))


def test_of_latents_the_posterior_is_drawn_by_the_pair_too():
    c = changed(
        recipe("digits_latent.py"),
        {
            "autoencoder": {"base_width": 4, "multipliers": (1, 2), "groups": 2, "scale": 0.5},
            "model": {"size": "1x32x2", "patch": 8},
            "evaluate": {"val_loss_num": 5},
        },
    )
    weights = seeded_params(make_task(decoder_recipe(c)).init, seed=1)
    encode = jax.jit(lambda x: autoencoder.encode_images(c, weights, x))

    def x0_of(x, key):
        moments = encode(x[None])
        noise = samplers.per_sample_noise(key, moments.mean.shape[1:])(jax.numpy.int32(0))
        return sample_posterior(moments, noise)[0] * 0.5

    mse, _ = by_hand(c, params(c), 5, x0_of)
    found = Validator(make_mesh(1, 1, jax.devices()[:1]), {"autoencoder": weights})(c, params(c))
    np.testing.assert_allclose(found["val_loss"], mse.mean(), rtol=1e-4)


def test_without_a_learned_variance_there_is_only_the_first():
    c = changed(recipe(), {"diffusion": {"variance": "fixed_small", "loss": "simple"}})
    assert on(1)(c, params(c)).keys() == {"val_loss", "val_loss_stderr"}


def test_the_protocol_says_what_it_is_of_and_only_where_it_is():
    validator, c = on(1), recipe()
    own = validator.protocol(c)
    assert own == {
        "val_loss_num": NUM,
        "val_loss_data": f"digits/1.0.0/test[:{HELD_OUT}]",
        "val_loss_target": "eps, linear, 1000 steps",
    }
    for changes in (
        {"evaluate": {"val_loss_num": 38}},
        {"evaluate": {"split": "test"}},
        {"diffusion": {"prediction": "v"}},
        {"diffusion": {"schedule": "cosine"}},
    ):
        assert validator.protocol(changed(c, changes)) != own, changes
    off = changed(c, {"evaluate": {"val_loss_num": 0}})
    assert (validator.protocol(off), validator(off, None)) == ({}, {})


def test_of_encoded_latents_the_images_behind_them_are_held_out(monkeypatch):
    c = changed(recipe("digits_latent.py"), {"data": {"name": "latents:/of/digits", "flip": True}})
    monkeypatch.setattr(source, "images_of", lambda split: Split("digits", split.split))
    spec = opening.held_out(c)
    assert (spec.name, spec.split, spec.flip) == ("digits", f"test[:{HELD_OUT}]", False)


def test_a_split_that_is_not_there_is_found_before_anything_is_trained():
    c = changed(recipe(), {"evaluate": {"split": "valid"}})
    with pytest.raises(UserError, match=r"'valid': there is no such split.*test, train"):
        Evaluator(c, make_mesh(-1, 1), {})
    Evaluator(changed(c, {"evaluate": {"val_loss_num": 0}}), make_mesh(-1, 1), {})


def test_without_features_evaluate_reports_the_held_out_scores_alone(monkeypatch, tmp_path):
    class Fixed:
        def __init__(self, mesh, frozen):
            assert frozen == {}

        def __call__(self, c, params):
            return {"val_loss": params}

        def protocol(self, c):
            return {"val_loss_num": c.evaluate.val_loss_num}

    monkeypatch.setattr(evaluate, "Validator", Fixed)
    monkeypatch.setattr(opening, "load_weights", lambda *args: (0.5, 3))
    c = read(
        {
            "evaluate": {"val_loss_num": 4},
            "data": {"name": "digits"},
            "autoencoder": {"kind": "none"},
        }
    )
    record = evaluate.evaluate_run(c, tmp_path)
    assert (record["step"], record["metrics"]) == (3, {"val_loss": 0.5})
    assert record["protocol"] == {"val_loss_num": 4}
    assert (tmp_path / "evaluation.json").exists()


def test_reconstructions_are_compared_with_their_images_where_features_are_named(monkeypatch):
    """Of perfect ones, larger than the features read them, the distance is 0."""

    def measure(params, frozen, keys, batch):
        x = batch["image"]
        return {"level": x.mean((1, 2, 3)), "images": params * x}

    score = ValidationScore(measure, {"level": "level"}, {"metric": "PSNR"}, images="images")
    task = SimpleNamespace(scores=(score,), frozen=lambda mesh: {})
    monkeypatch.setattr(validation, "make_task", lambda c, mesh: task)
    c, mesh = changed(recipe(), {"data": {"image_size": 16}}), make_mesh(1, 1, jax.devices()[:1])
    means, protocol = held_out_means(c, mesh, np.float32(1))
    assert means["rfd_digits"] == pytest.approx(0, abs=1e-6)
    assert means.keys() == {"level", "rfd_digits", "rfd_digits_low", "rfd_digits_high"}
    assert (protocol["metric"], protocol["reconstructions"]) == ("PSNR", "rfd_digits")
    assert protocol["reference_count"] == HELD_OUT
    bare = changed(c, {"evaluate": {"features": "none"}, "train": {"evaluate_every_steps": 0}})
    assert held_out_means(bare, mesh, np.float32(1)) == ({"level": means["level"]}, score.protocol)
