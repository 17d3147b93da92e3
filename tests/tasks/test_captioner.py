"""The captioner as a task, and what text to image is trained on with its captions."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax import evaluate, train
from ditjax.config import changed, check_used, read
from ditjax.data.tokenizers import open_tokenizer
from ditjax.errors import UserError
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import captioner as task_module
from ditjax.tasks import clip as clip_task
from ditjax.tasks import recaptioning
from ditjax.tasks.captioner import caption_nats, config_of_captioner, image_states, make
from ditjax.tasks.opened import Opened
from ditjax.tasks.recaptioning import recaptions
from ditjax.weights.clip import write_clip
from tests.seeded import seeded_params
from tests.tasks.test_clip import TINY as CLIP_RECIPE
from tests.tasks.test_text2image import TINY as TEXT_RECIPE
from tests.text_encoders import tiny_bert

pytest.importorskip("tokenizers")

TINY: dict[str, Any] = {
    "task": "captioner",
    "model": {"size": "1x16x2", "vocabulary": 360, "end": 1},
    "text": {"tokens": 12, "captions": "first"},
    "captioner": {"clip": "a"},
    "data": {"name": "caption_scenes/40", "image_size": 8, "num_classes": 10, "flip": False},
    "train": {"batch_size": 8, "steps": 2, "evaluate_every_steps": 0, "ema_decay": 0.0},
    "evaluate": {"split": "test", "features": "none"},
}
END, PAD = 1, open_tokenizer("scenes").pad


def recipe(**changes):
    return read({**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in changes.items()}})


@pytest.fixture(scope="module")
def clip():
    """A random CLIP with the recipe that trained it."""
    c = read(CLIP_RECIPE)
    params = seeded_params(clip_task.make(c).init)
    return Opened(clip_task.towers(c), lambda mesh: params, "clip", c)


@pytest.fixture
def opened(clip, monkeypatch):
    monkeypatch.setattr(task_module, "open_clip", lambda *args: clip)
    monkeypatch.setattr(recaptioning, "open_clip", lambda *args: clip)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    text = np.full((6, 12), PAD, np.int32)
    text[:, :4], text[:, 4] = rng.integers(2, 300, (6, 4)), END
    images = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
    return {"image": images, "caption": text, "index": np.array([3, 1, 8, 2, 9, 4])}


def test_the_loss_is_of_the_tokens_up_to_the_end(opened, clip, rows):
    c = recipe()
    task, mesh = make(c), make_mesh(-1, 1)
    params, frozen = seeded_params(task.init), task.frozen(mesh)
    batch = {name: jnp.asarray(rows[name]) for name in ("image", "caption")}
    drawn = jax.jit(task.prepare)(frozen, batch, jax.random.key(0))
    assert drawn["states"].shape == (6, 5, 16)
    np.testing.assert_array_equal(
        drawn["states"], jax.jit(lambda x: image_states(clip, frozen["clip"], x))(batch["image"])
    )
    loss, metrics = jax.jit(lambda p, d: task.loss(p, {}, d))(params, drawn)
    np.testing.assert_array_equal(loss, metrics["nats_per_token"])
    logits = np.random.default_rng(1).normal(size=(6, 12, 360)).astype(np.float32)
    config = config_of_captioner(c, clip)

    def nats(logits):
        return caption_nats(lambda *args: logits, config, params, drawn["states"], batch["caption"])

    chosen = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = [-np.mean([chosen[b, i, rows["caption"][b, i]] for i in range(5)]) for b in range(6)]
    np.testing.assert_allclose(nats(jnp.asarray(logits)), expected, rtol=1e-5)
    behind = jnp.asarray(logits).at[:, 5:].add(jnp.arange(360.0))
    np.testing.assert_array_equal(nats(behind), nats(jnp.asarray(logits)))


def test_a_caption_that_is_written_exactly_counts(opened, rows, monkeypatch):
    """What stands behind the end does not matter; one wrong token does."""
    task = make(recipe())
    (score,) = task.scores
    params, frozen = seeded_params(task.init), task.frozen(make_mesh(-1, 1))
    batch = {name: jnp.asarray(rows[name]) for name in ("image", "caption")}
    keys = jax.random.split(jax.random.key(0), 6)
    written = rows["caption"].copy()
    written[0, 8], written[1, 2] = 50, written[1, 2] + 1
    monkeypatch.setattr(task_module, "written_captions", lambda *args: jnp.asarray(written))
    found = score.measure(params, frozen, keys, batch)
    assert found["exact"].tolist() == [1, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(found["tokens"], [1, 11 / 12, 1, 1, 1, 1], rtol=1e-6)
    assert set(score.names) == set(found)


# ---- recaptioning


@pytest.fixture
def writer(opened, monkeypatch):
    """Its captions are those of a random captioner; the place is not read."""
    c = recipe()
    params = seeded_params(make(c).init)
    found = Opened(None, lambda mesh: params, "run", c)
    monkeypatch.setattr(recaptioning, "opened_run", lambda *args: found)
    return c


def text_recipe(**text):
    data = {**TEXT_RECIPE["data"], "image_size": 8}
    own = {**TEXT_RECIPE["text"], "captioner": "run", **text}
    return read({**TEXT_RECIPE, "data": data, "text": own})


def test_a_share_of_the_records_is_given_written_captions(writer, rows, capsys):
    own = recaptions(text_recipe(captioner=""))
    assert own.add(rows) is rows
    assert not own.contents
    every = recaptions(text_recipe(synthetic_share=1.0))
    assert (
        "a share of 1 of the records is given captions that run writes" in capsys.readouterr().err
    )
    assert set(every.contents) == {"text.captioner", "text.captioner.clip"}
    written = every.add(rows)["caption"]
    assert written.dtype == np.int32
    assert (written != rows["caption"]).any(1).all()
    np.testing.assert_array_equal((written == END).any(1), True)
    none = recaptions(text_recipe(synthetic_share=0.0)).add(rows)
    np.testing.assert_array_equal(none["caption"], rows["caption"])
    # By a record's number alone: not by its place in a batch, nor by what was read before.
    half = recaptions(text_recipe(synthetic_share=0.5))
    mixed = half.add(rows)["caption"]
    changed_rows = (mixed != rows["caption"]).any(1)
    assert 0 < changed_rows.sum() < 6
    np.testing.assert_array_equal(mixed[changed_rows], written[changed_rows])
    order = np.array([5, 2, 0])
    part = {name: value[order] for name, value in rows.items()}
    for of in (half, recaptions(text_recipe(synthetic_share=0.5))):
        np.testing.assert_array_equal(of.add(part)["caption"], mixed[order])


def test_a_record_is_captioned_once(writer, rows):
    every = recaptions(text_recipe(synthetic_share=1.0))
    first = every.add(rows)["caption"]
    again = every.add({**rows, "image": -rows["image"]})["caption"]
    np.testing.assert_array_equal(again, first)


def test_a_captioner_of_other_texts_or_images_is_one_line(writer):
    with pytest.raises(UserError, match=r"config.text.tokens is 9, and the captioner at run .* 12"):
        recaptions(text_recipe(tokens=9))
    with pytest.raises(UserError, match=r"synthetic_share has no effect: config.text.captioner"):
        check_used(text_recipe(captioner="", synthetic_share=0.5), ["text.synthetic_share"])
    with pytest.raises(UserError, match=r"captions is 'concat', and a captioner writes one"):
        recipe(text={"captions": "concat"})


def test_a_captioner_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"config.text.captioner=nowhere is no run"):
        recaptions(text_recipe(captioner="nowhere"))


# ---- a run


def test_a_captioner_is_trained_and_its_captions_used(clip, data_root, tmp_path, monkeypatch):
    """From a CLIP's folder to text to image; a run knows the captioner that it began with."""
    monkeypatch.setenv("DITJAX_DATA", str(data_root))
    weights = jax.tree.map(np.asarray, clip.load(make_mesh(-1, 1))["params"])
    write_clip(tmp_path / "clip", clip.config, weights)
    c = recipe(captioner={"clip": str(tmp_path / "clip")})
    train.train(c, tmp_path / "captioner")
    found = evaluate.evaluate_run(c, tmp_path / "captioner")["metrics"]
    assert found["nats_per_token"] > 0
    assert 0 <= found["captions_exact"] <= found["caption_tokens_right"] <= 1
    encoder = tiny_bert(tmp_path / "encoder")
    own = {"encoder": str(encoder), "synthetic_share": 1.0, "cache": True}
    t = text_recipe(**own, captioner=str(tmp_path / "captioner"))
    t = changed(t, {"evaluate": {"features": "none"}, "train": {"steps": 2}})
    assert train.train(t, tmp_path / "run").step == 2
    path = tmp_path / "run" / "contents.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps({**contents, "text.captioner": "0" * 64}))
    with pytest.raises(UserError, match=r"text\.captioner"):
        train.train(changed(t, {"train": {"steps": 3}}), tmp_path / "run")
