"""Maximal update parametrization (μP): the best learning rate does not change with the width D.

Yang et al. 2022 (Tensor Programs V), Table 8, the column of Adam. With r = D / D_base and heads of
width d, relative to the standard network of width D_base:

    kind     shape                      init variance    Adam's rate
    input    [fixed, D]                 1                1
    hidden   [D, D]                     1 / r            1 / r
    output   [D, fixed]                 zero here        1 / r
    vector   biases, norms' scales      -                1
    logits   q·k √d_base / d instead of q·k / √d

At D_base and d_base every factor is 1, and the network is bit for bit the standard one. The table
gives an output layer a multiplier 1 / r and a rate of 1. With Adam and zero initial weights, a rate
of 1 / r alone gives the same outputs (the paper's Lemma J.1) and leaves the forward pass unchanged.

Zheng et al. 2025 show that the table applies to DiT; the modulations of adaLN are hidden layers.
Weights that start at zero (the modulations and the final layer) have less than the table's variance
at any width. Adam's first update of each such weight has size 1 / r and is aligned with its input,
so that the sum over D of them does not depend on the width; the layers before it get their first
gradient one update later.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["input", "hidden", "output", "vector"]

# Path pattern -> kind of a parameter; exactly one pattern matches each. Every network has a table.
Kinds = tuple[tuple[str, Kind], ...]


class Base(NamedTuple):
    """Widths of the network and of its heads at which μP equals the standard parametrization."""

    width: int
    head_width: int


def kind_of(path: str, table: Kinds) -> Kind:
    """The kind of a parameter by its path 'a/b/c'. Raises ValueError unless one pattern matches."""
    kinds = [kind for pattern, kind in table if re.search(rf"(^|/)(?:{pattern})$", path)]
    if len(kinds) != 1:
        raise ValueError(f"{path}: {len(kinds)} rules of its network match; expected one")
    return kinds[0]


def rate_multiplier(path: str, ratio: float, table: Kinds) -> float:
    """The multiplier of a parameter's Adam rate in a network that is `ratio` times as wide."""
    return 1 / ratio if kind_of(path, table) in ("hidden", "output") else 1.0


def query_scale(base: Base, head_width: int) -> float:
    """√(d_base / d): multiplying the queries by it turns attention's 1 / √d into √d_base / d."""
    return (base.head_width / head_width) ** 0.5
