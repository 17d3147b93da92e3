"""Model sizes as plain data: the paper's Table 1, small ones for small images, and any other."""

import re
from typing import NamedTuple

from ditjax.errors import UserError, nearest


class Size(NamedTuple):
    """Layers L, hidden width D and attention heads of a transformer."""

    depth: int
    width: int
    heads: int


# DiT Table 1.
PAPER_SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
PAPER_PATCHES = (8, 4, 2)

_EXPLICIT = re.compile(r"(\d{1,4})x(\d{1,6})x(\d{1,4})")


def parse_size(name: str) -> Size:
    """'XL' -> Size(28, 1152, 16); any other network as depth x width x heads: '4x96x3'.

    Raises UserError for an unknown name, a zero, or a width that the heads do not divide.
    """
    if name in PAPER_SIZES:
        return PAPER_SIZES[name]
    match = _EXPLICIT.fullmatch(name)
    if match is None:
        raise UserError(
            f"model size {name!r} is unknown: expected one of {', '.join(PAPER_SIZES)}"
            f" or depth x width x heads such as '4x96x3'.{nearest(name, PAPER_SIZES)}"
        )
    size = Size(*(int(group) for group in match.groups()))
    if min(size) < 1:
        raise UserError(f"model size {name!r}: depth, width and heads must each be at least 1.")
    if size.width % size.heads:
        raise UserError(
            f"model size {name!r}: width {size.width} is not divisible by {size.heads} heads;"
            f" the nearest width that is: {max(1, round(size.width / size.heads)) * size.heads}."
        )
    if size.width % 4:
        raise UserError(
            f"model size {name!r}: width {size.width} is not divisible by 4, which the 2-D sin-cos"
            f" position embedding needs; the next width that is: {size.width + 4 - size.width % 4}."
        )
    return size
