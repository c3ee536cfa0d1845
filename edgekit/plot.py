"""How every figure of edgekit looks, and the one door to matplotlib.

Knows sizes, colours and files; never what is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.errors import MissingExtraError, UsageError

FORMS = (".png", ".svg")
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/): also apart for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "edgekit",  # the same figure gives the same bytes
}


def check_form(path: Path) -> None:
    """Raises UsageError for a file that is neither .png nor .svg: before the work, not after."""
    if path.suffix.lower() not in FORMS:
        raise UsageError(f"cannot draw {path.name}", hint=f"end it in {' or '.join(FORMS)}")


def round_numbers(low: float, high: float) -> list[float]:
    """Those between two figures, for a logarithmic scale: 1, 2, 5, 10, ..."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 300 * low else (1,)
    return [step * 10.0**n for n in decades for step in steps if low <= step * 10.0**n <= high]


@contextmanager
def figure(path: Path, *, width_in: float = 7.0, height_in: float = 4.0) -> Iterator[Any]:
    """A matplotlib Figure to draw on; written to ``path`` (.png or .svg) when the block ends well.

    Sizes in inches. Raises UsageError for another suffix, MissingExtraError without matplotlib.
    """
    check_form(path)
    try:
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plot", missing="matplotlib") from None
    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        drawn = Figure(figsize=(width_in, height_in), layout="constrained")
        yield drawn
        form = path.suffix.lower()[1:]
        raw = io.BytesIO()
        # No date: see hashsalt above.
        drawn.savefig(raw, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    _fs.write_atomic(path, raw.getvalue())
