"""python -m ditjax.sample: images from a run: PNG grid, npz, and a JSON of what made them."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ditjax import cli, programs, runs
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.io.checkpoint import is_primary
from ditjax.io.log import Progress
from ditjax.io.results import save_grid, save_samples, write_atomic
from ditjax.parallel.mesh import make_mesh

GRID_IMAGES = 100


class Samples(NamedTuple):
    """images u8[N,H,W,C], label i32[N], and the seconds that drawing took."""

    images: np.ndarray
    label: np.ndarray
    seconds: float


def draw(
    c: Config,
    params: Any,
    mesh: Mesh,
    num: int,
    *,
    cfg_scale: float,
    label_of: Sequence[int] | None = None,
    frozen: Any = None,
) -> Samples:
    """Samples 0..num-1 of a recipe; sample i takes label_of[i % len], or a uniform one of its own.

    `frozen` are a latent recipe's autoencoder parameters.
    """
    program = programs.sampling(c, mesh, guided=cfg_scale != 1, frozen=frozen)
    size = program.batch_size
    began = time.monotonic()
    images, label = [], []
    progress = Progress("sample", num, "images")
    for start in range(0, num, size):
        wanted = None
        if label_of is not None:
            indices = np.arange(start, start + size)
            wanted = np.asarray(label_of, np.int32)[indices % len(label_of)]
        drawn, labels = program.draw(params, start, wanted, cfg_scale)
        images.append(drawn)
        label.append(labels)
        progress.report(min(start + size, num))
    return Samples(
        np.concatenate(images)[:num], np.concatenate(label)[:num], time.monotonic() - began
    )


def parse_classes(text: str, num_classes: int) -> list[int]:
    """'3,7,7' -> [3, 7, 7]. Raises UserError for what is no class of the data set."""
    classes = []
    for word in text.split(","):
        if not word.strip().isdigit() or int(word) >= num_classes:
            raise UserError(
                f"--classes holds {word!r}: expected class numbers from 0 to {num_classes - 1},"
                " separated by commas."
            )
        classes.append(int(word))
    return classes


def sample(
    c: Config, workdir: str | os.PathLike[str], out: str | os.PathLike[str], classes: str = ""
) -> Path:
    """Draws config.sample.num images from a run's averaged weights into `out`."""
    if c.train.network != "dit":
        raise UserError(f"{workdir} is a run of a {c.train.network}: only a DiT draws samples.")
    label_of = parse_classes(classes, c.data.num_classes) if classes else None
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    params, step = runs.load_ema(c, workdir, mesh)
    frozen = runs.load_autoencoder(c, mesh)
    samples = draw(
        c, params, mesh, c.sample.num, cfg_scale=c.sample.cfg_scale, label_of=label_of,
        frozen=frozen,
    )  # fmt: skip
    folder = Path(out)
    if is_primary():
        save_samples(folder / "samples.npz", samples.images, samples.label)
        images = samples.images[:GRID_IMAGES]
        columns = 10 if label_of is None else max(1, min(len(label_of), 10))
        save_grid(images, folder / "samples.png", columns, upscale=max(1, 32 // images.shape[1]))
        record = {
            "run": str(workdir), "step": step, "seed": c.seed, "classes": label_of,
            "sample": dataclasses.asdict(c.sample), "seconds": round(samples.seconds, 3),
        }  # fmt: skip
        write_atomic(folder / "samples.json", (json.dumps(record, indent=1) + "\n").encode())
    return folder


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("sample", "Draws images from a run.")
    cli.add_workdir_of_a_run(parser)
    parser.add_argument("--out", default="", help="where to write (default: WORKDIR/drawn)")
    parser.add_argument("--classes", default="", help="class numbers to cycle through, as 3,7,7")
    args, config = cli.parse(parser, argv)
    out = args.out or Path(args.workdir) / "drawn"
    folder = sample(config, args.workdir, out, args.classes)
    print(f"{config.sample.num} images in {folder}: samples.png, samples.npz, samples.json")
    return 0


if __name__ == "__main__":
    cli.run(main)
