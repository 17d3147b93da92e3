"""What every figure shares: the two backgrounds, colours, markers, plain ticks, a PNG's bytes."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend


@dataclass(frozen=True)
class Theme:
    background: str
    ink: str
    faint: str
    grid: str


LIGHT = Theme("#ffffff", "#1b1f24", "#59636e", "#e4e7eb")
# Okabe & Ito's colours, told apart by colour-blind readers and visible on both backgrounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

Draw = Callable[[Theme], "Figure"]


def png(draw: Draw, theme: Theme) -> bytes:
    """The figure that `draw` makes for a theme, as the bytes of a PNG."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    style: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 10,
        "legend.frameon": False,
        "text.parse_math": False,  # a run's name may hold a dollar sign
    }
    with plt.rc_context(style):
        figure = draw(theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def left_title(legend: "Legend", size: float = 9) -> None:
    legend.set_alignment("left")
    legend.get_title().set_fontsize(size)


def plain_ticks(ax: "Axes") -> None:
    """A few labels on each axis whatever its span, never an exponent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            decades = math.log10(high / low)
            labelled = next(
                (
                    subs
                    for most, subs in ((1.0, (1, 1.5, 2, 3, 5, 7)), (3.0, (1, 2, 5)))
                    if decades < most
                ),
                (1,),
            )
            axis.set_major_locator(LogLocator(subs=labelled))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """0.0001, 0.15, 2, 1000."""
    return f"{value:.12f}".rstrip("0").rstrip(".")
