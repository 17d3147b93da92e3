"""python -m ditjax.evaluate: score a run by its recipe, or any samples against any reference."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditjax import cli
from ditjax.config import SHIPPED_FEATURES, Config, changed, migrated
from ditjax.data.folders import report_reading
from ditjax.data.images import open_images
from ditjax.errors import UserError
from ditjax.evaluation import scoring
from ditjax.evaluation.evaluator import GUIDED_FILE, Evaluator, scores_protocol
from ditjax.evaluation.features import check_frames_of, open_extractor
from ditjax.evaluation.scoring import open_reference
from ditjax.evaluation.validation import Validator, held_out_means
from ditjax.files import faults, npz
from ditjax.files.atomic import load_json, protocol_hash, write_json
from ditjax.files.npz import read_provenance
from ditjax.files.store import place
from ditjax.parallel.mesh import make_mesh, mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.runs.results import (
    EVALUATION_FILE,
    SAMPLES_FILE,
    checked_labels,
    load_samples,
    save_grid,
)
from ditjax.sample import GRID_IMAGES
from ditjax.sampling.draw import load_model
from ditjax.tasks import make_task


def save_evaluation(
    folder: Path,
    step: int,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    reference: str = "",
    average: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write evaluation.json, and NAME.png for each sample set, to a run's directory.

    `average` is the `average_record` of the weights. Returns the record. Only the first process
    writes. What was there of another protocol is kept, and a line says where.
    """
    record = {
        "step": step,
        "metrics": metrics,
        "reference": reference,
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        **(average or {}),
    }
    if not is_primary():
        return record
    for name in (SAMPLES_FILE, GUIDED_FILE):
        if (folder / name).exists() and "num_samples" in protocol:
            save_picture(folder / name)
    _keep_other(folder, record["protocol_hash"])
    write_json(folder / EVALUATION_FILE, record)
    return record


def _keep_other(folder: Path, protocol: str) -> None:
    """Keep a run's evaluation by another protocol as evaluation-HASH.json."""
    try:
        there = load_json(folder / EVALUATION_FILE)
        other = there["protocol_hash"]
    except (OSError, ValueError, TypeError, KeyError):  # none, or none that could be read
        return
    if other != protocol:
        kept = folder / f"evaluation-{other}.json"
        write_json(kept, there)
        report_reading(f"the evaluation of another protocol, {other}, is kept as {kept}")


