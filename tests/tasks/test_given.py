"""Channels beside x: functions of an image and a key in training, given while sampling."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.diffusion.losses import regression_loss
from ditjax.diffusion.resampling import blurred, resized
from ditjax.errors import UserError
from ditjax.evaluation.given import GivenScores
from ditjax.files.assets import flatten, unflatten
from ditjax.metrics.restoration import ssim
from ditjax.models import grafting, unet
from ditjax.models.grafting import End, Join
from ditjax.models.network import Conditions
from ditjax.sampling.given import GivenRows
from ditjax.sampling.program import sampling_of
from ditjax.tasks import cost_of, given, make_task
from ditjax.tasks.diffusion import GIVEN, denoiser_module, inputs_of
from ditjax.tasks.objective import objective_of, process_of
from ditjax.training.task import Known
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state

B = 6
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32)
LOW = {"kind": "low", "side": 4}
NOISY = {**LOW, "noise_most": 0.4, "noise": 0.1}
REGRESSION = {
    "diffusion": {"loss": "regression", "prediction": "x0", "variance": "fixed_small"},
    "sample": {"sampler": "regression"},
}


@functools.cache
def plain():
    return read(load_recipe(["--config=experiments/digits.py:1x16x2/4"]))


def recipe(shown, **sections):
    return changed(plain(), {"given": shown, **sections})


def keys(n=B):
    return jax.random.split(jax.random.key(3), n)


@functools.cache
def drawn(kind):
    c = recipe({"low": LOW, "noisy": NOISY, "mask": {"kind": "mask"}, "none": {}}[kind])
    batch = {"x0": jnp.asarray(IMAGE), "label": jnp.arange(B)}
    return jax.jit(make_task(c).draw)(batch, jax.random.key(5))


@pytest.mark.parametrize("kind", ["low", "noisy", "mask"])
def test_what_is_drawn_beside_it_is_as_without(kind):
    found, without = drawn(kind), drawn("none")
    assert without.keys() == found.keys() - {GIVEN}
    for name, value in without.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_low_image_is_enlarged():
    expected = resized(resized(IMAGE, 4, "area"), 8, "bicubic")
    assert drawn("low")[GIVEN].keys() == {"channels"}
    np.testing.assert_allclose(drawn("low")[GIVEN]["channels"], expected, atol=1e-6)


def test_noise_of_a_low_image_is_of_its_level():
    """α y + σ ε of the process, enlarged; ε is white, and the network is given its level."""
    c = recipe(NOISY)
    low = jnp.asarray(RNG.uniform(-1, 1, (400, 4, 4, 1)), jnp.float32)
    made = jax.jit(functools.partial(given.given_conditions, c))
    found = made(Known(low), keys(400), jnp.float32(0.25))
    np.testing.assert_array_equal(found["level"], np.full(400, 250))
    at = process_of(c.diffusion).at(np.array([250]))
    clean = resized(float(at.alpha[0]) * low, 8, "bicubic")
    rest = np.asarray(found["channels"] - clean)
    white = resized(RNG.standard_normal((400, 4, 4, 1)).astype(np.float32), 8, "bicubic")
    assert rest.std() == pytest.approx(float(at.sigma[0]) * np.asarray(white).std(), rel=0.03)
    levels = np.asarray(drawn("noisy")[GIVEN]["level"])
    assert len(set(levels.tolist())) > 3
    assert levels.max() < 400


def test_a_blur_is_a_gaussian_of_its_own_for_each_image():
    """Against SciPy's, at radius 1 and 3; nothing of σ = 0, and nothing of a constant image."""
    x = RNG.uniform(-1, 1, (3, 8, 6, 2)).astype(np.float32)
    found = blurred(jnp.asarray(x), jnp.asarray([0.0, 0.8, 1.5]), jnp.asarray([2, 1, 3]))
    np.testing.assert_allclose(found[0], x[0], atol=1e-6)
    for i, sigma, radius in ((1, 0.8, 1), (2, 1.5, 3)):
        smooth = functools.partial(
            gaussian_filter, sigma=(sigma, sigma, 0), radius=(radius, radius, 0), mode="constant"
        )
        expected = smooth(np.float64(x[i])) / smooth(np.ones(x[i].shape))
        np.testing.assert_allclose(found[i], expected, atol=1e-5)
    flat = blurred(jnp.full((1, 8, 6, 2), 0.3), jnp.asarray([2.0]), jnp.asarray([3]))
    np.testing.assert_allclose(flat, 0.3, atol=1e-6)


