"""MeanFlow in a task: its network of two times, its loss, its sampler, its cost, its refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from ditjax.cli import load_recipe
from ditjax.config import changed, read, task_module
from ditjax.diffusion import samplers
from ditjax.diffusion.losses import LOSSES
from ditjax.errors import UserError
from ditjax.files.assets import flatten
from ditjax.machines.roofline import hardware_flops
from ditjax.models import dit, mup
from ditjax.models.attention import attend
from ditjax.models.network import Conditions, training_flops
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.studies.cells import steps_within
from ditjax.tasks import cost_of, make_task, sampling_gflops
from ditjax.tasks.diffusion import denoiser_module, to_uint8
from ditjax.tasks.objective import objective_of
from ditjax.weights import networks, writing
from ditjax.weights.arguments import sit_arguments

FLOW = {"process": "flow", "prediction": "velocity", "loss": "simple", "variance": "none"}
MEANFLOW = {**FLOW, "loss": "meanflow", "time_scale": 1.0}
IMPROVED = {**MEANFLOW, "loss": "meanflow_v", "target_kappa": 0.5}
SAMPLE = {"sampler": "meanflow", "steps": "1", "eta": 0.0, "clip_x0": False}


@functools.cache
def digits():
    small = ("--config=digits:2x32x2/2", "--config.model.unroll=1", "--config.train.batch_size=8")
    return read(load_recipe([*small, "--config.evaluate.guided_scale=0"]))


def recipe(diffusion=MEANFLOW, sample=SAMPLE, **sections):
    return changed(digits(), {"diffusion": diffusion, "sample": sample, **sections})


@functools.cache
def weights(c):
    """Noise on every leaf: at initialisation the blocks are the identity."""
    shapes = jax.eval_shape(make_task(c).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)


@functools.cache
def drawn(c):
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32)
    batch = {"image": images, "label": jnp.arange(8, dtype=jnp.int32)}
    task, key = make_task(c), jax.random.key(3)
    return task.draw(task.prepare({}, batch, key), key)


# ---- the network


def test_a_network_of_two_times_has_one_more_embedder():
    c, plain = recipe(), recipe(FLOW, {"sampler": "euler", "steps": "1", "eta": 0.0})
    paths, before = (flatten(weights(each)["params"]) for each in (c, plain))
    added = {f"h_embedder/{layer}/{leaf}" for layer in ("in", "out") for leaf in ("kernel", "bias")}
    assert paths.keys() - before.keys() == added
    assert cost_of(c).parameters == sum(leaf.size for leaf in paths.values())
    assert cost_of(plain).parameters == sum(leaf.size for leaf in before.values())
    kinds = {name: mup.kind_of(f"h_embedder/{name}/kernel", dit.KINDS) for name in ("in", "out")}
    assert kinds == {"in": "input", "out": "hidden"}


def test_its_forward_derivative_is_the_transpose_of_its_gradient():
    """w·(J v) = v·(Jᵀ w), where J v is taken forwards and Jᵀ w by attention's own gradient."""
    c, batch = recipe(), drawn(recipe())
    forwards = denoiser_module(c)
    backwards = forwards.clone(place=dataclasses.replace(forwards.place, attend=attend))
    point = (batch["x0"], batch["t"], batch["t"] - batch["r"])
    rng = np.random.default_rng(4)
    along, weight = (
        tuple(jnp.asarray(rng.standard_normal(each.shape), jnp.float32) for each in point)
        for _ in range(2)
    )

    def through(module):
        def denoise(x, t, h):
            return module.apply(weights(c), x, t, Conditions(label=batch["y"], interval=h))

        return denoise

    out, moved = jax.jit(lambda *p: jax.jvp(through(forwards), p, along))(*point)

    @jax.jit
    def pulled(*point):
        found, pull = jax.vjp(through(backwards), *point)
        return found, pull(weight[0])

    same, gradient = pulled(*point)
    np.testing.assert_allclose(out, same, atol=1e-5)
    found, expected = (
        (moved * weight[0]).sum(),
        sum((a * g).sum() for a, g in zip(along, gradient, strict=True)),
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    one = (jnp.ones((1, 1, 2, 2)),) * 3
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(attend, one, one)


# ---- the loss


def test_the_task_gives_the_loss_its_interval_and_its_null_label():
    c = recipe(IMPROVED, model={"label_dropout": 0.4})
    batch = drawn(c)
    null = batch["y"] == 10
    assert 0 < int(null.sum()) < 8
    assert float((batch["t"] - batch["r"]).max()) > 0
    params, module = weights(c), denoiser_module(c)

    def denoise(x, t, h=None, label=batch["y"]):
        return module.apply(params, x, t, Conditions(label=label, interval=h))

    @jax.jit
    def expected(batch):
        return LOSSES["meanflow_v"].evaluate(
            objective_of(c),
            denoise,
            *(batch[name] for name in ("x0", "t", "eps")),
            r=batch["r"],
            unconditional=functools.partial(denoise, label=jnp.full(8, 10)),
            dropped=null,
            target_kappa=0.5,
        )

    found, metrics = jax.jit(lambda p, b: make_task(c).loss(p, {}, b))(params, batch)
    parts = expected(batch)
    assert found == metrics["loss"]
    for name in ("loss", "mse"):
        np.testing.assert_allclose(metrics[name], parts[name].mean(), rtol=1e-5)


def test_its_gradient_on_a_mesh_is_that_of_one_device():
    c = recipe()
    params, batch = weights(c), drawn(c)
    mesh = make_mesh(devices=jax.devices(), data=1, fsdp=2, tensor=2, context=2)
    split = rules.state_shardings(params, mesh, dit.RULES)["params"]
    assert split["h_embedder"] == split["t_embedder"]

    def gradients(mesh):
        task = make_task(c, mesh)
        placed = jax.device_put(params, rules.state_shardings(params, mesh, dit.RULES))
        loss = jax.value_and_grad(lambda p, b: task.loss(p, {}, b)[0])
        return jax.jit(loss, in_shardings=(None, rules.batch_sharding(mesh)))(placed, batch)

    value, expected = gradients(make_mesh(1, 1, jax.devices()[:1]))
    found, grads = gradients(mesh)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for path, leaf in flatten(expected["params"]).items():
        error = 1e-4 * max(1e-3, np.abs(leaf).max())
        np.testing.assert_allclose(flatten(grads["params"])[path], leaf, atol=error, err_msg=path)


# ---- sampling


@pytest.fixture(scope="module")
def steps():
    """Keys, labels, noise, and the network there as a function of h."""
    keys, label = jax.random.split(jax.random.key(5), 4), jnp.arange(4)
    x_1, c = samplers.initial_noise(keys, (8, 8, 1)), recipe(IMPROVED)
    apply = jax.jit(denoiser_module(c).apply)

    def moved(h):
        given = Conditions(label=label, interval=jnp.full(4, h))
        out = apply(weights(c), x_1, jnp.ones(4), given)
        return np.asarray(to_uint8(x_1 - out), int)

    return keys, label, moved


@pytest.mark.parametrize(("sampler", "h"), [("meanflow", 1.0), ("euler", 0.0)])
def test_one_step_is_the_network_once(steps, sampler, h):
    """By its average velocity over the step, or by another sampler, which reads the velocity."""
    keys, label, moved = steps
    c = recipe(IMPROVED, {**SAMPLE, "sampler": sampler})
    sampling = make_task(c).sampling
    assert sampling
    draw = jax.jit(
        lambda keys, label: sampling.draw(
            weights(c), {}, keys, Conditions(label=label), sampling.guidance
        )
    )
    images = draw(keys, label)
    assert np.abs(np.asarray(images, int) - moved(h)).max() <= 1
    assert np.abs(np.asarray(images, int) - moved(1 - h)).max() > 10
    order = jnp.array([2, 0, 3, 1])
    assert jnp.array_equal(draw(keys[order], label[order]), images[order])
    assert sampling_gflops(c) == cost_of(c).gflops


# ---- cost


def products(jaxpr):
    """Multiply-accumulates of the products in a jaxpr, those inside loops as often as they run."""
    total = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "dot_general":
            (contracted, _), _ = each.params["dimension_numbers"]
            shape = each.invars[0].aval.shape
            total += each.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted]))
        times = each.params["length"] if each.primitive.name == "scan" else 1
        total += times * sum(map(products, jaxprs_in_params(each.params)))
    return total


