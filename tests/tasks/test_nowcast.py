"""Forecasts: what is given, what is drawn, and the scores of what was drawn."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.data.radar import radar_clip
from ditjax.errors import UserError
from ditjax.evaluation.advection import advection, carried, motion, persistence
from ditjax.evaluation.given import GivenScores
from ditjax.evaluation.nowcast import NowcastScores, rain_features
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.parallel.mesh import mesh_of
from ditjax.sampling.given import GivenRows
from ditjax.tasks import given, make_task, nowcast
from ditjax.tasks.diffusion import GIVEN, guidance_of, inputs_of
from ditjax.training.task import Known
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state

B, F, PAST, SIDE = 2, 5, 3, 8
CLIPS = np.random.default_rng(0).uniform(-1, 1, (B, F, SIDE, SIDE, 1)).astype(np.float32)
REGRESSION = {"loss": "regression", "prediction": "x0", "variance": "fixed_small"}
FLOW = {"process": "flow", "prediction": "velocity", "loss": "simple", "variance": "none"}


READ = nowcast._recipe


@functools.cache
def recipe(stage="second"):
    tree = load_recipe(["--config=experiments/digits.py:2x16x2/4"])
    tree["model"] = {**tree["model"], "kind": "video", "label_dropout": 0.0}
    tree["data"] = {**tree["data"], "name": "radar", "frames": F, "num_classes": 1}
    tree["given"] = {"kind": "past", "past": PAST}
    tree["diffusion"] = REGRESSION if stage == "first" else FLOW
    sampler = "regression" if stage == "first" else "euler"
    tree["sample"] = {"sampler": sampler, "steps": "2", "cfg_scale": 1.0}
    tree["evaluate"] = {"features": "none", "guided_scale": 0.0}
    tree["train"] = {**tree["train"], "evaluate_every_steps": 0}
    tree["sweep"] = {"grid": ()}
    return read(tree)


@pytest.fixture(scope="module")
def with_first():
    """A second stage whose first is a network of seeded weights, not a run on disk."""
    patch = pytest.MonkeyPatch()
    patch.setattr(nowcast, "_recipe", lambda path: recipe("first"))
    yield
    patch.undo()


def variables(c, seed):
    return {"params": unflatten(seeded_state(shapes_of(c), seed))}


def test_the_network_is_given_the_past_and_where_it_is():
    c = recipe()
    assert inputs_of(c).shape == (F - PAST, SIDE, SIDE, 1)
    made = nowcast.example_maker(c, lambda c: None)({}, jnp.asarray(CLIPS))
    np.testing.assert_array_equal(made.x0, CLIPS[:, PAST:])
    assert made.channels.shape == (B, F, SIDE, SIDE, 2)
    np.testing.assert_array_equal(made.channels[:, :PAST, ..., :1], CLIPS[:, :PAST])
    assert not made.channels[:, PAST:].any()
    assert (made.channels[:, :PAST, ..., 1] == 1).all()
    batch = {"x0": made.x0, "channels": made.channels, "label": jnp.zeros(B, jnp.int32)}
    drawn = make_task(c).draw(batch, jax.random.key(0))
    np.testing.assert_array_equal(drawn[GIVEN]["channels"], made.channels)
    assert "channels" not in drawn


def test_the_future_of_a_record_is_never_given(with_first):
    """Channels and the first forecast are the same whatever the future is."""
    c = changed(recipe(), {"given": {"first": "runs/first", "residual_std": 0.5}})
    module = types.SimpleNamespace(
        apply=lambda params, x, t, conditions: (
            params * conditions.channels[:, -2:, ..., :1] + conditions.channels[:, :2, ..., :1]
        )
    )
    make = nowcast.example_maker(c, lambda c: module)
    other = CLIPS.copy()
    other[:, PAST:] = 0.3
    a, b = (make({nowcast.FIRST: 2.0}, jnp.asarray(x)) for x in (CLIPS, other))
    np.testing.assert_array_equal(a.channels, b.channels)
    assert a.channels.shape[-1] == given.extra_channels(c) == 3
    np.testing.assert_array_equal(a.forecast, CLIPS[:, :2])
    np.testing.assert_array_equal(a.channels[:, PAST:, ..., 2:], a.forecast)
    # What is drawn is the error of the forecast in its units, and the clip is made of it again.
    np.testing.assert_allclose(a.x0, (CLIPS[:, PAST:] - CLIPS[:, :2]) / 0.5, atol=1e-6)
    whole = nowcast.finished(c, Known(CLIPS), a.x0, a.forecast)
    np.testing.assert_allclose(whole, CLIPS, atol=1e-6)


@pytest.fixture(scope="module")
def drawn(with_first):
    """A second stage's samples, its first stage frozen beside it."""
    c = changed(recipe(), {"given": {"first": "runs/first"}})
    task = make_task(c)
    assert task.reads == (nowcast.FIRST,)
    assert task.sampling is not None
    frozen = {nowcast.FIRST: variables(recipe("first"), 2)}
    run = jax.jit(task.sampling.draw)

    def draw(clips, keys):
        known = given.known_past(clips, PAST)
        g = guidance_of(c)._replace(given=jax.tree.map(jnp.asarray, known))
        label = Conditions(label=jnp.zeros(len(clips), jnp.int32))
        return np.asarray(run(variables(c, 1), frozen, keys, label, g))

    return draw


