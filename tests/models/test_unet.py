"""ADM's U-Net: published costs, diffusers' outputs, one device and eight, and clear errors."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models import unet
from ditjax.models.network import Conditions, Inputs
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task
from ditjax.weights import layouts
from ditjax.weights.networks import initial_shapes
from tests.seeded import seeded_state

TINY = {
    "kind": "unet",
    "width": 16,
    "multipliers": (1.0, 2.0),
    "res_blocks": 1,
    "attention_factors": (2,),
    "head_width": 8,
    "groups": 8,
}
SHALLOW = {"multipliers": (1.0,), "attention_factors": ()}  # it compiles quickly
GOLDEN = Path(__file__).parents[1] / "goldens" / "unet.npz"
INPUTS = Inputs(shape=(8, 8, 3), out_channels=6, num_classes=10)


def keys(**changes: Any) -> unet.UNetKeys:
    return unet.UNetKeys(**{**TINY, "label_dropout": 0.1, **changes})


def shapes(k: unet.UNetKeys, inputs: Inputs = INPUTS) -> dict[str, tuple[int, ...]]:
    label = Conditions(label=jnp.zeros(1, jnp.int32))
    x, t = jnp.zeros((1, *inputs.shape)), jnp.zeros(1, jnp.int32)
    network = unet.module(k, inputs)
    return initial_shapes(lambda key: network.init(key, x, t, label))


def recipe(**model: Any) -> Any:
    """Digits; the recipe's own model is a DiT."""
    d = load_recipe(["--config=digits"])
    d = {**d, "model": {**TINY, **model}, "sweep": {}}
    return changed(read(d), {"train": {"batch_size": 8}, "sample": {"batch_size": 8}})


def macs(side: int, channels: int = 3, **model: Any) -> float:
    k = unet.UNetKeys(**{"kind": "unet", "label_dropout": 0.0, **model})
    inputs = Inputs((side, side, channels), 6, 1000)
    return unet.cost(k, inputs).gflops


