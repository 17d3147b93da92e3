"""Attention's TPU kernel compiled for chips that are not here: Mosaic's word on blocks and widths.

Compiled, not run. Needs libtpu: `pip install 'jax[tpu]'`; skipped without it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.machines import topology
from ditjax.models.blocks import BLOCKS, BlockConfig, Conditioning
from ditjax.models.dit import RULES
from ditjax.parallel import rules
from ditjax.parallel.mesh import mesh_of
from ditjax.tasks.diffusion import denoiser_module

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def devices():
    return topology.devices(topology.parse_topology("v5e:2x2"))


@pytest.mark.parametrize(("image_size", "block"), [(256, "adaln_zero"), (256, "in_context")])
def test_a_block_of_xl_compiles_with_its_kernels(devices, image_size, block):
    """N = 256 and 258, head width 72, forward and backward, the batch over fsdp = 4."""
    recipe = load_recipe(
        [
            "--config=experiments/base.py",
            "--config.model.dtype=bfloat16",
            f"--config.model.block={block}",
            f"--config.data.image_size={image_size}",
            "--config.mesh.data=1",
            "--config.mesh.fsdp=4",
        ]
    )
    c = read(recipe)
    mesh = mesh_of(c, devices)
    model = denoiser_module(c, mesh)
    N = (image_size // 16) ** 2 + 2 * (block == "in_context")

    def rows(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rules.batch_sharding(mesh))

    x, cond = rows(8, N, 1152), Conditioning(rows(8, 1152), rows(8, 2, 1152))
    config = BlockConfig(model.heads, model.mlp_ratio, dtype=model.dtype)
    plain = BLOCKS[block](config)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x, cond)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        rules.state_shardings(shapes, mesh, RULES),
    )
    module = BLOCKS[block](config._replace(place=model.place))
    apply: Any = module.apply

    def loss(params, x, cond):
        return jnp.square(apply(params, x, cond).astype(jnp.float32)).sum()

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, x))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings)
    lines = str(step.lower(params, x, cond).compile().as_text()).splitlines()
    kernels = [line for line in lines if 'custom_call_target="tpu_custom_call"' in line]
    operand = f"[2,16,{-(-N // 128) * 128},128]"  # 8 rows / 4, heads, whole blocks, whole lanes
    assert len(kernels) == 2, "one kernel forward, one backward"
    assert all(f"bf16{operand}" in line for line in kernels)
    # Weights are gathered; a kernel's operands never: each chip computes its own rows.
    gathered = [line for line in lines if " all-gather" in line]
    assert gathered
    assert not any(f"[8,16,{operand.split(',')[2]}," in line for line in gathered)
