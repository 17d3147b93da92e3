"""Figures that others have published, beside the cells of ours that they belong to.

A recipe names them (config.sweep.published), a sweep writes those of a cell into its `result.json`,
and everywhere they go by the name of *published*.
"""

import operator

from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.runs.results import PublishedFigures


def published_of(study: Config, cell: Config) -> PublishedFigures | None:
    """What `study.sweep.published` says of a cell, or None where it says nothing.

    A figure belongs to every cell that has all of its keys' values, so to all seeds of it. Raises
    UserError where two figures of one metric belong to a cell.
    """
    values: dict[str, float] = {}
    for keys, metric, value in study.sweep.published:
        if any(operator.attrgetter(key)(cell) != wanted for key, wanted in keys):
            continue
        if metric in values:
            named = ", ".join(f"{key}={wanted!r}" for key, wanted in keys)
            raise UserError(
                f"config.sweep.published says {metric} {values[metric]:g} and {value:g} of the"
                f" cells with {named}: give the figures more keys, so that one belongs to each."
            )
        values[metric] = value
    if not values:
        return None
    return {
        "values": values,
        "protocol": dict(study.sweep.published_protocol),
        "source": study.sweep.published_source,
    }