@pytest.mark.parametrize(
    ("diffusion", "passes"),
    [
        (FLOW, 3),
        (MEANFLOW, 4),
        ({**MEANFLOW, "loss": "meanflow_v"}, 5),
        ({**MEANFLOW, "target_kappa": 0.5}, 6),
    ],
)
def test_a_step_costs_the_passes_that_are_counted(diffusion, passes):
    """To the last product: nothing is transposed twice, and what has no weight is not evaluated."""
    c = recipe(diffusion, {**SAMPLE, "sampler": "euler"})
    task, params, batch, cost = make_task(c), weights(c), drawn(c), cost_of(c)
    step = jax.make_jaxpr(jax.value_and_grad(lambda p: task.loss(p, {}, batch)[0]))(params).jaxpr
    used, _ = partial_eval.dce_jaxpr(step, [True] * len(step.outvars))
    given = (batch["x0"], batch["t"], Conditions(label=batch["y"]))
    forward = products(jax.make_jaxpr(denoiser_module(c).apply)(params, *given).jaxpr)
    # The inputs of the embedders have no gradient.
    embedders = [each["in"]["kernel"] for name, each in params["params"].items() if "h_em" in name]
    embedders.append(params["params"]["t_embedder"]["in"]["kernel"])
    idle = 16 * params["params"]["x_embedder"]["kernel"].size + sum(e.size for e in embedders)
    attention = (cost.passes - passes) * cost.macs
    assert attention == pytest.approx(0 if passes == 3 else 2 * 2 * 16**2 * 32)
    assert products(used) == pytest.approx(passes * forward + 8 * (attention - idle), rel=1e-9)
    assert hardware_flops(cost, 8) == training_flops(cost.macs, 8, cost.passes)


