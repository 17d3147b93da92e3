"""A control branch: off at first and at scale 0, linear in its scale, and trained alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.data import maps
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.embed import ANYWHERE
from ditjax.models.network import Conditions
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import control, cost_of, make_task
from ditjax.tasks.control import active_steps, control_weights
from ditjax.tasks.diffusion import apply_of, denoiser_module, inputs_of, network_of
from ditjax.tasks.objective import process_of, times_of
from ditjax.training.program import precise, training
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state
from tests.toys.functions import noisy_map

STEPS = 2
B = 8


def recipe(size="3x32x2", kind="control", **control):
    words = [f"--config=experiments/digits.py:{size}/4", "--config.model.unroll=1"]
    c = read(
        load_recipe([*words, f"--config.train.batch_size={B}", "--config.optim.warmup_steps=0"])
    )
    own = {"blocks": 2, "source": "ink", **control} if kind == "control" else {}
    return changed(c, {"adapt": {"base": "x", "kind": kind}, "control": own})


@functools.cache
def base():
    """No weight is zero."""
    return {"params": unflatten(seeded_state(shapes_of(recipe()), 1))}


def shapes(c):
    return control.branch_shapes(c, network_of(c), inputs_of(c))


def seeded_control(c, seed):
    """A control whose zero layers are not."""
    flat = {rules.path_of(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(shapes(c))}
    return unflatten(seeded_state(flat, seed))


@functools.cache
def batch():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 10, B).astype(np.int32), "index": None}


def inputs(channels=1):
    rng = np.random.default_rng(2)
    x = jnp.asarray(batch()["image"])
    image = jnp.asarray(rng.uniform(-1, 1, (B, 8, 8, channels)), jnp.float32)
    return x, jnp.arange(B) * 100, jnp.asarray(batch()["label"]), image


def outputs(c, own, weights):
    """The controlled prediction."""
    x, t, label, image = inputs()
    params = {"params": base()["params"], "control": own}
    return program(c)(params, x, t, Conditions(label=label, channels=image), weights)


@functools.cache
def program(c):
    return jax.jit(apply_of(c))


@functools.cache
def plain_output():
    """The base's prediction, as a network that adds zeros to its blocks.

    XLA may round a program without these sums otherwise.
    """
    x, t, label, _ = inputs()
    module = denoiser_module(recipe())
    hooked = module.clone(hook=lambda tokens, residual: tokens + residual)
    found = jax.jit(hooked.apply)(base(), x, t, Conditions(label=label), jnp.zeros((3, B, 4, 32)))
    plain = jax.jit(module.apply)(base(), x, t, Conditions(label=label))
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-6 * np.abs(plain).max())
    return found


def scaled(*scale, low=-np.inf, high=np.inf):
    return control.ControlWeights(np.array(scale, np.float32), np.float32(low), np.float32(high))


MEANFLOW = {
    "process": "flow",
    "prediction": "velocity",
    "variance": "none",
    "loss": "meanflow",
    "time_scale": 1.0,
}


@pytest.mark.parametrize("form", ["sd3", "pixart"])
def test_at_first_and_at_scale_zero_the_output_is_the_bases_to_the_bit(form):
    c = recipe(form=form)
    plain, own = plain_output(), seeded_control(c, 2)
    first = make_task(c).transform.init(base(), jax.random.key(0))["control"]
    np.testing.assert_array_equal(outputs(c, first, scaled(1.0)), plain)
    np.testing.assert_array_equal(outputs(c, own, scaled(0.0)), plain)
    assert np.abs(outputs(c, own, scaled(1.0)) - plain).max() > 0.01 * np.abs(plain).max()


class Spy:
    """A network that returns what is added to its blocks."""

    def clone(self, hook):
        assert float(hook(1.0, 2.0)) == 3.0
        return self

    def apply(self, params, x, t, conditions, per_block):
        return per_block


@functools.cache
def spying(recipes):
    c = recipes[0]
    apply = control.with_branches(c, network_of(c), inputs_of(c), Spy(), ANYWHERE, recipes)
    return jax.jit(apply)


EVERY = np.ones(B, np.float32)


def residuals(recipes, weights, rows=EVERY):
    """[L,B,N,D] of the branches of some recipes."""
    x, times, label, image = inputs(channels=len(recipes))
    params = {"params": base()["params"], "control": seeded_control(recipes[0], 2)}
    params["controls"] = [seeded_control(each, 3 + j) for j, each in enumerate(recipes[1:])]
    conditions = Conditions(label=label, channels=image)

    return np.asarray(spying(recipes)(params, x, times, conditions, weights, rows))


def test_residuals_are_linear_in_the_scales_and_added():
    """sd3: copy ⌊jN/L⌋ after block j; pixart: copy i after block i, and none after the others."""
    both = (recipe(), recipe(form="pixart"))
    sd3, pixart = (residuals(both, scaled(*scale)) for scale in ((1, 0), (0, 1)))
    np.testing.assert_array_equal(residuals(both, scaled(-2, 0)), -2 * sd3)
    found = residuals(both, scaled(0.5, 4))
    np.testing.assert_allclose(found, 0.5 * sd3 + 4 * pixart, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(sd3[0], sd3[1])
    assert (sd3[1] != sd3[2]).any()
    assert not pixart[2].any()
    assert pixart[0].any()
    assert (pixart[0] != pixart[1]).any()


def test_rows_and_times_without_control_have_residual_zero():
    rows = np.float32(np.arange(B) % 2)
    found = residuals((recipe(),), scaled(1.0, low=250, high=550), rows)
    on = np.abs(found).max((0, 2, 3)) > 0
    assert on.tolist() == [k in (3, 5) for k in range(B)]


def test_guess_mode_is_of_the_conditional_half_and_grows_with_depth():
    c = recipe()
    guess = changed(c, {"control": {"guess": True}})
    plain = residuals((c,), scaled(1.0))
    factors = np.array([0.1, 0.1, 1.0])[:, None, None, None]
    np.testing.assert_allclose(residuals((guess,), scaled(1.0)), factors * plain, rtol=1e-5)
    # Not in training, where each counts in full.
    np.testing.assert_allclose(residuals((guess,), None), plain, rtol=1e-5, atol=1e-6)
    assert control.conditional_rows(c, 2) == {}
    assert control.conditional_rows(guess, 2)["rows"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 1.0), (0.0, 0.3), (0.2, 1.0), (0.3, 0.31), (0.1, 0.7)]
)
def test_the_active_steps_are_those_of_diffusers(start, end):
    # diffusers 0.42.1, pipeline_controlnet.py.
    for n in (1, 3, 10, 25):
        theirs = [1.0 - float(i / n < start or (i + 1) / n > end) for i in range(n)]
        np.testing.assert_array_equal(active_steps(start, end, n), theirs)


@pytest.mark.parametrize(
    "diffusion",
    [
        {},
        {"process": "flow", "prediction": "velocity", "loss": "simple", "variance": "none"},
        {
            "process": "flow",
            "prediction": "velocity",
            "loss": "simple",
            "variance": "none",
            "time_from_noise": True,
        },
    ],
)
def test_the_times_of_a_control_are_those_of_its_steps(diffusion):
    sample = {"sampler": "ddim", "steps": "ddim10" if not diffusion else "10"}
    for start, end in ((0.0, 1.0), (0.0, 0.3), (0.2, 1.0), (0.31, 0.8), (0.3, 0.35)):
        c = changed(recipe(start=start, end=end), {"diffusion": diffusion, "sample": sample})
        weights = control_weights(c)
        t = process_of(c.diffusion).c_noise(times_of(c)[:-1])
        assert len(t) == 10
        found = (weights.low < t) & (t < weights.high)
        np.testing.assert_array_equal(found, active_steps(start, end, 10))


def trained(c, mesh, steps=STEPS):
    """What is trained before and after some steps, and the gradient of the first."""
    task = make_task(c, mesh)
    p = training(c, task, mesh)
    frozen = {"base": jax.device_put(base(), rules.state_shardings(base(), mesh, task.rules))}
    state, after = p.init(base()), []
    before = jax.device_get(state.params)
    for k in range(steps):
        with precise(c), p.compiling(k == 0):
            state, _ = p.step(state, frozen, p.prepare(frozen, p.put(batch()), state.step))
        after.append(jax.device_get(state.params))
    return before, after


@functools.cache
def one_device():
    return trained(recipe(), make_mesh(1, 1, jax.devices()[:1]))


def test_the_first_step_moves_the_zero_layers_and_nothing_else():
    """∂loss/∂Z is not zero and ∂loss/∂copy is, exactly; then everything moves."""
    before, (first, second) = one_device()
    assert before.keys() == {"control"}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(first):
        path = rules.path_of(keys)
        was = functools.reduce(lambda node, name: node[name], path.split("/"), before)
        now = functools.reduce(lambda node, name: node[name], path.split("/"), second)
        if "copies/out" in path:
            assert not was.any(), path
            assert (leaf != was).any(), path
        else:
            np.testing.assert_array_equal(leaf, was, err_msg=path)
            assert (now != leaf).any(), path
    copies = before["control"]["copies"]["block"]
    jax.tree.map(
        lambda copy, block: np.testing.assert_array_equal(copy, block[:2]),
        copies,
        base()["params"]["blocks"],
    )
    assert not before["control"]["in"]["kernel"].any()


def test_eight_devices_equal_one():
    _, expected = one_device()
    _, found = trained(recipe(), make_mesh(data=2, fsdp=2, tensor=2))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-3)
    jax.tree.map(close, found[-1], expected[-1])


def test_the_draw_without_control_is_as_before_and_labels_are_dropped_by_its_own_rate():
    key = jax.random.key(3)
    example = {"x0": jnp.asarray(batch()["image"]), "label": jnp.asarray(batch()["label"])}
    plain = make_task(recipe(kind="full")).draw(example, key)
    source = "tests.toys.functions.noisy_map"
    found = make_task(recipe(drop=1.0, source=source)).draw(example, key)
    for name in ("t", "eps", "x0"):
        np.testing.assert_array_equal(found[name], plain[name])
    noise = jax.random.normal(jax.random.split(key, 3)[1], (B, 8, 8, 1))
    np.testing.assert_array_equal(found["eps"], noise)
    assert (np.asarray(found["y"]) == 10).all()
    own = jax.random.split(jax.random.fold_in(key, 3), B)
    np.testing.assert_array_equal(
        found["conditions"]["channels"], jax.vmap(noisy_map)(example["x0"], own)
    )


def otsu(grey):
    """The threshold of every byte, by the definition."""
    best, chosen = 0.0, 0
    for k in range(255):
        low, high = grey[grey <= k], grey[grey > k]
        if len(low) and len(high):
            between = len(low) * len(high) / grey.size**2 * (low.mean() - high.mean()) ** 2
            if between > best + 1e-9:
                best, chosen = between, k
    return chosen


def test_maps_are_their_definitions_and_mirror_with_the_image():
    rng = np.random.default_rng(5)
    grey = np.where(
        rng.random((8, 8)) < 0.4, rng.integers(150, 250, (8, 8)), rng.integers(0, 90, (8, 8))
    )
    x = (grey / 127.5 - 1).astype(np.float32)[..., None]
    key = jax.random.key(0)
    made = {name: jax.jit(each) for name, each in maps.CONTROL_MAPS.items()}
    ink = np.asarray(made["ink"](x, key))[..., 0]
    np.testing.assert_array_equal(ink, np.where(grey > otsu(grey), 1, -1))
    length = np.hypot(
        *(ndimage.sobel(x[..., 0].astype(np.float64), axis, mode="nearest") for axis in (0, 1))
    )
    edges = np.asarray(made["edges"](x, key))[..., 0]
    np.testing.assert_allclose(edges, 2 * length / length.max() - 1, atol=1e-5)
    low = np.asarray(made["low"](x, key))[..., 0]
    np.testing.assert_allclose(low[:4, 4:], x[:4, 4:, 0].mean(), atol=1e-6)
    for each in made.values():
        mirrored = np.asarray(each(x, key))[:, ::-1]
        np.testing.assert_allclose(each(x[:, ::-1], key), mirrored, rtol=0, atol=1e-6)
    assert (np.asarray(made["edges"](np.zeros((8, 8, 1), np.float32), key)) == -1).all()


def test_cost_is_the_networks_and_the_branchs_in_closed_form():
    plain = cost_of(recipe(kind="full"))
    for form in ("sd3", "pixart"):
        c = recipe(form=form)
        found = cost_of(c)
        count = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(shapes(c)))
        assert found.parameters - plain.parameters == count
    # 12 N D² + 2 N² D + 6 D² + 2 N D of two blocks, N D² of their zero layers, 16 N D of the map.
    N, D = 4, 32
    block = 12 * N * D * D + 2 * N * N * D + 6 * D * D + 2 * N * D
    assert cost_of(recipe()).macs - plain.macs == 2 * (block + N * D * D) + 16 * N * D


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"control": {"blocks": 0}},
            "config.control.blocks is 0, and the network has 3 blocks: expected 1 to 3",
        ),
        (
            {"control": {"blocks": 4}},
            "config.control.blocks is 4, and the network has 3 blocks: expected 1 to 3",
        ),
        ({"control": {"blocks": 3, "form": "pixart"}}, "expected 1 to 2, as the first one"),
        ({"model": {"block": "in_context"}}, "config.model.block is 'in_context'"),
        ({"diffusion": MEANFLOW}, "trains a network of two times, which a control branch"),
        ({"model": {"parametrization": "mup"}}, "rates are not known for a control branch"),
        (
            {"align": {"teacher": "random"}, "model": {"align_block": 1}},
            "config.adapt.kind 'control'",
        ),
        (
            {"control": {"scale": float("nan")}},
            "config.control.scale is nan: expected a finite number",
        ),
        ({"control": {"scale": (1.0, 2.0)}}, "config.control.scale has 2 numbers for 1 control"),
        ({"control": {"start": 0.5, "end": 0.5}}, "config.control.start is 0.5 and end 0.5"),
        (
            {"control": {"source": "ditjax.data.crop.normalize"}},
            "which fails for an image of 8x8x1",
        ),
        ({"control": {"source": "math.hypot"}}, "which fails for an image of 8x8x1"),
        ({"control": {"source": "depth"}}, "expected one of 'edges', 'ink', 'low'"),
        (
            {"model": {"label_dropout": 0.0}, "evaluate": {"guided_scale": 0.0}},
            "config.control.drop is 0.5",
        ),
        ({"evaluate": {"labels": "balanced"}}, "config.evaluate.labels is 'balanced'"),
        ({"adapt": {"kind": "full"}}, "has no effect: config.adapt.kind is 'full'"),
        ({"adapt": {"base": ""}}, "config.adapt.base is ''"),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, expected):
    with pytest.raises(UserError) as error:
        changed(recipe(), changes)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_latents_are_controlled_by_pixels():
    """XL/2 on latents of 256x256 pixels reads edges in patches of 16x16 pixels."""
    latent = {"model": {"size": "XL", "patch": 2}, "data": {"image_size": 256, "channels": 3}}
    latent |= {"autoencoder": {"kind": "kl", "path": "x"}, "evaluate": {"features": "none"}}
    latent |= {"control": {"blocks": 14, "source": "edges"}, "train": {"evaluate_every_steps": 0}}
    latent |= {"sample": {"clip_x0": False}}
    c = changed(recipe(), latent)
    assert shapes(c)["in"]["kernel"].shape == (256, 1152)
    task = make_task(c)
    assert task.inputs["image"].shape == (256, 256, 3)
    drawn = jax.eval_shape(
        task.draw,
        {k: jax.ShapeDtypeStruct((2, *v.shape), v.dtype) for k, v in task.inputs.items()},
        jax.random.key(0),
    )
    assert drawn["conditions"]["channels"].shape == (2, 256, 256, 1)
    assert "image" not in drawn
    for changes, expected in (
        ({"control": {"form": "pixart"}}, "set it to 'sd3'"),
        ({"data": {"name": "latents:/nowhere"}}, "holds latents alone"),
    ):
        with pytest.raises(UserError, match=expected):
            changed(c, changes)
