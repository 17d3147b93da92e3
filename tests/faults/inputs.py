"""Rows 7 and 9 to 12: records, meshes, recipes and weights that are not what they should be."""

import io
import json
import pickle
import shutil
import signal
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.weights.torch_file import write_torch
from tests.faults.harness import (
    DIT,
    INTERVAL,
    Battery,
    Child,
    LostError,
    Outcome,
    Trial,
    check,
    judge,
)
from tests.faults.training import damage
from tests.weight_files import release_state


def _refused(child: Child, *words: str) -> None:
    """Status 2 with one line that has these words."""
    status = child.wait()
    check(status == 2, f"status {status}: {child.said()[-300:]!r}")
    line = child.error()
    for word in words:
        check(word in line, f"no {word!r} in {line!r}")


# ---- records


def damaged_records(trial: Trial) -> Outcome:
    """Row 7: the file of records cut short or with a flipped bit; a damaged image of a folder."""
    battery = trial.battery
    reference = battery.unbroken()
    folder = battery.folder("records")
    kind = ("flipped", "halved", "image")[trial.number % 3]
    if kind == "image":
        return _damaged_image(trial, folder)
    data = folder / "data"
    shutil.copytree(battery.data, data)
    (records,) = data.rglob("*-train.array_record-*")
    damage(records, kind, trial)
    run = battery.run("records")
    (child,) = run.start(pace=0.0, env={"DITJAX_DATA": str(data)})
    status = child.wait()
    if status == 0:  # the bit lies in none of the records that were read
        check(kind == "flipped", f"nobody saw that the records were {kind}")
        judge(run, reference)
        return Outcome(0, f"{kind}: unread")
    check(status == 2, f"status {status}: {child.said()[-300:]!r}")
    line = child.error()
    check("record" in line, f"no record is named: {line!r}")
    return Outcome(0, f"{kind}: named")


def _damaged_image(trial: Trial, folder: Path) -> Outcome:
    """Named; with a cap, left out, and the rest of the run is the same killed or not."""
    from PIL import Image

    images = folder / "images"
    for label in ("cat", "dog"):
        (images / label).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([i, len(label)]).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(images / label / f"{i}.png")
    (folder / "data").mkdir()
    data = {"DITJAX_DATA": str(folder / "data")}
    words = (
        f"--config.data.name=folder:{images}",
        "--config.data.num_classes=2",
        "--config.data.split=train",
    )
    victim = images / trial.rng.choice(("cat", "dog")) / f"{trial.rng.randrange(20)}.png"
    damage(victim, "halved", trial)
    run = trial.battery.run("images")
    (child,) = run.start(*words, pace=0.0, env=data)
    status = child.wait()
    check(status == 2, f"status {status}: {child.said()[-300:]!r}")
    check(victim.name in child.error(), f"{victim.name} is not named: {child.error()!r}")
    capped = (*words, "--config.data.max_damaged=1")
    reference, run = (trial.battery.run("images") for _ in range(2))
    (child,) = reference.finish(*capped, env=data)
    check(victim.name in child.said(), f"{victim.name} was left out without a word")
    (child,) = run.start(*capped, env=data)
    child.until(lambda: child.last() >= INTERVAL + 1, "a step after a checkpoint")
    child.kill(signal.SIGKILL)
    child.wait()
    run.finish(*capped, env=data)
    return Outcome(judge(run, reference, epochs=False), "image: named, then left out")


# ---- recipes and meshes

# Flags, and words that the line must have: the axis or the batch, its size, a legal value.
MESHES = (
    (("--config.mesh.data=3",), ("data=3", "8")),
    (("--config.mesh.data=3", "--config.mesh.fsdp=2"), ("data=3", "fsdp=2", "8")),
    (("--config.train.batch_size=12",), ("12", "fsdp = 8", "16")),
    (("--config.train.microbatches=3",), ("microbatches=3", "16", "4")),
    (("--config.mesh.data=1", "--config.mesh.tensor=8"), ("tensor=8", "2 heads", "1, 2")),
    (("--config.mesh.data=1", "--config.mesh.context=8"), ("context=8", "4 tokens", "1, 2, 4")),
    (("--config.mesh.slices=3",), ("slices=3", "8")),
)
# Words of a recipe, and what the line must have.
RECIPES = (
    (("--config.optim.learning_rat=0.1",), ("learning_rate",)),
    (("--config.optim.learning_rate=nan",), ("learning_rate", "finite")),
    (("--config.optim.learning_rate=inf",), ("learning_rate", "finite")),
    (("--config.optim.learning_rate=-1.0",), ("learning_rate", "greater than 0")),
    (("--config.train.batch_size=-1",), ("batch_size", "at least 1")),
    (("--config.train.batch_size=16.5",), ("batch_size",)),
    (("--config.train.steps=many",), ("steps",)),
    (("--config.train.steps=0",), ("steps", "at least 1")),
    (("--config.train.ema_decay=1.0",), ("ema_decay", "below 1")),
    (("--config.optim.warmup_steps=20",), ("warmup_steps", "20")),
    (("--config.model.patch=3",), ("patch", "1, 2, 4, 8")),
    (("--config.model.size=1x32",), ("size",)),
    (("--config.model.dtype=float8",), ("dtype", "bfloat16")),
    (("--config.diffusion.schedule=linaer",), ("linear",)),
    (("--config.diffusion.loss=simple",), ("variance",)),
    (("--config.sample.eta=nan",), ("eta", "finite")),
    (("--config.sample.cfg_interval=(0.7,0.2)",), ("cfg_interval",)),
    (("--config.train.keep_checkpoints=0",), ("keep_checkpoints",)),
    (("--config.seed=-1",), ("seed", "at least 0")),
    (("--config.data.threads=99999999999999999999",), ("threads",)),
)


