"""python -m ditjax.evaluate: FD-digits and class accuracy of a DiT, PSNR of an autoencoder."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax import build, cli, programs, runs
from ditjax.classify import FEATURES, JUDGE, accuracy, recognise
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.io import data
from ditjax.io.assets import load_asset
from ditjax.io.checkpoint import is_primary
from ditjax.io.results import protocol_hash, save_grid, save_samples, write_json
from ditjax.metrics import frechet
from ditjax.models import classifier
from ditjax.parallel.mesh import make_mesh
from ditjax.pipeline import Samples, draw
from ditjax.sample import GRID_IMAGES
from ditjax.train import data_spec

EVALUATION_FILE = "evaluation.json"


@functools.cache
def _classifier(name: str) -> tuple[classifier.DigitsConvNet | classifier.DigitsMixer, Any]:
    params, record = load_asset(name)
    widths = dict(record["network"])
    return getattr(classifier, widths.pop("name"))(**widths), params


def see(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A shipped classifier on u8[N,H,W,C] of any size -> features f32[N,F], logits f32[N,10]."""
    small = data.resize_images(images, classifier.SIDE)
    if small.shape[-1] == 3:
        small = small.mean(-1, keepdims=True).round().astype(np.uint8)
    return recognise(*_classifier(name), small)


def fd_digits(images: np.ndarray, reference: frechet.Moments) -> float:
    """Fréchet distance to `reference` on our digit classifier's features: FD-digits, not FID."""
    features, _ = see(FEATURES, images)
    return frechet.frechet_distance(frechet.batch_moments(features), reference)


def class_accuracy(images: np.ndarray, label: np.ndarray) -> float:
    """How often an independent classifier sees the class that was asked for."""
    return accuracy(see(JUDGE, images)[1], label)


@functools.cache
def digits_reference(data_dir: str) -> tuple[frechet.Moments, float]:
    """(moments of the train split's features, FD-digits of the test split to them: the floor)."""
    moments = {}
    for split in ("train", "test"):
        images = data.load_arrays("digits", split, data_dir or None)["image"]
        moments[split] = frechet.batch_moments(see(FEATURES, images)[0])
    return moments["train"], frechet.frechet_distance(moments["test"], moments["train"])


class Evaluated(NamedTuple):
    """metrics name -> value, the protocol that fixes their meaning, and the samples."""

    metrics: dict[str, float]
    protocol: dict[str, Any]
    samples: dict[str, Samples]  # 'samples', and 'guided' when the recipe asks for it


def evaluate(c: Config, params: Any) -> Evaluated:
    """Draws config.evaluate.num_samples images and measures them against the train split."""
    if c.evaluate.features != "digits" or c.train.network != "dit":
        raise UserError(
            f"config.evaluate.features is {c.evaluate.features!r} for a {c.train.network}: expected"
            " 'digits' and a DiT."
        )
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    frozen = runs.load_autoencoder(c, mesh)
    label_of = None if c.evaluate.labels == "uniform" else range(c.data.num_classes)
    measure = functools.partial(draw, c, params, mesh, label_of=label_of, frozen=frozen)
    reference, floor = digits_reference(c.data.data_dir)
    samples = measure(c.evaluate.num_samples, cfg_scale=c.sample.cfg_scale)
    metrics = {
        "fd_digits": fd_digits(samples.images, reference),
        "accuracy": class_accuracy(samples.images, samples.label),
        "fd_digits_floor": floor,
    }
    sets = {"samples": samples}
    if c.evaluate.guided_scale not in (0, c.sample.cfg_scale):
        guided = measure(c.evaluate.guided_num, cfg_scale=c.evaluate.guided_scale)
        metrics["accuracy_guided"] = class_accuracy(guided.images, guided.label)
        sets["guided"] = guided
    return Evaluated(metrics, protocol_of(c, reference.count), sets)


