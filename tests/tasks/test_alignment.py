"""Representation alignment: the loss against its formula, off without a trace, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, check_used, read
from ditjax.data import stream
from ditjax.errors import UserError
from ditjax.models import dit, mup
from ditjax.models.network import Conditions
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import contents, opening
from ditjax.tasks import alignment, cost_of, make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.tasks.objective import process_of
from ditjax.training.step import AVERAGE, init_state, make_step
from ditjax.weights.shipped import shipped_classifier

RNG = np.random.default_rng(0)
SMALL = ("--config=digits:2x32x2/2", "--config.model.unroll=1", "--config.train.batch_size=8")
PROJECTOR = {"align_block": 1, "align_width": 24, "align_features": 48}
OF_SELF = {**PROJECTOR, "align_features": 32}


classifier_features = jax.jit(alignment.classifier_features, static_argnums=0)


def recipe(teacher="none", model=None, **sections):
    align = {"teacher": teacher, **sections.pop("align", {})}
    return changed(
        read(load_recipe(list(SMALL))), {"model": model or {}, "align": align, **sections}
    )


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@functools.cache
def weights(c):
    """Noise on every leaf: at initialisation the blocks are the identity."""
    shapes = jax.eval_shape(make_task(c).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def drawn(task):
    rows = {"image": normal(8, 8, 8, 1), "label": jnp.arange(8, dtype=jnp.int32)}
    key = jax.random.key(2)
    return task.draw(task.prepare({}, rows, key), key)


def tokens_after(c, params, block, x, t, label):
    """The tokens after a block, as Linen captures them."""
    apply = functools.partial(
        denoiser_module(c).apply,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "blocks",
    )
    _, state = jax.jit(apply)(params, x, t, Conditions(label=label))
    return state["intermediates"]["blocks"]["__call__"][0][block - 1]


# ---- the loss


def test_the_mean_cosine_and_its_gradient():
    """cos = a·f / |a||f|; its gradient is (f̂ - cos â) / |a|, over the number of vectors."""
    a, f = np.asarray(normal(2, 3, 5)), np.asarray(normal(2, 3, 5))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, f)]
    cosine = (unit[0] * unit[1]).sum(-1, keepdims=True)
    found, gradient = jax.value_and_grad(alignment.mean_cosine)(jnp.asarray(a), jnp.asarray(f))
    np.testing.assert_allclose(found, cosine.mean(), rtol=1e-5)
    expected = (unit[1] - cosine * unit[0]) / np.linalg.norm(a, axis=-1, keepdims=True) / 6
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    zero, flat = jax.value_and_grad(alignment.mean_cosine)(jnp.zeros((1, 2, 5)), normal(1, 2, 5))
    assert zero == 0
    assert np.isfinite(flat).all()


def test_the_loss_is_the_objective_less_the_weighted_cosine():
    """Of the tokens after the block, through REPA's MLP, and of the mixer's 4x4 map."""
    c = recipe("digits_mixer", {**PROJECTOR, "align_block": 2}, align={"weight": 0.25})
    task, params = make_task(c), weights(c)
    batch = drawn(task)
    x0, t, eps, y = (batch[k] for k in ("x0", "t", "eps", "y"))
    h = tokens_after(c, params, 2, process_of(c.diffusion).noised(x0, t, eps), t, y)
    p = params["params"]["projector"]
    for name in ("in", "middle"):
        h = h @ p[name]["kernel"] + p[name]["bias"][None, None]
        h = h / (1 + jnp.exp(-h))
    h = h @ p["out"]["kernel"] + p["out"]["bias"][None, None]
    teacher = classifier_features("digits_mixer", x0).reshape(8, 16, 48)
    cosine = alignment.mean_cosine(h, teacher)
    assert abs(float(cosine)) > 1e-3
    loss, metrics = jax.jit(task.loss)(params, {}, batch)
    np.testing.assert_allclose(metrics["alignment"], cosine, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], metrics["mse"] + metrics["vlb"], rtol=1e-6)
    np.testing.assert_allclose(loss, metrics["loss"] - 0.25 * cosine, rtol=1e-5)


def test_the_mixers_map_is_what_it_pools():
    x = normal(8, 8, 8, 1)
    network, params = shipped_classifier("digits_mixer")
    pooled = jax.jit(network.apply)({"params": params}, x).features
    found = classifier_features("digits_mixer", x)
    assert found.shape == (8, 4, 4, 48)
    np.testing.assert_allclose(found.mean((1, 2)), pooled, atol=1e-5)
    # Larger images in colours are brought to 8x8 in grey.
    large = jnp.repeat(jnp.repeat(jnp.tile(x, (1, 1, 1, 3)), 2, 1), 2, 2)
    same = jax.eval_shape(functools.partial(classifier_features, "digits_mixer"), large)
    assert same.shape == found.shape
    control = classifier_features("random", x)
    assert np.abs(control - found).max() > 0.1
    np.testing.assert_array_equal(control, classifier_features("random", x))


def test_tokens_are_row_by_row():
    rows = jnp.repeat(jnp.arange(4.0)[:, None], 4, 1).reshape(1, 16, 1)
    as_map = alignment.as_map(rows)
    np.testing.assert_array_equal(as_map[0, :, 2, 0], np.arange(4))
    np.testing.assert_array_equal(alignment.as_tokens(as_map, 16), rows)
    halves = alignment.as_tokens(as_map, 4).reshape(2, 2)
    assert halves[0, 0] == halves[0, 1] < halves[1, 0]
    np.testing.assert_allclose(halves.sum(0), 3, rtol=1e-6)


def test_the_teacher_self_is_the_average_on_the_clean_image():
    c = recipe("self", OF_SELF, align={"teacher_block": 2})
    task, params = make_task(c), weights(c)
    average = jax.tree.map(lambda x: x * 1.1, params)
    batch = drawn(task)

    def loss(params, average):
        return task.loss(params, {AVERAGE: average}, batch)

    gradient, metrics = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, average)
    x0, y, zero = batch["x0"], batch["y"], jnp.zeros(8, jnp.int32)
    noised = process_of(c.diffusion).noised(x0, zero, batch["eps"])
    teacher = tokens_after(c, average, 2, noised, zero, y)
    x_t = process_of(c.diffusion).noised(x0, batch["t"], batch["eps"])
    apply = functools.partial(denoiser_module(c).apply, mutable=["intermediates"])
    _, sown = jax.jit(apply)(params, x_t, batch["t"], Conditions(label=y))
    aligned = sown["intermediates"]["aligned"][0]
    expected = alignment.mean_cosine(aligned, teacher)
    np.testing.assert_allclose(metrics["alignment"], expected, rtol=1e-3, atol=1e-5)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradient[1]))
    assert float(jnp.abs(gradient[0]["params"]["projector"]["in"]["kernel"]).max()) > 0


def test_a_step_hands_the_average_to_the_loss():
    assert make_task(recipe("self", OF_SELF)).averages
    assert not make_task(recipe()).averages

    def loss(params, frozen, batch):
        return params * batch["x"].mean(), {"average": frozen[AVERAGE]}

    tx = optax.sgd(1.0)
    state = init_state(jnp.float32(4), tx)
    step = make_step(lambda batch, key: batch, loss, tx, 0.5, jax.random.key(0), averages=True)
    for expected in (4, 3.5, 2.75):  # the average before the update
        state, metrics = step(state, {}, {"x": jnp.ones(2)})
        assert metrics["average"] == expected


# ---- off without a trace


def test_the_projector_leaves_the_rest_as_it_was():
    """The same initial weights and outputs; what does not train needs no projector at all."""
    c, plain = recipe("digits_mixer", PROJECTOR), recipe()
    ours, theirs = (jax.jit(make_task(each).init)(jax.random.key(3)) for each in (c, plain))
    rest = {k: v for k, v in ours["params"].items() if k != "projector"}
    jax.tree.map(np.testing.assert_array_equal, rest, theirs["params"])
    params = {"params": {k: v for k, v in weights(c)["params"].items() if k != "projector"}}
    args = (normal(2, 8, 8, 1), jnp.asarray([3, 700]), Conditions(label=jnp.asarray([1, 2])))

    def program(c):
        return str(jax.make_jaxpr(denoiser_module(c).apply)(params, *args))

    assert program(c) == program(plain)


def test_its_parameters_and_its_cost():
    c = recipe("digits_mixer", PROJECTOR)
    shapes = jax.eval_shape(make_task(c).init, jax.random.key(0))
    found, plain = cost_of(c), cost_of(recipe())
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found.macs == plain.macs
    assert found.training_macs == 3 * 16 * (32 * 24 + 24 * 24 + 24 * 48)
    assert plain.training_macs == 0


def test_its_kinds_and_the_scale_of_its_first_layer():
    """In μP it is an output layer: 1/r of the base's deviation, and 1/r of its rate."""
    bound = {}
    for width in (32, 128):
        projector = dit.Projector(width=24, features=48, base_width=32)
        params = projector.init(jax.random.key(0), jnp.zeros((1, 1, width)))["params"]
        bound[width] = float(jnp.abs(params["in"]["kernel"]).max())
    assert bound[32] == pytest.approx((6 / (32 + 24)) ** 0.5, rel=0.02)
    assert bound[128] == pytest.approx(bound[32] / 4, rel=0.02)
    kinds = {
        name: mup.kind_of(f"projector/{name}/kernel", dit.KINDS) for name in ("in", "middle", "out")
    }
    assert kinds == {"in": "output", "middle": "input", "out": "input"}


