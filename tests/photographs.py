"""A small DiT that removes noise from photographs, beside scikit-image's methods; by hand.

    pip install scikit-image==0.26.0 PyWavelets
    python -m tests.photographs --workdir=runs/photographs --figure=docs/denoising.png

The photographs are those in scikit-image's own files. The network sees grey crops of 16x16 pixels
of ten of them, turned and mirrored, and noise of up to σ = 54. It is scored on 128x128 pixels of
three others, whose windows overlap. Beside it: wavelets (BayesShrink), non-local means, and total
variation with the best of seven weights for each image, which only the truth can choose.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.metrics.restoration import psnr
from ditjax.runs.results import save_grid
from ditjax.sampling.pipeline import Pipeline
from tests.denoisers import GreyImages, trained

TRAINING = (
    "camera",
    "astronaut",
    "chelsea",
    "coins",
    "brick",
    "gravel",
    "grass",
    "moon",
    "hubble_deep_field",
    "retina",
)
SCORED = {"coffee": (100, 200), "rocket": (100, 260), "immunohistochemistry": (100, 100)}
SIDE, WINDOW = 128, 16
CROPS = {"train": 60_000, "test": 1_000}
SIGMAS = (15.0, 25.0, 50.0)  # of noise, in pixels from 0 to 255
WEIGHTS = (0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25)  # of total variation
STEPS = 5_000


def grey(name: str) -> np.ndarray:
    """A photograph of scikit-image as f64[H,W], pixels from 0 to 255."""
    from skimage import color, data

    image = np.asarray(getattr(data, name)())
    return image.astype(np.float64) if image.ndim == 2 else 255 * color.rgb2gray(image)


class Crops(
    GreyImages,
    skip_registration=True,  # type: ignore[call-arg]
):
    SIDE, LABEL, COUNTS = WINDOW, "photograph", CROPS

    def images(self, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
        photographs = [grey(name) for name in TRAINING]
        for _ in range(count):
            whole = photographs[rng.integers(len(photographs))]
            top, left = (rng.integers(n - WINDOW + 1) for n in whole.shape)
            crop = np.rot90(whole[top : top + WINDOW, left : left + WINDOW], int(rng.integers(4)))
            crop = crop[:, ::-1] if rng.integers(2) else crop
            yield np.rint(crop).astype(np.uint8)


def clipped_psnr(x: np.ndarray, truth: np.ndarray) -> float:
    """Of clipped pixels, in dB."""
    return float(psnr(np.clip(x, 0, 255)[None], truth[None], 255)[0])


def denoised(pipeline: Pipeline, truth: np.ndarray, y: np.ndarray, s: float) -> dict[str, Any]:
    """{method: image f64[H,W]}; y has noise of deviation s."""
    from skimage import restoration

    unit = y / 255
    varied = [255 * restoration.denoise_tv_chambolle(unit, weight) for weight in WEIGHTS]

    def network(sigma: float) -> np.ndarray:
        out = pipeline.denoise(y[None, ..., None], sigma, cfg_scale=1.0, quiet=True)
        return np.asarray(out.array, np.float64)[0, ..., 0]

    wavelets = restoration.denoise_wavelet(unit, method="BayesShrink", rescale_sigma=True)
    means = restoration.denoise_nl_means(unit, h=0.8 * s / 255, sigma=s / 255, fast_mode=False)
    return {
        "noisy": y,
        "wavelets": 255 * wavelets,
        "non-local means": 255 * means,
        "total variation, best": max(varied, key=lambda x: clipped_psnr(x, truth)),
        "network": network(s),
        "network, σ estimated": network(0.0),
    }


def main() -> None:
    """Train the network, unless it is there; print a table and save a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--figure", default="")
    args = parser.parse_args()
    own = {
        "data.name": "tests.photographs.Crops",
        "data.image_size": WINDOW,
        "diffusion.time_most": 0.3,  # noise of up to .43, or 54 in pixels
        "optim.learning_rate": 2e-3,
        "train.batch_size": 32,
        "train.steps": args.steps,
    }
    pipeline = trained("4x96x3/2", args.workdir, own)
    shown: list[np.ndarray] = []
    rows: list[tuple[float, dict[str, Any]]] = []
    rng = np.random.default_rng(1)
    crops = {n: grey(n)[i : i + SIDE, j : j + SIDE] for n, (i, j) in SCORED.items()}
    for sigma in SIGMAS:
        scores: dict[str, list[float]] = {}
        for truth in crops.values():
            y = truth + sigma * rng.standard_normal(truth.shape)
            found = denoised(pipeline, truth, y, sigma)
            for method, image in found.items():
                scores.setdefault(method, []).append(clipped_psnr(image, truth))
            if sigma == SIGMAS[1]:
                shown += [truth, *found.values()]
        rows.append((sigma, {method: np.mean(each) for method, each in scores.items()}))
    print("| σ |", " | ".join(rows[0][1]), "|")
    for sigma, means in rows:
        print(f"| {sigma:g} |", " | ".join(f"{each:.2f}" for each in means.values()), "|")
    if args.figure:
        bytes_of = np.clip(np.rint(np.stack(shown)), 0, 255).astype(np.uint8)
        save_grid(bytes_of[..., None], args.figure, len(shown) // len(crops))


if __name__ == "__main__":
    main()
