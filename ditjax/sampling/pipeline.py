"""Draw images from trained weights: a run's directory, a weights file or a diffusers folder.

from ditjax.sampling.pipeline import Pipeline

pipeline = Pipeline.from_pretrained("DiT-XL-2-256x256.pt", autoencoder="sd-vae-ft-mse")
pipeline(classes=[207, "golden_retriever"], cfg_scale=4.0).images[0].save("x.png")
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Unpack

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ditjax import __version__
from ditjax.config import Config, adapters_of, changed, check_used, hints, replaced
from ditjax.data.classes import ClassNames, parse_classes
from ditjax.data.clips import picture
from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.files.store import place, present
from ditjax.models.network import Rules
from ditjax.parallel.mesh import mesh_of
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.runs.results import tile
from ditjax.runs.snapshots import average_record
from ditjax.sampling import editing
from ditjax.sampling.draw import Drawer, digests_of, draw_to, sampling_protocol
from ditjax.sampling.given import (
    ControlImage,
    GivenRows,
    given_controls,
    given_known,
    given_prompts,
    held_out_given,
)
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.tasks.adapters import adapters_record, open_once, with_adapters
from ditjax.tasks.guide import load_guide
from ditjax.tasks.text_conditions import load_texts
from ditjax.training.task import Frozen
from ditjax.weights import networks, reading, tensors, vocabulary
from ditjax.weights.networks import LoadedNetwork
from ditjax.weights.text_pipeline import is_text_pipeline, load_text_pipeline

# Name -> compute dtype and precision of float32 products (config.model.dtype and matmul).
PRECISIONS = {
    "float32": ("float32", "float32"),
    "fast": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
DEFAULT_CFG_SCALE = 4.0  # for published weights, as in the release's sampling script


class Source(NamedTuple):
    """The recipe of trained networks, and the function that loads them.

    `load(config, mesh)` -> (parameters, frozen weights). `record` identifies the weights. `notes`
    are lines to print: what was taken from the files, left out and assumed.
    """

    config: Config
    class_names: ClassNames | None
    record: dict[str, Any]
    load: Callable[[Config, Mesh], tuple[Any, Frozen]]
    notes: tuple[str, ...] = ()


def open_source(
    path: str | os.PathLike[str],
    autoencoder: str | os.PathLike[str] = "",
    *,
    step: Step = "latest",
    class_names: str = "auto",
    **options: Unpack[reading.WeightsOptions],
) -> Source:
    """Open a run's directory, a DiT's weights with its autoencoder's, or a diffusers pipeline.

    `class_names`: as in `networks.with_class_names`.

    Raises UserError for any other path, and for networks that do not fit together.
    """
    if rundir.is_run(path):
        if autoencoder:
            raise UserError(
                f"{path} is a run, whose recipe names its autoencoder: remove --autoencoder, or"
                " set --config.autoencoder.path."
            )
        reading.check_no_options(path, "a run", options)
        return open_run_source(path, step, class_names)
    opening.check_no_step(path, step)
    which = options.get("which", "ema")
    dit, decoder = _networks_at(path, which, options)
    if dit.decodes:
        raise UserError(f"{path} holds a {dit.name}: expected a DiT; use --autoencoder for it.")
    dit = networks.with_class_names(dit, class_names)
    if autoencoder:
        decoder = reading.load_autoencoder(autoencoder, which)
    if decoder is None and dit.config.latent:
        raise UserError(
            f"{path} is a {dit.name} on latents: give the autoencoder that decodes them with"
            " --autoencoder=FILE (see docs/weights.md)."
        )
    config = networks.combined_recipe(dit, decoder) if decoder else dit.config
    if dit.layout != "ditjax" and config.model.label_dropout > 0:
        sample = dataclasses.replace(config.sample, cfg_scale=DEFAULT_CFG_SCALE)
        config = replaced(config, sample=sample)
    # Only exact products reproduce the results of another program; a TPU rounds by default.
    config = changed(config, {"model": precision_keys("float32")})
    record = {"weights": _file_record(dit, which)}
    if decoder:
        record["autoencoder"] = _file_record(decoder, which)

    def load(c: Config, mesh: Mesh) -> tuple[Any, Frozen]:
        params = _placed(dit, c, mesh, make_task(c).rules)
        own = {"autoencoder": _placed(decoder, networks.decoder_recipe(c), mesh)} if decoder else {}
        return params, {**own, **load_guide(c, mesh), **load_texts(c, mesh)}

    notes = (*dit.notes, *(decoder.notes if decoder else ()))
    return Source(config, dit.class_names, record, load, notes)


def _networks_at(
    path: str | os.PathLike[str], which: str, options: reading.WeightsOptions
) -> tuple[LoadedNetwork, LoadedNetwork | None]:
    """The network of a file or folder, and the autoencoder of a whole pipeline's."""
    if not present(place(path) / vocabulary.MODEL_INDEX):
        return reading.load_network(path, wanted="dit", **options), None
    reading.check_no_options(path, "a whole pipeline", options, ("numerics", "which"))
    if is_text_pipeline(path):
        return load_text_pipeline(path, which)
    folder = reading.load_pipeline(path, numerics=options.get("numerics", "auto"))
    names = folder.class_names if any(folder.class_names) else None
    return folder.dit._replace(class_names=names), folder.autoencoder


