"""CLIP: its loss in both forms, beside transformers, and its scores."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed, read
from ditjax.data.tokenizers import open_tokenizer
from ditjax.errors import UserError
from ditjax.evaluation.validation import held_out_means
from ditjax.machines.stages import stages_of
from ditjax.models.clip import CLIP, clip_cost, unit
from ditjax.models.embed import ANYWHERE
from ditjax.models.text import layers_macs
from ditjax.parallel import rules
from ditjax.parallel.mesh import mesh_of
from ditjax.tasks.clip import Clip, Pairs, class_vectors, contrastive_loss, make, retrieval, towers
from ditjax.training import program
from ditjax.weights.clip import load_clip, write_clip
from tests.text_encoders import golden, golden_images, relative, with_config, write_folder

TINY: dict[str, Any] = {
    "task": "clip",
    "model": {"size": "1x16x2", "text_size": "1x16x2", "patch": 4, "embedding": 8}
    | {"vocabulary": 360, "end": 1},
    "text": {"tokens": 12},
    "data": {"name": "caption_scenes/40", "image_size": 8, "num_classes": 10, "flip": False},
    "train": {"batch_size": 16, "steps": 2, "evaluate_every_steps": 0},
    "optim": {"weight_decay": 0.1, "decay": "kernels"},
}


def recipe(**changes):
    tree = {**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in changes.items()}}
    return read(tree)


# ---- the loss


def pairs(N=16, E=6, distinct=16):
    rng = np.random.default_rng(0)
    v, w = rng.normal(size=(2, N, E)).astype(np.float32)
    ids = np.arange(N) % distinct
    return Pairs(jnp.asarray(v), jnp.asarray(w), jnp.asarray(ids[:, None].repeat(3, 1)))


def loss_of(mesh, found, s=1.3, b=-0.7, place=ANYWHERE, **keys):
    scale, bias = jnp.float32(s), jnp.float32(b if keys.get("loss") == "sigmoid" else 0)
    return contrastive_loss(Clip(**keys), found, scale, bias, mesh, place)


def dense(v, w, ids, s, loss, targets):
    """Radford et al. 2021 Fig. 3 in NumPy, float64."""
    v, w = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, w))
    S = np.exp(s) * v @ w.T
    same = ids[:, :1] == ids[:, 0] if targets == "captions" else np.eye(len(v), dtype=bool)
    T = same / same.sum(1, keepdims=True)

    def entropy(logits):
        return -(T * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean()

    return (entropy(S) + entropy(S.T)) / 2


@pytest.mark.parametrize("targets", ["pairs", "captions"])
def test_the_loss_is_figure_3(targets):
    found = pairs(distinct=5)
    ours, metrics = loss_of(None, found, targets=targets)
    v, w, ids = (np.asarray(x, np.float64) for x in found)
    assert abs(ours - dense(v, w, ids, 1.3, "softmax", targets)) < 1e-6
    floor = np.mean([np.log((ids[:, 0] == i).sum()) for i in ids[:, 0]])
    np.testing.assert_allclose(metrics["above_floor"], ours - floor, rtol=1e-5)


def test_the_sum_is_2n_times_the_mean_at_temperature_1():
    found = pairs()
    same = found._replace(image=unit(found.image), text=unit(found.text))
    total, _ = loss_of(None, same, loss="sum")
    mean, _ = loss_of(None, same, s=0.0)
    np.testing.assert_allclose(total, 2 * 16 * mean, rtol=1e-6)


def test_the_sigmoid_loss_is_siglips():
    found = pairs()
    ours, _ = loss_of(None, found, loss="sigmoid")
    v, w = (np.asarray(unit(x), np.float64) for x in found[:2])
    z = 2 * np.eye(16) - 1
    expected = np.log1p(np.exp(-z * (np.exp(1.3) * v @ w.T - 0.7))).sum() / 16
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_scale_is_clipped_and_has_no_gradient_there():
    def of_scale(s, limit):
        keys = Clip(max_scale=limit)
        return contrastive_loss(keys, pairs(), s, jnp.zeros(()), None, ANYWHERE)[0]

    s = jnp.float32(3.0)
    assert of_scale(s, 5.0) == of_scale(jnp.float32(9.0), 5.0)
    assert jax.grad(of_scale)(s, 5.0) == 0
    assert jax.grad(of_scale)(s, 100.0) != 0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_both_forms_on_eight_devices_equal_one_in_loss_and_gradients(loss):
    """Within 1e-5; stopping the gradient at the gather would leave the loss and spoil these."""
    mesh = mesh_of(recipe(mesh={"data": 4, "fsdp": 2}))
    found = pairs(distinct=9)

    def value(vectors, mesh, form):
        v, w, s = vectors
        place = ANYWHERE
        keys = Clip(loss=loss, form=form, targets="captions")
        return contrastive_loss(
            keys, found._replace(image=v, text=w), s, jnp.float32(-1), mesh, place
        )[0]

    vectors = (found.image, found.text, jnp.float32(1.3))
    one = jax.jit(jax.value_and_grad(functools.partial(value, mesh=None, form="global")))(vectors)
    split = (*(jax.device_put(x, rules.batch_sharding(mesh)) for x in vectors[:2]), vectors[2])
    for form in ("global", "local"):
        many = jax.jit(jax.value_and_grad(functools.partial(value, mesh=mesh, form=form)))(split)
        for ours, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            assert relative(ours, np.asarray(theirs)) < 1e-5, form


# ---- beside transformers


@pytest.fixture(scope="module")
def theirs():
    return golden("clip")


@pytest.fixture(scope="module")
def loaded(theirs, tmp_path_factory):
    return load_clip(write_folder(tmp_path_factory.mktemp("clip") / "a", theirs))


def test_transformers_computes_the_same(theirs, loaded):
    images, ids = golden_images(), jnp.asarray(theirs["ids"], jnp.int32)
    apply = jax.jit(CLIP(loaded.config).apply)
    v, w, scale, bias = apply({"params": loaded.params}, images, ids)
    assert relative(unit(v), theirs["out/image"]) < 5e-6
    assert relative(unit(w), theirs["out/text"]) < 5e-6
    assert scale == theirs["tensor/logit_scale"]
    ours, _ = contrastive_loss(Clip(), Pairs(v, w, ids), scale, bias, None, ANYWHERE)
    assert relative(ours, theirs["out/loss"]) < 5e-6


def test_weights_are_written_as_they_were_read(theirs, loaded, tmp_path):
    write_clip(tmp_path, loaded.config, loaded.params)
    again = load_clip(tmp_path)
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    stated = json.loads((tmp_path / "config.json").read_text())
    theirs_config = json.loads(str(theirs["config"]))
    for section in ("text_config", "vision_config"):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act"):
            assert stated[section][name] == theirs_config[section][name]


def test_what_is_no_clip_is_one_line(theirs, loaded, tmp_path):
    with pytest.raises(UserError, match="model_type='bert': expected 'clip'"):
        load_clip(write_folder(tmp_path / "a", with_config(theirs, model_type="bert")))
    less = {k: v for k, v in theirs.items() if k != "tensor/logit_scale"}
    with pytest.raises(UserError, match="logit_scale is missing"):
        load_clip(write_folder(tmp_path / "b", less))
    with pytest.raises(UserError, match="logit_bias, which CLIPModel lacks"):
        write_clip(tmp_path, loaded.config._replace(biased=True), loaded.params)


# ---- scores


def test_retrieval_of_known_vectors():
    eye = np.eye(6, dtype=np.float32)
    ids = np.arange(6)[:, None]
    assert retrieval(eye, eye, ids, 6)["image_to_text_r1"] == 1
    found = retrieval(eye, np.roll(eye, 1, axis=0), ids, 6)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 0
    # Equal captions count once: the first of each.
    assert retrieval(eye, eye, ids // 2, 6)["retrieval_num"] == 3
    close = eye + 2 * np.roll(eye, 1, axis=1)
    near = retrieval(eye, close, ids, 6)
    assert (near["image_to_text_r1"], near["image_to_text_r5"]) == (0, 1)


def test_a_class_is_the_unit_mean_of_its_templates():
    embedded = jnp.asarray([[[1.0, 0], [0, 1.0]]])
    np.testing.assert_allclose(class_vectors(embedded)[0], [0.5**0.5] * 2, rtol=1e-6)


# ---- the task


def test_what_does_not_go_together_is_one_line():
    for changes, message in (
        ({"train": {"microbatches": 2}}, "the mean over parts is another loss; set it to 1"),
        ({"data": {"flip": True}}, "config.data.flip is True: a mirrored image's caption"),
        ({"clip": {"templates": (("digit", "no"),)}}, "expected one {}"),
        ({"clip": {"templates": ("digit",)}}, "expected pairs such as"),
        (
            {"train": {"evaluate_every_steps": 1}, "evaluate": {"features": "digits"}},
            "only tasks that draw samples",
        ),
    ):
        with pytest.raises(UserError) as error:
            recipe(**changes)
        assert message in str(error.value)


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("tokenizers")
    return make(recipe())


def test_the_tokenizer_must_fit(task):
    with pytest.raises(UserError, match="vocabulary is 100, and the tokenizer 'scenes' has 360"):
        make(recipe(model={"vocabulary": 100}))
    with pytest.raises(UserError, match="end is 5, and the tokenizer 'scenes' ends texts with 1"):
        make(recipe(model={"end": 5}))
    with pytest.raises(UserError, match="patch is 3, which does not divide"):
        make(recipe(model={"patch": 3}))


def test_the_cost_counts_every_parameter(task):
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    assert task.cost.parameters == sum(x.size for x in jax.tree.leaves(shapes))
    c = recipe()
    assert task.cost == clip_cost(c.model, towers(c))


def test_no_gain_no_bias_and_no_temperature_decays(task):
    """With gradients of 0, Adam leaves a parameter as it is, and decay does not."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    tx = program.optimizer_of(recipe())

    @jax.jit
    def update():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
        ones = jax.tree.map(jnp.ones_like, zeros)
        return tx.update(zeros, tx.init(ones), ones)[0]

    leaves = jax.tree_util.tree_leaves_with_path(update())
    moved = {rules.path_of(p) for p, u in leaves if np.any(u)}
    every = {rules.path_of(p) for p, _ in leaves}
    still = {path for path in every if path.endswith(("scale", "bias"))}
    assert moved == every - still
    assert "params/logit_scale" in still


