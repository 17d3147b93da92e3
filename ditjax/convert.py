"""python -m ditjax.convert: convert weights between ditjax and PyTorch's DiT or diffusers."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

from ditjax import cli
from ditjax.config import Config, as_tree
from ditjax.errors import UserError, first_few
from ditjax.files import faults, hub, lease
from ditjax.files.atomic import read_json
from ditjax.files.store import is_object, place, present
from ditjax.models.dit import DiTKeys, query_factor
from ditjax.parallel.mesh import make_mesh
from ditjax.reporting.card import model_card
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.runs.results import EVALUATION_FILE
from ditjax.tasks import make_task
from ditjax.tasks.adapters import open_adapter
from ditjax.tasks.text_conditions import has_texts, write_encoder
from ditjax.weights import networks, reading, vocabulary, writing
from ditjax.weights.adapters import Adapter, write_lora_file, write_peft
from ditjax.weights.networks import LoadedNetwork
from ditjax.weights.text_pipeline import write_text_pipeline

FOLDERS = ("diffusers", "pipeline", "peft", "peft_release")
_NULL_LABEL = 1000  # of DiTPipeline, whatever the number of classes


def read_network(
    path: str,
    *,
    step: Step = "latest",
    wanted: reading.Wanted = "any",
    **options: Unpack[reading.WeightsOptions],
) -> LoadedNetwork:
    """Read a network from a run (averaged weights), a weights file or a model folder."""
    if not rundir.is_run(path):
        return reading.load_network(path, wanted=wanted, **options)
    reading.check_no_options(path, "a run", options)
    config = opening.recipe_of(path)
    mesh = make_mesh(-1, 1)
    params, found = opening.network_weights(config, make_task(config), path, mesh, step)
    names = opening.class_names_of(path, config)
    network = networks.from_run(config, params, (place(path),), names)
    return network._replace(notes=(opening.account(path, found, config),))


def read_decoder(path: str, which: str) -> LoadedNetwork:
    """Read the autoencoder of a pipeline from a run, a weights file or a model folder."""
    return read_network(path) if rundir.is_run(path) else reading.load_autoencoder(path, which)


def _read_whole(
    source: str, target: str, step: Step, class_names: str, options: reading.WeightsOptions
) -> LoadedNetwork:
    """Read a network for a target, with its class names."""
    wanted = TARGETS[target].wanted
    network = read_network(source, step=step, wanted=wanted, **options)
    if network.decodes:
        networks.check_stated(network)
    else:
        network = networks.with_class_names(network, class_names)
    if wanted != ("autoencoder" if network.decodes else "dit") and wanted != "any":
        raise UserError(
            f"{source} holds a {network.name}: --to={target} takes the other kind of network."
        )
    return network


def _read_factors(
    source: str, target: str, step: Step, class_names: str, options: reading.WeightsOptions
) -> Adapter:
    """Read an adapter, or the factors of a run of LoRA, which are not merged."""
    reading.check_no_options(source, f"an adapter for --to={target}", options)
    if class_names != "auto":
        raise UserError(f"--class_names={class_names}: an adapter names no classes: remove it.")
    return open_adapter(source, step)


class Target(NamedTuple):
    """What `convert` writes: its description, how it is written, of what, and how that is read."""

    text: str
    write: Callable[..., Any]
    wanted: reading.Wanted = "any"
    read: Callable[..., Any] = _read_whole


def _write_pipeline(out: str, network: LoadedNetwork, decoder: LoadedNetwork | None = None) -> None:
    """Write a DiTPipeline, whose classes have their numbers as names if they have no others.

    Of a network of texts it is a PixArtAlphaPipeline with its encoder and tokenizer.
    """
    if has_texts(network.config):
        encoder = functools.partial(write_encoder, network.config)
        note = write_text_pipeline(out, network, decoder, encoder)
        print(note or f"{out}: a PixArtAlphaPipeline", file=sys.stderr)
        return
    if decoder is None:
        raise UserError("--to=pipeline needs the DiT's --autoencoder.")
    numbers = [(str(i),) for i in range(network.config.data.num_classes)]
    writing.write_pipeline(out, network, decoder, network.class_names or numbers)


TARGETS: Mapping[str, Target] = {
    "ditjax": Target("one safetensors file that includes the recipe", writing.write_ditjax),
    "release": Target(
        "a state dict (.pt) with the names of the public DiT release", writing.write_release, "dit"
    ),
    "sit": Target(
        "a checkpoint (.pt) of SiT's training script, for its processes", writing.write_sit, "dit"
    ),
    "lightning": Target(
        "a checkpoint (.pt) of LightningDiT's training script", writing.write_lightning, "dit"
    ),
    "latte": Target(
        "a state dict (.pt) with the names of Latte, of a DiT of clips", writing.write_latte, "dit"
    ),
    "diffusers": Target("a model folder: config.json and safetensors", writing.write_diffusers),
    "adm": Target(
        "a U-Net's state dict (.pt) with the names of guided-diffusion", writing.write_adm, "dit"
    ),
    "ldm": Target(
        "an autoencoder's checkpoint (.ckpt) with the names of latent diffusion",
        writing.write_ldm,
        "autoencoder",
    ),
    "pipeline": Target(
        "a DiTPipeline folder; needs the --autoencoder of the latent DiT. Of a network of texts, a"
        " PixArtAlphaPipeline with its encoder and tokenizer",
        _write_pipeline,
        "dit",
    ),
    "peft": Target(
        "a folder of peft with the factors of a run of LoRA, or of an adapter, for diffusers' DiT",
        write_peft,
        read=_read_factors,
    ),
    "peft_release": Target(
        "the same for the release's DiT",
        functools.partial(write_peft, names="release"),
        read=_read_factors,
    ),
    "lora": Target(
        "the same in diffusers' one file (.safetensors)", write_lora_file, read=_read_factors
    ),
}


@lease.scope()
def convert(
    source: str,
    target: str,
    out: str,
    *,
    autoencoder: str = "",
    step: Step = "latest",
    class_names: str = "auto",
    push: str = "",
    **options: Unpack[reading.WeightsOptions],
) -> str:
    """Write `out` in the layout `target`, and push it to a repository. Returns a summary to print.

    Raises UserError for a source that cannot be read or that the layout cannot express.
    """
    if push:
        hub.check_push(push)
        if is_object(place(out)):
            raise UserError(f"--push={push}: --out={out} must be on this machine.")
    if not rundir.is_run(source):
        opening.check_no_step(source, step)
    which = options.get("which", "ema")
    decoders: list[LoadedNetwork] = []
    if target in FOLDERS:
        lease.acquire(place(out) / lease.FILE, out)
    if present(place(source) / vocabulary.MODEL_INDEX):
        text, network = _convert_pipeline(source, target, out, autoencoder, class_names, options)
        return _pushed(push, source, out, network, text)
    found = TARGETS[target].read(source, target, step, class_names, options)
    if autoencoder and target != "pipeline":
        raise UserError(f"--autoencoder goes with --to=pipeline, not with --to={target}.")
    if target == "pipeline":
        decoders = [read_decoder(autoencoder, which)] if autoencoder else []
    TARGETS[target].write(out, found, *decoders)
    return _pushed(push, source, out, found, _summary(source, out, found, target, *decoders))


def _convert_pipeline(
    source: str,
    target: str,
    out: str,
    autoencoder: str,
    class_names: str,
    options: reading.WeightsOptions,
) -> tuple[str, LoadedNetwork]:
    """Write a whole pipeline as another one. Returns a summary to print, and the network."""
    if target != "pipeline":
        raise UserError(
            f"{source} is a whole pipeline: convert {source}/transformer or {source}/vae, or"
            " give --to=pipeline."
        )
    reading.check_no_options(source, "a whole pipeline", options, ("numerics", "which"))
    network, decoder, names = reading.load_pipeline(
        source, numerics=options.get("numerics", "auto")
    )
    if autoencoder:
        decoder = read_decoder(autoencoder, options.get("which", "ema"))
    network = network._replace(class_names=names if any(names) else None)
    _write_pipeline(out, networks.with_class_names(network, class_names), decoder)
    return _summary(source, out, network, target, decoder), network


def _pushed(repo: str, source: str, out: str, found: LoadedNetwork | Adapter, summary: str) -> str:
    """Write `out` to the hub, with a card, if a repository is named. Returns what to print."""
    if not repo:
        return summary
    c = getattr(found, "config", None)
    evaluation = None
    if rundir.is_run(source):
        c = opening.recipe_of(source)
        if faults.exists(path := place(source) / EVALUATION_FILE):
            record = read_json(path)
            # The summary names the step that was read.
            evaluation = record if f": step {record['step']}, " in summary else None
    file = place(out)
    name = f"{hub.PREFIX}{repo}" + ("" if file.is_dir() else f"/{file.name}")
    about = summary.replace(source, place(source).name).replace(out, file.name)
    card = model_card(found.name, about, name, _stated(c) if c else {}, evaluation)
    url = hub.push(repo, file, card)
    scores = "its scores" if evaluation else "no scores: none of this step are on record"
    return f"{summary}\npushed to {url}, with a card that has {scores}"


def _stated(c: Config) -> dict[str, Any]:
    """The keys of a recipe that differ from the paper's values; of paths the last name alone."""
    usual = dict(rundir.leaves(as_tree(type(c)())))
    return {
        key: value.rpartition("/")[2] if isinstance(value, str) and value[:1] in "/~" else value
        for key, value in rundir.leaves(as_tree(c))
        if value != usual.get(key)
    }


