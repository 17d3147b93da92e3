"""How durations read: to the second while something runs, roughly in a table."""

import math


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def duration(seconds: float) -> str:
    """Two digits and a unit: '9.0 s', '42 s', '35 min', '2.1 h'; '-' where it is not finite."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        exponent = int(f"{seconds:.1e}".partition("e")[2])  # of the rounded value
        return f"{seconds:.{max(1 - exponent, 0)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
