"""python -m ditjax.sample: draw images from a run or from weights, as a PNG grid and an npz."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.config import Config, changed, check_used
from ditjax.data import clips
from ditjax.errors import UserError
from ditjax.files.atomic import write_atomic, write_json
from ditjax.files.paths import split_paths
from ditjax.files.store import place
from ditjax.parallel.processes import is_primary
from ditjax.runs.results import load_samples, save_grid, tiled_frames
from ditjax.sampling.cascade import Cascade, parse_upsamplers, stage_file
from ditjax.sampling.editing import EDITS, request_of
from ditjax.sampling.given import read_prompts
from ditjax.sampling.pipeline import (
    PRECISIONS,
    Pipeline,
    Source,
    open_run_source,
    open_source,
    precision_keys,
)
from ditjax.weights.networks import labels_text

SAMPLES = "samples.npz"
GRID_IMAGES = 100
MIN_GRID_SIDE = 32  # pixels; smaller images are enlarged in the grid


def save_sample_record(folder: Path, record: Mapping[str, Any], mp4: bool = False) -> None:
    """Write samples.png and samples.json beside the samples.npz in `folder`.

    Of clips samples.gif is written, too, and with `mp4` samples.mp4.
    """
    images, _ = load_samples(folder / SAMPLES, GRID_IMAGES)
    classes = record["classes"]
    columns = min(len(images), 10, len(classes or images))
    upscale = max(1, MIN_GRID_SIDE // images.shape[-3])
    save_grid(images, folder / "samples.png", columns, upscale=upscale)
    if mp4:
        frames = tiled_frames(images, columns, upscale=upscale)
        write_atomic(folder / "samples.mp4", clips.encode_mp4(frames))
    write_json(folder / "samples.json", record)


# Flags that abbreviate keys of the recipe.
_FLAGS: Mapping[str, tuple[str, Any, str]] = {
    "num": ("sample.num", int, "images to draw"),
    "cfg_scale": ("sample.cfg_scale", float, "guidance scale; 1 means no guidance"),
    "cfg_channels": ("sample.cfg_channels", str, "guided channels: three (the release) or all"),
    "steps": ("sample.steps", str, "sampling steps: 250, ddim50, or counts such as 10,15,20"),
    "sampler": ("sample.sampler", str, "a sampler, such as ddim or dpmpp_2m"),
    "eta": ("sample.eta", float, "noise of DDIM, from 0 to 1"),
    "batch_size": ("sample.batch_size", int, "images per batch, over all devices"),
    "negative": ("text.negative", str, "negative prompt"),
    "adapter": ("sample.adapters", str, "adapters (LoRA) to merge: PATH[:SCALE],..."),
    "seed": ("seed", int, "image i depends only on (seed, i)"),
}


def add_source(parser: cli.Parser) -> None:
    """Add the flags of a trained network, a run or weights, which `parse_source` opens."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", default="", help="a run's directory")
    source.add_argument(
        "--weights",
        default="",
        help="DiT weights (.pt, .safetensors), or a diffusers folder with a DiT or a DiTPipeline",
    )
    parser.add_argument(
        "--autoencoder", default="", help="the autoencoder, if the --weights are of a latent DiT"
    )
    cli.add_step(parser)
    cli.add_weights_options(parser)


def parse_source(parser: cli.Parser, argv: list[str]) -> tuple[argparse.Namespace, Config, Source]:
    """A command's flags, its checked recipe, and the network that its flags name.

    Raises UserError.
    """
    opened: list[Source] = []

    def recorded(args: argparse.Namespace) -> Mapping[str, Any]:
        if args.workdir:
            opened.append(open_run_source(args.workdir, args.step, args.class_names))
        else:
            opened.append(
                open_source(
                    args.weights,
                    args.autoencoder,
                    **cli.weights_options(args),
                    step=args.step,
                    class_names=args.class_names,
                )
            )
        return dataclasses.asdict(opened[0].config)

    if parser.parse_known_args(argv)[0].workdir:
        of_weights = ("autoencoder", "which", "leave_out", "heads", "num_classes", "numerics")
        cli.check_unused(parser, argv, of_weights, "with --workdir, whose recipe says it")
    args, config = cli.parse(parser, argv, recorded)
    return args, config, opened[0]


def _parser() -> cli.Parser:
    parser = cli.parser("sample", "Draw images from a run or from published weights.")
    add_source(parser)
    parser.add_argument("--out", default="", help="output folder (default: WORKDIR/drawn)")
    parser.add_argument(
        "--classes",
        default="",
        help="classes to cycle through, such as 207,n02099601,golden_retriever",
    )
    parser.add_argument(
        "--prompts",
        default="",
        help="of a network of texts: a file with a prompt in each line, or one prompt",
    )
    parser.add_argument(
        "--control",
        default="",
        help="control images of a run that has a control: IMAGE[,IMAGE..], one for each control",
    )
    for flag, (key, kind, text) in _FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, help=f"{text} (config.{key})")
    parser.add_argument(
        "--mp4",
        action="store_true",
        help="of clips, also write samples.mp4 (needs pip install 'ditjax[video]')",
    )
    parser.add_argument(
        "--edit",
        choices=EDITS,
        default="",
        help="edit images instead of drawing new ones, by config.edit",
    )
    parser.add_argument("--image", default="", help="images to edit, as files separated by commas")
    parser.add_argument(
        "--mask",
        default="",
        help="masks of --edit=inpaint, white where it draws: one, or as images",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="float32 (exact; the default for --weights), fast (float32 with the backend's rounded"
        " products) or bfloat16",
    )
    parser.add_argument(
        "--upsample",
        default="",
        help="runs that enlarge what is drawn, lowest first: RUN[:NOISE],.. (a cascade)",
    )
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
    """Run the command. Raises UserError."""
    args, config, source = parse_source(_parser(), argv)
    config = changed(config, _overrides(args))
    given = [key for flag, (key, _, _) in _FLAGS.items() if getattr(args, flag) is not None]
    ours = ("sample.", "control.", "edit.", "given.")
    words = [word[9:].partition("=")[0] for word in argv if word.startswith("--config.")]
    given += [word for word in words if word.startswith(ours)]
    check_used(changed(config, {"evaluate": {"guided_scale": 0.0}}), given)
    if args.mp4:
        clips.check_mp4(config.data.frames)
    flags = {"image": args.image, "mask": args.mask}
    edit = request_of(config, args.edit, flags, [key for key in given if key != "seed"])
    folder = place(args.out or place(args.workdir or ".") / "drawn")
    if folder.exists() and not folder.is_dir():  # before hours of work, not after
        raise UserError(f"--out={folder} is a file: give a folder.")
    pipeline = Pipeline(source, config)
    cascade = Cascade(pipeline, parse_upsamplers(args.upsample))
    if is_primary():
        print("\n".join((*source.notes, labels_text(config))), flush=True)
    # Without a number, as many as are given: of images and of classes.
    num = config.sample.num if not edit or "sample.num" in given else None
    record = pipeline.write(
        folder / (stage_file(0) if args.upsample else SAMPLES),
        args.classes,
        edit=edit,
        num=num,
        batch_size=args.batch_size,
        control=split_paths(args.control, "--control") if args.control else None,
        prompts=read_prompts(args.prompts) if args.prompts else None,
    )
    if args.upsample:
        record = cascade.write(folder, record, SAMPLES)
    if is_primary():
        save_sample_record(folder, record, args.mp4)
        num = record["sample"]["num"]
        print(f"{num} images in {folder}: samples.png, samples.npz, samples.json")
    return 0


if __name__ == "__main__":
    cli.run(main)
