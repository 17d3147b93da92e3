"""A study of finished runs as fits, a table, figures and a page."""

import os
import sys

# Figures are drawn on canvases of their own, and no backend is used. Matplotlib reads the one of
# the environment all the same, and cannot be imported with a name that it does not know.
_BACKEND = os.environ.pop("MPLBACKEND", None)

import matplotlib  # noqa: E402

if _BACKEND is not None:
    os.environ["MPLBACKEND"] = _BACKEND
    try:
        matplotlib.rcParams["backend"] = _BACKEND
    except ValueError:
        print(f"MPLBACKEND is {_BACKEND!r}, no backend of matplotlib: ignored", file=sys.stderr)
