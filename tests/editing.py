"""How well a run on digits completes and denoises held-out ones; by hand.

    ditjax train --config=digits:4x96x3/2 --workdir=runs/edited
    python -m tests.editing runs/edited --figure=docs/editing.png

Completion of the lower half: four completions of each of --num test digits, without its label. The
energy score of the missing half, mean ‖x - truth‖ - ½ mean ‖x - x'‖, is smallest for the true
posterior (Gneiting & Raftery 2007); the judge names the completed digit. Beside them: the Gaussian
with the mean and covariance of the training digits, given the known half, and the four training
digits nearest in it, and each method with the perfect denoiser of that Gaussian for a network.

Denoising at three σ, known and estimated from each image: PSNR beside that Gaussian's mean.
"""

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config, changed
from ditjax.data.crop import normalize
from ditjax.data.records import load_arrays
from ditjax.diffusion.inverse import METHODS, known_pixels
from ditjax.diffusion.samplers import initial_noise, per_sample_noise, walk
from ditjax.diffusion.solvers import SAMPLERS
from ditjax.evaluation.classifiers import JUDGE, predict_class
from ditjax.metrics.restoration import psnr
from ditjax.runs import opening
from ditjax.runs.results import save_grid
from ditjax.sampling.editing import inpaint_request
from ditjax.sampling.given import given_known
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks.objective import objective_of, times_of
from tests.denoisers import linear_mean

COMPLETIONS = 4
ARMS: dict[str, dict[str, Any]] = {
    "replace": {"method": "replace"},
    "repaint (5, 5)": {"method": "repaint", "jump": 5, "resample": 5},
    "ddnm": {"method": "ddnm"},
    "pigdm": {"method": "pigdm"},
    "dps, 0.3": {"method": "dps", "strength": 0.3},
    "dps, 1": {"method": "dps", "strength": 1.0},
}


def energy_score(drawn: np.ndarray, truth: np.ndarray) -> str:
    """drawn f64[K,N,D], truth f64[N,D] -> the mean over N and its standard error."""
    K = len(drawn)
    to_truth = np.linalg.norm(drawn - truth, axis=-1).mean(0)
    between = np.linalg.norm(drawn[:, None] - drawn[None], axis=-1).sum((0, 1)) / (K * (K - 1))
    each = to_truth - between / 2
    return f"{each.mean():.3f} ± {each.std(ddof=1) / len(each) ** 0.5:.3f}"