def _flags_refused(trial: Trial, cases: Any, count: int, devices: int) -> Outcome:
    folder = trial.battery.folder("refused")
    for flags, words in trial.rng.sample(cases, count):
        workdir = folder / "run"
        child = trial.battery.command(
            folder, "train", *DIT, *flags, f"--workdir={workdir}", devices=devices
        )
        try:
            _refused(child, *words)
        except LostError as error:
            raise LostError(f"{' '.join(flags)}: {error}") from None
        check(not child.compiled(), f"{' '.join(flags)}: something was compiled")
        check(not (workdir / "checkpoints").exists(), f"{' '.join(flags)}: a run was begun")
    return Outcome()


def illegal_mesh(trial: Trial) -> Outcome:
    """Row 9."""
    trial.battery.unbroken()
    return _flags_refused(trial, MESHES, 2, 8)


def illegal_recipe(trial: Trial) -> Outcome:
    """Row 10."""
    trial.battery.unbroken()
    return _flags_refused(trial, RECIPES, 4, 1)


# ---- weights


def _weights(battery: Battery) -> Path:
    """A small DiT's weights, as a safetensors file of ours."""

    def make() -> Path:
        folder = battery.folder("weights")
        release, out = folder / "release.pt", folder / "ours.safetensors"
        write_torch(release, release_state(depth=1, width=32, patch=4, side=8, channels=1))
        words = (f"--weights={release}", "--heads=2", "--to=ditjax", f"--out={out}")
        child = battery.command(folder, "convert", *words)
        check(child.wait() == 0, child.said()[-300:])
        return out

    return battery.once("weights", make)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, tensors' bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def other_weights(trial: Trial) -> Outcome:
    """Row 11: missing, extra, mis-shaped, of another type: each is named."""
    header, body = _read_safetensors(_weights(trial.battery))
    names = sorted(name for name in header if name != "__metadata__")
    shapes = {name: header[name]["shape"] for name in names}
    shaped = trial.rng.choice([name for name in names if shapes[name] != shapes[name][::-1]])
    missing, typed = trial.rng.sample([name for name in names if name != shaped], 2)
    header[shaped]["shape"].reverse()
    header["stranger/kernel"] = header.pop(missing)
    header[typed]["dtype"] = "I32"
    text = json.dumps(header).encode()
    folder = trial.battery.folder("weights")
    bad = folder / "bad.safetensors"
    bad.write_bytes(struct.pack("<Q", len(text)) + text + body)
    child = trial.battery.command(
        folder, "sample", f"--weights={bad}", "--num=1", f"--out={folder / 'drawn'}"
    )
    _refused(child, missing, "stranger/kernel", shaped, typed)
    return Outcome()


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def running_weights(trial: Trial) -> Outcome:
    """Row 12: a file that runs code when it is unpickled."""
    import os
    import subprocess

    folder = trial.battery.folder("evil")
    canary = folder / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    evil = trial.rng.choice(
        (
            _Call(os.system, f"touch {canary}"),
            _Call(eval, code),
            _Call(exec, code),
            _Call(open, str(canary), "w"),
            _Call(subprocess.check_call, ["touch", str(canary)]),
            _Call(os.mkdir, str(canary)),
            _Call(Path.touch, canary),
        )
    )
    inside = {"ema": {"w": evil}, "args": evil} if trial.number % 2 else evil
    data = pickle.dumps(inside, protocol=trial.rng.randint(0, 5))
    path = folder / "evil.pt"
    if trial.rng.random() < 0.3:
        path.write_bytes(data)
    else:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("evil/data.pkl", data)
            archive.writestr("evil/byteorder", "little")
            archive.writestr("evil/version", "3\n")
        path.write_bytes(packed.getvalue())
    words = (
        ("convert", f"--weights={path}", "--to=ditjax", f"--out={folder / 'out'}"),
        ("sample", f"--weights={path}", "--num=1", f"--out={folder / 'out'}"),
    )[trial.number % 2]
    child = trial.battery.command(folder, *words)
    try:
        _refused(child, "evil.pt")
    finally:
        check(not canary.exists(), "code was run")
    check(not (folder / "out").exists(), "something was written")
    return Outcome()
