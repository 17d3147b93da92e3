"""Studies with a law planted in them: what an interval must hold is known."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditjax.scaling.isoflop import ComputeCurve
from ditjax.scaling.joint import JointLaw

Vector = NDArray[np.float64]

NOISES = ("even", "small end", "large end", "tailed")


class Study(NamedTuple):
    """Runs of `model` i[n] at x f64[n] with the metric y f64[n]."""

    x: Vector
    y: Vector
    model: list[int]


def study(
    rng: np.random.Generator,
    *,
    models: int,
    seeds: int = 1,
    noise: str = "even",
    a: float = 0.05,
    b: float = 0.5,
    c: float = 0.0,
    sigma: float = 0.1,
) -> Study:
    """y = (c + a·x^(-b))·exp(a model's deviation + a seed's) over three decades of Gflops.

    Models deviate by `sigma`, seeds of one by half of that; at one end both are 1.8 times as
    large and at the other 0.3 times where the noise has an end.
    """
    x = 10 ** np.sort(rng.uniform(-4, -1, models))
    up = (np.log10(x) + 4) / 3
    scale = {"small end": 1.8 - 1.5 * up, "large end": 0.3 + 1.5 * up}.get(noise, np.ones(models))
    own = rng.standard_t(3, models) if noise == "tailed" else rng.normal(size=models)
    of_seeds = rng.normal(size=(models, seeds)) if seeds > 1 else np.zeros((models, 1))
    log_noise = sigma * scale[:, None] * (own[:, None] + 0.5 * of_seeds)
    y = (c + a * x**-b)[:, None] * np.exp(log_noise)
    model = np.repeat(np.arange(models), seeds)
    return Study(x[model], y.ravel(), model.tolist())


LAW = JointLaw(e=1.0, a=2.0, alpha=0.4, b=270.0, beta=0.3, n=0)  # N in Gflops, D in images


def curves(
    rng: np.random.Generator,
    *,
    models: int,
    seeds: int = 1,
    sigma: float = 0.0,
    law: JointLaw = LAW,
    steps: int = 40,
) -> list[ComputeCurve]:
    """Training curves along the law of models of 0.03 to 3 Gflops, 3·10³ to 3·10⁸ images each.

    A run deviates from the law by one factor e^(sigma·normal), the same all along its curve.
    """
    images = np.geomspace(3e3, 3e8, steps)
    found = []
    for size in np.geomspace(0.03, 3, models):
        for _ in range(seeds):
            value = law(size, images) * np.exp(sigma * rng.normal())
            found.append(ComputeCurve(float(size), 3 * size * images, value))
    return found


def budgets(n: int = 6) -> list[float]:
    """Of `LAW` and `curves`: at all of them the best size lies well inside the models."""
    return np.geomspace(1e5, 1e7, n).tolist()
