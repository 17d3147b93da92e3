"""The card of a model on the hub: what it is, its recipe, its scores with their protocol."""

import json
from collections.abc import Mapping
from typing import Any

from ditjax import __version__
from ditjax.files.masking import masked
from ditjax.studies.words import OF_A_METRIC, metric_name, number

_INTERVAL = ("_low", "_high")


def model_card(
    title: str,
    summary: str,
    place: str,
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The text of README.md. Secrets are masked.

    `place` is the name on the hub. `recipe` has the dotted keys that differ from the paper's
    values. `evaluation` is the run's evaluation.json, None without one.
    """
    keys = [f"| `{key}` | `{json.dumps(value)}` |" for key, value in recipe.items()]
    parts = [
        "---\nlibrary_name: ditjax\ntags:\n- ditjax\n- diffusion\n---",
        f"# {title}",
        f"Made by ditjax {__version__}.",
        f"```\n{summary}\n```",
        f"`{place}` stands wherever ditjax takes weights, after `pip install 'ditjax[hub]'`.",
        "## Recipe",
        "Keys that differ from the paper's values:",
        "\n".join(["| key | value |", "|---|---|", *keys]),
        "## Scores",
        _scores(evaluation) if evaluation else "None are on record: `evaluate` was not run.",
        "No licence is stated: the author adds one.",
    ]
    return masked("\n\n".join(parts) + "\n")


def _scores(evaluation: Mapping[str, Any]) -> str:
    """A table of the metrics, and what fixes their meaning."""
    metrics = evaluation["metrics"]
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in metrics.items():
        if name.endswith(OF_A_METRIC):
            continue
        low, high = (metrics.get(name + end) for end in _INTERVAL)
        interval = "-" if low is None or high is None else f"{number(low)} to {number(high)}"
        rows.append(f"| {metric_name(name)} | {number(value)} | {interval} |")
    protocol = json.dumps(evaluation["protocol"], indent=1)
    about = (
        f"Step {evaluation['step']}, against {evaluation['reference'] or 'no reference'}. Scores of"
        f" another protocol than `{evaluation['protocol_hash']}` are not comparable."
    )
    return "\n\n".join(["\n".join(rows), about, f"```json\n{protocol}\n```"])