# ---- on meshes


def test_gradients_on_a_mesh_are_those_of_one_device():
    c = recipe("self", OF_SELF)
    params, batch = weights(c), drawn(make_task(c))

    def gradients(mesh):
        task = make_task(c, mesh)
        placed = jax.device_put(params, rules.state_shardings(params, mesh, dit.RULES))

        def loss(params, batch):
            return task.loss(params, {AVERAGE: placed}, batch)[0]

        return jax.jit(jax.value_and_grad(loss), in_shardings=(None, rules.batch_sharding(mesh)))(
            placed, batch
        )

    value, expected = gradients(make_mesh(1, 1, jax.devices()[:1]))
    found, grads = gradients(make_mesh(devices=jax.devices(), data=1, fsdp=2, tensor=2, context=2))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5 * max(1e-3, float(jnp.abs(b).max())) + 1e-7)


# ---- features from a file


def test_features_of_a_file_are_those_of_its_records(own_data, tmp_path, capsys):
    """Written in the records' order, the mixer's features are as if it were the teacher."""
    path = tmp_path / "mixer.npz"
    c = recipe(f"file:{path}", PROJECTOR, data={"flip": False})
    opening.check_data(c)
    images = np.concatenate([b["image"] for b in stream.in_order(opening.data_spec(c), 512)])
    features = np.asarray(classifier_features("digits_mixer", jnp.asarray(images)))
    np.savez(path, features=features.reshape(len(images), 16, 48), labels=np.zeros(3))
    task = make_task(c)
    rows = task.open_rows()
    taken = "mixer.npz: features of 1,438 records taken; arrays left out: labels"
    assert taken in capsys.readouterr().err
    with stream.train_batches(opening.data_spec(c), 0, 8) as batches:
        batch = rows.add(next(batches))
    assert len(set(batch.pop("index"))) == 8
    batch = jax.tree.map(jnp.asarray, batch)
    key = jax.random.key(0)
    found = task.prepare({}, batch, key)["features"]
    mixer = make_task(recipe("digits_mixer", PROJECTOR)).prepare({}, batch, key)["features"]
    np.testing.assert_allclose(found, mixer, atol=1e-5)
    # A run resumes on these features alone.
    contents.record_contents(tmp_path, rows.contents)
    np.savez(path, features=features.reshape(len(images), 16, 48) + 1)
    with pytest.raises(UserError, match=r"config\.align\.teacher held"):
        contents.check_contents(tmp_path, task.open_rows().contents)
    for wrong, words in (
        (features.reshape(-1, 16, 48)[1:], r"expected floating-point numbers \[1438, T, Z\]"),
        (features.reshape(-1, 16, 48)[:, :15], "T a square number"),
        (features.reshape(-1, 16, 48)[..., :40], "has features of width 40: set it to that"),
        (
            features.reshape(-1, 16, 48) * np.nan,
            "'features' of 1438 of 1438 records are not finite",
        ),
    ):
        np.savez(path, features=wrong)
        with pytest.raises(UserError, match=words):
            task.open_rows()
    del batch["features"]
    with pytest.raises(UserError, match="a batch that was not read from it has none"):
        task.prepare({}, batch, key)


