"""python -m ditjax.encode: cache a data set's latents, for every image and its mirror image."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax import cli
from ditjax.config import Config
from ditjax.data import latents, stream
from ditjax.data.records import HostBatch
from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.parallel import processes, rules
from ditjax.parallel.mesh import mesh_of
from ditjax.runs import opening
from ditjax.runs.log import Progress
from ditjax.tasks import autoencoder
from ditjax.training.program import precise


@lease.scope()
def encode_dataset(
    c: Config,
    out: str | os.PathLike[str],
    *,
    shard_mb: int = latents.SHARD_MB,
    index: int = 0,
    count: int = 1,
) -> int:
    """Write the latents of config.data's split to `out`; the data set latents:OUT reads them.

    A damaged image that config.data.max_damaged allows is skipped: in its place is the next
    readable one, and damaged.txt beside the latents names it. Each latent is the posterior's mean
    and log variance. An interrupted call resumes at the first missing shard. Process `index` of
    `count` writes every count-th shard. Returns the number of shards that other processes still
    have to write; at 0 the data set is complete. Raises UserError.
    """
    _check(c, index, count)
    mesh = mesh_of(c)
    size = c.train.batch_size
    rules.check_batch(size, mesh, "config.train.batch_size")
    info = opening.check_data(c)
    frozen = autoencoder.load_frozen(c, mesh)
    side = c.input_size
    opening.acquire_lease(out, f".encode-{index}-of-{count}.lease")
    provenance = {
        "images": info.full_name,
        "split": c.data.split,
        "image_size": c.data.image_size,
        "autoencoder_sha256": opening.digest(frozen),
        "dtype": c.model.dtype,
        "matmul": c.model.matmul,
        latents.STATISTICS: c.autoencoder.statistics,
    }
    shape = (side, side, c.input_channels)
    writer = latents.LatentWriter(
        out, c.data.split, shape, info.class_names, info.num_examples, provenance, shard_mb
    )
    missing = writer.missing(index, count)
    damaged = writer.folder / stream.DAMAGED_FILE
    warn = stream.record_warnings(damaged)
    # The images are opened once for all shards; no batch spans two shards.
    with contextlib.closing(stream.in_order(opening.data_spec(c), size, missing, warn)) as images:
        encoded = _encoded(c, mesh, frozen, images)
        total = sum(map(len, writer.shards(index, count)))
        done = total - sum(map(len, missing))
        progress = Progress("encode", total, "images", start=done)
        for shard in missing:
            batches = itertools.islice(encoded, -(-len(shard) // size))
            writer.write(shard, _records(batches, progress, done))
            done += len(shard)
    if damaged.exists():
        print(f"{damaged} names the images that were skipped for the next readable ones")
    remaining = len(writer.missing())
    if not remaining:
        writer.finish()
    return remaining


def _check(c: Config, index: int, count: int) -> None:
    """Raise UserError for what cannot be encoded here."""
    if not c.latent:
        raise UserError("config.autoencoder.kind is 'none': there is nothing to encode with.")
    if c.data.frames > 1:
        raise UserError(
            f"config.data.frames is {c.data.frames}: latents are cached of images alone; train on"
            " the clips themselves, whose frames are encoded at each step."
        )
    if jax.process_count() > 1:
        raise UserError(
            "encode runs in one process: start it on one machine, or one process per machine"
            " with --index=K --count=N."
        )
    if not 0 <= index < count:
        raise UserError(f"--index={index} --count={count}: expected an index from 0 to count - 1.")


def _encoded(
    c: Config, mesh: Mesh, frozen: Any, images: Iterable[HostBatch]
) -> Iterator[HostBatch]:
    """Encode images f32[b,H,W,C]: mean and log_variance f32[b,2,h,w,c], label i32[b]."""
    size = c.train.batch_size
    sharding = rules.batch_sharding(mesh)
    moments_of = jax.jit(lambda params, images: autoencoder.encode_images(c, params, images))
    for rows in images:
        count = len(rows["label"])
        sides = []
        for side in (rows["image"], rows["image"][:, :, ::-1]):
            filled = processes.padded(side, size)
            with precise(c):
                moments = moments_of(frozen, jax.device_put(filled, sharding))
            sides.append([np.asarray(value)[:count] for value in moments])
        mean, log_variance = (np.stack(pair, axis=1) for pair in zip(*sides, strict=True))
        yield {"mean": mean, "log_variance": log_variance, "label": rows["label"]}


def _records(
    batches: Iterable[HostBatch], progress: Progress, done: int
) -> Iterator[latents.LatentRecord]:
    for rows in batches:
        for mean, log_variance, label in zip(
            rows["mean"], rows["log_variance"], rows["label"], strict=True
        ):
            yield {"mean": mean, "log_variance": log_variance, "label": int(label)}
        done += len(rows["label"])
        progress.report(done)


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    parser = cli.parser(
        "encode", "Cache a data set's latents, for every image and its mirror image."
    )
    parser.add_argument(
        "--out", required=True, help="output folder; train on it as data set latents:OUT"
    )
    parser.add_argument(
        "--shard_mb",
        type=int,
        default=latents.SHARD_MB,
        help="MiB per file; an interruption loses at most one file of work",
    )
    parser.add_argument(
        "--index", type=int, default=0, help="in an array job: the number of this job, from 0"
    )
    parser.add_argument("--count", type=int, default=1, help="in an array job: the number of jobs")
    args, config = cli.parse(parser, argv)
    remaining = encode_dataset(
        config, args.out, shard_mb=args.shard_mb, index=args.index, count=args.count
    )
    if remaining:
        print(f"{args.out}: this job's shards are written, {remaining} of other jobs are missing")
    else:
        print(f"{args.out}: train on it with --config.data.name=latents:{args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
