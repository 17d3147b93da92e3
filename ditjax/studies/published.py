"""Published figures of other authors, matched to the cells of a study.

A recipe lists them (config.sweep.published) and a sweep writes those of a cell to its
`result.json`. The term for them is *published* everywhere.
"""

import operator

from ditjax.config import Config
from ditjax.errors import UserError
from ditjax.runs.results import PublishedFigures


def published_of(study: Config, cell: Config) -> PublishedFigures | None:
    """Return the figures of `study.sweep.published` that belong to a cell, or None.

    A figure belongs to every cell that has the values of all its keys, and so to all seeds. Raises
    UserError if two figures of one metric belong to a cell.
    """
    values: dict[str, float] = {}
    for keys, metric, value in study.sweep.published:
        if any(operator.attrgetter(key)(cell) != wanted for key, wanted in keys):
            continue
        if metric in values:
            named = ", ".join(f"{key}={wanted!r}" for key, wanted in keys)
            raise UserError(
                f"config.sweep.published lists {metric} {values[metric]:g} and {value:g} for the"
                f" cells with {named}: add keys so that one figure belongs to each cell."
            )
        values[metric] = value
    if not values:
        return None
    return {
        "values": values,
        "protocol": dict(study.sweep.published_protocol),
        "source": study.sweep.published_source,
    }