def _placed(network: LoadedNetwork, c: Config, mesh: Mesh, rules: Rules = ()) -> Any:
    """Put a network's weights on the mesh. Raises UserError if the recipe's network differs."""
    if networks.shapes_of(c) != network.shapes:
        raise UserError(
            f"the recipe describes another network than the weights at {network.files[0]}, a"
            f" {network.name}: do not change the keys of its architecture."
        )
    return opening.put_on_mesh(networks.as_float32(network), mesh, rules)


def _file_record(network: LoadedNetwork, which: str) -> dict[str, Any]:
    return {
        "which": which,
        "files": [str(path) for path in network.files],
        "sha256": tensors.sha256_of(network.files),
        "network": network.name,
        "layout": network.layout,
        "parameters": network.num_parameters,
    }


def open_run_source(
    path: str | os.PathLike[str], step: Step = "latest", class_names: str = "auto"
) -> Source:
    """Open a run: the averaged weights of a checkpoint. Raises UserError."""
    config = opening.recipe_of(path)
    names = networks.chosen_names(
        opening.class_names_of(path, config), class_names, config.data.num_classes, path
    )
    task = make_task(config)
    if task.sampling is None:
        raise UserError(f"{path} is a run of a {task.name}, which draws no samples.")
    record: dict[str, Any] = {"run": str(path)}

    def load(c: Config, mesh: Mesh) -> tuple[Any, Frozen]:
        task = make_task(c)
        params, record["step"] = opening.load_weights(c, task, path, mesh, step)
        record.update(average_record(c, place(path), record["step"]))
        if c.latent:
            record["autoencoder"] = c.autoencoder.path
        return params, task.frozen(mesh)

    return Source(config, names, record, load)


class Output(NamedTuple):
    """PIL images, the same images as u8[N,H,W,C], labels i32[N], and a record of the settings.

    Of clips, the images are strips of their frames, and the array is u8[N,F,H,W,C].
    """

    images: list[Image.Image]
    array: np.ndarray
    label: np.ndarray
    record: dict[str, Any]


