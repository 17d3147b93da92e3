"""Regression: the mean colour of an image. It draws nothing, and has a held-out error."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ditjax.config import Config, Section, above, key
from ditjax.models.network import NetworkCost
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import Definition, Frozen, Task, ValidationScore


@dataclass(frozen=True)
class Brightness(Section):
    weight: float = key(1.0, above(0))


def make(c: Config, mesh: Mesh | None = None) -> Task:
    side, channels = c.data.image_size, c.data.channels

    def predicted(params: Any, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1) @ params["params"]["w"]

    def error(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(predicted(params, x) - x.mean((1, 2, 3)))

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        mse = error(params, drawn["x0"]).mean()
        return c.brightness.weight * mse, {"mse": mse}

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"error": error(params, batch["image"])}

    size = side * side * channels
    return Task(
        name="Brightness",
        inputs={"x0": jax.ShapeDtypeStruct((side, side, channels), jnp.float32)},
        init=lambda key: {"params": {"w": jax.random.normal(key, (size,)) / size}},
        prepare=lambda frozen, batch, key: {"x0": batch["image"]},
        draw=lambda batch, key: batch,
        loss=loss,
        cost=NetworkCost("Brightness", size, size),
        scores=(ValidationScore(measure, names={"error": "mse"}, protocol={"metric": "MSE"}),),
    )


TASK = Definition(make=make, network="tests.toys.linear", sections={"brightness": Brightness})