def test_samples_are_whole_clips_that_depend_on_their_past_and_key(drawn):
    keys = jax.random.split(jax.random.key(0), B)
    out = drawn(CLIPS, keys)
    assert out.shape == (B, F, SIDE, SIDE, 1)
    expected = np.clip(127.5 * CLIPS[:, :PAST] + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(out[:, :PAST], expected)
    future = CLIPS.copy()
    future[:, PAST:] = 0.9  # the truth has no part in a forecast
    np.testing.assert_array_equal(drawn(future, keys), out)
    np.testing.assert_array_equal(drawn(CLIPS[::-1], keys[::-1])[::-1], out)
    past = CLIPS.copy()
    past[:, :PAST] *= -1
    assert (drawn(past, keys)[:, PAST:] != out[:, PAST:]).any()
    assert (drawn(CLIPS, keys[::-1])[:, PAST:] != out[:, PAST:]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": {"past": 5}}, r"config.given.past is 5 and config.data.frames 5"),
        ({"given": {"residual_std": 0.1}}, r"residual_std is 0.1 and config.given.first ''"),
        ({"given": {"kind": "mask", "past": 0}}, r"frames 5: the past is that of clips"),
        ({"evaluate": {"bpd_num": 8}}, r"the density of a future is not computed"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        changed(recipe(), changes)
    assert "\n" not in str(error.value)


def test_another_first_stage_is_refused(monkeypatch):
    monkeypatch.setattr(nowcast, "_recipe", READ)
    c = changed(recipe(), {"given": {"first": "runs/nothing"}})
    with pytest.raises(UserError, match=r"config.given.first=runs/nothing is no run"):
        make_task(c).frozen(mesh_of(c))
    for first, message in (
        (recipe(), "a run of another kind"),
        (changed(recipe("first"), {"given": {"past": 2}}), "given.past is 3, and the run"),
    ):
        monkeypatch.setattr(nowcast, "_recipe", lambda path, first=first: first)
        with pytest.raises(UserError, match=message):
            nowcast.first_recipe(c)


# ---- scores and baselines


@functools.cache
def rain(advect=True):
    return np.stack([radar_clip(3, "test", i, advect) for i in range(12)])


def test_a_moving_field_is_followed():
    """Motion to a tenth of a pixel, and a field is carried by it; 0 comes in from outside."""
    rng = np.random.default_rng(0)
    texture = smooth(rng.standard_normal((64, 64)), 3)
    texture = 255 * (texture > 0) * texture / texture.max()
    clip = np.stack([np.roll(texture, (t, -2 * t), (0, 1)) for t in range(6)])
    np.testing.assert_allclose(motion(clip[:4]).mean((1, 2)), (1, -2), atol=0.1)
    flow = np.broadcast_to(np.array([1.0, -2.0])[:, None, None], (2, 64, 64))
    found = carried(clip[3], flow, 2)
    np.testing.assert_allclose(found[:, 2:, :-4], clip[4:, 2:, :-4], atol=1e-9)
    assert (found[1, :2] == 0).all()
    assert (motion(np.zeros((4, 16, 16))) == 0).all()


def smooth(field, times):
    """A field [.., H, W] after so many averages of neighbours."""
    for axis in (-1, -2) * times:
        field = (np.roll(field, 1, axis) + 2.0 * field + np.roll(field, -1, axis)) / 4
    return field


def test_advection_beats_persistence_where_rain_only_moves():
    clips = rain()
    truth = clips[:, 7:].astype(float)
    error = {
        method: np.abs(method(clips[:, :7], 6) - truth).mean()
        for method in (persistence, advection)
    }
    assert error[advection] < 0.8 * error[persistence]


def test_members_are_the_samples_of_a_record():
    """The scores of an ensemble whose mean is the truth, added in batches of any size."""
    clips = rain()[:4, ..., None]
    up, down = clips.copy(), clips.copy()
    up[:, 7:] = np.minimum(clips[:, 7:], 245) + 10
    down[:, 7:] = np.maximum(clips[:, 7:], 10) - 10
    samples, truth = np.concatenate([up, down]), np.concatenate([clips, clips])
    found = []
    for size in (8, 3):
        scores = NowcastScores(4)
        for i in range(0, 8, size):
            scores.add(samples[i : i + size], truth[i : i + size], 7)
        found.append(scores.means())
    assert found[0] == found[1]
    whole = found[0]
    assert whole["members"] == 2
    assert whole["mean_mae"] < 5 < whole["mae"]
    assert whole["crps"] < whole["mae"]
    assert whole["csi"] < 1
    assert {"persistence_csi", "advection_mae", "spread_skill", "csi_16", "ssim"} <= whole.keys()
    records = scores.records()
    assert {name: x.shape for name, x in records.items()} == {"mae": (4,), "crps": (4,)}
    for name, values in records.items():
        assert values.mean() == pytest.approx(whole[name])
    single = NowcastScores(4)
    single.add(clips, clips, 7)
    assert single.means()["csi"] == 1
    assert single.means()["crps"] == 0


def test_samples_are_scored_beside_the_records_that_they_are_given():
    c = recipe()
    clips = np.stack([radar_clip(5, "test", i)[:F] for i in range(3)])[..., None]

    def rows(indices):
        return {"image": clips[indices % 3] / 127.5 - 1.0}

    scores = GivenScores(c, GivenRows(rows, {}, 3), 0)
    scores.add(clips[[0, 1]])
    scores.add(clips[[2, 0]])
    found = scores.means()
    assert found["mae"] == 0
    assert found["persistence_mae"] > 0


def test_features_of_rain_see_blur_and_drizzle():
    clips = rain(False)[..., None]
    features = rain_features(clips)
    assert features.shape == (12, 29)
    assert np.isfinite(features).all()
    blurred = smooth(clips[..., 0], 3)[..., None]
    bands = slice(7, 13)
    assert rain_features(blurred)[:, bands].mean() < features[:, bands].mean() - 0.1
    assert (rain_features(clips // 2)[:, 0] < features[:, 0]).all()


def test_arms_of_a_study_share_a_protocol(with_first):
    """Layers and a first stage are part of the model; another target is another loss."""
    c = recipe()
    first = changed(c, {"given": {"first": "runs/first"}})
    error = changed(first, {"given": {"residual_std": 0.5}})
    assert given.given_protocol(c) == given.given_protocol(first) == given.given_protocol(error)
    assert given.training_protocol(c) == given.training_protocol(first)
    assert given.training_protocol(c) != given.training_protocol(error)
