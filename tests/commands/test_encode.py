"""encode: killed and gone on with; and training on its latents is training on the images."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax import config, encode, train
from ditjax.cli import load_recipe
from ditjax.data import records, source, stream
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import make_task
from ditjax.training.program import precise, training
from ditjax.weights import networks, writing
from tests.commands.conftest import LATENTS
from tests.seeded import seeded_state

# Latents of 16x16x4, 16 KiB a record: 64 of the 359 test digits are a shard of a MiB.
SHARDS = [range(start, min(start + 64, 359)) for start in range(0, 359, 64)]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder, no weight of which is zero."""
    sections = {"base_width": 4, "multipliers": (1, 2), "res_blocks": 1, "groups": 2}
    c = config.read({"task": "autoencoder", "autoencoder": sections})
    leaves = seeded_state(networks.shapes_of(c), 0)
    # Means that tell images apart, and a posterior that is neither a point nor all noise.
    leaves["quant_conv/kernel"][..., :4] *= 10
    leaves["quant_conv/bias"][4:] -= 2
    network = networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", ())
    folder = tmp_path_factory.mktemp("files") / "vae"
    writing.write_diffusers(folder, network)
    return folder


def words(vae, *more):
    return [
        *LATENTS,
        "--config.autoencoder.base_width=4",
        "--config.autoencoder.multipliers=(1,2)",
        "--config.autoencoder.groups=2",
        "--config.autoencoder.res_blocks=1",
        "--config.data.channels=3",
        "--config.data.image_size=32",
        "--config.data.split=test",
        "--config.train.batch_size=24",
        f"--config.autoencoder.path={vae}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(vae, data_dir, tmp_path_factory):
    """The test digits, encoded at one go."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        assert encode.main([*words(vae), f"--out={out}", "--shard_mb=1"]) == 0
    return out


def contents(folder):
    """Path -> bytes of all that lies below, hidden files included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def read(monkeypatch):
    """The records whose images are read from now on, in order."""
    found = []
    real = records.ImageReader.batch

    def batch(self, indices, mirrored):
        found.extend(indices.tolist())
        return real(self, indices, mirrored)

    monkeypatch.setattr(records.ImageReader, "batch", batch)
    return found


KILLED = """
import os, signal, sys
from ditjax import encode
from ditjax.data.latents import LatentWriter
real, written = LatentWriter._example, []
def example(self, record):
    written.append(1)
    if len(written) > 150:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, record)
LatentWriter._example = example
sys.exit(encode.main(sys.argv[1:]))
"""


def test_a_killed_encoding_goes_on_where_it_was(vae, whole, tmp_path, read, capsys):
    command = [*words(vae), f"--out={tmp_path}", "--shard_mb=1"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*of-00006")}
    assert len(left) == 2
    assert len(list(tmp_path.rglob(".*.tmp"))) == 1
    with pytest.raises(UserError, match="its encoding is not finished; resume it"):
        source.dataset_info(f"latents:{tmp_path}", "test")
    with pytest.raises(
        UserError, match=r"image_size=32, and this command has 16: give another --out"
    ):
        encode.main([*command, "--config.data.image_size=16"])
    with pytest.raises(UserError, match=r"dtype='float32', and this command has 'bfloat16'"):
        encode.main([*command, "--config.model.dtype=bfloat16"])
    assert read == []

    assert encode.main(command) == 0
    assert read == list(range(128, 359)), "nothing before the shard that was cut off"
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert contents(tmp_path) == contents(whole)
    read.clear()
    assert encode.main(command) == 0
    assert read == []
    assert "train on it with --config.data.name=latents:" in capsys.readouterr().out


def test_an_array_job_writes_the_same_files(vae, whole, tmp_path, read, capsys):
    command = [*words(vae), f"--out={tmp_path}", "--shard_mb=1", "--count=2"]
    assert encode.main([*command, "--index=1"]) == 0
    assert "this job's shards are written, 3 of other jobs are missing" in capsys.readouterr().out
    assert read == [i for shard in SHARDS[1::2] for i in shard]
    assert encode.main([*command, "--index=0"]) == 0
    assert "train on it" in capsys.readouterr().out
    assert contents(tmp_path) == contents(whole)


def test_skipped_images_are_on_record(vae, data_dir, tmp_path, monkeypatch, capsys):
    real, read = records.ImageReader.batch, []

    def batch(self, indices, mirrored):
        if 330 in indices:
            raise records.DamagedRecordsError({330: "record 330 is damaged"}, "prepare it again")
        read.extend(indices.tolist())
        return real(self, indices, mirrored)

    monkeypatch.setattr(records.ImageReader, "batch", batch)
    command = [*words(vae), f"--out={tmp_path}", "--shard_mb=1", "--index=5", "--count=6"]
    assert encode.main([*command, "--config.data.max_damaged=1"]) == 0
    assert read == [*range(320, 330), 331, *range(331, 359)]
    (path,) = tmp_path.rglob("damaged.txt")
    assert path.read_text().startswith("record 330 is damaged; skipped, as config.data.max_damage")
    assert f"{path} names the images that were skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--config.train.batch_size=12"], "batch_size is 12: not divisible by"),
        (["--index=2", "--count=2"], "--index=2 --count=2: expected an index from 0"),
        (["--index=-1"], "--index=-1 --count=1: expected"),
        (["--count=0"], "--count=0: expected"),
        (["--shard_mb=0"], "shards of 0 MiB"),
        (["--config.data.split=test[:10]"], "encode a whole split, such as 'test'"),
    ],
)
def test_flags_that_do_not_fit(vae, tmp_path, more, match):
    with pytest.raises(UserError, match=match):
        encode.main([*words(vae), f"--out={tmp_path / 'out'}", *more])
    assert not (tmp_path / "out").exists()


