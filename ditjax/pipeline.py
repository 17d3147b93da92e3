"""Images from trained weights: a run's directory, a weights file or a diffusers folder.

from ditjax.pipeline import Pipeline

pipeline = Pipeline.from_pretrained("DiT-XL-2-256x256.pt", autoencoder="sd-vae-ft-mse")
pipeline(classes=[207, "golden_retriever"], cfg_scale=4.0).images[0].save("x.png")
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ditjax import __version__, programs, runs
from ditjax.config import Config, changed
from ditjax.errors import UserError
from ditjax.io import rundir, weights
from ditjax.io.classes import class_names, parse_classes
from ditjax.io.log import Progress
from ditjax.parallel.mesh import make_mesh
from ditjax.pretrained import networks, reading, vocabulary
from ditjax.pretrained.networks import Network

# Compute type, and what products of float32 are made of where the backend has a faster form.
PRECISIONS = {
    "float32": ("float32", "float32"),
    "fast": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
DEFAULT_CFG_SCALE = 4.0  # of published weights, as the release's own sampling script

ClassNames = Sequence[Sequence[str]]


class Source(NamedTuple):
    """Where networks come from: their recipe, and how to put them on a mesh.

    `load(config, mesh)` -> (parameters of the DiT, of its autoencoder or None). `record` says what
    the weights are.
    """

    config: Config
    class_names: ClassNames | None
    record: dict[str, Any]
    load: Callable[[Config, Mesh], tuple[Any, Any]]


def open_source(
    path: str | os.PathLike[str],
    autoencoder: str | os.PathLike[str] = "",
    *,
    which: str = "ema",
    heads: int = 0,
    numerics: reading.Numerics = "auto",
) -> Source:
    """A run's directory, a DiT's weights with its autoencoder's, or a whole diffusers pipeline.

    Raises UserError for what is none of them, and for networks that do not fit together.
    """
    if rundir.is_run(path):
        if autoencoder:
            raise UserError(
                f"{path} is a run, whose recipe names its autoencoder: leave --autoencoder out, or"
                " set --config.autoencoder.path."
            )
        return open_run(path)
    names: ClassNames | None = None
    decoder: Network | None = None
    if os.path.exists(Path(path) / vocabulary.MODEL_INDEX):
        folder = reading.load_pipeline(path, numerics=numerics)
        dit, decoder, names = folder
    else:
        dit = reading.load(path, which=which, heads=heads, numerics=numerics)
    if dit.kind != "dit":
        raise UserError(f"{path} holds a {dit.name}: give it as --autoencoder, and a DiT here.")
    if autoencoder:
        decoder = reading.load(autoencoder, which=which)
    if decoder is None and dit.config.latent:
        raise UserError(
            f"{path} is a {dit.name} on latents: give the autoencoder that decodes them with"
            " --autoencoder=FILE (see README, Published weights)."
        )
    config = networks.joined(dit, decoder) if decoder else dit.config
    if dit.layout != "ditjax" and config.model.label_dropout > 0:
        sample = dataclasses.replace(config.sample, cfg_scale=DEFAULT_CFG_SCALE)
        config = dataclasses.replace(config, sample=sample)
    # The numbers of another program are met by exact products only; a TPU's own would round.
    config = changed(config, {"model": precision_keys("float32")})
    if names is None and config.data.num_classes == len(class_names()):
        names = class_names()
    record = {"weights": _file_record(dit, which)}
    if decoder:
        record["autoencoder"] = _file_record(decoder, which)

    def load(c: Config, mesh: Mesh) -> tuple[Any, Any]:
        on_mesh: list[Any] = []
        for network in (dit, decoder):
            if network is None:
                on_mesh.append(None)
                continue
            if networks.shapes_of(networks.training(c, network.kind)) != network.shapes:
                raise UserError(
                    f"the recipe describes another {network.kind} than the weights at"
                    f" {network.files[0]}, a {network.name}: leave the keys of its architecture as"
                    " they are."
                )
            on_mesh.append(runs.put(networks.as_float32(network.params), mesh))
        return on_mesh[0], on_mesh[1]

    return Source(config, names, record, load)


def _file_record(network: Network, which: str) -> dict[str, Any]:
    return {
        "which": which,
        "files": [str(path) for path in network.files],
        "sha256": weights.sha256_of(network.files),
        "network": network.name,
        "layout": network.layout,
        "parameters": network.num_parameters,
    }


def open_run(path: str | os.PathLike[str]) -> Source:
    """A run of ours: the averaged weights of its newest checkpoint. Raises UserError."""
    config = runs.recipe_of(path)
    if config.train.network != "dit":
        raise UserError(f"{path} is a run of a {config.train.network}: only a DiT draws samples.")
    record: dict[str, Any] = {"run": str(path)}

    def load(c: Config, mesh: Mesh) -> tuple[Any, Any]:
        params, record["step"] = runs.load_ema(c, path, mesh)
        if c.latent:
            record["autoencoder"] = c.autoencoder.path
        return params, runs.load_autoencoder(c, mesh)

    return Source(config, None, record, load)


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
    program: programs.Sampling | None = None,
    quiet: bool = False,
) -> Samples:
    """Samples 0..num-1 of a recipe; sample i takes label_of[i % len], or a uniform one of its own.

    `frozen` are a latent recipe's autoencoder parameters; `program` a compiled one of this recipe,
    whatever its seed.
    """
    program = program or programs.sampling(c, mesh, guided=cfg_scale != 1, frozen=frozen)
    size = program.batch_size
    began = time.monotonic()
    images, label = [], []
    progress = None if quiet else Progress("sample", num, "images")
    for start in range(0, num, size):
        wanted = None
        if label_of is not None:
            indices = np.arange(start, start + size)
            wanted = np.asarray(label_of, np.int32)[indices % len(label_of)]
        drawn, labels = program.draw(params, start, wanted, cfg_scale, c.seed)
        images.append(drawn)
        label.append(labels)
        if progress:
            progress.report(min(start + size, num))
    return Samples(
        np.concatenate(images)[:num], np.concatenate(label)[:num], time.monotonic() - began
    )


class Output(NamedTuple):
    """PIL images, the same as u8[N,H,W,C], labels i32[N], and all that made them."""

    images: list[Image.Image]
    array: np.ndarray
    label: np.ndarray
    record: dict[str, Any]


class Pipeline:
    """A DiT and its autoencoder on a mesh, ready to draw; compiled once a set of arguments."""

    def __init__(self, source: Source, config: Config | None = None) -> None:
        """Puts the networks on the devices of `config.mesh`; `config` changes the source's own."""
        self.config = config or source.config
        self.class_names = source.class_names
        self._mesh = make_mesh(self.config.mesh.data, self.config.mesh.fsdp)
        self._params, self._frozen = source.load(self.config, self._mesh)
        self._source = source
        self._programs: dict[Any, programs.Sampling] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        autoencoder: str | os.PathLike[str] = "",
        *,
        precision: str = "float32",
        which: str = "ema",
        heads: int = 0,
        numerics: reading.Numerics = "auto",
    ) -> "Pipeline":
        """From a run's directory, a weights file or a diffusers folder; see `open_source`.

        `precision`: 'float32' (exact products on every backend), 'fast' (float32 with the
        backend's own, rounded products) or 'bfloat16'. Raises UserError.
        """
        source = open_source(path, autoencoder, which=which, heads=heads, numerics=numerics)
        return cls(source, changed(source.config, {"model": precision_keys(precision)}))

    def __call__(
        self,
        classes: Sequence[int | str] | str | None = None,
        *,
        cfg_scale: float | None = None,
        num: int | None = None,
        seed: int | None = None,
        steps: str | int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        cfg_channels: str | None = None,
        batch_size: int | None = None,
        quiet: bool = False,
    ) -> Output:
        """Draws `num` images (one a class where not given); image i takes classes[i % len].

        Classes are numbers, names or WordNet ids; None draws uniform ones. Image i depends on
        (seed, i) and its class alone, not on the batch or the devices. What is not given is the
        recipe's (`self.config.sample`). Raises UserError.
        """
        label_of = self.labels(classes)
        count = num
        if count is None:
            count = len(label_of) if label_of else self.config.sample.num
        given = {
            "cfg_scale": cfg_scale, "sampler": sampler, "eta": eta, "cfg_channels": cfg_channels,
            "steps": None if steps is None else str(steps), "batch_size": batch_size,
        }  # fmt: skip
        sample = {key: value for key, value in given.items() if value is not None}
        seed = self.config.seed if seed is None else seed
        c = changed(self.config, {"seed": seed, "sample": {**sample, "num": count}})
        if batch_size is None:
            # No more than asked for, and a row for every device: a batch is computed whole.
            devices = self._mesh.size
            size = -(-min(c.sample.batch_size, count) // devices) * devices
            c = changed(c, {"sample": {"batch_size": size}})
        drawn = draw(
            c, self._params, self._mesh, count,
            cfg_scale=c.sample.cfg_scale, label_of=label_of, program=self._program(c), quiet=quiet,
        )  # fmt: skip
        images = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in drawn.images]
        return Output(images, drawn.images, drawn.label, self._record(c, label_of, drawn))

    def labels(self, classes: Sequence[int | str] | str | None) -> list[int] | None:
        """Class numbers of numbers, names and WordNet ids. Raises UserError."""
        if classes is None or (isinstance(classes, str) and not classes):
            return None
        text = classes if isinstance(classes, str) else ",".join(str(word) for word in classes)
        return parse_classes(text, self.config.data.num_classes, self.class_names)

    def _program(self, c: Config) -> programs.Sampling:
        guided = c.sample.cfg_scale != 1
        sample = dataclasses.replace(c.sample, cfg_scale=float(guided), num=1)
        if sample not in self._programs:
            self._programs[sample] = programs.sampling(
                c, self._mesh, guided=guided, frozen=self._frozen
            )
        return self._programs[sample]

    def _record(self, c: Config, label_of: list[int] | None, drawn: Samples) -> dict[str, Any]:
        return {
            **self._source.record,
            "seed": c.seed,
            "classes": label_of,
            "sample": dataclasses.asdict(c.sample),
            "model": dataclasses.asdict(c.model),
            "diffusion": dataclasses.asdict(c.diffusion),
            "autoencoder_scale": c.autoencoder.scale if c.latent else None,
            "image_size": c.data.image_size,
            "seconds": round(drawn.seconds, 3),
            "environment": {
                "ditjax": __version__,
                "jax": version("jax"),
                "devices": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
            },
        }


def precision_keys(precision: str) -> dict[str, str]:
    """The recipe's keys of a precision by name. Raises UserError for an unknown one."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    dtype, matmul = PRECISIONS[precision]
    return {"dtype": dtype, "matmul": matmul}
