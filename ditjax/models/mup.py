"""Maximal update parametrization (μP): the best learning rate stays where it is as D grows.

Yang et al. 2022 (Tensor Programs V), Table 8, the column of Adam. With r = D / D_base and heads d
wide, relative to the standard network of width D_base:

    kind     shape                      init variance    Adam's rate
    input    [fixed, D]                 1                1
    hidden   [D, D]                     1 / r            1 / r
    output   [D, fixed]                 zero here        1 / r
    vector   biases, norms' scales      -                1
    logits   q·k √d_base / d instead of q·k / √d

At D_base and d_base all of it is 1, and the network is the standard one to the bit. An output layer
has a multiplier 1 / r and a rate of 1 in the table: under Adam, from zero weights, its outputs are
then the same as with a rate of 1 / r alone (the paper's Lemma J.1), which changes no forward pass.

Zheng et al. 2025 show that the table is DiT's too; the modulations of adaLN are hidden layers. What
begins at zero (they, and the final layer) is below the table's variance at any width. Adam's first
update of each of its weights is of size 1 / r and lines up with its input, so that D of them add up
to a step that no width changes; what is behind it gets its first gradient one update later.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["input", "hidden", "output", "vector"]

# Path pattern -> what a parameter is to the width; exactly one matches each. A network's file has
# its own.
Kinds = tuple[tuple[str, Kind], ...]


class Base(NamedTuple):
    """Widths of the network, and of its heads, where this is the standard parametrization."""

    width: int
    head_width: int


def kind_of(path: str, table: Kinds) -> Kind:
    """What a parameter is to the width, by its path 'a/b/c'. ValueError when the table has none."""
    kinds = [kind for pattern, kind in table if re.search(rf"(^|/)(?:{pattern})$", path)]
    if len(kinds) != 1:
        raise ValueError(f"{path}: {len(kinds)} rules of its network match it; expected one")
    return kinds[0]


def rate_multiplier(path: str, ratio: float, table: Kinds) -> float:
    """What Adam's rate of a parameter is multiplied by, of a network `ratio` times as wide."""
    return 1 / ratio if kind_of(path, table) in ("hidden", "output") else 1.0


def query_scale(base: Base, head_width: int) -> float:
    """√(d_base / d): with it on the queries, attention's own 1 / √d becomes √d_base / d."""
    return (base.head_width / head_width) ** 0.5