def test_a_budget_of_gflops_counts_them():
    budget = ("gflops", 10.0)
    plain, ours = recipe(FLOW, {**SAMPLE, "sampler": "euler"}), recipe()
    steps = [steps_within(budget, c) for c in (plain, ours)]
    macs = [cost_of(c).macs for c in (plain, ours)]
    ratio = cost_of(ours).passes * macs[1] / (3 * macs[0])
    assert steps[0] / steps[1] == pytest.approx(ratio, rel=2 / steps[1])


# ---- refusals


@pytest.mark.parametrize(
    ("diffusion", "sections", "words"),
    [
        ({**MEANFLOW, "process": "gvp"}, {}, "with process 'gvp': expected process 'flow'"),
        ({**MEANFLOW, "prediction": "x0"}, {}, "prediction 'x0': expected prediction 'velocity'"),
        (
            {"loss": "meanflow"},
            {"sample": {**SAMPLE, "sampler": "ddim"}},
            "process 'ddpm', prediction 'eps', variance 'learned_range', time_scale 1000.0:"
            " expected process 'flow', prediction 'velocity', variance 'none', time_scale 1.0",
        ),
        ({**MEANFLOW, "time_from_noise": True}, {}, "time_from_noise True: expected"),
        ({**MEANFLOW, "weighting": "sigmoid"}, {}, "weighting 'sigmoid': expected"),
        ({**MEANFLOW, "t_eps": 0.05}, {}, "t_eps 0.05: expected t_eps 0.0"),
        (
            {**FLOW, "interval_share": 0.5},
            {"sample": {**SAMPLE, "sampler": "euler"}},
            "interval_share has no effect: config.diffusion.loss is 'simple'",
        ),
        ({**MEANFLOW, "target_kappa": 1.0}, {}, "target_kappa is 1.0: expected from 0 to below 1"),
        (
            {**MEANFLOW, "target_omega": 2.0},
            {"model": {"label_dropout": 0.0}},
            "needs the null label, and config.model.label_dropout is 0",
        ),
        (MEANFLOW, {"model": {"block": "cross_attention"}}, "which this block lacks"),
        (MEANFLOW, {"model": {"attention": "cudnn"}}, "set it to 'auto' or 'plain'"),
        (
            MEANFLOW,
            {
                "model": {"align_block": 1, "align_features": 48},
                "align": {"teacher": "digits_mixer"},
            },
            "teacher is 'digits_mixer' and config.diffusion.loss 'meanflow', whose forward",
        ),
        (FLOW, {}, "diffusion.loss is 'simple', which trains none: choose"),
        (MEANFLOW, {"sample": {**SAMPLE, "cfg_scale": 2.0}}, "config.sample.cfg_scale is 2.0: the"),
        (MEANFLOW, {"evaluate": {"guided_scale": 2.0}}, "evaluate.guided_scale is 2.0: these are"),
    ],
)
def test_what_does_not_go_together(diffusion, sections, words):
    with pytest.raises(UserError, match=words) as error:
        recipe(diffusion, **{"sample": SAMPLE, **sections})
    assert "\n" not in str(error.value)