@pytest.mark.usefixtures("own_data")
def test_evaluation_reports_zero_shot_and_retrieval():
    """Of a mesh of eight devices, which the prompts need not divide."""
    pytest.importorskip("tokenizers")
    c = recipe(
        data={"name": "caption_scenes/80"},
        clip={"templates": (("colour", "a {} digit"),)},
        evaluate={"split": "train"},
        train={"batch_size": 32},
    )
    mesh = mesh_of(c)
    params = jax.jit(make(c, mesh).init)(jax.random.key(0))
    means, protocol = held_out_means(c, mesh, params)
    assert set(means) == {
        *("zero_shot_colour", "retrieval_num"),
        *(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)),
    }
    assert 20 < means["retrieval_num"] <= 80
    assert all(0 <= means[name] <= 1 for name in means if name != "retrieval_num")
    assert protocol["tokenizer"] == open_tokenizer("scenes").sha256
    # A plan counts it: two towers for a pair, and the texts of eight colours.
    stage, text = stages_of(c, 1)[-1], towers(c).text
    of_text = layers_macs(text.layers, text.positions) + text.projection * text.layers.width
    assert stage.name == "evaluate"
    assert stage.macs == pytest.approx(clip_cost(c.model, towers(c)).macs + 8 * of_text, rel=0.01)
    wrong = changed(c, {"clip": {"templates": (("hue", "{}"),)}})
    with pytest.raises(UserError, match="names 'hue', which is no feature with classes"):
        held_out_means(wrong, mesh, params)