def protocol_of(c: Config, reference_count: int) -> dict[str, Any]:
    """Everything that two results must share to be compared. The seed is not: it is what varies."""
    native = c.data.image_size == classifier.SIDE
    return {
        "metric": "FD-digits",
        "features_sha256": load_asset(FEATURES)[1]["sha256"],
        "judge_sha256": load_asset(JUDGE)[1]["sha256"],
        "reference": f"digits/train, {reference_count} images",
        "num_samples": c.evaluate.num_samples,
        "labels": c.evaluate.labels,
        "sampler": c.sample.sampler,
        "steps": c.sample.steps,
        "eta": c.sample.eta,
        "cfg_scale": c.sample.cfg_scale,
        "cfg_channels": c.sample.cfg_channels,
        "guided_scale": c.evaluate.guided_scale,
        "guided_num": c.evaluate.guided_num,
        "clip_x0": c.sample.clip_x0,
        "decoder": c.autoencoder.path if c.latent else "pixels",
        "ema_decay": c.train.ema_decay,
        "precision": c.model.dtype,
        "image_size": c.data.image_size,
        "resize": "none" if native else f"centre crop, bicubic to {classifier.SIDE}",
    }


def save(
    folder: Path,
    step: int,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    samples: Mapping[str, Samples],
) -> None:
    """evaluation.json, and NAME.npz and NAME.png of each sample set, in a run's directory."""
    for name, drawn in samples.items():
        save_samples(folder / f"{name}.npz", drawn.images, drawn.label)
        order = np.argsort(drawn.label[:GRID_IMAGES], kind="stable")  # the grid goes by class
        images = drawn.images[:GRID_IMAGES][order]
        save_grid(images, folder / f"{name}.png", 10, upscale=max(1, 32 // images.shape[1]))
    record = {
        "step": step, "metrics": metrics, "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
    }  # fmt: skip
    write_json(folder / EVALUATION_FILE, record)


def reconstruction_psnr(c: Config, params: Any) -> float:
    """Mean over config.evaluate.split of 10 log10(2² / mse) dB, decoding the posterior's mean.

    An image's mse is over its pixels in [-1, 1], the reconstruction clipped to them.
    """
    held_out = dataclasses.replace(data_spec(c), split=c.evaluate.split)

    @jax.jit
    def psnr(params: Any, x: jax.Array) -> jax.Array:
        again = build.reconstruct(c, params, x)
        mse = jnp.square(jnp.clip(again, -1, 1) - x).mean(axis=(1, 2, 3))
        return 10 * jnp.log10(4 / mse)

    size, values = c.train.batch_size, []
    for rows in data.in_order(held_out, size):
        x, count = rows["image"], len(rows["image"])
        # The last batch is filled up, so that one shape is compiled.
        x = np.pad(x, ((0, size - count), (0, 0), (0, 0), (0, 0)))
        with programs.precise(c):
            values.append(np.asarray(psnr(params, x))[:count])
    return float(np.concatenate(values).mean())


def evaluate_run(c: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Evaluates a run's newest averaged weights, saves the outcome in its directory."""
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    params, step = runs.load_ema(c, workdir, mesh)
    if c.train.network == "autoencoder":
        metrics = {"psnr_db": reconstruction_psnr(c, params)}
        protocol = {"metric": "PSNR", "split": c.evaluate.split, "image_size": c.data.image_size}
        samples: Mapping[str, Samples] = {}
    else:
        metrics, protocol, samples = evaluate(c, params)
    if is_primary():
        save(Path(workdir), step, metrics, protocol, samples)
    return metrics


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser(
        "evaluate", "FD-digits and class accuracy of a DiT's samples, PSNR of an autoencoder."
    )
    cli.add_workdir_of_a_run(parser)
    args, config = cli.parse(parser, argv)
    for name, value in evaluate_run(config, args.workdir).items():
        print(f"{name:<20} {value:.4f}")
    return 0


if __name__ == "__main__":
    cli.run(main)