# ---- refusals


CONVNET = {**PROJECTOR, "align_features": 40}


@pytest.mark.parametrize(
    ("teacher", "model", "sections", "words"),
    [
        ("digits_convnet", CONVNET, {}, "with the teacher, and its gain would be circular"),
        ("digits_convnet", CONVNET, {"evaluate": {"features": "scenes"}}, "circular"),
        ("digits_mixer", {}, {}, "no projector to align: set config.model.align_block"),
        ("digits_mixer", OF_SELF, {}, "is 32, and the teacher has features of width 48"),
        ("self", PROJECTOR, {}, "is 48, and the network itself has features of width 32"),
        ("self", OF_SELF, {"align": {"teacher_block": 3}}, "is 3, and the network has 2"),
        ("none", {"align_block": 3}, {}, "is 3, and the network has 2 blocks: expected 1"),
        ("file:x.npz", PROJECTOR, {"data": {"flip": True}}, "data.flip mirrors half of them"),
        ("dino", PROJECTOR, {}, "align.teacher is 'dino': expected one of 'none', 'digits_m"),
    ],
)
def test_what_does_not_go_together(teacher, model, sections, words):
    with pytest.raises(UserError, match=words):
        recipe(teacher, model, **sections)


def test_what_is_refused_when_training_begins(capsys):
    with pytest.raises(UserError, match="nothing would train the projector; set align_block to 0"):
        make_task(recipe("none", PROJECTOR)).open_rows()
    make_task(recipe("digits_mixer", PROJECTOR)).open_rows()
    assert "accuracy is judged by digits_mixer, the teacher" in capsys.readouterr().err
    no_score = {"evaluate": {"features": "none"}, "train": {"evaluate_every_steps": 0}}
    nothing = recipe("digits_convnet", CONVNET, **no_score)
    make_task(nothing).open_rows()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "by"),
    [
        ("align.weight", "config.align.teacher is 'none'"),
        ("align.teacher_block", "config.align.teacher is 'none'"),
        ("model.align_width", "config.model.align_block is 0"),
    ],
)
def test_a_key_without_effect(key, by):
    with pytest.raises(UserError, match=f"config.{key} has no effect: {by}"):
        check_used(recipe(), [key])


def test_a_loss_that_evaluates_twice_has_no_one_tap():
    one = jnp.ones(1)
    tap = alignment.Tapped(lambda *_, **__: (one, {"intermediates": {"aligned": (one,)}}), one)
    tap(one, one)
    assert tap.only("aligned") is one
    tap(one, one)
    with pytest.raises(UserError, match="evaluated it 2 times"):
        tap.only("aligned")