def test_a_low_image_is_blurred_in_training_and_nothing_else_changes():
    """Up to `blur_most` of its pixels, and then noised and enlarged; noise is as without."""
    c, without = recipe({**NOISY, "blur_most": 1.0}), recipe(NOISY)
    image = jnp.asarray(IMAGE)
    found, plain_ = (given.trained_conditions(each, image, keys()) for each in (c, without))
    np.testing.assert_array_equal(found["level"], plain_["level"])
    difference = np.abs(found["channels"] - plain_["channels"]).max((1, 2, 3))
    assert (difference > 1e-3).sum() >= 4
    flat = jnp.full_like(image, 0.3)
    one, other = (given.trained_conditions(each, flat, keys())["channels"] for each in (c, without))
    np.testing.assert_allclose(one, other, atol=1e-5)
    # Samples are given what is there, and old protocols keep their hashes.
    assert given.given_protocol(c) == given.given_protocol(without)
    assert "blur_most" not in given.training_protocol(without)["val_loss_given"]
    assert given.training_protocol(c)["val_loss_given"]["blur_most"] == 1.0


def test_a_mask_and_what_it_leaves():
    channels = np.asarray(drawn("mask")[GIVEN]["channels"])
    assert set(np.unique(channels[..., 0])) == {0.0, 1.0}
    np.testing.assert_array_equal(channels[..., 1:], channels[..., :1] * IMAGE)


@pytest.mark.parametrize("shown", [NOISY, {"kind": "mask"}])
def test_it_is_of_an_image_and_its_key_alone(shown):
    made = jax.jit(functools.partial(given.trained_conditions, recipe(shown)))
    whole, other = made(IMAGE, keys()), np.array([4, 2, 2, 0, 5, 1])
    for name, value in made(IMAGE[other], keys()[other]).items():
        np.testing.assert_array_equal(value, whole[name][other])
        assert len(np.unique(whole[name], axis=0)) > 3


@functools.cache
def network(kind):
    c = recipe({"noisy": NOISY, "mask": {"kind": "mask"}, "none": {}}[kind])
    return c, unflatten(seeded_state(shapes_of(c), 1)), jax.jit(denoiser_module(c).apply)


def conditions(channels, level=None):
    return Conditions(label=jnp.arange(B), channels=channels, level=level)


def test_the_level_is_ignored_at_first_and_read_afterwards():
    c, params, apply = network("noisy")
    fresh = flatten(jax.jit(make_task(c).init)(jax.random.key(0))["params"])
    out = params["s_embedder"]["out"]
    trained: Any = {"params": params}
    first: Any = {"params": {**params, "s_embedder": {**params["s_embedder"], "out": {}}}}
    for name in out:
        assert not np.asarray(fresh[f"s_embedder/out/{name}"]).any()
        first["params"]["s_embedder"]["out"][name] = 0 * out[name]
    x, t, channels = jnp.asarray(IMAGE), jnp.arange(B), jnp.asarray(IMAGE)
    levels = (jnp.zeros(B, jnp.int32), jnp.full(B, 300))
    same = [np.asarray(apply(first, x, t, conditions(channels, each))) for each in levels]
    np.testing.assert_array_equal(same[0], same[1])
    apart = [np.asarray(apply(trained, x, t, conditions(channels, each))) for each in levels]
    assert np.abs(apart[0] - apart[1]).max() > 0.01
    with pytest.raises(ValueError, match="needs their level"):
        jax.eval_shape(apply, trained, x, t, conditions(channels))


def test_a_graft_of_a_network_without_channels_is_that_network_to_the_bit():
    (c, base, apply), (wide, _, wider) = network("none"), network("mask")
    old, new = (End(each.model, inputs_of(each)) for each in (c, wide))
    rules: Any = [(r"x_embedder/kernel", grafting.input_channels)]
    leaves = flatten(base)
    found = grafting.graft(leaves, shapes_of(wide), leaves.__getitem__, rules, Join(old, new))
    assert list(found.adapted) == ["x_embedder/kernel"]
    x, t = jnp.asarray(IMAGE), jnp.arange(B) * 100
    channels = jnp.asarray(RNG.standard_normal((B, 8, 8, 2)), jnp.float32)
    np.testing.assert_allclose(
        wider({"params": unflatten(found.leaves)}, x, t, conditions(channels)),
        apply({"params": base}, x, t, Conditions(label=jnp.arange(B))),
        atol=1e-6,
    )


