"""The task of the transformer over text and codes: its loss, its prompts, its samples."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import read
from ditjax.data.tokenizers import open_tokenizer
from ditjax.errors import UserError
from ditjax.models.dvae import DVAE, DvaeConfig
from ditjax.models.network import Conditions
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.given import given_prompts
from ditjax.tasks import clip as clip_task
from ditjax.tasks import tokens as task_module
from ditjax.tasks.opened import Opened
from ditjax.tasks.tokens import best_of, config_of, make, nats
from ditjax.weights.networks import labels_text
from tests.seeded import seeded_params
from tests.tasks.test_clip import TINY as CLIP

TINY: dict[str, Any] = {
    "task": "tokens",
    "model": {"size": "1x8x2", "vocabulary": 360, "codes": 6, "grid": 4, "attention": "sparse"}
    | {"kernel": 3},
    "text": {"tokens": 12},
    "tokens": {"dvae": "a"},
    "sample": {"batch_size": 8, "num": 8},
    "data": {"name": "caption_scenes/40", "image_size": 8, "num_classes": 10, "flip": False},
    "train": {"batch_size": 4, "steps": 2},
    "evaluate": {"val_loss_num": 4},
}
DVAE_SIZES = DvaeConfig(6, 4, 4, 2, 1, 3)


def recipe(**changes):
    return read({**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in changes.items()}})


@pytest.fixture(scope="module")
def frozen():
    """A random discrete VAE, and a random CLIP with the recipe that trained it."""
    pytest.importorskip("tokenizers")
    dvae = seeded_params(DVAE(DVAE_SIZES).init, jnp.zeros((1, 8, 8, 3)))
    c = read(CLIP)
    clip = seeded_params(clip_task.make(c).init)
    opened = Opened(clip_task.towers(c), lambda mesh: clip, "clip", c)
    return SimpleNamespace(dvae=Opened(DVAE_SIZES, lambda mesh: dvae, "dvae"), clip=opened)


@pytest.fixture
def opened(frozen, monkeypatch):
    """Their places are not read: what is opened there are the random ones."""
    monkeypatch.setattr(task_module, "open_dvae", lambda *args: frozen.dvae)
    monkeypatch.setattr(task_module, "open_clip", lambda *args: frozen.clip)


def test_the_loss_weighs_text_and_codes(opened):
    c = recipe(tokens={"text_loss_weight": 0.25})
    task, rng = make(c), np.random.default_rng(0)
    params = seeded_params(task.init)
    images = jnp.asarray(rng.uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    text = np.ones((3, 12), np.int32)
    text[:, :4] = rng.integers(2, 300, (3, 4))  # padded from place 5 on
    mesh = make_mesh(-1, 1)
    (score,) = task.scores

    @jax.jit
    def computed(params, frozen, rows):
        key = jax.random.key(1)
        batch = task.prepare(frozen, rows, key)
        held_out = score.measure(params, frozen, key, rows)["bits"]
        return batch, *task.loss(params, {}, batch), held_out

    rows = {"image": images, "caption": text}
    batch, loss, metrics, held_out = computed(params, task.frozen(mesh), rows)
    assert batch["codes"].shape == (3, 16)
    assert score.num == 4
    np.testing.assert_allclose(held_out.mean(), metrics["bits_per_token"], rtol=1e-5)
    bits = metrics["bits_per_token"] * np.log(2)
    np.testing.assert_allclose(loss, 0.25 * metrics["text_nats"] + 0.75 * bits, rtol=1e-6)
    # Nothing behind the end counts, except that a longer text is another one.
    logits = {"text": jnp.zeros((3, 11, 360)), "codes": jnp.zeros((3, 16, 6))}
    seen = logits["text"].at[:, 5:].add(jnp.arange(360.0))

    def found(of_text):
        out = SimpleNamespace(text=of_text, codes=logits["codes"])
        return nats(lambda *args: out, config_of(c), params, jnp.asarray(text), batch["codes"])[0]

    np.testing.assert_array_equal(found(seen), found(logits["text"]))
    assert np.all(found(seen.at[:, 1].add(jnp.arange(360.0))) != found(logits["text"]))


def test_a_sample_follows_from_its_key_and_text_alone(opened):
    """Also if a CLIP keeps the best of its candidates."""
    task = make(recipe(tokens={"candidates": 2, "clip": "b"}))
    params, weights = seeded_params(task.init), task.frozen(make_mesh(-1, 1))
    assert task.sampling
    draw = jax.jit(task.sampling.draw)

    def drawn(keys, words):
        text = jnp.ones((2, 12), jnp.int32).at[:, :2].set(jnp.array(words)[:, None])
        return np.asarray(draw(params, weights, keys, Conditions(context=text), ()))

    keys = jax.random.split(jax.random.key(7), 2)
    images = drawn(keys, [30, 50])
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(drawn(keys[::-1], [50, 30])[::-1], images)
    assert np.any(drawn(keys[::-1], [30, 50]) != images)
    # By default of the captions of held-out records.
    needs, ids = task.sampling.needs, jnp.ones((2, 12), jnp.int32)
    assert needs
    assert (needs.name, needs.reads) == ("captions", "caption")
    assert needs.beside(ids, keys).context is ids


def test_samples_are_of_prompts_if_there_are_any(opened):
    given = given_prompts(recipe(), ["a red three", "a blue two"])
    ids = open_tokenizer("scenes")(["a blue two", "a red three"], 12).ids
    np.testing.assert_array_equal(given.rows(np.array([1, 2]))["beside"].context, ids)
    assert given.record["captions"].startswith("SHA-256:")


def test_the_best_candidate_of_each_row_is_kept():
    scores = jnp.array([[0.0, 3, 1], [2, 0, 9], [2, -1, 5]])  # of candidate, row
    kept = best_of(
        lambda n: jnp.full((3, 2), n), lambda codes: scores[codes[:, 0], jnp.arange(3)], 3
    )
    np.testing.assert_array_equal(kept[:, 0], [1, 0, 1])


def test_what_a_run_draws_from_is_said():
    assert labels_text(recipe()) == "texts: 12 tokens"


def test_codes_that_do_not_fit_are_one_line(opened):
    mesh = make_mesh(-1, 1)
    with pytest.raises(UserError, match=r"model.codes is 7, and the discrete VAE at a makes 6"):
        make(recipe(model={"codes": 7})).frozen(mesh)
    with pytest.raises(UserError, match=r"model.grid is 4, .* makes 8 of images of 16 pixels"):
        make(recipe(data={"image_size": 16})).frozen(mesh)


def test_what_does_not_go_together_is_one_line():
    for changes, message in (
        ({"tokens": {"candidates": 4}}, "config.tokens.clip is ''"),
        ({"data": {"flip": True}}, "config.data.flip is True"),
        ({"sample": {"cfg_scale": 2.0}}, "draws codes, not by steps of diffusion"),
        ({"tokens": {"top_p": 0.0}}, "top_p is 0.0: expected greater than 0"),
        ({"model": {"kernel": 4}}, "kernel is 4: expected an odd number"),
    ):
        with pytest.raises(UserError) as error:
            recipe(**changes)
        assert message in str(error.value)


@pytest.mark.parametrize("kind", ["dvae", "clip"])
def test_a_path_that_is_no_such_run_is_one_line(kind, tmp_path):
    pytest.importorskip("tokenizers")
    where = {"dvae": str(tmp_path / "no"), "clip": str(tmp_path / "no"), "candidates": 2}
    task = make(recipe(tokens={"dvae": where["dvae"]} if kind == "dvae" else where))
    with pytest.raises(UserError, match=r"no encoder\.pkl|no run"):
        task.frozen(make_mesh(-1, 1))
