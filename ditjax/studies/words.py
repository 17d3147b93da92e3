"""How numbers, names, laws and tables read in a report."""

import math
import re
from collections.abc import Iterable, Sequence

from ditjax.config import SHIPPED_FEATURES
from ditjax.errors import printable
from ditjax.scaling.fit import Interval, PowerLaw

_SHARES = ("precision", "recall", "density", "coverage")
# Only the distance on the features of the 2015 Inception is called FID.
METRIC_NAMES = {
    **{f"fd_{name}": f"FD-{name}" for name in SHIPPED_FEATURES},
    **{f"fd_{name}_floor": f"FD-{name} floor" for name in SHIPPED_FEATURES},
    **{f"fd_{name}_inf": f"FD-{name}∞" for name in SHIPPED_FEATURES},
    **{f"kd_{name}": f"KD-{name}" for name in SHIPPED_FEATURES},
    **{f"md_{name}": f"MD-{name}" for name in SHIPPED_FEATURES},
    **{f"{metric}_{name}": metric for metric in _SHARES for name in SHIPPED_FEATURES},
    "fd_dinov2": "FD-DINOv2",
    "fd_dinov2_inf": "FD-DINOv2∞",
    "kd_dinov2": "KDD",
    "fid": "FID",
    "fid_inf": "FID∞",
    "sfid": "sFID",
    "inception_score": "IS",
    "kid": "KID",
    "mind": "MIND",
    "val_loss": "validation loss",
    "val_vlb": "validation L_vlb",
}
# Suffixes of a metric's uncertainty, which is in the CSV and not in a reader's table.
OF_A_METRIC = ("_low", "_high", "_inf_se", "_deviation", "_stderr")


def number(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits and no exponent: 0.000262, 1.41, 119, 12300."""
    if value is None or math.isnan(value):
        return "NaN" if value is not None else "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    places = max(digits - 1 - exponent, 0)
    if places > 12:
        return f"{value:.{digits}g}"
    return f"{value:.{places}f}"


def count(value: int) -> str:
    """A number of parameters as in the paper's tables: 33.1M, 450K, 812."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{number(value / size)}{suffix}"
    return str(value)


def percent(share: float) -> str:
    """A signed share: +18 %, -3.1 %."""
    return f"{'+' if share >= 0 else '-'}{number(abs(share) * 100, 2)} %"


def interval_words(interval: Interval | None) -> str:
    """'0.5 to 1.2'; '-' for None."""
    if interval is None:
        return "-"
    return f"{number(interval.low)} to {number(interval.high)}"


def plural(n: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def short(text: str, longest: int = 44) -> str:
    """The text on one line of at most `longest` characters, without control characters."""
    line = printable(text)
    return line if len(line) <= longest else line[: longest - 3] + "..."


def shortened(names: Iterable[str], longest: int = 44) -> dict[str, str]:
    """`short` of each of several names, so that different names stay different.

    Parts that all of them have are left out before anything else is. A name is longer than
    `longest` only where shorter ones would be the same.
    """
    lines = {name: printable(name) for name in names}
    if all(len(line) <= longest for line in lines.values()):
        return lines
    parts = {name: re.split(r"(?<=[-_ ,])", line) for name, line in lines.items()}
    common = set.intersection(*map(set, parts.values())) if len(lines) > 1 else set()
    elided = {
        name: "".join("\0" if part in common else part for part in each)
        for name, each in parts.items()
    }
    elided = {name: re.sub("\0+", "...", line) for name, line in elided.items()}
    for length in range(longest, max(map(len, lines.values())) + 1):
        for texts in (elided, lines):
            for head in (1.0, 0.5, 0.0):
                found = {name: _cut(text, length, head) for name, text in texts.items()}
                if len(set(found.values())) == len(set(lines.values())):
                    return found
    return lines


def _cut(text: str, longest: int, head: float) -> str:
    """The text, or its first and last characters, of which `head` is the share of the first."""
    if len(text) <= longest:
        return text
    first = round(head * (longest - 3))
    return f"{text[:first]}...{text[len(text) - (longest - 3 - first) :]}"


def encodable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot encode, such as lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def metric_name(metric: str) -> str:
    """The name of a metric's key for a reader."""
    return METRIC_NAMES.get(metric, short(metric.replace("_", " "), 24))


def law_words(law: PowerLaw, name: str) -> str:
    """A law in Gflops: 'FID ≈ 138 · Gflops^-0.365'."""
    offset = f"{number(law.c)} + " if law.c else ""
    return f"{name} ≈ {offset}{number(law.a)} · Gflops^{number(-law.b)}"


def aligned(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """One line a row: numeric columns are aligned to the right, the others to the left."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
