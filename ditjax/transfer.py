"""python -m ditjax.transfer: plot the best learning rate by width and parametrization."""

import math
from collections.abc import Sequence
from typing import Any

from ditjax import cli
from ditjax.config import Config, migrated, read
from ditjax.errors import UserError
from ditjax.files.atomic import write_atomic, write_json, write_text
from ditjax.files.paths import split_paths
from ditjax.files.store import place
from ditjax.models.dit import parse_size
from ditjax.reporting.transfer import (
    RateRun,
    rate_curves,
    summary_of_seeds,
    transfer_png,
    transfer_record,
    transfer_text,
)
from ditjax.runs.results import Found, find_results

FINAL_LOSS = "final_loss"  # training loss, the mean over the last logged interval
# Keys in which the runs of one figure may differ.
_AXES = ("model.parametrization", "model.size", "optim.learning_rate", "seed")
_SECTIONS = ("model", "diffusion", "data", "autoencoder", "optim", "train")


def rate_runs(found: Sequence[Found], metric: str) -> list[RateRun]:
    """Return the learning rate, the width and the value of `metric` of each run.

    Raises UserError if a run lacks the metric or a width, if two runs are the same, or if runs
    differ in more than parametrization, width, learning rate and seed.
    """
    made: dict[tuple[str, int, float, int], RateRun] = {}
    first: tuple[str, dict[str, Any]] | None = None
    for each in found:
        result, c = each.result, read(migrated(each.result["config"]))
        values = {**result["metrics"], FINAL_LOSS: result["train"]["final_loss"]}
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
                    f" runs that differ only in {', '.join(_AXES)}."
                )
        width = result["model"].get("width")
        if type(width) is not int:
            raise UserError(
                f"{each.folder} holds a {result['model']['name']}, which has no width: name runs of"
                " DiTs."
            )
        cell = (c.model.parametrization, width, c.optim.learning_rate, c.seed)
        if cell in made:
            raise UserError(f"{each.folder} is a second run of {cell}: name it once.")
        made[cell] = RateRun(*cell, values[metric])
    return list(made.values())


def _rest(c: Config) -> dict[str, Any]:
    """Return what all runs of a figure must share: all training keys except `_AXES`."""
    found: dict[str, Any] = {"depth": parse_size(c.model.size).depth}
    for section in _SECTIONS:
        for key, value in vars(getattr(c, section)).items():
            name = f"{section}.{key}"
            if name not in _AXES and name != "data.data_dir":
                found[name] = value
    return found


def main(argv: list[str]) -> int:
    """Print the table and the path of the figure. Raises UserError."""
    parser = cli.parser(
        "transfer", "Plot the best learning rate by width and parametrization.", config=False
    )
    parser.add_argument("--runs", required=True, help="folders of sweeps or runs, comma-separated")
    parser.add_argument("--out", help="output folder (default: transfer/ in the first folder)")
    parser.add_argument(
        "--metric", default=FINAL_LOSS, help=f"a metric to minimize (default: {FINAL_LOSS})"
    )
    args = parser.parse_args(argv)
    folders = split_paths(args.runs, "--runs")
    found, problems = find_results(folders)
    if not found:
        raise UserError(f"no readable result.json below {args.runs}: run a sweep first.")
    runs = rate_runs(found, args.metric)
    made = rate_curves(runs)
    out = place(args.out) if args.out else folders[0] / "transfer"
    diverged = sum(not math.isfinite(run.value) for run in runs)
    words = summary_of_seeds(made) + (f", {diverged} diverged" if diverged else "") + "."
    text = "\n".join(
        [transfer_text(made, args.metric), words, *(f"problem: {p}" for p in problems)]
    )
    write_text(out / "transfer.txt", text + "\n")
    write_atomic(out / "transfer.png", transfer_png(made, args.metric, words))
    environment = found[0].result["environment"]
    whole = {
        "schema": 1,
        "metric": args.metric,
        **transfer_record(made),
        "problems": problems,
        "environment": environment,
    }
    write_json(out / "transfer.json", whole)
    print(f"{text}\n{out / 'transfer.png'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
