"""Layers of a language model in a denoiser: what is trained, and what is read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.frozen import LanguageBlock
from ditjax.models.network import Conditions
from ditjax.parallel.mesh import mesh_of
from ditjax.tasks import cost_of, language, make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.weights.networks import shapes_of
from tests import language_files as files
from tests.seeded import seeded_state


@functools.cache
def plain():
    return read(load_recipe(["--config=experiments/digits.py:1x16x2/4"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return str(files.write_folder(tmp_path_factory.mktemp("lm") / "llama", "llama"))


@pytest.fixture(scope="module")
def recipe(place):
    def made(mode, **others):
        return changed(plain(), {"lm": {"mode": mode, "path": place, "layers": (1, 3), **others}})

    return made


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_closed_form_counts_what_is_trained_and_held(recipe):
    without, mapper = (cost_of(c).description.keys() for c in (plain(), recipe("mapper")))
    assert without == mapper - {"lm", "lm_frozen"}
    for mode in ("mapper", "frozen", "unfrozen"):
        task = make_task(recipe(mode))
        params = jax.eval_shape(task.init, jax.random.key(0))
        cost = cost_of(recipe(mode))
        assert sizes(params) == cost.parameters, mode
        assert sizes(task.shapes()) == cost.description["lm_frozen"], mode


def test_arms_differ_in_what_the_layers_hold(recipe):
    mesh = mesh_of(plain())
    held = {}
    for mode in ("frozen", "random", "permuted", "released"):
        held[mode] = language.load_language(recipe(mode), mesh)["lm"]
    assert language.load_language(recipe("unfrozen"), mesh) == {}
    kernels = {k: np.asarray(v["blocks"]["mlp"]["out"]["kernel"]) for k, v in held.items()}
    frozen = kernels["frozen"]
    for layer in range(2):
        rows = {tuple(row) for row in frozen[layer].tolist()}
        assert {tuple(row) for row in kernels["permuted"][layer].tolist()} == rows
        assert kernels["random"][layer].std() == pytest.approx(frozen[layer].std(), rel=0.05)
    for mode in ("random", "permuted"):
        assert (kernels[mode] != frozen).any()
    np.testing.assert_array_equal(kernels["released"], frozen)
    assert (np.asarray(held["released"]["norm_final"]["scale"]) == 1).all()
    other = changed(recipe("random"), {"seed": 1})
    again = language.load_language(other, mesh)["lm"]["blocks"]["mlp"]["out"]["kernel"]
    assert (np.asarray(again) != kernels["random"]).any()


def test_unfrozen_layers_begin_as_the_file_has_them(recipe):
    c = recipe("unfrozen")
    begun = language.with_initial(c, lambda key: {"params": {"lm": {"in": key}}})(jnp.zeros(1))
    assert begun["params"]["lm"]["in"] == 0
    wanted = language._layers(c).params
    jax.tree.map(np.testing.assert_array_equal, begun["params"]["lm"]["layers"], wanted)


def test_gradients_pass_frozen_layers_and_do_not_reach_them(recipe):
    """They are an argument of the program: other layers are another loss, without a compilation."""
    c = recipe("frozen")
    task = make_task(c)
    assert task.reads == ("lm",)
    params = {"params": unflatten(seeded_state(shapes_of(c), 1))}
    frozen = language.load_language(c, mesh_of(plain()))
    rng = np.random.default_rng(0)
    batch = {
        "x0": rng.standard_normal((2, 8, 8, 1)).astype(np.float32),
        "eps": rng.standard_normal((2, 8, 8, 1)).astype(np.float32),
        "t": np.array([10, 600]),
        "y": np.array([1, 2]),
    }
    run: Any = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradient = run(params, frozen, batch)
    assert gradient["params"]["lm"].keys() == {"in", "out"}
    for each in gradient["params"]["lm"].values():
        assert np.abs(each["kernel"]).max() > 0
    (other, _), _ = run(params, jax.tree.map(lambda x: 1.5 * x, frozen), batch)
    assert run._cache_size() == 1
    assert other != loss


def test_the_block_adds_or_replaces(recipe):
    kept, replaced = (
        language.language_of(recipe("mapper", residual=each)) for each in (True, False)
    )
    h = jnp.asarray(files.tokens().reshape(2, 5, 1, 24)[..., :8])
    shapes = {"in/kernel": (8, 24), "out/kernel": (24, 8)}
    variables = {"params": unflatten(seeded_state(shapes, 3))}
    assert kept
    assert replaced
    out: Any = [LanguageBlock(x, jnp.float32).apply(variables, h) for x in (kept, replaced)]
    np.testing.assert_allclose(out[0], h + out[1], atol=1e-6)
    by_hand = h @ variables["params"]["in"]["kernel"] @ variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(out[1], by_hand, rtol=1e-4, atol=1e-5)
    released = language.language_of(recipe("released"))
    assert released
    assert not released.residual


def test_the_released_arm_does_not_read_the_time(recipe):
    for mode, reads in (("frozen", True), ("released", False)):
        c = recipe(mode)
        params = {"params": unflatten(seeded_state(shapes_of(c), 1))}
        variables = language.with_layers(language.language_shapes(c), params)
        label = Conditions(label=jnp.zeros(2, jnp.int32))
        apply = functools.partial(denoiser_module(c).apply, conditions=label)
        closed = jax.make_jaxpr(apply)(variables, jnp.zeros((2, 8, 8, 1)), jnp.zeros(2))
        t = closed.jaxpr.invars[-1]
        assert any(t in eqn.invars for eqn in closed.jaxpr.eqns) == reads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm": {"mode": "frozen"}}, r"config.lm.path '': expected a folder"),
        ({"lm": {"path": "x"}}, r"config.lm.path has no effect"),
        ({"lm": {"mode": "frozen", "path": "x", "layers": (3, 1)}}, r"lm.layers is \(3, 1\)"),
        (
            {"lm": {"mode": "frozen", "path": "x"}, "adapt": {"kind": "lora", "base": "x"}},
            r"config.adapt.kind 'lora': leave one",
        ),
        (
            {"lm": {"mode": "frozen", "path": "x"}, "model": {"parametrization": "mup"}},
            r"config.model.parametrization 'mup': leave one",
        ),
    ],
)
def test_bad_recipes_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        changed(plain(), changes)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_named_when_the_task_is_made():
    c = changed(plain(), {"lm": {"mode": "frozen", "path": "nowhere"}})
    with pytest.raises(UserError, match=r"config.lm.path: nowhere does not exist"):
        make_task(c)
