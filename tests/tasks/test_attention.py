"""A recipe's attention on a mesh: sharded over rows, heads and queries, chosen before a compile."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.models import kernels
from ditjax.models.attention import attend
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.program import batch_sampler
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import denoiser_module, placement
from ditjax.training.program import training

flash = functools.partial(kernels.flash, interpret=True)


def recipe(*overrides):
    small = ("--config=experiments/digits.py:1x32x2/2", "--config.train.batch_size=8")
    return read(load_recipe([*small, "--config.sample.batch_size=8", *overrides]))


def mesh_of(**sizes):
    return make_mesh(devices=jax.devices()[: math.prod(sizes.values())], **sizes)


def operands(B, H, N, d):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, H, N, d)), jnp.float32) for _ in range(4))


def output_and_gradients(f):
    def run(q, k, v, g):
        out, back = jax.vjp(f, q, k, v)
        return out, *back(g)

    return jax.jit(run)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8, "fsdp": 1},
        {"data": 2, "fsdp": 4, "tensor": 1, "context": 1},
        {"data": 2, "fsdp": 1, "tensor": 4, "context": 1},
        {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    ],
)
def test_each_device_computes_its_own_rows_heads_and_queries(sizes):
    """The same numbers as on one device, and every device's share is 1/8 of the work."""
    mesh, values = mesh_of(**sizes), operands(8, 4, 16, 8)
    seen = []

    def local(q, k, v):
        seen.append((q.shape, k.shape))
        return attend(q, k, v)

    found = output_and_gradients(rules.by_heads(local, mesh))(*values)
    assert_close(found, output_and_gradients(attend)(*values))
    rows, tensor, context = (
        sizes["data"] * sizes["fsdp"],
        sizes.get("tensor", 1),
        sizes.get("context", 1),
    )
    B, H = 8 // rows, 4 // tensor
    assert seen == [((B, H, 16 // context, 8), (B, H, 16, 8))]


def test_a_kernel_on_eight_devices_is_the_plain_form_on_one():
    mesh, values = mesh_of(data=2, fsdp=1, tensor=2, context=2), operands(2, 2, 132, 8)
    found = output_and_gradients(rules.by_heads(flash, mesh))(*values)
    assert_close(found, output_and_gradients(attend)(*values))


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_network_trains_through_the_kernel(heads_first, monkeypatch):
    """The loss and its gradients on fsdp = 2, the blocks scanned, as of the plain form on one.

    A TPU's kernel is given queries, keys and values whose product has the heads first.
    """
    c = recipe("--config.model.unroll=1")
    rng = np.random.default_rng(0)
    batch = {
        "x0": rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    key = jax.random.key(0)
    # Noise on every leaf: at initialisation adaLN-Zero's gates hide the attention.
    shapes = jax.eval_shape(make_task(c).init, key)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.1, shapes)

    def gradients(mesh):
        task = make_task(c, mesh)

        def loss(params, batch):
            return task.loss(params, {}, task.draw(batch, key))

        program = jax.value_and_grad(loss, has_aux=True)
        (value, _), grads = jax.jit(program, in_shardings=(None, rules.batch_sharding(mesh)))(
            params, batch
        )
        return value, *jax.tree.leaves(grads)

    expected = gradients(make_mesh(1, 1, jax.devices()[:1]))
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return flash(q, k, v)

    monkeypatch.setattr(kernels, "choose", lambda *args, **kwargs: counted)
    if heads_first:
        monkeypatch.setattr(kernels, "flash", counted)
    mesh = make_mesh(1, 2, jax.devices()[:2])
    assert placement(c, mesh).heads_first == heads_first
    assert not placement(changed(c, {"model": {"remat": "dots"}}), mesh).heads_first
    found = gradients(mesh)
    assert set(calls) == {(4, 2, 16, 16)}
    assert_close(found, expected)


def test_the_choice_is_of_the_mesh_and_the_recipe(monkeypatch):
    asked = []

    def choose(name, device, **facts):
        asked.append((name, device, facts))
        return attend

    monkeypatch.setattr(kernels, "choose", choose)
    mesh = mesh_of(data=1, fsdp=1)
    facts = {"tokens": 16, "head_width": 16, "dtype": jnp.float32}
    placement(recipe("--config.model.attention=plain"), mesh)
    assert asked == [("plain", mesh.devices.flat[0], facts)]
    other = recipe("--config.model.block=in_context", "--config.model.dtype=bfloat16")
    placement(other, mesh)
    assert asked[1][2] == {"tokens": 18, "head_width": 16, "dtype": jnp.bfloat16}


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize(
    "program",
    [
        lambda c, mesh: training(c, make_task(c, mesh), mesh),
        lambda c, mesh: batch_sampler(c, make_task(c, mesh), mesh),
    ],
    ids=["training", "sampling"],
)
def test_a_kernel_that_is_not_there_is_refused_before_a_compile(program, name):
    with pytest.raises(UserError, match=rf"config\.model\.attention is '{name}' and the devices"):
        program(recipe(f"--config.model.attention={name}"), make_mesh(8, 1))


def test_on_cpus_nothing_is_sharded_by_hand():
    """The plain form is left to XLA's partitioner."""
    assert placement(recipe(), make_mesh(8, 1)).attend is None
    assert not placement(recipe(), make_mesh(8, 1)).heads_first
    assert denoiser_module(recipe(), make_mesh(8, 1)).place.attend is None
