"""unCLIP's prior as a task: what CLIP gives it, its loss, and what it draws."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import read
from ditjax.errors import UserError
from ditjax.models.clip import CLIP, unit
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import clip as clip_task
from ditjax.tasks import prior as task_module
from ditjax.tasks.opened import Opened
from ditjax.tasks.prior import make, nearest_candidate
from ditjax.training import program
from ditjax.training.step import init_state, make_step
from tests.seeded import seeded_params
from tests.tasks.test_clip import TINY as CLIP_RECIPE

TINY: dict[str, Any] = {
    "task": "prior",
    "model": {"size": "1x16x2"},
    "text": {"tokens": 12},
    "prior": {"clip": "a", "samples": 2},
    "diffusion": {"prediction": "x0", "schedule": "cosine", "loss": "simple", "timesteps": 20}
    | {"variance": "fixed_small"},
    "sample": {"steps": "2", "batch_size": 8},
    "data": {"name": "caption_scenes/40", "image_size": 8, "num_classes": 10, "flip": False},
    "optim": {"learning_rate": 1e-2},
    "train": {"batch_size": 8, "steps": 2, "evaluate_every_steps": 0, "ema_decay": 0.5},
}


def recipe(**changes):
    return read({**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in changes.items()}})


@pytest.fixture(scope="module")
def clip():
    """A random CLIP with the recipe that trained it."""
    pytest.importorskip("tokenizers")
    c = read(CLIP_RECIPE)
    params = seeded_params(clip_task.make(c).init)
    return Opened(clip_task.towers(c), lambda mesh: params, "clip", c)


@pytest.fixture
def opened(clip, monkeypatch):
    monkeypatch.setattr(task_module, "open_clip", lambda *args: clip)


@pytest.fixture(scope="module")
def rows():
    """Eight images, and captions of ten tokens; id 1 ends a text."""
    rng = np.random.default_rng(0)
    ids = np.ones((8, 12), np.int32)
    ids[:, :4] = rng.integers(2, 300, (8, 4))
    images = rng.uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32)
    return {"image": jnp.asarray(images), "caption": jnp.asarray(ids)}


def test_examples_are_standardized_vectors_and_encoded_captions(opened, clip, rows):
    task = make(recipe(prior={"drop": 0.0}))
    frozen = task.frozen(make_mesh(-1, 1))
    prepare = jax.jit(task.prepare)
    batch = prepare(frozen, rows, jax.random.key(0))
    assert {k: v.shape[1:] for k, v in batch.items()} == {
        k: v.shape for k, v in task.inputs.items()
    }
    np.testing.assert_allclose(jnp.square(batch["x0"]).mean(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(batch["context_mask"].sum(1), 5)
    embed = jax.jit(CLIP(clip.config).apply)
    v, w, _, _ = embed(frozen["clip"], rows["image"], rows["caption"])
    np.testing.assert_allclose(unit(batch["x0"]), unit(v), atol=1e-6)
    np.testing.assert_allclose(unit(batch["vector"]), unit(w), atol=1e-6)
    # All dropped, every caption is the empty one; the images stay.
    gone = jax.jit(make(recipe(prior={"drop": 0.9999999})).prepare)(frozen, rows, jax.random.key(0))
    np.testing.assert_array_equal(gone["x0"], batch["x0"])
    for name in ("context", "context_mask", "vector"):
        assert np.ptp(np.asarray(gone[name], np.float32), axis=0).max() == 0, name
    assert gone["context_mask"].sum() < batch["context_mask"].sum()


def test_a_few_steps_lower_the_loss(opened):
    c = recipe()
    task = make(c)
    rng = np.random.default_rng(1)
    batch = {name: jnp.ones((8, *each.shape), each.dtype) for name, each in task.inputs.items()}
    batch["x0"] = jnp.asarray(rng.choice([-1.0, 1.0], batch["x0"].shape), jnp.float32)
    batch["vector"] = batch["x0"][:, ::-1]
    tx = program.optimizer_of(c)
    step = jax.jit(make_step(task.draw, task.loss, tx, 0.5, jax.random.key(1)))
    state, losses = init_state(seeded_params(task.init), tx), []
    for _ in range(12):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert task.cost
    assert task.cost.parameters == sum(x.size for x in jax.tree.leaves(state.params))


@functools.cache
def score_of(scale, opened):
    """The score of a random prior, guided at a scale: (keys, rows) -> what it measures."""
    task = make(recipe(sample={"cfg_channels": "all", "cfg_scale": scale}))
    frozen = task.frozen(make_mesh(-1, 1))
    params = seeded_params(task.init)
    measure = jax.jit(lambda keys, rows: task.scores[0].measure(params, frozen, keys, rows))
    keys = jax.random.split(jax.random.key(4), 8)

    def found(rows, order=slice(None)):
        rows = {name: each[order] for name, each in rows.items()}
        return {name: np.asarray(each) for name, each in measure(keys[order], rows).items()}

    return found, task.scores[0]


def test_a_vector_follows_from_its_key_and_caption_alone(opened, rows):
    measure, score = score_of(1.0, opened)
    found, turned = measure(rows), measure(rows, slice(None, None, -1))
    assert found["samples"].shape == (8, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(found["samples"], axis=-1), 1, rtol=1e-5)
    for name, each in found.items():
        np.testing.assert_allclose(turned[name][::-1], each, atol=1e-5)
    assert np.ptp(found["samples"], axis=1).max() > 0.01
    summary = score.summary({**found, "classes": np.zeros((8, 1), int)})
    assert {"mean_cosine", "calibration_gap", "energy_samples", "nearest_text"} <= set(summary)
    assert all(np.isfinite(list(summary.values())))


def test_guidance_compares_with_the_empty_caption(opened, rows):
    """At scale 0 a vector is that of the empty caption, whatever its own is."""
    other = {**rows, "caption": jnp.roll(rows["caption"], 1, axis=0)}
    empty, plain = (score_of(scale, opened)[0] for scale in (0.0, 1.0))
    np.testing.assert_allclose(empty(other)["samples"], empty(rows)["samples"], atol=1e-5)
    assert np.abs(plain(other)["samples"] - plain(rows)["samples"]).max() > 1e-3
    assert np.abs(empty(rows)["samples"] - plain(rows)["samples"]).max() > 1e-3


def test_the_nearest_candidate_is_kept():
    text = jnp.array([[1.0, 0], [0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 2)

    def draw(keys):
        return unit(jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys))

    one = nearest_candidate(draw, text, keys, 1)
    np.testing.assert_allclose(one, draw(keys), rtol=1e-6)
    many = nearest_candidate(draw, text, keys, 40)
    assert np.all((many * text).sum(-1) > 0.9)


def test_what_does_not_go_together_is_one_line():
    for changes, message in (
        ({"diffusion": {"variance": "learned_range", "loss": "hybrid"}}, "has no output"),
        ({"sample": {"clip_x0": True}}, "the numbers of a vector are not in [-1, 1]"),
        ({"sample": {"cfg_scale": 2.0}}, "set cfg_channels to 'all'"),
        ({"evaluate": {"val_loss_num": 4}}, "a prior draws vectors"),
        ({"data": {"flip": True}}, "config.data.flip is True"),
    ):
        with pytest.raises(UserError) as error:
            recipe(**changes)
        assert message in str(error.value)


def test_a_clip_that_does_not_fit_is_one_line(clip, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"config.prior.clip=.* is no run"):
        make(recipe(prior={"clip": str(tmp_path)}))
    with pytest.raises(UserError, match=r"config.prior.clip is ''"):
        make(recipe(prior={"clip": ""}))
    monkeypatch.setattr(clip_task, "opened_clip", lambda *args: clip)
    for changes, message in (
        ({"data": {"image_size": 16}}, "image_size is 16, and the CLIP at a reads 8"),
        ({"text": {"tokens": 14}}, "text.tokens is 14, and the CLIP at a reads 12"),
        ({"data": {"channels": 1}}, "channels is 1, and the network at a was trained on 3"),
    ):
        with pytest.raises(UserError, match=message):
            make(recipe(**changes))
    other = SimpleNamespace(text=SimpleNamespace(tokenizer="b"))
    monkeypatch.setattr(clip_task, "opened_clip", lambda *args: clip._replace(recipe=other))
    with pytest.raises(UserError, match="the CLIP at a was trained with 'b'"):
        make(recipe())
