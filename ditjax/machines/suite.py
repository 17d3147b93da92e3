"""The suite of `bench --suite`: models at their best batch, features, numerics of attention.

`bench` gives it the function that measures a recipe. One JSON holds all, and one table shows it.
"""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config, changed
from ditjax.errors import UserError, first_few, one_line
from ditjax.models.attention import attend
from ditjax.models.embed import Attend
from ditjax.models.inception import FIDInception, preprocess
from ditjax.models.kernels import cudnn, flash
from ditjax.studies.words import aligned, number

SUITE_SIZES = ("S", "B", "L", "XL")
SUITE_BATCHES = (64, 128, 256, 512)
HEAD_WIDTH, TOKENS, HEADS = 64, 256, 6  # of DiT-S/2 on 256 x 256: what the numerics are measured on
_KERNELS: dict[str, tuple[str, Attend]] = {
    "cudnn": ("gpu", cudnn),
    "flash": ("tpu", flash),
}  # fused ones, and their backend
_FULL = "RESOURCE_EXHAUSTED"  # of XLA, for what does not fit into a device's memory

MeasureRecipe = Callable[
    [Config, bool], dict[str, Any]
]  # (recipe, whether in full) -> bench's figures


def run_suite(
    c: Config, measure: MeasureRecipe, sizes: Sequence[str], batches: Sequence[int]
) -> dict[str, Any]:
    """Measure each size at each batch shortly, then at its best in full; and the rest."""
    models = [_model(c, measure, size, sorted(batches)) for size in sizes]
    return {"models": models, "features": inception_speed(c), "attention": attention_errors()}


def _model(c: Config, measure: MeasureRecipe, size: str, batches: Sequence[int]) -> dict[str, Any]:
    """The figures of a size at the batch with the most images a second, and those of all batches.

    Larger batches than the first that does not fit are not tried.
    """
    tried: list[dict[str, Any]] = []
    alone = len(batches) == 1
    for batch in batches:
        gc.collect()  # the state of the one before may be in cycles
        found = _fitting(c, measure, size, batch, alone)
        rate = found["images_per_second"]["median"] if found else None
        tried.append({"batch_size": batch, "images_per_second": rate})
        _say(f"DiT-{size}, batch {batch}: {f'{rate:.4g} images/s' if rate else 'does not fit'}")
        if not found:
            break
    best = max(tried, key=lambda each: each["images_per_second"] or 0.0)
    if not best["images_per_second"]:
        raise UserError(
            f"--suite: DiT-{size} does not fit with a batch of {batches[0]}: give smaller"
            " --batches, or fewer --sizes."
        )
    whole = found if alone else _fitting(c, measure, size, best["batch_size"], True)
    assert whole
    # The peak is of the process so far: of the largest batch that was tried.
    return {**{k: v for k, v in whole.items() if not k.startswith("peak_bytes")}, "tried": tried}


def _fitting(
    c: Config, measure: MeasureRecipe, size: str, batch: int, full: bool
) -> dict[str, Any] | None:
    """The figures of a size and a batch; None if they do not fit into a device's memory."""
    try:
        return measure(changed(c, {"model": {"size": size}, "train": {"batch_size": batch}}), full)
    except jax.errors.JaxRuntimeError as error:
        if _FULL not in str(error):
            raise
        return None


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


# ---- features


def inception_speed(c: Config, seconds: float = 2.0) -> dict[str, Any]:
    """Images a second of FID's Inception on one device, float32, of the recipe's image size.

    Its weights are random: they change no time.
    """
    rows, side = (64, c.data.image_size) if jax.default_backend() != "cpu" else (2, 32)
    images = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    network = FIDInception()
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
    forward = jax.jit(lambda params, x: network.apply(params, preprocess(x)))
    jax.block_until_ready(forward(params, images))
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds:
        jax.block_until_ready(forward(params, images))
        done += rows
    rate = done / (time.perf_counter() - began)
    return {"images_per_second": rate, "batch_size": rows, "image_size": side}


# ---- attention


def attention_errors() -> dict[str, Any]:
    """Errors of each attention kernel of this backend against float32 products without rounding.

    {kernel: {"forward", "gradient"}}: relative to the reference's root mean square; the gradient is
    that of a random projection in q, k and v. A kernel for another backend has these words.
    """
    rng = np.random.default_rng(0)
    shape = (4, HEADS, TOKENS, HEAD_WIDTH)
    exact = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(4)]
    # The same values for all, which bfloat16 holds.
    exact = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in exact]
    with jax.default_matmul_precision("highest"):
        wanted = _with_gradients(attend, *exact)
    found: dict[str, Any] = {}
    backend = jax.default_backend()
    kernels: dict[str, tuple[str, Attend]] = {"plain": (backend, attend), **_KERNELS}
    for name, (home, kernel) in kernels.items():
        if home != backend:
            found[name] = f"not run: it is for {home}"
            continue
        values = _with_gradients(kernel, *(x.astype(jnp.bfloat16) for x in exact))
        errors = [_error(a, b) for a, b in zip(values, wanted, strict=True)]
        found[name] = {"forward": errors[0], "gradient": max(errors[1:])}
    return found


def _with_gradients(
    kernel: Attend, q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array
) -> list[jax.Array]:
    """The output, and the gradients of Σ output · w in q, k and v."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(kernel, q, k, v)
        return [out, *pull(w.astype(out.dtype))]

    return run(q, k, v)


def _error(a: jax.Array, b: jax.Array) -> float:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(np.sqrt(np.square(difference).mean() / np.square(np.asarray(b)).mean()))


# ---- the table


def suite_text(found: Mapping[str, Any]) -> str:
    """The suite as a table for the terminal."""
    peers = [peer["name"] for peer in found["models"][0]["peers"]]
    head = ["model", "batch", "images/s", "MFU", "of the ceiling", *(f"x {name}" for name in peers)]
    rows = [[*head, "samples/s"]]
    for each in found["models"]:
        sampled = each["sampling"]
        rows.append(
            [
                each["model"],
                str(each["batch_size"]),
                number(each["images_per_second"]["median"]),
                f"{each['mfu']['median']:.1%}" if each["mfu"] else "-",
                f"{each['of_ceiling']['median']:.1%}",
                *(number(peer["ratio"]["median"]) for peer in each["peers"]),
                number(sampled["batch_size"] / sampled["batch_seconds"]["median"])
                if sampled
                else "-",
            ]
        )
    features = found["features"]
    lines = aligned(rows, [False, *[True] * (len(rows[0]) - 1)])
    lines.append(
        f"Inception features: {number(features['images_per_second'])} images/s of"
        f" {features['image_size']} x {features['image_size']}"
    )
    for name, errors in found["attention"].items():
        words = errors
        if not isinstance(errors, str):
            words = f"{errors['forward']:.2g}, gradient {errors['gradient']:.2g}"
        lines.append(f"attention {name}, bfloat16 against float32: {words}")
    ceilings = [number(each["ceiling_flops"]["median"] / 1e12) for each in found["models"]]
    lines.append(f"matmul ceiling, TFLOP/s a device: {first_few(ceilings, len(ceilings))}")
    return "\n".join(lines)
