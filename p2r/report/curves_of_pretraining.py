"""Curves of pretraining for a published backbone: loss and health over steps. It shows no scan, so it is under no data licence."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from p2r.report.canvas import INK, WIDE, new_sheet, plain, to_png
from p2r.report.text import for_picture

_PANELS = (
    ("loss", "loss"),
    ("loss_parts.reconstruction", "reconstruction error"),
    ("health.effective_rank", "effective rank"),
    ("equivariance_error", "equivariance error"),
    ("probe_dice", "probe Dice"),
)
_PANEL_HEIGHT = 1.5  # inches


def pretraining_curves(rows: Sequence[Mapping[str, Any]], *, step: int, title: str, source: str = "") -> bytes | None:
    """Draw the history of a run up to a step as a PNG; None if it has no values.

    Args:
        rows: Rows of `history.jsonl`.
        step: The published step.
        title: Headline.
        source: Source line below the picture.
    """
    past = [row for row in rows if row["step"] <= step]
    panels = [(label, points) for key, label in _PANELS if (points := _points(past, key))]
    if not panels:
        return None
    return to_png(_figure(panels, step, title, source))


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = []
    for row in rows:
        value: Any = row
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found.append((row["step"], float(value)))
    return found


def _figure(panels: Sequence[tuple[str, list[tuple[int, float]]]], step: int, title: str, source: str) -> Figure:
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    left, gap, below, above = 0.6, 0.75, 0.5, 0.3
    width = (WIDE - left - 0.2 - (columns - 1) * gap) / columns
    height = lines * (_PANEL_HEIGHT + above + below)
    sheet = new_sheet(WIDE, height, title=for_picture(title, 120), subtitle=f"up to step {step}", source=source)
    for index, (label, points) in enumerate(panels):
        low = below + (lines - 1 - index // columns) * (_PANEL_HEIGHT + above + below)
        axes = sheet.panel(left + (index % columns) * (width + gap), low, width, _PANEL_HEIGHT)
        marker = "o" if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.5, marker=marker, markersize=3)
        axes.set_title(label, fontsize=9, loc="left", color=INK)
        axes.set_xlim(0, step * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step", color=INK)
        plain(axes)
    return sheet.figure
