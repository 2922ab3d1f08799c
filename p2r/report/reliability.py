"""Calibration of the models' confidence: a reliability curve for each mode, and a table.

A point of a curve is one bin of confidence, over voxels of all patients and draws. A model on the diagonal is right as often as its
confidence states; below it, it is overconfident. Bins with less than one voxel in `_LEAST` are left out, because they are too noisy.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from p2r.evaluate.rows import TrialRow
from p2r.report.canvas import (
    FAINT,
    INK,
    KEY_LINE,
    NARROW,
    WIDE,
    Drawing,
    KeyEntry,
    drawing,
    key_lines,
    mode_colour,
    mode_marker,
    new_sheet,
    plain,
)
from p2r.report.page import Block, Grid, Heading, Paragraph, Picture
from p2r.report.tables import (
    CalibrationFigure,
    Spread,
    aggregate,
    calibration_of,
    label_of,
    series_name,
    series_of,
    series_order,
)
from p2r.report.text import for_picture

_LEAST = 1000
_PANEL = 2.5  # inches
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
Put = Callable[[str, Drawing, str], Picture]
"""Function that adds a picture to the page: name, drawing, caption."""


def calibration_blocks(rows: Sequence[TrialRow], *, task: str, tag: str, source: str, put: Put) -> Iterator[Block]:
    """Yield the calibration part of a page; empty for rows of earlier versions, which lack it.

    Args:
        rows: Rows of one task and protocol.
        task: Name of the task.
        tag: Part of the picture's name.
        source: Source line below the picture.
        put: Adds the picture to the page.
    """
    known = [row for row in rows if calibration_of(row, "ece") is not None]
    if not known:
        return
    first = known[0].calibration
    assert first is not None
    yield Heading(3, "Calibration")
    yield put(
        f"reliability-{tag}",
        reliability_curves(known, title=f"{task}: confidence and accuracy{label_of(rows)}", source=source),
        f"Accuracy of voxels by the confidence of their prediction ({first.num_bins} bins), near the organs. Below the diagonal a model "
        "is overconfident.",
    )
    yield Grid(
        ("labelled patients", "mode", "ECE", "Brier", "ECE, whole scan", "Brier, whole scan"),
        [
            (
                str(cell.num_labelled),
                series_name(cell.series),
                cell.ece.text(3),
                cell.brier.text(3),
                _whole_scan_text(known, cell.series, cell.num_labelled, "ece_whole"),
                _whole_scan_text(known, cell.series, cell.num_labelled, "brier_whole"),
            )
            for cell in aggregate(known)
        ],
    )
    yield Paragraph(
        f"Calibration is measured on the network's probabilities per patient, then averaged; ± over draws. ECE: mean distance of "
        f"confidence and accuracy over {first.num_bins} bins. Brier: squared distance of the probabilities from the truth, 0 to 2. "
        f"Near: within {first.margin_mm:g} mm of the box around the reference. Sources: p2r/evaluate/calibration.py."
    )


def _whole_scan_text(
    rows: Sequence[TrialRow], series: tuple[str, str], num_labelled: int, name: CalibrationFigure
) -> str:
    found = [calibration_of(row, name) for row in rows if series_of(row) == series and row.num_labelled == num_labelled]
    present = [figure for figure in found if figure is not None]
    return Spread(float(np.mean(present)) if present else None, None).text(3)


def reliability_curves(rows: Sequence[TrialRow], *, title: str, source: str = "") -> Drawing:
    """Draw accuracy over confidence, one panel for the fewest and one for the most labelled patients.

    Args:
        rows: Rows of one task and protocol, each with its `calibration`.
        title: Headline.
        source: Source line below the picture.
    """
    return drawing(*(_figure(rows, title, source, width) for width in (WIDE, NARROW)))


def _figure(rows: Sequence[TrialRow], title: str, source: str, width: float) -> Figure:
    numbers = sorted({row.num_labelled for row in rows})
    shown = list(dict.fromkeys((numbers[0], numbers[-1])))
    columns = len(shown) if width > NARROW else 1
    series = sorted({series_of(row) for row in rows}, key=series_order)
    entries = [
        KeyEntry(for_picture(series_name(one)), mode_marker(one[0]), mode_colour(one[0]), mode_colour(one[0]))
        for one in series
    ]
    key = key_lines(entries, width - 0.3)
    lines = -(-len(shown) // columns)
    below, gap = 0.5, 0.75
    height = below + lines * _PANEL + (lines - 1) * gap + 0.3 + KEY_LINE * len(key)
    subtitle = "a point: one bin of confidence, all patients and draws together; dashed: calibrated"
    sheet = new_sheet(width, height, title=title, subtitle=subtitle, source=source)
    sheet.key(key, 0.15, height - 0.02)
    for index, number in enumerate(shown):
        left = 0.62 + (index % columns) * (_PANEL + 1.1)
        low = below + (lines - 1 - index // columns) * (_PANEL + gap)
        axes = sheet.panel(left, low, _PANEL, _PANEL)
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle="dashed", linewidth=1)
        for one in series:
            curve = _pool_bins([row for row in rows if series_of(row) == one and row.num_labelled == number])
            if len(curve):
                axes.plot(*curve.T, color=mode_colour(one[0]), marker=mode_marker(one[0]), markersize=5, linewidth=1.6)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        plain(axes)
        axes.set_xlabel("confidence", color=INK)
        axes.set_ylabel("accuracy", color=INK)
        axes.set_title(f"{number} labelled patient{'s' * (number > 1)}", fontsize=10, loc="left", color=INK)
    return sheet.figure


def _pool_bins(rows: Sequence[TrialRow]) -> NDArray[np.float64]:
    """Return (bins, 2) mean confidence and accuracy of the bins that hold enough voxels."""
    total = np.zeros((0, 3))
    for row in rows:
        if row.calibration is None:
            continue
        curve = row.calibration.reliability
        counts = np.array(curve.num_voxels, dtype=np.float64)
        means = np.array([[one or 0.0 for one in column] for column in (curve.confidence, curve.accuracy)])
        sums = np.column_stack([counts, *(means * counts)])
        total = sums if not len(total) else total + sums
    kept = total[total[:, 0] > max(0.0, total[:, 0].sum() / _LEAST)] if len(total) else total
    found: NDArray[np.float64] = kept[:, 1:] / kept[:, :1]
    return found
