"""python -m ditjax.sample: images from a run or from weights: PNG grid, npz, and what made them."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.files.atomic import write_json
from ditjax.parallel.processes import is_primary
from ditjax.runs.results import load_samples, save_grid
from ditjax.sampling.pipeline import (
    PRECISIONS,
    Pipeline,
    Source,
    open_run,
    open_source,
    precision_keys,
)

SAMPLES = "samples.npz"
GRID_IMAGES = 100
MIN_GRID_SIDE = 32  # pixels of one image in a grid, enlarged if it is smaller


def save(folder: Path, record: Mapping[str, Any]) -> None:
    """samples.png and samples.json of the samples.npz that is there."""
    images, _ = load_samples(folder / SAMPLES, GRID_IMAGES)
    classes = record["classes"]
    columns = min(len(images), 10 if classes is None else max(1, min(len(classes), 10)))
    upscale = max(1, MIN_GRID_SIDE // images.shape[1])
    save_grid(images, folder / "samples.png", columns, upscale=upscale)
    write_json(folder / "samples.json", record)


# Flags that are short for keys of the recipe.
_FLAGS: Mapping[str, tuple[str, Any, str]] = {
    "num": ("sample.num", int, "images to draw"),
    "cfg_scale": ("sample.cfg_scale", float, "guidance scale; 1 is none"),
    "cfg_channels": ("sample.cfg_channels", str, "guided channels: three (the release) or all"),
    "steps": ("sample.steps", str, "sampling steps: 250, ddim50 or counts as 10,15,20"),
    "sampler": ("sample.sampler", str, "ddpm or ddim"),
    "eta": ("sample.eta", float, "DDIM's noise, from 0 to 1"),
    "batch_size": ("sample.batch_size", int, "images at a time, over all devices"),
    "seed": ("seed", int, "image i depends on (seed, i) alone"),
}


def _parser() -> cli.Parser:
    parser = cli.parser("sample", "Draws images from a run or from published weights.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", default="", help="a run's directory")
    source.add_argument(
        "--weights",
        default="",
        help="a DiT's weights (.pt, .safetensors) or a diffusers folder, of a DiT or a DiTPipeline",
    )
    parser.add_argument("--autoencoder", default="", help="the autoencoder of latent --weights")
    parser.add_argument("--out", default="", help="where to write (default: WORKDIR/drawn)")
    parser.add_argument(
        "--classes", default="", help="classes to cycle through, as 207,n02099601,golden_retriever"
    )
    for flag, (key, kind, text) in _FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, help=f"{text} (config.{key})")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="float32 (exact: what --weights get unasked), fast (the backend's rounded products of"
        " float32) or bfloat16",
    )
    cli.add_step(parser)
    cli.add_reading_of_weights(parser)
    cli.add_processes(parser)
    return parser


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for flag, (key, _, _) in _FLAGS.items():
        if getattr(args, flag) is not None:
            *sections, leaf = key.split(".")
            group = changes.setdefault(sections[0], {}) if sections else changes
            group[leaf] = getattr(args, flag)
    if args.precision:
        changes["model"] = precision_keys(args.precision)
    return changes


def main(argv: list[str]) -> int:
    """The command."""
    opened: list[Source] = []

    def recorded(args: argparse.Namespace) -> Mapping[str, Any]:
        if args.workdir:
            opened.append(open_run(args.workdir, args.step))
        else:
            opened.append(
                open_source(
                    args.weights,
                    args.autoencoder,
                    which=args.which,
                    heads=args.heads,
                    numerics=args.numerics,
                    step=args.step,
                )
            )
        return dataclasses.asdict(opened[0].config)

    args, config = cli.parse(_parser(), argv, recorded)
    config = changed(config, _overrides(args))
    folder = Path(args.out or Path(args.workdir or ".") / "drawn")
    if folder.exists() and not folder.is_dir():  # before hours of work, not after
        raise UserError(f"--out={folder} is a file: give a folder.")
    pipeline = Pipeline(opened[0], config)
    num = config.sample.num
    record = pipeline.write(folder / SAMPLES, args.classes, num=num, batch_size=args.batch_size)
    if is_primary():
        save(folder, record)
        print(f"{num} images in {folder}: samples.png, samples.npz, samples.json")
    return 0


if __name__ == "__main__":
    cli.run(main)