def _summary(
    source: str,
    out: str,
    found: LoadedNetwork | Adapter,
    target: str,
    decoder: LoadedNetwork | None = None,
) -> str:
    text = (
        f"{found.name}, {found.num_parameters:,} parameters of {found.dtype}:"
        f" {source} ({found.layout}) -> {out} ({target})"
    )
    text = "\n".join((text, *found.notes, *(decoder.notes if decoder else ())))
    if isinstance(found, Adapter):
        return text
    network = found
    if bad := networks.not_finite(network.leaves):
        text += f"\nnote: {len(bad)} arrays hold NaN or infinities: {first_few(bad)}"
    if not network.decodes:
        text += f"\n{networks.labels_text(network.config)}"
        theirs = {"release": 0, "sit": 0, "lightning": 0, "diffusers": 1, "pipeline": 1}.get(target)
        if theirs is not None and not has_texts(network.config):
            text += _differences(network.config.model, theirs)
    classes = network.config.data.num_classes
    if target == "pipeline" and classes != _NULL_LABEL and not has_texts(network.config):
        text += (
            f"\nnote: DiTPipeline takes class {_NULL_LABEL} for the null label, and this"
            f" DiT's is {classes}: only guidance_scale=1 is correct there."
        )
    return text


def _differences(k: DiTKeys, theirs: int) -> str:
    """What the other program computes differently; its frequencies are shifted by `theirs`."""
    text, ours, scale = "", k.frequency_shift, query_factor(k)
    if theirs != ours:
        text += (
            "\nnote: the two programs embed timesteps differently (frequencies over"
            f" {128 - ours} here, {128 - theirs} there), so the same weights give other images"
            " there; see docs/weights.md."
        )
    if scale != 1:
        text += (
            "\nnote: the other program has no μP attention scale (1 / head width):"
            f" the queries' weights and bias are scaled by {scale:.6g}, which is equivalent."
        )
    return text


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    parser = cli.parser(
        "convert",
        "Convert weights between ditjax, PyTorch's DiT, diffusers and latent diffusion.",
        config=False,
    )
    parser.add_argument(
        "--weights", required=True, help="a weights file, a diffusers folder or a run's directory"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=TARGETS,
        help="; ".join(f"{name}: {text}" for name, (text, *_) in TARGETS.items()),
    )
    parser.add_argument("--out", required=True, help="the file or folder to write")
    parser.add_argument(
        "--autoencoder", default="", help="with --to=pipeline: the autoencoder's weights"
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="also write it to this repository of the Hugging Face hub, with a model card",
    )
    cli.add_step(parser)
    cli.add_weights_options(parser)
    args = parser.parse_args(argv)
    print(
        convert(
            args.weights,
            args.to,
            args.out,
            autoencoder=args.autoencoder,
            **cli.weights_options(args),
            step=args.step,
            class_names=args.class_names,
            push=args.push,
        )
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