def opened(command):
    """(the recipe, its training's programs, its frozen weights where they are read)."""
    c = config.read(load_recipe(command))
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    task = make_task(c, mesh)
    return c, training(c, task, mesh), task.frozen(mesh) if task.reads else {}


def x0_of_steps(command, start, stop):
    """What the training step gets, by the command's own programs: x0 f32[S,B,h,w,c], labels."""
    c, p, frozen = opened(command)
    found = []
    spec = opening.data_spec(c)
    with (
        stream.train_batches(spec, c.seed, c.train.batch_size, start_step=start) as batches,
        precise(c),
    ):
        for step in range(start, stop):
            examples = p.prepare(frozen, p.put(next(batches)), jnp.int32(step))
            found.append(jax.device_get(examples))
    return np.stack([x["x0"] for x in found]), np.stack([x["label"] for x in found])


def test_latents_are_the_same_x0_as_images_encoded_on_the_way(vae, whole):
    """Order, mirroring and the posterior's noise are functions of (seed, step) alone."""
    x0 = {}
    for flip in (False, True):
        command = words(vae, f"--config.data.flip={flip}")
        # 359 records in batches of 24: step 14 holds the end of an epoch and the start of the next.
        x0[flip], label = x0_of_steps(command, 13, 16)
        cached = [*command, f"--config.data.name=latents:{whole}"]
        assert opened(cached)[2] == {}, "of an autoencoder that is not needed"
        x0_cached, label_cached = x0_of_steps(cached, 13, 16)
        np.testing.assert_array_equal(label_cached, label)
        np.testing.assert_allclose(x0_cached, x0[flip], atol=1e-4)
    # Mirroring would tell.
    assert 0.3 < (np.abs(x0[True] - x0[False]).max(axis=(2, 3, 4)) > 0.1).mean() < 0.7


