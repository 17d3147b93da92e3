"""python -m ditjax.convert: convert weights between ditjax and PyTorch's DiT or diffusers."""

import os
from pathlib import Path
from typing import Unpack

from ditjax import cli
from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.models.dit import query_factor
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.tasks import make_task
from ditjax.weights import networks, reading, vocabulary, writing
from ditjax.weights.networks import LoadedNetwork

TARGETS = {
    "ditjax": "one safetensors file that includes the recipe",
    "release": "a state dict (.pt) with the names of the public DiT release",
    "sit": "a checkpoint (.pt) of SiT's training script, for its processes",
    "diffusers": "a model folder: config.json and safetensors",
    "ldm": "an autoencoder's checkpoint (.ckpt) with the names of latent diffusion",
    "pipeline": "a DiTPipeline folder; needs the --autoencoder of the latent DiT",
}
_WANTED: dict[str, reading.Wanted] = {
    "release": "dit",
    "sit": "dit",
    "pipeline": "dit",
    "ldm": "autoencoder",
}
FOLDERS = ("diffusers", "pipeline")
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
    params, _ = opening.network_weights(config, make_task(config), path, mesh, step)
    names = opening.class_names_of(path, config)
    return networks.from_run(config, params, (Path(path),), names)


def read_decoder(path: str, which: str) -> LoadedNetwork:
    """Read the autoencoder of a pipeline from a run, a weights file or a model folder."""
    return read_network(path) if rundir.is_run(path) else reading.load_autoencoder(path, which)


@lease.scope()
def convert(
    source: str,
    target: str,
    out: str,
    *,
    autoencoder: str = "",
    step: Step = "latest",
    class_names: str = "auto",
    **options: Unpack[reading.WeightsOptions],
) -> str:
    """Write `out` in the layout `target`. Returns a summary to print.

    Raises UserError for a source that cannot be read or that the layout cannot express.
    """
    if not rundir.is_run(source):
        opening.check_no_step(source, step)
    which = options.get("which", "ema")
    decoder: LoadedNetwork | None = None
    if target in FOLDERS:
        lease.acquire(Path(out) / lease.FILE, out)
    if os.path.exists(Path(source) / vocabulary.MODEL_INDEX):
        return _convert_pipeline(source, target, out, autoencoder, class_names, options)
    wanted = _WANTED.get(target, "any")
    network = read_network(source, step=step, wanted=wanted, **options)
    if network.decodes:
        networks.check_stated(network)
    else:
        network = networks.with_class_names(network, class_names)
    if wanted != ("autoencoder" if network.decodes else "dit") and wanted != "any":
        raise UserError(
            f"{source} holds a {network.name}: --to={target} takes the other kind of network."
        )
    if autoencoder and target != "pipeline":
        raise UserError(f"--autoencoder goes with --to=pipeline, not with --to={target}.")
    if target == "pipeline":
        if not autoencoder:
            raise UserError("--to=pipeline needs the DiT's --autoencoder.")
        decoder = read_decoder(autoencoder, which)
        _write_pipeline(out, network, decoder)
    else:
        write = {
            "ditjax": writing.write_ditjax,
            "release": writing.write_release,
            "sit": writing.write_sit,
            "diffusers": writing.write_diffusers,
            "ldm": writing.write_ldm,
        }[target]
        write(out, network)
    return _summary(source, out, network, target, decoder)


def _convert_pipeline(
    source: str,
    target: str,
    out: str,
    autoencoder: str,
    class_names: str,
    options: reading.WeightsOptions,
) -> str:
    """Write a whole pipeline as another one. Returns a summary to print."""
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
    return _summary(source, out, network, target, decoder)


def _write_pipeline(out: str, network: LoadedNetwork, decoder: LoadedNetwork) -> None:
    """Write a DiTPipeline, whose classes have their numbers as names if they have no others."""
    numbers = [(str(i),) for i in range(network.config.data.num_classes)]
    writing.write_pipeline(out, network, decoder, network.class_names or numbers)


def _summary(
    source: str,
    out: str,
    network: LoadedNetwork,
    target: str,
    decoder: LoadedNetwork | None = None,
) -> str:
    text = (
        f"{network.name}, {network.num_parameters:,} parameters of {network.dtype}:"
        f" {source} ({network.layout}) -> {out} ({target})"
    )
    text = "\n".join((text, *network.notes, *(decoder.notes if decoder else ())))
    if not network.decodes:
        text += f"\n{networks.labels_text(network.config)}"
        theirs = {"release": 0, "sit": 0, "diffusers": 1, "pipeline": 1}.get(target)
        ours = network.config.model.frequency_shift
        if theirs is not None and theirs != ours:
            text += (
                "\nnote: the two programs embed timesteps differently (frequencies over"
                f" {128 - ours} here, {128 - theirs} there), so the same weights give other images"
                " there; see docs/weights.md."
            )
        scale = query_factor(network.config.model)
        if theirs is not None and scale != 1:
            text += (
                "\nnote: the other program has no μP attention scale (1 / head width):"
                f" the queries' weights and bias are scaled by {scale:.6g}, which is equivalent."
            )
    classes = network.config.data.num_classes
    if target == "pipeline" and classes != _NULL_LABEL:
        text += (
            f"\nnote: DiTPipeline takes class {_NULL_LABEL} for the null label, and this"
            f" DiT's is {classes}: only guidance_scale=1 is correct there."
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
        help="; ".join(f"{name}: {text}" for name, text in TARGETS.items()),
    )
    parser.add_argument("--out", required=True, help="the file or folder to write")
    parser.add_argument(
        "--autoencoder", default="", help="with --to=pipeline: the autoencoder's weights"
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
        )
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