ADM_512 = (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
UPSAMPLER: dict[str, Any] = {"width": 192, "multipliers": (1.0, 1.0, 2.0, 2.0, 4.0, 4.0)}
BASE_64: dict[str, Any] = {"width": 192, "multipliers": (1.0, 2.0, 3.0, 4.0), "res_blocks": 3}


def test_published_gflops():
    """Dhariwal & Nichol 2021 Table 4, as the DiT paper's Tables 2 and 3 quote them."""
    adm, adm_512 = macs(256), macs(512, multipliers=ADM_512, attention_factors=(16, 32, 64))
    assert adm == pytest.approx(1120, abs=0.5)
    assert adm_512 == pytest.approx(1983, abs=0.5)
    base_64 = macs(64, **BASE_64, attention_factors=(2, 4, 8))
    upsampler = macs(256, 6, **UPSAMPLER)
    assert base_64 + upsampler == pytest.approx(742, abs=0.5)
    base_128 = macs(128, multipliers=(1.0, 1.0, 2.0, 3.0, 4.0), attention_factors=(4, 8, 16))
    up_512 = macs(
        512, 6, width=192, multipliers=(1.0, 1.0, 2.0, 2.0, 4.0, 4.0), attention_factors=(16, 32)
    )
    assert base_128 + up_512 == pytest.approx(2813, abs=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_dropout": 0.0, "res_blocks": 2, "attention_factors": (1, 2)},
        {"multipliers": (1.0, 0.5, 2.0), "attention_factors": ()},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_closed_form(changes):
    k = keys(**changes)
    leaves = shapes(k)
    assert sum(map(np.prod, leaves.values())) == unet.cost(k, INPUTS).parameters


def test_parameters_of_adm():
    """553.8 million: of 256x256 ImageNet with 1,000 labels and learned variances."""
    k = unet.UNetKeys(kind="unet", label_dropout=0.0)
    assert unet.cost(k, Inputs((256, 256, 3), 6, 1000)).parameters == 553_838_086


def test_output_of_diffusers():
    """Its weights by `layouts`, there and back; no layer of the seeded weights is zero."""
    with np.load(GOLDEN) as file:
        golden = dict(file)
    theirs = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    state, k = seeded_state(theirs, 0), keys()
    ours = shapes(k)
    rules_ = layouts.unet_layout(k, ours, "diffusers")
    assert layouts.expected_shapes(rules_, ours) == theirs
    leaves = layouts.to_ours(rules_, state, ours)
    again = layouts.to_theirs(rules_, leaves)
    assert all(np.array_equal(again[name], state[name]) for name in state)
    params = {"params": unflatten(leaves)}
    x = jnp.asarray(golden["x"].transpose(0, 2, 3, 1))
    label = Conditions(label=jnp.asarray(golden["y"], jnp.int32))
    found = jax.jit(unet.module(k, INPUTS).apply)(params, x, jnp.asarray(golden["t"]), label)
    expected = golden["output"]
    np.testing.assert_allclose(
        np.asarray(found).transpose(0, 3, 1, 2), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_a_label_changes_the_output():
    k = keys(**SHALLOW)
    network, rng = unet.module(k, INPUTS), np.random.default_rng(0)
    params = {
        "params": unflatten(
            {
                n: jnp.asarray(0.1 * rng.standard_normal(s), jnp.float32)
                for n, s in shapes(k).items()
            }
        )
    }
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    same = jnp.broadcast_to(x[:1], x.shape)

    apply = jax.jit(network.apply)

    def output(t: Any, label: Any) -> np.ndarray:
        conditions = Conditions(label=jnp.asarray(label, jnp.int32))
        return np.asarray(apply(params, same, jnp.asarray(t, jnp.int32), conditions))

    for pair in (output([3, 3], [0, 10]), output([3, 700], [0, 0])):
        assert np.abs(pair[0] - pair[1]).max() > 1e-3


def test_gradients_on_a_mesh_are_those_of_one_device():
    c, rng = recipe(**SHALLOW), np.random.default_rng(0)
    tree = jax.eval_shape(make_task(c).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), tree)
    batch = {
        "x0": jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32),
        "label": jnp.arange(8, dtype=jnp.int32),
    }

    def gradients(mesh: Any) -> Any:
        task = make_task(c, mesh)
        placed = jax.device_put(params, rules.state_shardings(params, mesh, unet.NETWORK.rules))
        drawn = task.draw(batch, jax.random.key(1))

        def loss(params: Any, drawn: Any) -> Any:
            return task.loss(params, {}, drawn)[0]

        where = rules.batch_sharding(mesh)
        return jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(drawn, where))

    value, expected = gradients(make_mesh(1, 1, jax.devices()[:1]))
    found, grads = gradients(make_mesh(2, 4))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5 * max(1e-3, float(jnp.abs(b).max())))


def test_the_width_of_a_budget():
    k = keys(groups=8)
    inputs = Inputs((8, 8, 1), 2, 10)
    gflops = unet.cost(keys(width=40), inputs).gflops
    assert unet.width_for(k, inputs, 1.01 * gflops) == 40


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"multipliers": (1.0,) * 5}, r"5 levels.* 8x8 input 4 times: .*divisible by 16"),
        ({"attention_factors": (2, 3)}, r"attention_factors has 3: expected .* 1, 2\."),
        ({"groups": 32}, r"groups is 32: it does not divide the 16 channels of down_0_0"),
        ({"head_width": 12}, r"head_width is 12: .* 32 channels of the attention in down_1_0"),
        ({"multipliers": (1.0, 0.0)}, r"multipliers is .*: expected 1 to 12 numbers above 0"),
        ({"patch": 2}, r"model\.patch"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(model, match):
    with pytest.raises(UserError, match=match):
        recipe(**model)


def test_a_mesh_that_splits_tokens_is_refused():
    with pytest.raises(UserError, match=r"tensor=2: config\.model\.kind=unet has no tokens"):
        make_task(recipe(), make_mesh(4, 1, tensor=2))
