"""How near a trained network comes to the least squared error, where that is known; by hand.

    python -m tests.mmse --workdir=runs/mmse

The data are Gaussian: 8x8 images with the mean and the covariance of the training digits, scaled so
that bytes hold them. The mean of an image given a noisy one is then linear, and its error known. A
small DiT is trained on them, and its error is measured on held-out images and noises, beside that
error and beside the least one of a filter that shrinks each pixel by itself.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ditjax.data.records import load_arrays
from ditjax.sampling.pipeline import Pipeline
from tests.denoisers import GreyImages, linear_mean, trained

SCALE = 0.3  # of the digits' deviation: 3 in a million pixels are beyond a byte
CENTRE, COUNTS = 127.5, {"train": 20_000, "test": 2_000}
SIGMAS = (5.0, 10.0, 15.0, 25.0, 50.0)  # of noise, in pixels from 0 to 255
STEPS = 6_000


def moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[64] and covariance f64[64,64] of the data, in pixels from 0 to 255."""
    x = load_arrays("digits", "train")["image"].reshape(-1, 64).astype(np.float64) - CENTRE
    return CENTRE + SCALE * x.mean(0), SCALE**2 * np.cov(x.T)


class GaussianDigits(
    GreyImages,
    skip_registration=True,  # type: ignore[call-arg]
):
    SIDE, LABEL, COUNTS = 8, "Gaussian", COUNTS

    def images(self, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
        yield from drawn(rng, count)


def drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """So many images u8[N,8,8]."""
    x = rng.multivariate_normal(*moments(), count)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8).reshape(-1, 8, 8)


def measured(pipeline: Pipeline) -> Iterator[tuple[float, float, float, float, float]]:
    """σ, and squared errors: of the network, of the linear mean, at its least, of each pixel."""
    images = drawn(np.random.default_rng(1), COUNTS["test"]).astype(np.float64)[..., None]
    noise = np.random.default_rng(9).standard_normal(images.shape)
    mean, cov = moments()
    cov = cov + np.eye(64) / 12  # bytes are rounded
    own = np.diag(cov)
    for sigma in SIGMAS:
        y = images + sigma * noise
        linear, least = linear_mean(y.reshape(-1, 64), mean, cov, sigma)
        found = pipeline.denoise(y, sigma, batch_size=len(y), cfg_scale=1.0, quiet=True).array
        of_network, of_linear = (
            float(np.mean((x.reshape(images.shape) - images) ** 2)) for x in (found, linear)
        )
        alone = float(np.mean(own * sigma**2 / (own + sigma**2)))
        yield sigma, of_network, of_linear, least, alone


def main() -> None:
    """Train the network, unless it is there, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    moments()  # prepares the digits, which cannot be prepared within another data set
    own = {
        "data.name": "tests.mmse.GaussianDigits",
        "diffusion.time_most": 0.35,  # noise of up to .54, or 69 in pixels
        "optim.learning_rate": 3e-3,
        "train.batch_size": 64,
        "train.steps": args.steps,
    }
    pipeline = trained("2x96x3/2", args.workdir, own)
    print("| σ | network | linear mean | least | each pixel alone | network over linear |")
    for sigma, network, *others in measured(pipeline):
        row = " | ".join(f"{each:.3f}" for each in (network, *others))
        print(f"| {sigma:g} | {row} | {network / others[0]:.3f} |")


if __name__ == "__main__":
    main()
