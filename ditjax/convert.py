"""python -m ditjax.convert: weights between PyTorch's DiT, diffusers, latent diffusion and ours."""

import os
from pathlib import Path

from ditjax import cli
from ditjax.data.classes import class_names
from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.models.dit import query_scale
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening, rundir
from ditjax.runs.checkpoint import Step
from ditjax.tasks import make_task
from ditjax.weights import networks, reading, vocabulary, writing
from ditjax.weights.networks import Network

TARGETS = {
    "ditjax": "one safetensors file with its recipe",
    "release": "a state dict (.pt) in the names of the public DiT release",
    "diffusers": "a model folder: config.json and safetensors",
    "ldm": "an autoencoder's checkpoint (.ckpt) in the names of latent diffusion",
    "pipeline": "a DiTPipeline folder; with a latent DiT's --autoencoder",
}
FOLDERS = ("diffusers", "pipeline")


def read_network(
    path: str,
    *,
    which: str = "ema",
    heads: int = 0,
    numerics: reading.Numerics = "auto",
    step: Step = "latest",
) -> Network:
    """A network out of a run's directory (averaged weights), a weights file or a model folder."""
    if not rundir.is_run(path):
        return reading.load(path, which=which, heads=heads, numerics=numerics)
    config = opening.recipe_of(path)
    mesh = make_mesh(-1, 1)
    params, _ = opening.load_weights(config, make_task(config), path, mesh, step)
    return networks.of_run(config, params, (Path(path),))


@lease.scope()
def convert(
    source: str,
    target: str,
    out: str,
    *,
    autoencoder: str = "",
    which: str = "ema",
    heads: int = 0,
    numerics: reading.Numerics = "auto",
    step: Step = "latest",
) -> str:
    """Writes `out` in the layout `target`; returns a line that says what was done.

    Raises UserError for what cannot be read, or cannot be said in that layout.
    """
    if not rundir.is_run(source):
        opening.no_step(source, step)
    names = class_names()
    if target in FOLDERS:
        lease.acquire(Path(out) / lease.FILE, out)
    if os.path.exists(Path(source) / vocabulary.MODEL_INDEX):
        if target != "pipeline":
            raise UserError(
                f"{source} is a whole pipeline: convert {source}/transformer or {source}/vae, or"
                " say --to=pipeline."
            )
        network, decoder, names = reading.load_pipeline(source, numerics=numerics)
        if autoencoder:
            decoder = read_network(autoencoder, which=which)
        writing.write_pipeline(out, network, decoder, names)
        return _line(source, out, network, target)
    network = read_network(source, which=which, heads=heads, numerics=numerics, step=step)
    decodes = {"ldm": True, "release": False, "pipeline": False}.get(target, network.decodes)
    if network.decodes != decodes:
        raise UserError(f"{source} holds a {network.name}: --to={target} is for the other network.")
    if autoencoder and target != "pipeline":
        raise UserError(f"--autoencoder goes with --to=pipeline, not with --to={target}.")
    if target == "pipeline":
        if not autoencoder:
            raise UserError("--to=pipeline needs the DiT's --autoencoder.")
        classes = network.config.data.num_classes
        named = names if classes == len(names) else tuple((str(i),) for i in range(classes))
        writing.write_pipeline(out, network, read_network(autoencoder, which=which), named)
    else:
        write = {
            "ditjax": writing.write_ditjax,
            "release": writing.write_release,
            "diffusers": writing.write_diffusers,
            "ldm": writing.write_ldm,
        }[target]
        write(out, network)
    return _line(source, out, network, target)


def _line(source: str, out: str, network: Network, target: str) -> str:
    done = (
        f"{network.name}, {network.num_parameters:,} parameters of {network.dtype}:"
        f" {source} ({network.layout}) -> {out} ({target})"
    )
    if not network.decodes:
        theirs = {"release": 0, "diffusers": 1, "pipeline": 1}.get(target)
        ours = network.config.model.frequency_shift
        if theirs is not None and theirs != ours:
            done += (
                "\nnote: the two programs embed timesteps differently (frequencies over"
                f" {128 - ours} here, {128 - theirs} there): the same weights give other images"
                " there; see docs/weights.md."
            )
        scale = query_scale(network.config.model)
        if theirs is not None and scale != 1:
            done += (
                "\nnote: attention over the width of a head (μP) is not known there: the"
                f" queries' weights and bias are multiplied by {scale:.6g}, which is the same."
            )
    classes = network.config.data.num_classes
    if target == "pipeline" and classes != len(class_names()):
        done += (
            f"\nnote: DiTPipeline takes class {len(class_names())} for the null label, and this"
            f" DiT's is {classes}: only guidance_scale=1 is right there."
        )
    return done


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("convert", __doc__.partition(": ")[2], config=False)
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
    parser.add_argument("--autoencoder", default="", help="of a pipeline")
    cli.add_step(parser)
    cli.add_reading_of_weights(parser)
    args = parser.parse_args(argv)
    print(
        convert(
            args.weights,
            args.to,
            args.out,
            autoencoder=args.autoencoder,
            which=args.which,
            heads=args.heads,
            numerics=args.numerics,
            step=args.step,
        )
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
