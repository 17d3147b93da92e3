"""ditjax NAME ..., python -m ditjax NAME ...: one command; without arguments, the list of them."""

import importlib
import sys

from ditjax import cli
from ditjax.errors import UserError, nearest
from ditjax.files.streams import keep_streams

COMMANDS = {
    "train": "train one network; the same command again resumes",
    "sample": "draw images from a run or from published weights",
    "evaluate": "score a run's samples, or any sample set, with their protocol",
    "grid": "score one checkpoint at every combination of sampler, steps and guidance",
    "inspect": "look inside a trained network: probes, lens, patching, ablation, similarity",
    "sweep": "train and evaluate every cell of a study, then report",
    "report": "write a page, tables and plots from any number of results",
    "transfer": "find the best learning rate by width and parametrization",
    "encode": "cache a data set's latents",
    "convert": "convert weights between PyTorch's DiT, diffusers, latent diffusion and ditjax",
    "flops": "count parameters and Gflops",
    "bench": "time a recipe's train step on this machine, beside PyTorch",
    "plan": "compile a recipe's train step for a machine that is not here: memory, time, cost",
    "classify": "train the small classifiers that ship",
}


def main() -> None:
    """Run the command that the first argument names."""
    keep_streams()
    name, *rest = sys.argv[1:] or [""]
    if name in ("", "-h", "--help", "help"):
        print(__doc__.partition(": ")[0].replace(", ", "\n"), end="\n\n")
        print("\n".join(f"  {command:<9} {text}" for command, text in COMMANDS.items()))
        print("\n--help after a command lists its flags. The manual is docs/README.md.")
        return
    if name not in COMMANDS:
        error = UserError(
            f"{name[:100]!r} is no command.{nearest(name, COMMANDS)} One of: {', '.join(COMMANDS)}."
        )

        def fail(argv: list[str]) -> int:
            raise error

        cli.run(fail)
    sys.argv = [f"ditjax {name}", *rest]
    cli.run(importlib.import_module(f"ditjax.{name}").main)


if __name__ == "__main__":
    main()
