"""python -m ditjax.encode: a data set's latents, cached: moments of every image and its mirror."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax import build, cli, programs, runs
from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.io import data, latents
from ditjax.io.log import Progress
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.train import check_data, data_spec


def encode(c: Config, out: str | os.PathLike[str]) -> Path:
    """Writes the latents of config.data's split to `out`; read them as data set latents:OUT."""
    if not c.latent:
        raise UserError("config.autoencoder.kind is 'none': there is nothing to encode with.")
    if jax.process_count() > 1:
        raise UserError("encode runs in one process: start it on one machine.")
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    info = check_data(c)
    frozen = runs.load_autoencoder(c, mesh)
    side = c.input_size
    return latents.write(
        out,
        (side, side, c.input_channels),
        info.class_names,
        {c.data.split: _records(c, mesh, frozen, info.num_examples)},
        {
            "images": info.full_name,
            "split": c.data.split,
            "image_size": c.data.image_size,
            "autoencoder_sha256": _digest(frozen),
        },
    )


def _digest(params: Any) -> str:
    """SHA-256 of all parameters, by path."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        digest.update(rules.path_of(path).encode() + b"\0" + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _records(c: Config, mesh: Mesh, frozen: Any, total: int) -> Iterator[latents.Record]:
    """The records of the split in order, a batch over the mesh at a time."""
    size = c.train.batch_size
    rules.check_batch(size, mesh, "config.train.batch_size")
    sharding = rules.batch_sharding(mesh)
    moments_of = jax.jit(lambda params, images: build.encode(c, params, images))
    progress = Progress("encode", total, "images")
    for rows in data.in_order(data_spec(c), size):
        count = len(rows["label"])
        sides = []
        for images in (rows["image"], rows["image"][:, :, ::-1]):
            # The last batch is filled up, so that one shape is compiled.
            filled = np.pad(images, ((0, size - count), (0, 0), (0, 0), (0, 0)))
            with programs.precise(c):
                moments = moments_of(frozen, jax.device_put(filled, sharding))
            sides.append([np.asarray(value)[:count] for value in moments])
        mean, log_variance = (np.stack(pair, axis=1) for pair in zip(*sides, strict=True))
        for i in range(count):
            yield {"mean": mean[i], "log_variance": log_variance[i], "label": int(rows["label"][i])}
        progress.report(int(rows["index"][-1]) + 1)


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("encode", "Caches a data set's latents: moments of images and mirrors.")
    parser.add_argument("--out", required=True, help="where to write: read it as latents:OUT")
    args, config = cli.parse(parser, argv)
    folder = encode(config, args.out)
    print(f"{folder}: train on it with --config.data.name=latents:{folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
