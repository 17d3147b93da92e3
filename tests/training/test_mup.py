"""μP: the table of kinds, the standard network at the base width, and sizes that stay at others."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed, read
from ditjax.models import mup
from ditjax.models.attention import CrossAttention, SelfAttention, attend
from ditjax.models.blocks import BLOCKS
from ditjax.models.dit import KINDS
from ditjax.models.embed import Placement
from ditjax.models.network import Conditions
from ditjax.parallel.rules import path_of
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training.program import optimizer_of
from ditjax.training.step import init_state, make_step
from ditjax.weights import networks, reading, writing
from tests import coordinates
from tests.weight_files import assert_same

BLOCK_NAMES = tuple(BLOCKS)


def shapes(c):
    """Path -> shape of a parameter, of a block's without the axis of the layers."""
    tree = jax.eval_shape(make_task(c).init, jax.random.key(0))
    leaves = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {path: s[1:] if "/blocks/" in path else s for path, s in leaves.items()}


@pytest.mark.parametrize("block", BLOCK_NAMES)
def test_every_parameter_is_of_the_kind_of_its_shape(block):
    """Exactly one rule matches it, and says of its two sides whether they grow with the width."""
    narrow, wide = (shapes(coordinates.recipe(width, "mup", block)) for width in (32, 64))
    kinds = set()
    for path, small in narrow.items():
        matching = [k for p, k in KINDS if re.search(rf"(^|/)(?:{p})$", path)]
        assert matching == [mup.kind_of(path, KINDS)], path
        large = wide[path]
        grows_in, grows_out = large[0] > small[0], large[1:] != small[1:]
        expected = {(False, True): "input", (True, True): "hidden", (True, False): "output"}
        if path.rpartition("/")[2] in ("bias", "scale"):
            assert mup.kind_of(path, KINDS) == "vector", path
        else:
            assert mup.kind_of(path, KINDS) == expected[grows_in, grows_out], path
        kinds.add(mup.kind_of(path, KINDS))
    assert kinds == {"input", "hidden", "output", "vector"}


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="params/new/kernel: 0 rules"):
        mup.rate_multiplier("params/new/kernel", 2.0, KINDS)


def program(c):
    """The text of the program that makes a state and takes one step from it."""
    task = make_task(c)
    tx = optimizer_of(c, task.rates)

    def run(key: Any) -> Any:
        step = make_step(task.draw, task.loss, tx, 0.9, key)
        batch = {"x0": jnp.ones((4, 8, 8, 1)), "label": jnp.zeros(4, jnp.int32)}
        return step(init_state(task.init(key), tx), {}, batch)

    text = jax.jit(run).lower(jax.random.key(0)).as_text()
    return re.sub(r'jax.result_info = "[^"]*"', "", text)  # the outputs' places in their tree


@pytest.mark.parametrize("block", ["adaln_zero", "cross_attention"])
def test_at_the_base_width_it_is_the_standard_parametrization_to_the_bit(block):
    """Initial weights, function, gradient and update are one program."""
    base = coordinates.BASE_WIDTH
    standard = program(coordinates.recipe(base, "standard", block))
    assert program(coordinates.recipe(base, "mup", block)) == standard


@pytest.mark.parametrize("block", ["adaln", "cross_attention"])
def test_initial_sizes_by_kind(block):
    """Four times as wide: input as before, hidden half of it, and what was zero is zero."""
    drawn = []
    for c in (coordinates.recipe(width, "mup", block) for width in (64, 256)):
        params = jax.jit(make_task(c).init)(jax.random.key(1))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        drawn.append({path_of(path): float(np.std(leaf)) for path, leaf in leaves})
    narrow, wide = drawn
    for path, std in wide.items():
        if std == 0:
            assert narrow[path] == 0, path
        else:
            expected = {"input": 1.0, "hidden": 0.5}[mup.kind_of(path, KINDS)]
            assert std / narrow[path] == pytest.approx(expected, rel=0.15), path


def test_learning_rates_by_kind_and_a_decay_for_all():
    """r = 4: Adam's first update is lr · m of each weight; the decay is lr · λ · w, whatever m."""
    rate, decay = 1e-3, 0.1
    c = coordinates.recipe(128, "mup", rate=rate)
    c = changed(c, {"optim": {"weight_decay": decay}})
    task = make_task(c)
    tree = jax.eval_shape(task.init, jax.random.key(0))
    params, grads = (
        jax.tree.map(lambda s, v=v: np.full(s.shape, v, np.float32), tree) for v in (2.0, -3.0)
    )
    tx = optimizer_of(c, task.rates)
    updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)
    by_kind = {"input": 1.0, "vector": 1.0, "hidden": 0.25, "output": 0.25}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = rate * (by_kind[mup.kind_of(path_of(path), KINDS)] - decay * 2.0)
        np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=path_of(path))


def test_an_autoencoder_has_no_such_table():
    """All of its parameters have the rate of the recipe."""
    c = read({"task": "autoencoder"})
    tx = optimizer_of(c, make_task(c).rates)
    params = {"new": {"kernel": jnp.ones((2, 2))}}
    tx.update(params, tx.init(params), params)


