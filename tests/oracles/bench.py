"""Speed of evaluation beside the public implementations, in one process, taking turns.

    python -m tests.oracles.bench [--batch=16] [--size=256] [--rounds=8] [--dimensions=2048]

Prints images/s of FID's Inception here and in torch-fidelity, and seconds of a Fréchet distance
here and by scipy's sqrtm as pytorch-fid calls it; then the ratios. Give it a quiet machine.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from ditjax.metrics.frechet import gaussian_frechet_distance
from ditjax.models.inception import FIDInception, preprocess
from tests.models.test_inception import from_torch
from tests.oracles import inception, scores
from tests.seeded import seeded_images, seeded_state


def taking_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, the order reversed every other round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(-1, rounds):
        for name in list(runs)[:: 1 if k % 2 else -1]:
            time.sleep(0.25)  # torch's threads spin for a while after a region
            began = time.perf_counter()
            runs[name]()
            if k >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def told(title: str, seconds: dict[str, list[float]], unit: str, rate: float = 0) -> None:
    """Medians, and the quartiles of the paired ratios theirs / ours."""
    for name, values in seconds.items():
        median = float(np.median(values))
        print(f"{title:<20} {name:<16} {rate / median if rate else median:10.3f} {unit}")
    ours, theirs = (np.array(values) for values in seconds.values())
    low, middle, high = np.quantile(theirs / ours, [0.25, 0.5, 0.75])
    print(f"{title:<20} ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dimensions", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    state = seeded_state(inception.layout(), 0, inception.GAIN)
    images = seeded_images((args.batch, args.size, args.size, 3), 1)
    variables, on_device = jax.device_put((from_torch(state), images))
    forward = jax.jit(lambda v, x: FIDInception().apply(v, preprocess(x)))
    network = inception.torch_fidelity_network()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x = torch.from_numpy(images).permute(0, 3, 1, 2)

    def theirs() -> None:
        with torch.inference_mode():
            network(x)

    told(
        "Inception",
        taking_turns(
            {
                "ditjax": lambda: jax.block_until_ready(forward(variables, on_device)),
                "torch-fidelity": theirs,
            },
            args.rounds,
        ),
        "images/s",
        args.batch,
    )

    d, rng = args.dimensions, np.random.default_rng(0)
    samples = [rng.normal(size=(d + d // 2, d)) @ rng.normal(size=(d, d)) / d**0.5 for _ in "ab"]
    gaussians = [value for s in samples for value in (s.mean(0), np.cov(s, rowvar=False))]
    told(
        f"Fréchet, d = {d}",
        taking_turns(
            {
                "ditjax": lambda: gaussian_frechet_distance(*gaussians),
                "scipy's sqrtm": lambda: scores.frechet_distance(*gaussians),
            },
            3,
        ),
        "s",
    )


if __name__ == "__main__":
    main()
