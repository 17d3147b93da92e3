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
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax import train
from ditjax.data.records import load_arrays
from ditjax.sampling.pipeline import Pipeline

SCALE = 0.3  # of the digits' deviation: 3 in a million pixels are beyond a byte
CENTRE, COUNTS = 127.5, {"train": 20_000, "test": 2_000}
SIGMAS = (5.0, 10.0, 15.0, 25.0, 50.0)  # of noise, in pixels from 0 to 255
STEPS = 6_000


def moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[64] and covariance f64[64,64] of the data, in pixels from 0 to 255."""
    x = load_arrays("digits", "train")["image"].reshape(-1, 64).astype(np.float64) - CENTRE
    return CENTRE + SCALE * x.mean(0), SCALE**2 * np.cov(x.T)


class GaussianDigits(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(8, 8, 1), encoding_format="png")
        label = tfds.features.ClassLabel(names=["Gaussian"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, image in enumerate(drawn(split)):
            yield i, {"image": Image.fromarray(image[..., 0]), "label": 0}


def drawn(split: str) -> np.ndarray:
    """The images u8[N,8,8,1] of a split."""
    mean, cov = moments()
    rng = np.random.default_rng(list(COUNTS).index(split))
    x = rng.multivariate_normal(mean, cov, COUNTS[split])
    return np.clip(np.rint(x), 0, 255).astype(np.uint8).reshape(-1, 8, 8, 1)


def measured(workdir: str) -> Iterator[tuple[float, float, float, float, float]]:
    """σ, and squared errors: of the network, of the linear mean, at its least, of each pixel."""
    pipeline = Pipeline.from_pretrained(workdir)
    images = drawn("test").astype(np.float64)
    noise = np.random.default_rng(9).standard_normal(images.shape)
    mean, cov = moments()
    cov = cov + np.eye(64) / 12  # bytes are rounded
    own = np.diag(cov)
    for sigma in SIGMAS:
        y = images + sigma * noise
        gain = cov @ np.linalg.inv(cov + sigma**2 * np.eye(64))
        linear = mean + (y.reshape(-1, 64) - mean) @ gain.T
        found = pipeline.denoise(y, sigma, batch_size=len(y), cfg_scale=1.0, quiet=True).array
        errors = (np.mean((x.reshape(images.shape) - images) ** 2) for x in (found, linear))
        least = sigma**2 * np.trace(gain) / 64
        yield (sigma, *errors, least, float(np.mean(own * sigma**2 / (own + sigma**2))))


def main() -> None:
    """Train the network, unless it is there, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    words = {
        "data.name": "tests.mmse.GaussianDigits",
        "data.num_classes": 1,
        "diffusion.process": "flow",
        "diffusion.prediction": "velocity",
        "diffusion.loss": "simple",
        "diffusion.variance": "none",
        "diffusion.time_most": 0.35,  # noise of up to .54, or 69 in pixels
        "optim.learning_rate": 3e-3,
        "train.batch_size": 64,
        "train.steps": args.steps,
        "train.ema_decay": 0.999,
        "train.sample_every_steps": 0,
        "train.evaluate_every_steps": 0,
        "evaluate.features": "none",
        "sample.sampler": "heun",
        "sample.steps": 10,
        "sample.eta": 0.0,
    }
    flags = [f"--config.{key}={value}" for key, value in words.items()]
    status = train.main(["--config=digits:2x96x3/2", f"--workdir={args.workdir}", *flags])
    if status:
        raise SystemExit(status)
    print("| σ | network | linear mean | least | each pixel alone | network over linear |")
    for sigma, network, *others in measured(str(args.workdir)):
        row = " | ".join(f"{each:.3f}" for each in (network, *others))
        print(f"| {sigma:g} | {row} | {network / others[0]:.3f} |")


if __name__ == "__main__":
    main()