class Pipeline:
    """A DiT and its autoencoder on a mesh; sampling compiles once per set of arguments."""

    def __init__(self, source: Source, config: Config | None = None) -> None:
        """Put the networks on the devices of `config.mesh`; `config` replaces the source's."""
        c = config or source.config
        self.class_names = source.class_names
        self._mesh = mesh_of(c)
        self._source = source
        self._base, self._frozen = source.load(c, self._mesh)
        self._drawer = Drawer(self._mesh, self._frozen)
        self._use(c)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        autoencoder: str | os.PathLike[str] = "",
        *,
        precision: str = "float32",
        step: Step = "latest",
        weights: str = "",
        class_names: str = "auto",
        guide: str = "",
        **options: Unpack[reading.WeightsOptions],
    ) -> "Pipeline":
        """Load a run's directory, a weights file or a diffusers folder; see `open_source`.

        `precision`: 'float32' (exact products on every backend), 'fast' (float32 with the
        backend's default, possibly rounded products) or 'bfloat16'. `step` of a run: 'latest',
        'best' or a number. `weights` of a run: 'ema', 'model', 'ema:DECAY' or 'power:STD', by
        default its recipe's. `class_names`: those in the file ('auto'), 'imagenet' or 'none'.
        `guide` is config.sample.guide, a weak network in place of the unconditional one. Raises
        UserError.
        """
        if weights and not rundir.is_run(path):
            raise UserError(f"weights={weights!r} is for runs, and {path} is not a run: use which.")
        source = open_source(path, autoencoder, step=step, class_names=class_names, **options)
        sample = {"weights": weights or source.config.sample.weights}
        if guide:
            sample["guide"] = guide
        changes = {"model": precision_keys(precision), "sample": sample}
        pipeline = cls(source, changed(source.config, changes))
        if is_primary():
            lines = (*source.notes, networks.labels_text(source.config))
            print("\n".join(lines), file=sys.stderr, flush=True)
        return pipeline

    def load_adapter(self, path: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Merge an adapter (LoRA), beside those that are loaded already, or at another scale.

        `path` is a folder of peft, a file of diffusers, or a run of LoRA on the same weights.
        Nothing is compiled anew. Raises UserError, and the pipeline stays as it was.
        """
        open_once.cache_clear()  # the file may be another than before
        self._with(dict(adapters_of(self.config.sample.adapters)) | {str(path): scale})

    def unload_adapter(self, path: str | os.PathLike[str] = "") -> None:
        """Take out an adapter, by default all: the weights are to the bit those without it."""
        kept = dict(adapters_of(self.config.sample.adapters))
        if path and str(path) not in kept:
            loaded = ", ".join(kept) or "none"
            raise UserError(f"{path} is not loaded: expected one of the adapters ({loaded}).")
        self._with({p: scale for p, scale in kept.items() if path and p != str(path)})

    def _with(self, adapters: Mapping[str, float]) -> None:
        text = ",".join(f"{path}:{float(scale)!r}" for path, scale in adapters.items())
        self._use(changed(self.config, {"sample": {"adapters": text}}))

    def _use(self, c: Config) -> None:
        self._params = with_adapters(c, self._base, self._mesh)
        self.config = c

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
        control: ControlImage | Sequence[ControlImage] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Output:
        """Draw `num` images, by default one per class; image i has class classes[i % len].

        Classes are numbers, names or WordNet ids; None draws them uniformly. Image i depends only
        on (seed, i), its class and its control image, not on the batch or the devices. `control`
        are control images of a run that has a control, as `given.given_controls` takes them.
        Other arguments default to the recipe's (`self.config.sample`). A network that was trained
        to enlarge or complete images is given held-out ones here. A network of texts is given
        `prompts`, prompt i % len for image i, or held-out captions. Raises UserError.
        """
        return self._draw(
            classes,
            quiet=quiet,
            control=control,
            prompts=prompts,
            num=num,
            seed=seed,
            cfg_scale=cfg_scale,
            sampler=sampler,
            eta=eta,
            cfg_channels=cfg_channels,
            steps=steps,
            batch_size=batch_size,
        )

    def inpaint(
        self,
        image: editing.Pictures,
        mask: editing.Pictures,
        classes: Sequence[int | str] | str | None = None,
        *,
        quiet: bool = False,
        **keys: Any,
    ) -> Output:
        """Complete images where the mask is white; sample i is of image i % N.

        `image` and `mask` are paths, PIL images or arrays of bytes, one or a list. Other arguments
        are those of `__call__` and keys of config.edit, such as method='ddnm'. Raises UserError.
        """
        edit = editing.inpaint_request(self.config, image, mask)
        return self._draw(classes, edit, quiet=quiet, **keys)

    def upscale(
        self,
        image: editing.Pictures,
        classes: Sequence[int | str] | str | None = None,
        *,
        quiet: bool = False,
        **keys: Any,
    ) -> Output:
        """Enlarge images, whose pixels are means of the drawn ones; as `inpaint` otherwise."""
        edit = editing.upscale_request(self.config, image)
        return self._draw(classes, edit, quiet=quiet, **keys)

    def denoise(
        self,
        image: editing.Pictures,
        sigma: float = 0.0,
        classes: Sequence[int | str] | str | None = None,
        *,
        quiet: bool = False,
        **keys: Any,
    ) -> Output:
        """Remove white noise of standard deviation `sigma`, in units of bytes; 0 estimates it.

        Images are of the network's size or larger: bytes, or floats in the same units. Image i is
        the mean of all that image i % N may have been. Raises UserError.
        """
        own = {k: v for k, v in keys.items() if k == "estimate"}
        c = changed(self.config, {"edit": {"sigma": sigma, **own}})
        edit = editing.denoise_request(c, image)
        return self._draw(classes, edit, quiet=quiet, sigma=sigma, **keys)

    def _draw(
        self,
        classes: Sequence[int | str] | str | None,
        edit: editing.Request | None = None,
        *,
        quiet: bool,
        control: ControlImage | Sequence[ControlImage] | None = None,
        prompts: Sequence[str] | None = None,
        **keys: Any,
    ) -> Output:
        c, label_of, edited = self._request(classes, edit, prompts=prompts, **keys)
        given, others = self._given(c, edit, control, prompts)
        began = time.monotonic()
        drawn = self._drawer.whole(
            c,
            self._params,
            c.sample.num,
            seed=c.seed,
            label_of=label_of,
            given=given,
            title="" if quiet else "sample",
        )
        images = [picture(tile(x[None], 1, gap=0)) for x in drawn.images]
        record = self._record(c, label_of, edited, time.monotonic() - began, others, prompts)
        return Output(images, drawn.images, drawn.label, record)

    @lease.scope()
    def write(
        self,
        path: str | os.PathLike[str],
        classes: Sequence[int | str] | str | None = None,
        *,
        edit: editing.Request | None = None,
        num: int | None = None,
        batch_size: int | None = None,
        control: ControlImage | Sequence[ControlImage] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Draw images into an npz (arr_0, label), batch by batch, and return their record.

        With `edit` they agree with what it gives (`sampling/editing.py`). After an interruption,
        the same call draws what is missing. A different set at `path` is replaced. Raises
        UserError, also if another process is writing samples to the same folder.
        """
        c, label_of, edited = self._request(
            classes, edit, prompts=prompts, num=num, batch_size=batch_size
        )
        given, others = self._given(c, edit, control, prompts)
        opening.acquire_lease(place(path).parent, opening.SAMPLES_LEASE)
        record = self._record(c, label_of, edited, 0.0, others, prompts)
        labels = "uniform" if label_of is None else f"classes {record['classes']}"
        labels = "prompts" if prompts else labels
        if label_of is None and others and control is None:
            labels = "records"
        protocol = sampling_protocol(
            c, seed=c.seed, labels=labels, given=others, **digests_of(self._frozen)
        )
        provenance = {
            "model": {**self._source.record, "params_sha256": opening.digest(self._params)},
            "sampling": {**protocol, **edited},
        }
        seconds = draw_to(
            path,
            self._drawer,
            c,
            self._params,
            provenance,
            seed=c.seed,
            label_of=label_of,
            given=given,
            size=edit.size if edit else None,
        )
        return {**record, "protocol": provenance["sampling"], "seconds": round(seconds, 3)}

    def _request(
        self,
        classes: Sequence[int | str] | str | None,
        edit: editing.Request | None = None,
        *,
        prompts: Sequence[str] | None = None,
        num: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        steps: str | int | None = None,
        **keys: Any,
    ) -> tuple[Config, list[int] | None, dict[str, Any]]:
        """The recipe and the labels of a call, and what an edit adds to its record and protocol.

        None leaves a key as it is.
        """
        label_of = self._labels_of(classes, prompts)
        asked = len(prompts or label_of or ())
        if num is None and (edit or asked):
            num = max(edit.num if edit else 0, asked)
        keys |= {"num": num, "steps": None if steps is None else str(steps)}
        sections: dict[str, dict[str, Any]] = {"edit": {}, "sample": {}}
        for name, value in keys.items():
            if value is not None:
                of_edit = edit is not None and name in hints(type(self.config.edit))
                sections["edit" if of_edit else "sample"][name] = value
        seed = self.config.seed if seed is None else seed
        c = changed(self.config, {"seed": seed, **{k: v for k, v in sections.items() if v}})
        given = [f"{section}.{name}" for section in sections for name in sections[section]]
        check_used(changed(c, {"evaluate": {"guided_scale": 0.0}}), given)
        if edit:
            editing.check_read(edit.record["edit"], given)
        what = "prompts" if prompts else "classes"
        _report_left_out(c.sample.num, {"images": edit.num if edit else 0, what: asked})
        edited = {"edit": self._edited(c, edit)} if edit else {}
        if edit and label_of is None:
            label_of = [self._null_label(c)]
        if batch_size is None:
            # No larger than needed, and a multiple of the devices: batches are padded to this size.
            devices = self._mesh.size
            batch_size = -(-min(c.sample.batch_size, c.sample.num) // devices) * devices
        return changed(c, {"sample": {"batch_size": batch_size}}), label_of, edited

    def _edited(self, c: Config, edit: editing.Request) -> dict[str, Any]:
        edits = sampling_of(c, make_task(c)).edits
        if edits is None:
            raise UserError(f"config.task is {c.task!r}, which does not edit images.")
        return {**edit.record, **edits(edit.given)}

    def _null_label(self, c: Config) -> int:
        """The label of an image that is given without its class."""
        if c.model.label_dropout == 0:
            raise UserError(
                "config.model.label_dropout is 0, so that the network has no null label: give the"
                " classes of the images to edit (--classes)."
            )
        return c.data.num_classes

    def _given(
        self,
        c: Config,
        edit: editing.Request | None,
        control: ControlImage | Sequence[ControlImage] | None,
        prompts: Sequence[str] | None = None,
    ) -> tuple[GivenRows | None, GivenRows | None]:
        """What samples are given, and what of it is not an edit's."""
        if prompts is None:
            others = self._beside_edit(c, edit, control)
        else:
            others = given_prompts(c, prompts)
        return (given_known(edit.given, others) if edit else others), others

    def _beside_edit(
        self,
        c: Config,
        edit: editing.Request | None,
        control: ControlImage | Sequence[ControlImage] | None,
    ) -> GivenRows | None:
        """The given control images, or what a network needs of held-out records, as a line says."""
        needs = sampling_of(c, make_task(c)).needs
        if control is None:
            default = None if edit and needs and needs.edited else held_out_given(c)
            if default and is_primary():
                name, images = next(iter(default.record.items()))
                line = f"{name.replace('_', ' ')}: those of {images}, in order"
                print(line, file=sys.stderr, flush=True)
            return default
        if needs is None or needs.edited:
            raise UserError(
                "a control image is given, and the network has no control: name a run that was"
                " trained with config.adapt.kind 'control'."
            )
        return given_controls(c, control)

    def _labels_of(
        self, classes: Sequence[int | str] | str | None, prompts: Sequence[str] | None
    ) -> list[int] | None:
        """The labels of a call. Those of prompts say nothing. Raises UserError."""
        if not classes:
            return [0] if prompts is not None else None
        needs = sampling_of(self.config, make_task(self.config)).needs
        if needs and needs.texts:
            raise UserError("classes are given, and the network takes texts: give --prompts.")
        if prompts is not None:
            raise UserError("both classes and prompts are given: expected one of them.")
        return self.labels(classes)

    def labels(self, classes: Sequence[int | str] | str | None) -> list[int] | None:
        """Convert class numbers, names and WordNet ids to class numbers. Raises UserError."""
        if classes is None or (isinstance(classes, str) and not classes):
            return None
        text = classes if isinstance(classes, str) else ",".join(str(word) for word in classes)
        return parse_classes(text, self.config.data.num_classes, self.class_names)

    def _record(
        self,
        c: Config,
        label_of: list[int] | None,
        edited: dict[str, Any],
        seconds: float,
        given: GivenRows | None,
        prompts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        null = [c.data.num_classes]
        said = (
            {}
            if prompts is None
            else {"prompts": list(prompts), "text": dataclasses.asdict(c.text)}
        )
        if prompts is not None:
            label_of = null
        protocol = sampling_of(c, make_task(c)).protocol
        beside = {name: protocol[name] for name in ("control", "given") if name in protocol}
        return {
            **self._source.record,
            **adapters_record(c),
            **edited,
            "seed": c.seed,
            "classes": [] if label_of == null else label_of,
            "sample": dataclasses.asdict(c.sample),
            "model": dataclasses.asdict(c.model),
            **({"diffusion": dataclasses.asdict(c.diffusion)} if hasattr(c, "diffusion") else {}),
            **beside,
            **(given.record if given else {}),
            **said,
            "autoencoder_scale": c.autoencoder.scale if c.latent else None,
            "autoencoder_statistics": c.autoencoder.statistics if c.latent else None,
            "image_size": c.data.image_size,
            "seconds": round(seconds, 3),
            "environment": {
                "ditjax": __version__,
                "jax": version("jax"),
                "devices": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
            },
        }


def _report_left_out(num: int, counts: Mapping[str, int]) -> None:
    """Print what of the given images, classes and prompts too few samples leave out."""
    for what, count in counts.items():
        if num < count and is_primary():
            line = f"note: config.sample.num is {num}: the last {count - num} of {count} {what}"
            print(f"{line} are left out", file=sys.stderr, flush=True)


def precision_keys(precision: str) -> dict[str, str]:
    """The keys of config.model for a named precision. Raises UserError for an unknown name."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    dtype, matmul = PRECISIONS[precision]
    return {"dtype": dtype, "matmul": matmul}
