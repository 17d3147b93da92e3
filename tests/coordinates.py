"""The coordinate check of Yang et al. 2022, App. D.1: python -m tests.coordinates [--block=BLOCK]

Mean |output| of every module after t steps of Adam, for networks of several widths: with μP none of
them grows or shrinks with the width, with the standard parametrization they do.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ditjax.cli import load_recipe
from ditjax.config import Config, read
from ditjax.models.blocks import BLOCKS
from ditjax.models.dit import query_factor
from ditjax.models.network import Conditions
from ditjax.parallel.rules import path_of
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training.program import optimizer_of

WIDTHS = (32, 64, 128, 256, 512)
BASE_WIDTH, HEADS = 32, 2
STEPS, BATCH = 4, 8
RATE = 4e-3
LOGITS = "blocks/attn/logits"


def recipe(
    width: int, parametrization: str, block: str = "adaln_zero", rate: float = RATE
) -> Config:
    """Two blocks of two heads, which are wider in a wider network, on 16 tokens."""
    return read(
        load_recipe(
            [
                f"--config=experiments/digits.py:2x{width}x{HEADS}/2",
                f"--config.model.block={block}",
                f"--config.model.parametrization={parametrization}",
                f"--config.model.base_width={BASE_WIDTH}",
                f"--config.model.base_head_width={BASE_WIDTH // HEADS}",
                "--config.model.unroll=1",
                "--config.diffusion.variance=fixed_small",
                "--config.diffusion.loss=simple",
                "--config.optim.schedule=constant",
                "--config.optim.warmup_steps=0",
                f"--config.optim.learning_rate={rate}",
            ]
        )
    )


def sizes(c: Config, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Module -> mean |output| after 0, 1, ..., `steps` steps on one batch; the logits as one."""
    model: Any = denoiser_module(c)
    tx = optimizer_of(c, make_task(c).rates)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, 8, 8, 1)).astype(np.float32)
    t = rng.integers(0, 1000, BATCH).astype(np.int32)
    y = Conditions(label=jnp.asarray(rng.integers(0, 10, BATCH), jnp.int32))

    def loss(params: Any) -> tuple[jax.Array, Any]:
        out, seen = model.apply(
            params, x, t, y, capture_intermediates=True, mutable=["intermediates"]
        )
        # x_t is nearly eps at most t: a network that learns learns its input.
        return jnp.square(out - x).mean(), _means(seen["intermediates"], query_factor(c.model))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, seen

    params = jax.jit(lambda key: model.init(key, x, t, y))(jax.random.key(0))
    state, rows = tx.init(params), []
    for _ in range(steps + 1):
        params, state, seen = step(params, state)
        rows.append(seen)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def _means(seen: Any, scale: float) -> dict[str, jax.Array]:
    """'a/b/__call__/0' -> its mean size as 'a/b'; of outputs that are several arrays, none."""
    end = "__call__/0"
    leaves = jax.tree_util.tree_leaves_with_path(seen)
    arrays = {path_of(path): leaf for path, leaf in leaves if path_of(path).endswith(end)}
    found = {path[: -len(end)].strip("/") or "dit": jnp.abs(a).mean() for path, a in arrays.items()}
    qkv = arrays[f"blocks/attn/qkv/{end}"]  # [L, B, N, 3, H, d]
    q, k = qkv[..., 0, :, :], qkv[..., 1, :, :]
    logits = jnp.einsum("lbnhd,lbmhd->lbhnm", q, k) * scale * q.shape[-1] ** -0.5
    return found | {LOGITS: jnp.abs(logits).mean()}


def slopes(found: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Module -> d log(size) / d log(width) after 0, 1, ... steps, of the `sizes` by width.

    NaN where a size is zero.
    """
    log_width = np.log(list(found))
    centred = log_width - log_width.mean()
    result = {}
    for name in next(iter(found.values())):
        size = np.stack([each[name] for each in found.values()])  # [widths, steps + 1]
        log = np.log(np.where(size > 0, size, np.nan))
        result[name] = centred @ log / (centred @ centred)
    return result


def table(block: str, widths: Sequence[int] = WIDTHS) -> str:
    """Slopes of both parametrizations, a module a line."""
    lines = [f"{block}, widths {', '.join(map(str, widths))}: slope of log |output| after t steps"]
    for parametrization in ("mup", "standard"):
        found = slopes({w: sizes(recipe(w, parametrization, block)) for w in widths})
        lines.append(f"{parametrization:<26}" + "".join(f"{f't={t}':>8}" for t in range(STEPS + 1)))
        for name, row in sorted(found.items()):
            lines.append(f"{name:<26}" + "".join(f"{slope:>8.2f}" for slope in row))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", default="adaln_zero", choices=list(BLOCKS))
    print(table(parser.parse_args().block))