def test_a_network_of_one_time_is_refused():
    flags = [f"--config.diffusion.{key}={value}" for key, value in MEANFLOW.items()]
    tree = load_recipe(["--config=tests/toys/recipe.py", *flags])
    with pytest.raises(UserError, match="which needs a network of two times, and"):
        read(tree)


def test_other_programs_have_no_such_network():
    with pytest.raises(UserError, match="time_from_noise"):
        sit_arguments(recipe())


# ---- from the weights of a flow


@pytest.fixture(scope="module")
def flow_file(tmp_path_factory):
    c = recipe(FLOW, {**SAMPLE, "sampler": "euler"})
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    return writing.write_ditjax(path, networks.from_run(c, weights(c), (path,)))


def adapted(base, **keys):
    c = recipe(adapt={"base": str(base), **keys})
    return task_module(c.task).TASK.resolve(c, base.parent / "run")


def test_a_flow_is_a_base_but_for_the_interval(flow_file):
    with pytest.raises(UserError, match=r"h_embedder/in/kernel \(256, 32\) is not in the base"):
        adapted(flow_file)
    task = make_task(adapted(flow_file, skip="h_embedder"))
    assert task.start
    start = task.start(make_mesh(1, 1, jax.devices()[:1]))
    assert [path for path in start.record["fresh"] if "h_embedder" not in path] == []
    assert len(start.record["fresh"]) == 4


def test_an_interval_that_nothing_trains_is_refused(flow_file):
    keys = {"skip": "h_embedder", "kind": "lora"}
    with pytest.raises(UserError, match="neither the base's nor trained; name them in config"):
        adapted(flow_file, **keys)
    assert adapted(flow_file, **keys, train="h_embedder").adapt.sha256


def test_factors_of_a_meanflow_train(flow_file, tmp_path):
    """Forward derivatives go through LoRA's products, those of the interval's embedder, too."""
    base = recipe(IMPROVED)
    path = tmp_path / "base.safetensors"
    writing.write_ditjax(path, networks.from_run(base, weights(base), (path,)))
    lora = {"base": str(path), "kind": "lora", "rank": 2, "targets": "h_embedder/.*"}
    c = recipe(IMPROVED, adapt=lora)
    task = make_task(c)
    factors = task.transform.init(weights(base), jax.random.key(0))
    frozen, batch = {"base": weights(base)}, drawn(c)
    (value, _), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        factors, frozen, batch
    )
    assert np.isfinite(value)
    # B is zero at first, so that A has no gradient.
    found = flatten(gradient["lora"])
    assert set(found) == {f"h_embedder/{layer}/{f}" for layer in ("in", "out") for f in "ab"}
    assert {path: bool(np.any(leaf)) for path, leaf in found.items()} == {
        path: path.endswith("b") for path in found
    }
