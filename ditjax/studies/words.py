"""How numbers, names and laws read in a report."""

import math
from collections.abc import Sequence

from ditjax.files.masking import visible
from ditjax.scaling.fit import Interval, PowerLaw

# The honest names: FID is said only of the 2015 Inception features.
METRIC_NAMES = {
    "fd_digits": "FD-digits",
    "fd_digits_floor": "FD-digits floor",
    "fd_digits_inf": "FD-digits∞",
    "kd_digits": "KD-digits",
    "precision_digits": "precision",
    "recall_digits": "recall",
    "fid": "FID",
    "fid_inf": "FID∞",
    "sfid": "sFID",
    "inception_score": "IS",
    "kid": "KID",
    "val_loss": "validation loss",
    "val_vlb": "validation L_vlb",
}
# How sure a metric is, not what it is: in the CSV, and no columns of a reader's table.
OF_A_METRIC = ("_low", "_high", "_inf_se", "_deviation", "_stderr")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent: 0.000262, 1.41, 119, 12300."""
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
    """Parameters as in the paper's tables: 33.1M, 450K, 812."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{number(value / size)}{suffix}"
    return str(value)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def percent(share: float) -> str:
    """+18 %, -3.1 %."""
    return f"{'+' if share >= 0 else '-'}{number(abs(share) * 100, 2)} %"


def interval_words(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{number(interval.low)} to {number(interval.high)}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def short(text: str, longest: int = 44) -> str:
    """One printable line of at most `longest` characters: no escape reaches the terminal."""
    line = visible(text)
    return line if len(line) <= longest else line[: longest - 3] + "..."


def encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, short(metric.replace("_", " "), 24))


def law_words(law: PowerLaw, name: str) -> str:
    offset = f"{number(law.c)} + " if law.c else ""
    return f"{name} ≈ {offset}{number(law.a)} · Gflops^{number(-law.b)}"


def aligned(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """A line a row: numeric columns end where their titles do, the others begin there."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
