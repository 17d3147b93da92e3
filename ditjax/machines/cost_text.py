"""The costs of the cells of a study, as a table."""

import math
from collections.abc import Sequence

from ditjax.machines.chips import GIB
from ditjax.machines.costs import Cost
from ditjax.studies.words import aligned, number, plural, short

COST_ASSUMPTIONS = (
    "training: products, memory and links at their peaks, all at once at best, the links after the"
    " rest with nothing hidden; sampling: the DiT's products at their peak. No run is faster",
    "not counted: memory and traffic of activations (--plan compiles the step and counts them), the"
    " decoder, features, input, checkpoints, restarts",
)


def cost_text(topology: str, names: Sequence[str], costs: Sequence[Cost]) -> str:
    """One row per cell, their sum, and the assumptions."""
    rows = [["cell", "training h", "to", "sampling h", "chip-hours", "to", "GiB a device", ""]]
    for name, each in zip(names, costs, strict=True):
        used = f"{each.needed / GIB:.2f} of {each.hbm / GIB:.2f}"
        note = (
            "" if each.fits else "does not fit: split it (config.mesh.fsdp), or a larger topology"
        )
        rows.append([short(name), *_figures([each]), used, note])
    if len(costs) > 1:
        rows.append([plural(len(costs), "cell"), *_figures(costs), "", ""])
    labels = ", ".join(dict.fromkeys(each.label for each in costs))
    chips = max(each.chips for each in costs)
    return "\n".join(
        [
            f"on {topology}, {plural(chips, 'chip')} ({labels}):",
            *aligned(rows, [False, True, True, True, True, True, True, False]),
            *(f"  - {text}" for text in COST_ASSUMPTIONS),
        ]
    )


def _figures(costs: Sequence[Cost]) -> list[str]:
    """Hours of training at best and at worst, of sampling, and chip-hours at best and at worst."""
    each = [(cost.best, cost.worst, cost.sampling, *cost.chip_hours) for cost in costs]
    totals = map(sum, zip(*each, strict=True))
    return ["-" if math.isnan(total) else number(total) for total in totals]