def save_picture(samples: Path) -> None:
    """Write NAME.png beside NAME.npz: a grid of its first samples, sorted by class."""
    images, label = load_samples(samples, GRID_IMAGES)
    order = np.argsort(np.asarray(label), kind="stable")
    upscale = max(1, 32 // images.shape[-3])
    save_grid(images[order], samples.with_suffix(".png"), 10, upscale=upscale)


def evaluate_samples(
    samples: str,
    reference: str,
    features: str,
    *,
    batch_size: int = 0,
    seed: int = 0,
    save_reference: str = "",
) -> dict[str, Any]:
    """Score the images in `samples` against `reference`.

    Returns {samples, metrics, reference, protocol, protocol_hash}. Raises UserError for inputs
    that cannot be read or compared.
    """
    mesh = make_mesh(-1, 1)
    images = open_images(samples)
    report_reading(f"samples: {images}")
    sampling, label = read_sample_record(images.path)
    extractor = open_extractor(features, mesh, batch_size)
    check_frames_of(extractor, images.frames, str(images.path))
    against = open_reference(
        reference, extractor, images.height, save_to=save_reference, frames=images.frames
    )
    batches = images.batches(extractor.batch_size)
    extracted = scoring.extract_features(extractor, batches, images.count, title="samples")
    metrics = scoring.score(
        extracted, against.statistics, against.pool, family=extractor.family, seed=seed
    )
    if extracted.predicted is not None and label is not None:
        metrics["accuracy"] = float(np.mean(extracted.predicted == label))
    # How images from other programs were made is unknown: only their size is recorded.
    sampling = sampling or {"sample_size": [images.height, images.width]}
    protocol = scores_protocol(extractor, against, images.count, sampling)
    return {
        "samples": str(images.path),
        "metrics": metrics,
        "reference": against.name,
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
    }


def read_sample_record(path: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return (sampling settings, labels) of a ditjax sample file; {} and None for other files."""
    if faults.is_folder(path):
        return {}, None
    with npz.reading(path) as archive:
        sampling = read_provenance(archive).get("sampling", {})
        if not isinstance(sampling, dict):
            raise UserError(f"{path}: the sampling in its provenance is not a JSON object.")
        if "label" not in npz.names(archive):
            return sampling, None
        (count, *_), _ = npz.shape_and_dtype(archive, "arr_0")
        return sampling, checked_labels(path, npz.read_array(archive, "label"), count)


def evaluate_run(
    c: Config, workdir: str | os.PathLike[str], step: Step = "latest"
) -> dict[str, Any]:
    """Evaluate a run's checkpoint by its recipe. Returns the record, saved in its directory too."""
    mesh = mesh_of(c)
    task = make_task(c, mesh)
    if task.sampling is None:
        params, step = opening.load_weights(c, task, workdir, mesh, step)
        metrics, protocol = held_out_means(c, mesh, params)
        return save_evaluation(place(workdir), step, metrics, protocol)
    if c.evaluate.features == "none" and any(score.num for score in task.scores):
        params, step = opening.load_weights(c, task, workdir, mesh, step)
        validator = Validator(mesh, task.frozen(mesh))
        return save_evaluation(place(workdir), step, validator(c, params), validator.protocol(c))
    evaluator = Evaluator(c, mesh, task.frozen(mesh))
    params, model = load_model(c, workdir, mesh, step)
    found = evaluator.of_run(c, params, place(workdir), model)
    average = {name: model[name] for name in ("average",) if name in model}
    return save_evaluation(
        place(workdir), model["step"], found.metrics, found.protocol, found.reference, average
    )


# Flags that abbreviate keys of the recipe when a run is evaluated.
FLAGS = {
    "features": f"inception:WEIGHTS, dinov2:WEIGHTS, {', '.join(SHIPPED_FEATURES)}, or a function's"
    " dotted name (config.evaluate.features)",
    "reference": "statistics (npz with mu, sigma), an npz or folder of images, or DATASET[/SPLIT];"
    " default for a run: its training images (config.evaluate.reference)",
}


def _parser() -> cli.Parser:
    parser = cli.parser(
        "evaluate",
        "Score a run's samples, drawn by its recipe, or any --samples, and print the protocol: FID,"
        " sFID, IS, KID, MIND, precision, recall, density, coverage; FD-digits or FD-mnist"
        " on the features of a shipped classifier; PSNR and rFID for an autoencoder's run.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", default="", help="a run's directory")
    source.add_argument(
        "--samples",
        default="",
        help="an npz with arr_0 u8[N,H,W,C], a folder of PNGs, or a run's directory",
    )
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag}", default="", help=text)
    cli.add_step(parser)
    parser.add_argument("--out", default="", help="JSON file for the result")
    parser.add_argument(
        "--save_reference", default="", help="npz file to save the reference's statistics to"
    )
    parser.add_argument(
        "--batch_size", type=int, default=0, help="with --samples: images per batch"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --samples: seed of intervals and KID subsets"
    )
    cli.add_processes(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    parser = _parser()
    args, _ = parser.parse_known_args(argv)
    if args.samples and not rundir.is_run(args.samples):
        args = parser.parse_args(argv)  # there is no recipe: --config is refused
        if args.distributed or args.coordinator:
            raise UserError(
                f"--samples={args.samples} are scored by one process: leave --distributed out."
            )
        opening.check_no_step(args.samples, args.step)
        return _evaluate_samples(args)
    workdir = args.workdir or args.samples
    of_samples = ("batch_size", "seed", "save_reference")
    cli.check_unused(parser, argv, of_samples, "when a run is evaluated by its recipe")

    def recorded(_: argparse.Namespace) -> Mapping[str, Any]:
        return migrated(rundir.read_recipe(workdir))

    args, config = cli.parse(parser, argv, recorded)
    given = {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag)}
    _report(evaluate_run(changed(config, {"evaluate": given}), workdir, args.step), args.out)
    return 0


def _evaluate_samples(args: argparse.Namespace) -> int:
    for flag in FLAGS:
        if not getattr(args, flag):
            raise UserError(f"--samples={args.samples} needs --{flag}: {FLAGS[flag]}.")
    if args.batch_size < 0 or not 0 <= args.seed < 1 << 32:
        raise UserError(
            f"--batch_size={args.batch_size} --seed={args.seed}: expected at least 0, and a seed"
            " below 2**32."
        )
    evaluated = evaluate_samples(
        args.samples,
        args.reference,
        args.features,
        batch_size=args.batch_size,
        seed=args.seed,
        save_reference=args.save_reference,
    )
    _report(evaluated, args.out)
    return 0


def _report(record: Mapping[str, Any], out: str) -> None:
    if not is_primary():
        return
    for name, value in record["metrics"].items():
        print(f"{name:<32} {value:z.4f}")
    print(f"{'protocol_hash':<32} {record['protocol_hash']}")
    if out:
        write_json(out, record)


if __name__ == "__main__":
    cli.run(main)
