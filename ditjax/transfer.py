"""python -m ditjax.transfer: where the best learning rate is, by width and parametrization."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.config import Config, completed, read
from ditjax.errors import UserError
from ditjax.files.atomic import write_atomic, write_json
from ditjax.models.sizes import parse_size
from ditjax.reporting.transfer import Run, curves, record, summary_of_seeds, table, transfer_png
from ditjax.runs.results import Found, find_results

LOSS = "final_loss"  # of the last logged interval of the training
# In these keys the runs of one figure differ; in another they would be two studies.
_AXES = ("model.parametrization", "model.size", "optim.learning_rate", "seed")
_SECTIONS = ("model", "diffusion", "data", "autoencoder", "optim", "train")


def runs_of(found: Sequence[Found], metric: str) -> list[Run]:
    """The runs' learning rates, widths and values of `metric`.

    Raises UserError for a metric that a run has not, and for runs that differ in more than
    parametrization, width, learning rate and seed, or that stand twice.
    """
    made: dict[tuple[Any, ...], Run] = {}
    first: tuple[str, dict[str, Any]] | None = None
    for each in found:
        result, c = each.result, read(completed(each.result["config"]))
        values = {**result["metrics"], LOSS: result["train"]["final_loss"]}
        if metric not in values:
            raise UserError(
                f"{each.folder} has no {metric}: --metric is one of {', '.join(sorted(values))}."
            )
        rest = _rest(c)
        first = first or (str(each.folder), rest)
        for key, value in rest.items():
            if value != first[1][key]:
                raise UserError(
                    f"{each.folder} has {key}={value!r} and {first[0]} {first[1][key]!r}: name"
                    f" runs that differ in {', '.join(_AXES)} alone."
                )
        run = Run(
            c.model.parametrization,
            result["model"]["width"],
            c.optim.learning_rate,
            c.seed,
            values[metric],
        )
        cell = (run.parametrization, run.width, run.learning_rate, run.seed)
        if cell in made:
            raise UserError(f"{each.folder} is a second run of {cell}: name it once.")
        made[cell] = run
    return list(made.values())


def _rest(c: Config) -> dict[str, Any]:
    """What all runs of a figure share, of what is learned."""
    found: dict[str, Any] = {"depth": parse_size(c.model.size).depth}
    for section in _SECTIONS:
        for key, value in vars(getattr(c, section)).items():
            name = f"{section}.{key}"
            if name not in _AXES and name != "data.data_dir":
                found[name] = value
    return found


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("transfer", "Where the best learning rate is, by width.", config=False)
    parser.add_argument("--runs", required=True, help="folders of sweeps or runs, comma-separated")
    parser.add_argument("--out", help="folder of the files (default: transfer/ in the first one)")
    parser.add_argument("--metric", default=LOSS, help=f"what is lower where it is better ({LOSS})")
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.runs.split(",") if folder]
    if not folders:
        raise UserError("--runs is empty: expected one or more folders, comma-separated.")
    found, problems = find_results(folders)
    if not found:
        raise UserError(f"no readable result.json below {args.runs}: run a sweep first.")
    runs = runs_of(found, args.metric)
    made = curves(runs)
    out = Path(args.out) if args.out else folders[0] / "transfer"
    diverged = sum(not math.isfinite(run.value) for run in runs)
    words = summary_of_seeds(made) + (f", {diverged} diverged" if diverged else "") + "."
    text = "\n".join([table(made, args.metric), words, *(f"problem: {p}" for p in problems)])
    write_atomic(out / "transfer.txt", (text + "\n").encode())
    write_atomic(out / "transfer.png", transfer_png(made, args.metric, words))
    environment = found[0].result["environment"]
    whole = {
        "schema": 1,
        "metric": args.metric,
        **record(made),
        "problems": problems,
        "environment": environment,
    }
    write_json(out / "transfer.json", whole)
    print(f"{text}\n{out / 'transfer.png'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