def test_training_on_latents_is_training_on_images(vae, whole):
    """The same losses step by step; without mirroring they would differ by 1 %."""
    command = words(
        vae,
        "--config.data.flip=True",
        "--config.optim.warmup_steps=0",
        "--config.optim.learning_rate=2e-2",
        "--config.train.batch_size=16",
    )
    c, p, frozen = opened(command)
    losses: dict[str, list[list[float]]] = {}
    for name in ("digits", f"latents:{whole}"):
        spec = dataclasses.replace(opening.data_spec(c), name=name)
        state, losses[name] = p.init(), []
        with stream.train_batches(spec, c.seed, c.train.batch_size) as batches, precise(c):
            for _ in range(12):
                examples = p.prepare(frozen, p.put(next(batches)), state.step)
                state, metrics = p.step(state, frozen, examples)
                losses[name].append([float(metrics[key]) for key in ("loss", "mse", "grad_norm")])
    on_images, on_latents = losses.values()
    np.testing.assert_allclose(on_latents, on_images, rtol=1e-3)


def test_latents_of_another_shape_are_refused_before_a_compilation(vae, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"latents of \[16, 16, 4\], but the recipe's are \[32, 32"):
        train.main(
            [
                *words(vae, "--config.data.image_size=64"),
                f"--config.data.name=latents:{whole}",
                f"--workdir={run}",
            ]
        )
    assert not run.exists()


# The statistics of the latents.


@pytest.fixture(scope="module")
def shifted(vae, tmp_path_factory):
    """The same autoencoder, whose latents have a mean."""
    folder = tmp_path_factory.mktemp("files") / "shifted"
    folder.mkdir()
    for path in vae.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    described = {**json.loads((vae / "config.json").read_text()), "shift_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_statistics_are_part_of_the_record(vae, shifted, whole, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DITJAX_DATA", str(data_dir))
    out, more = tmp_path / "latents", ["--config.autoencoder.shift=0.5"]
    with pytest.raises(UserError, match=r"has shift 0\.5, and the recipe of its latents has 0\.0"):
        encode.main([*words(shifted), f"--out={out}"])
    assert encode.main([*words(shifted, *more), f"--out={out}", "--shard_mb=1"]) == 0
    record = json.loads((out / "latents" / "1.0.0" / "metadata.json").read_text())
    expected = {"scale": 0.66, "shift": 0.5, "latent_mean": [], "latent_std": []}
    assert record["statistics"] == expected
    # The moments are the same, and training subtracts the shift.
    cached = words(shifted, *more, f"--config.data.name=latents:{out}")
    plain = words(vae, f"--config.data.name=latents:{whole}")
    x0, _ = x0_of_steps(cached, 0, 1)
    unshifted, _ = x0_of_steps(plain, 0, 1)
    np.testing.assert_allclose(x0, unshifted - 0.5 * 0.66, atol=1e-5)
    images, _ = x0_of_steps(words(shifted, *more), 0, 1)
    np.testing.assert_allclose(x0, images, atol=1e-4)
    name = f"--config.data.name=latents:{out}"
    for command, match in (
        (words(shifted, name), r"was encoded with autoencoder\.shift 0\.5, but .*shift is 0\.0"),
        (words(shifted, *more, name, "--config.autoencoder.scale=0.5"), "scale 0.66, but .* 0.5"),
        (
            words(
                shifted,
                name,
                "--config.autoencoder.latent_mean=(0,0,0,0)",
                "--config.autoencoder.latent_std=(1,1,1,1)",
            ),
            r"shift 0\.5, but .* is 0\.0: set it to that",
        ),
    ):
        with pytest.raises(UserError, match=match):
            train.main([*command, f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_sets_older_than_the_record_are_read(vae, whole, tmp_path):
    """They were normalised by a scale alone; with a shift they would be another network's."""
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    path = old / "latents" / "1.0.0" / "metadata.json"
    record = json.loads(path.read_text())
    del record["statistics"]
    path.write_text(json.dumps(record))
    name = f"--config.data.name=latents:{old}"
    for more in ((), ("--config.autoencoder.scale=0.5",)):
        opening.check_data(config.read(load_recipe(words(vae, name, *more))))
    shifted = words(vae, name, "--config.autoencoder.shift=0.5")
    with pytest.raises(UserError, match=r"autoencoder\.shift 0\.0, but config\.autoencoder\.shift"):
        opening.check_data(config.read(load_recipe(shifted)))
    before = contents(old)
    assert encode.main([*words(vae), f"--out={old}", "--shard_mb=1"]) == 0
    assert contents(old) == before