def noise(shapes: Any, size: float, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (size * rng.normal(size=s.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_is_of_logits_over_the_width_of_a_head(kind):
    """q·k √d_base / d, and a kernel of the devices gets the queries so."""
    d_base, d, D = 4, 16, 32
    given: list[Any] = []

    def kernel(q: Any, k: Any, v: Any) -> Any:
        given.extend((q, k))
        return attend(q, k, v)

    scale = mup.query_scale(mup.Base(D, d_base), d)
    x, context = (np.float32(np.random.default_rng(n).normal(size=(2, n, D))) for n in (5, 3))
    module: Any = {
        "self": SelfAttention(D // d, place=Placement(attend=kernel), query_scale=scale),
        "cross": CrossAttention(D // d, query_scale=scale),
    }[kind]
    inputs = (x,) if kind == "self" else (x, context)
    params = noise(jax.eval_shape(module.init, jax.random.key(1), *inputs), 0.2)
    given.clear()
    y, kernels = jax.jit(lambda p: (module.apply(p, *inputs), tuple(given)))(params)
    w = params["params"]
    if kind == "self":
        qkv = np.einsum("bnD,Dchd->cbhnd", x, w["qkv"]["kernel"])
        q, k, v = qkv + w["qkv"]["bias"][:, None, :, None]
    else:
        q = np.einsum("bnD,Dhd->bhnd", x, w["q"]["kernel"]) + w["q"]["bias"][:, None]
        kv = np.einsum("bmD,Dchd->cbhmd", context, w["kv"]["kernel"])
        k, v = kv + w["kv"]["bias"][:, None, :, None]
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) * d_base**0.5 / d
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bhmd->bnhd", weights, v).reshape(x.shape)
    np.testing.assert_allclose(y, mixed @ w["out"]["kernel"] + w["out"]["bias"], atol=1e-4)
    for queries, keys in [kernels] if kernels else []:
        ours = np.einsum("bhnd,bhmd->bhnm", queries, keys) * d**-0.5
        np.testing.assert_allclose(ours, logits, atol=1e-4)


def of_noise(c):
    """A network with weights of noise: nothing is hidden by a zero."""
    shapes = jax.eval_shape(make_task(c).init, jax.random.key(0))
    return networks.LoadedNetwork(c, noise(shapes, 0.1), "ditjax", ())


def test_other_programs_get_a_network_that_computes_the_same(tmp_path):
    """They know no scale of queries: it is in their weights. Ours keeps it, and its weights."""
    network = of_noise(coordinates.recipe(64, "mup"))  # heads 32 wide, of 16: a scale of √½
    writing.write_ditjax(tmp_path / "ours.safetensors", network)
    ours = reading.load_network(tmp_path / "ours.safetensors")
    assert ours.config.model == network.config.model
    assert_same(ours.leaves, network.leaves)
    assert writing.folded(network).config.model.parametrization == "standard"
    writing.write_release(tmp_path / "release.pt", network)
    writing.write_diffusers(tmp_path / "diffusers", network)
    other = reading.load_network(tmp_path / "release.pt", heads=2)
    assert other.config.model.parametrization == "standard"
    assert_same(reading.load_network(tmp_path / "diffusers").leaves, other.leaves)

    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    labels = np.array([3, 7], np.int32)
    conditions = Conditions(label=jnp.asarray(labels))

    def function(c: Any) -> Any:
        model: Any = denoiser_module(c)
        return jax.jit(lambda params: model.apply(params, x, labels * 90, conditions))

    expected, theirs = function(network.config)(network.params), function(other.config)
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(theirs(other.params), expected, atol=1e-5 * size)
    assert np.abs(theirs(network.params) - expected).max() > 1e-2 * size


def test_what_needs_no_scale_is_not_touched():
    """The standard parametrization, and μP with heads of the base's width."""
    for c in (coordinates.recipe(64, "standard"), coordinates.recipe(32, "mup")):
        network = of_noise(c)
        assert writing.folded(network) is network


def test_the_coordinate_check():
    """After any step no module's output goes with the width; of the standard network most do."""

    def sizes(width: int, parametrization: str = "mup") -> Any:
        return coordinates.sizes(coordinates.recipe(width, parametrization))

    narrow = sizes(coordinates.BASE_WIDTH)  # the standard network, too
    found = coordinates.slopes({32: narrow, 128: sizes(128), 512: sizes(512)})
    logits = found.pop(coordinates.LOGITS)
    for name, row in found.items():
        assert np.isfinite(row[-1]), f"{name} is still zero"
        assert np.nanmax(np.abs(row)) < 0.12, f"{name}: {row}"
    # q and k of initial weights are of no one direction: over d their product goes as 1 / √d.
    assert logits.max() < 0.12
    assert logits[0] == pytest.approx(-0.5, abs=0.12)

    standard = coordinates.slopes({32: narrow, 128: sizes(128, "standard")})
    assert standard.pop(coordinates.LOGITS).max() > 0.3
    assert standard.keys() == found.keys()
    assert standard["dit"][1] > 0.8  # all of its weights step in one direction: rate · D
    assert sum(np.nanmax(row) > 0.25 for row in standard.values()) > len(standard) / 2
