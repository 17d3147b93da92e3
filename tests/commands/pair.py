"""What each of two processes runs in test_two_processes.py: argv are the work directory and flags.

It trains, draws from what it has trained, runs a cell of a study that is evaluated while it trains
and a grid on it, extracts features, puts rows on meshes of every kind, and then trains a long run
until it is killed.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler, distributed
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditjax import cli, grid, sample, sweep, train
from ditjax.evaluation import features
from ditjax.models import inception
from ditjax.parallel import processes
from ditjax.parallel.mesh import make_mesh
from ditjax.weights.inception import Inception
from tests.commands.conftest import TOY

# The state is split over the devices of both. A constant rate: it does not depend on the steps.
TRAINED = (
    *TOY,
    "--config.mesh.data=1",
    "--config.mesh.fsdp=8",
    "--config.optim.schedule=constant",
    "--config.train.steps=6",
    "--config.train.log_every_steps=1",
    "--config.train.checkpoint_every_steps=3",
    "--config.train.keep_checkpoints=2",
    "--config.train.evaluate_every_steps=0",  # compiles for long, three times
    "--config.sample.batch_size=16",
    "--config.distributed.initialization_seconds=120",
    "--config.distributed.heartbeat_seconds=20",
)
STUDY = (
    *TRAINED,
    "--config.sweep.grid=(('seed',(0,1)),)",
    "--config.train.steps=3",
    "--config.train.evaluate_every_steps=3",
    "--config.train.evaluate_num=24",  # one batch, and half of one
    "--config.evaluate.num_samples=24",
    "--config.evaluate.guided_scale=0",  # one sampler less to compile
    "--index=1",
)
CELL = "runs/Conv-8-seed1"
GRID = ("--cfg_scale=1", "--num=24")
DRAWN = ("--num=16", "--batch_size=16", "--config.mesh.fsdp=8", "--config.mesh.data=1")


def check_rows() -> None:
    """Row i of the global array is example i, whatever the order of the devices in the mesh."""
    whole = np.arange(48, dtype=np.float32).reshape(16, 3)
    by_process = np.array(jax.devices())
    interleaved = by_process.reshape(2, 4).T.reshape(8)
    loaded = []
    for devices, shape in itertools.product(
        (by_process, interleaved, by_process[::-1]), ((8, 1), (4, 2), (2, 4))
    ):
        mesh = Mesh(devices.reshape(shape), ("data", "tensor"))
        sharding = NamedSharding(mesh, P("data"))
        rows = processes.local_rows(sharding, len(whole))
        loaded.append(rows.tolist())
        array = processes.global_rows(sharding, len(whole), rows, whole[rows])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    # Of these only some are the half that goes by the process's number.
    half = np.split(np.arange(16), 2)[jax.process_index()].tolist()
    assert 0 < loaded.count(half) < len(loaded), loaded
    assert {len(rows) for rows in loaded} == {8, 16}, loaded


def check_features() -> None:
    """Every process has Inception's features of all images; the last batch is not full."""

    class Means:  # of the network's scaled images, in the place of its blocks
        def apply(self, params: Any, x: jax.Array) -> inception.InceptionFeatures:
            pool = x.mean((1, 2)) * params["scale"]
            return inception.InceptionFeatures(pool, pool, pool, pool)

    read = Inception({"scale": np.asarray([1, 2, 3], np.float32)}, (), "")
    mesh = make_mesh(-1, 1)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "FIDInception", Means)
        patch.setattr(features, "load_inception", lambda path: read)
        found = features.inception_extractor("", mesh, 16).extract(images)
    expected = Means().apply(read.params, inception.preprocess(jnp.asarray(images))).pool
    np.testing.assert_allclose(found.pool, expected, rtol=1e-5, atol=1e-6)


def keep_what_every_process_compiles() -> None:
    """JAX writes to its cache from process 0 alone, and on CPUs the others cannot use that."""
    real, state = compiler._cache_write, distributed.global_state

    def write(*args: Any) -> None:
        mine, state.process_id = state.process_id, 0
        try:
            real(*args)
        finally:
            state.process_id = mine

    compiler._cache_write = write  # type: ignore[assignment]


def main(argv: list[str]) -> int:
    keep_what_every_process_compiles()
    workdir, *flags = argv
    train.main([*TRAINED, f"--workdir={workdir}", *flags])
    sample.main([*DRAWN, f"--workdir={workdir}", f"--out={workdir}/drawn", *flags])
    sweep.main([*STUDY, f"--workdir={workdir}-study", *flags])
    cell = f"--workdir={workdir}-study/{CELL}"
    grid.main([*GRID, cell, f"--out={workdir}-grid", "--config.mesh.fsdp=8", *flags])
    check_features()
    check_rows()
    print("checked", flush=True)
    long = "--config.train.steps=100000"
    return train.main([*TRAINED, long, f"--workdir={workdir}-long", *flags])


if __name__ == "__main__":
    cli.run(main)