@pytest.mark.parametrize("shown", [LOW, NOISY, {"kind": "mask"}])
def test_the_cost_counts_the_channels(shown):
    c = recipe(shown)
    assert cost_of(c).parameters == sum(np.prod(shape) for shape in shapes_of(c).values())
    assert cost_of(c).macs > cost_of(plain()).macs


def test_a_regressor_is_given_zeros_for_x():
    c = recipe(LOW, **REGRESSION)
    seen = []

    def denoise(x, t):
        seen.append((x, t))
        return jnp.full_like(x, 0.25)

    x0 = jnp.asarray(IMAGE)
    found = regression_loss(objective_of(c), denoise, x0, jnp.arange(B), x0)
    ((x, t),) = seen
    assert not np.asarray(x).any()
    np.testing.assert_array_equal(t, np.full(B, 999))
    np.testing.assert_allclose(found["loss"], ((IMAGE - 0.25) ** 2).mean((1, 2, 3)), rtol=1e-5)
    assert len(np.asarray(sampling_of(c, make_task(c)).timesteps)) == 1


def test_scores_are_of_the_records_that_samples_are_given():
    c = recipe(LOW, data={"image_size": 12}, model={"patch": 4})
    records = RNG.integers(0, 256, (4, 12, 12, 1), np.uint8)

    def rows(indices):
        return {"image": (records[indices % 4] / 127.5 - 1).astype(np.float32)}

    scores = GivenScores(c, GivenRows(rows, {}), 0)
    moved = np.clip(records.astype(int) + 10, 0, 255).astype(np.uint8)
    scores.add(moved[:3])
    scores.add(moved[3:])
    found = scores.means()
    error = ((moved.astype(float) - records) ** 2).mean((1, 2, 3))
    assert found["psnr_db"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-4)
    assert found["ssim"] == pytest.approx(ssim(moved, records, 255).mean(), rel=1e-4)
    np.testing.assert_allclose(scores.records()["ssim"], ssim(moved, records, 255), rtol=1e-4)
    low = [x.reshape(4, 4, 3, 4, 3).mean((2, 4)) for x in (moved / 1.0, records / 1.0)]
    error = ((low[0] - low[1]) ** 2).mean((1, 2))
    assert found["consistency_db"] == pytest.approx(
        np.mean(10 * np.log10(255**2 / error)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"given": {"kind": "low"}}, r"side is 0 and .*image_size 8: .* divides it: 1, 2, 4\."),
        ({"given": {**LOW, "side": 3}}, "side is 3 and"),
        (
            {"given": {"side": 4}},
            r"config\.given\.side has no effect: config\.given\.kind is 'none'",
        ),
        ({"given": {**LOW, "noise": 0.1}}, r"noise is 0\.1 and .* no more noise than that"),
        ({"given": LOW, "autoencoder": {"kind": "kl"}}, "the network is of latents: expected"),
        ({"given": LOW, "evaluate": {"labels": "balanced"}}, "the labels of the records"),
        (
            {"given": LOW, "sample": {"cfg_scale": 2.0, "guide": "runs/x"}},
            r"which the network of config\.sample\.guide 'runs/x' is not given",
        ),
        ({"given": LOW, "diffusion": REGRESSION["diffusion"]}, "set both, or neither"),
        ({"sample": REGRESSION["sample"]}, "set both, or neither"),
        ({"given": LOW, "edit": {"method": "bicubic"}}, "edit.method: 'bicubic'"),
    ],
)
def test_what_does_not_go_together(sections, words):
    with pytest.raises(UserError, match=words):
        changed(plain(), sections)


def test_a_network_without_the_door_is_refused():
    with pytest.raises(UserError, match="network 'dit' takes no channels beside x"):
        given.check_given(recipe(LOW), unet.NETWORK)


def test_a_level_compiles_nothing_anew():
    recipes = [recipe({**NOISY, "noise": x}) for x in (0.1, 0.3)]
    one, other = (sampling_of(c, make_task(c)) for c in recipes)
    assert one.compiled == other.compiled
    assert one.guidance.level != other.guidance.level
    assert one.protocol != other.protocol
    assert dataclasses.asdict(plain().given)["kind"] == "none"