def gaussian(train: np.ndarray, known: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Completions f64[K,N,D] by the conditional of a Gaussian fitted to `train` f64[M,D]."""
    mean, cov = train.mean(0), np.cov(train.T) + 1e-4 * np.eye(train.shape[1])
    a, b = np.flatnonzero(known), np.flatnonzero(~known)
    gain = np.linalg.solve(cov[np.ix_(a, a)], cov[np.ix_(a, b)]).T
    rest = cov[np.ix_(b, b)] - gain @ cov[np.ix_(a, b)]
    noise = np.random.default_rng(0).standard_normal((COMPLETIONS, len(rows), len(b)))
    completed = np.repeat(rows[None], COMPLETIONS, axis=0)
    completed[..., b] = mean[b] + (rows[:, a] - mean[a]) @ gain.T
    completed[..., b] += noise @ np.linalg.cholesky(rest).T
    return completed


def nearest(train: np.ndarray, known: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Completions f64[K,N,D] by the training digits that are nearest in what is known."""
    square = ((rows[:, None, known] - train[None, :, known]) ** 2).sum(-1)
    chosen = np.argsort(square, axis=1)[:, :COMPLETIONS].T
    return np.where(known, rows, train[chosen])


def completions(
    run: str,
    images: np.ndarray,
    known: np.ndarray,
    label: np.ndarray | None,
    arms: dict[str, dict[str, Any]] = ARMS,
) -> Iterator[tuple[str, Any]]:
    """Each arm, and its completions u8[K,N,H,W,C], of the labels i[N] or of none."""
    pipeline = Pipeline.from_pretrained(run)
    request = inpaint_request(pipeline.config, images, ~known.reshape(images.shape[1:3]))
    for name, edit in arms.items():
        sample = {"cfg_scale": 1.0, "batch_size": len(images)}
        c = changed(pipeline.config, {"edit": edit, "sample": sample})
        began = time.monotonic()
        drawn = pipeline._drawer.whole(
            *(c, pipeline._params, COMPLETIONS * len(images)),
            seed=0,
            label_of=[c.data.num_classes] if label is None else label.tolist(),
            given=given_known(request.given),
        )
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        yield name, drawn.images.reshape(COMPLETIONS, *images.shape)


def ideal(
    c: Config, train: np.ndarray, known: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Each arm with the perfect denoiser of that Gaussian for a network: f64[K,N,D]."""
    objective, times, N = objective_of(c), times_of(c), len(rows)
    values, vectors = np.linalg.eigh(np.cov(train.T))
    mean, w, V = (jnp.asarray(x, jnp.float32) for x in (train.mean(0), values.clip(0), vectors))

    def denoise(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        at = objective.process.at(objective.process.time_of_noise(timesteps))
        alpha, sigma, flat = at.alpha[:, None], at.sigma[:, None], x.reshape(len(x), -1)
        gain = alpha * w / (alpha**2 * w + sigma**2)
        x0 = mean + (gain * ((flat - alpha * mean) @ V)) @ V.T
        return ((flat - alpha * x0) / sigma).reshape(x.shape)

    y = jnp.asarray(np.tile(rows, (COMPLETIONS, 1)).reshape(-1, 8, 8, 1), jnp.float32)
    mask = jnp.broadcast_to(jnp.asarray(known, jnp.float32).reshape(1, 8, 8, 1), y.shape)
    keys = jax.random.split(jax.random.key(0), len(y))
    x_T, noise = initial_noise(keys, y.shape[1:]), per_sample_noise(keys, y.shape[1:])
    for name, edit in ARMS.items():
        method, options = METHODS[edit["method"]], {k: v for k, v in edit.items() if k != "method"}
        settings = (objective, times, known_pixels(y, mask))
        wrapped = method.wrap(denoise, objective, settings[-1], **options) if method.wrap else None
        network, made = wrapped or denoise, SAMPLERS["ddim"].steps
        assert made is not None
        steps = made(network, objective, times, x_T, clip_x0=True, eta=1.0)
        steps = method.chain(steps, *settings, **options) if method.chain else steps
        x0 = jax.jit(functools.partial(walk, steps, noise=noise))(x_T)
        yield f"{name}, ideal", np.asarray(x0, float).reshape(COMPLETIONS, N, -1)


def print_denoised(run: str, images: np.ndarray, bank: np.ndarray) -> None:
    """Print PSNR in dB, the mean over images: bytes clipped, the same noise for all."""
    pipeline = Pipeline.from_pretrained(run)
    mean, cov = 127.5 * (bank.mean(0) + 1), 127.5**2 * np.cov(bank.T)
    noise = np.random.default_rng(1).standard_normal(images.shape)
    arguments: dict[str, Any] = {"batch_size": len(images), "cfg_scale": 1.0, "quiet": True}

    def mean_psnr(x: np.ndarray) -> float:
        return float(psnr(np.clip(x.reshape(images.shape), 0, 255), images, 255).mean())

    print("| σ | noisy | Gaussian | network | network, σ estimated |")
    for sigma in (15.0, 25.0, 50.0):
        y = images + sigma * noise
        wiener, _ = linear_mean(y.reshape(len(y), -1), mean, cov, sigma)
        known, blind = (pipeline.denoise(y, s, **arguments).array for s in (sigma, 0.0))
        row = " | ".join(
            f"{mean_psnr(np.asarray(x, float)):.2f}" for x in (y, wiener, known, blind)
        )
        print(f"| {sigma:g} | {row} |", flush=True)


def main() -> None:
    """Print two tables, and save a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--num", type=int, default=359)
    parser.add_argument("--labelled", action="store_true", help="complete digits of known classes")
    parser.add_argument("--masked", default="", help="a run that was trained on masks")
    parser.add_argument("--figure", default="")
    args = parser.parse_args()
    train, test = (load_arrays("digits", name) for name in ("train", "test"))
    images, label = test["image"][: args.num], test["label"][: args.num]
    known = np.repeat(np.arange(8) < 4, 8)
    rows, bank = (
        normalize(x).reshape(len(x), -1).astype(np.float64) for x in (images, train["image"])
    )
    arms = {"Gaussian": gaussian(bank, known, rows), "nearest": nearest(bank, known, rows)}
    print_denoised(args.run, images, bank)
    shown = {"truth": images[None], "known": np.where(known.reshape(8, 8, 1), images, 128)[None]}
    given = (images, known, label if args.labelled else None)
    trained = completions(args.masked, *given, {"trained on masks": {}}) if args.masked else ()
    for name, drawn in (*completions(args.run, *given), *trained):
        arms[name] = normalize(drawn).reshape(COMPLETIONS, len(images), -1).astype(np.float64)
    print("| method | energy score | RMSE of the mean of 4 | judge's accuracy |")
    arms |= ideal(opening.recipe_of(args.run), bank, known, rows)
    for name, x in arms.items():
        byte = np.clip(127.5 * x + 128, 0, 255).astype(np.uint8).reshape(COMPLETIONS, *images.shape)
        shown[name] = byte
        named = np.mean([np.mean(predict_class(JUDGE, each) == label) for each in byte])
        score = energy_score(x[..., ~known], rows[:, ~known])
        rmse = np.sqrt(np.mean((x.mean(0) - rows)[:, ~known] ** 2))
        print(f"| {name} | {score} | {rmse:.3f} | {named:.3f} |")
    print(f"| truth | 0 | 0 | {np.mean(predict_class(JUDGE, images) == label):.3f} |")
    if args.figure:
        columns = [int(np.flatnonzero(label == digit)[1]) for digit in range(10)] * 2
        cells = [
            x[0, i] if k < 10 else x[-1, i] for x in shown.values() for k, i in enumerate(columns)
        ]
        save_grid(np.stack(cells), args.figure, len(columns), upscale=3)


if __name__ == "__main__":
    main()
