"""How well runs enlarge held-out images, and what is drawn by a base; by hand.

    ditjax sweep --config=small/cascade --workdir=runs/small/cascade
    ditjax train --config=small/cascade:base --workdir=runs/small/cascade_base
    python -m tests.cascade runs/small/cascade --base=runs/small/cascade_base

Held-out images, made small and enlarged by bicubic, the regressor and samples: PSNR, SSIM,
consistency, FD, and the PSNR of means of 1, 4 and 16 samples. Then a cascade at several
levels of noise.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.config import changed
from ditjax.data.crop import normalize
from ditjax.data.records import load_arrays
from ditjax.diffusion.resampling import resized
from ditjax.evaluation import scoring
from ditjax.evaluation.evaluator import reference_of
from ditjax.evaluation.features import Extractor, open_extractor
from ditjax.metrics.restoration import SSIM_SIDE, psnr, ssim
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.results import save_grid
from ditjax.sampling.cascade import Cascade, Upsampler
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks.diffusion import to_uint8

SAMPLES = 16


def distance(extractor: Extractor, reference: Any, images: np.ndarray, label: np.ndarray) -> str:
    """'FD | accuracy' of images u8[N,H,W,C]."""
    found = scoring.extract_features(extractor, [images], len(images))
    scores = scoring.score(found, reference.statistics, None, family="digits", brief=True)
    assert found.predicted is not None
    return f"{scores['fd_digits']:.1f} | {np.mean(found.predicted == label):.3f}"


def restored(images: np.ndarray, truth: np.ndarray, low: np.ndarray) -> str:
    """'PSNR | SSIM | consistency' in dB, means over images."""
    again = 127.5 * (np.asarray(resized(normalize(images), low.shape[1], "area")) + 1)
    similar = f"{ssim(images, truth, 255).mean():.3f}" if truth.shape[1] >= SSIM_SIDE else "-"
    decibels = (psnr(images, truth, 255), psnr(again, low, 255))
    one, other = (f"{each.mean():.2f}" for each in decibels)
    return f"{one} | {similar} | {other}"


def runs_of(study: Path) -> dict[str, tuple[str, Any]]:
    """The runs of the study by arm."""
    found = {}
    for folder in sorted((study / "runs").iterdir()):
        if (folder / "config.json").exists():
            c = opening.recipe_of(folder)
            blind = c.diffusion.loss == "regression"
            name = "regressor" if blind else "samples"
            name += ", trained on noise" if c.given.noise_most else ""
            name += ", trained on blur" if c.given.blur_most else ""
            assert name not in found, f"{folder}: there is another run of its arm, {name!r}"
            found[name] = (str(folder), c)
    return found


def main() -> None:
    """Print two tables, and save a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--base", default="")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--means", type=int, default=50, help="images whose samples are averaged")
    parser.add_argument("--figure", default="")
    args = parser.parse_args()
    trained = runs_of(args.study)
    c = next(iter(trained.values()))[1]
    side, small = c.data.image_size, c.given.side
    test = load_arrays(c.data.name, c.evaluate.split, None, side)
    truth, label = test["image"][: args.num], test["label"][: args.num]
    low = np.asarray(to_uint8(resized(normalize(truth), small, c.given.kernel)))
    extractor = open_extractor(c.evaluate.features, make_mesh(-1, 1))
    reference = reference_of(c, extractor)
    bicubic = np.asarray(to_uint8(resized(normalize(low), side, "bicubic")))
    nearest = np.asarray(to_uint8(resized(normalize(low), side, "area")))
    shown = {"low": nearest, "bicubic": bicubic}
    print("| | PSNR | SSIM | consistency | FD | accuracy |", flush=True)
    for name, (run, _) in trained.items():
        pipeline = Pipeline.from_pretrained(run, precision="fast")
        shown[name] = pipeline.upscale(low, label.tolist(), seed=0, quiet=True).array
    shown["truth"] = truth
    for name, images in shown.items():
        scores = f"{restored(images, truth, low)} | {distance(extractor, reference, images, label)}"
        print(f"| {name} | {scores} |", flush=True)
    for name, (run, _) in trained.items():
        pipeline = Pipeline.from_pretrained(run, precision="fast")
        few = {"image": low[: args.means], "classes": label[: args.means].tolist()}
        drawn = [pipeline.upscale(**few, seed=k, quiet=True).array for k in range(SAMPLES)]
        means = (np.mean(drawn[:k], axis=0) for k in (1, 4, SAMPLES))
        text = " | ".join(f"{psnr(x, truth[: args.means], 255).mean():.2f}" for x in means)
        print(f"| {name}, mean of 1, 4, {SAMPLES} | {text} |", flush=True)
    if args.figure:
        columns = 12
        cells = np.concatenate([images[:columns] for images in shown.values()])
        save_grid(cells, args.figure, columns, upscale=2)
    if args.base:
        print_cascades(args.base, trained, args.num, extractor, reference)


def print_cascades(
    run: str, trained: dict[str, tuple[str, Any]], num: int, extractor: Extractor, reference: Any
) -> None:
    """Print FD and accuracy of a base's images enlarged by each run, at several levels."""
    base = Pipeline.from_pretrained(run, precision="fast")
    base.config = changed(base.config, {"sample": {"cfg_scale": 1.0}})
    label = [i % 10 for i in range(num)]
    print("| cascade | noise | FD on scenes | accuracy |", flush=True)
    for name, (path, c) in trained.items():
        for noise in (0.0, 0.05, 0.1, 0.2, 0.4) if c.given.noise_most else (0.0,):
            cascade = Cascade(base, [Upsampler(path, noise)])
            images = cascade(label, seed=0, quiet=True)[1].array
            scores = distance(extractor, reference, images, np.asarray(label))
            print(f"| {name} | {noise:g} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
