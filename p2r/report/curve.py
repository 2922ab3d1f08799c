"""Few-shot curve of one task: Dice over the number of labelled patients, by mode."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from p2r.evaluate.rows import TrialRow
from p2r.evaluate.statistics import Interval
from p2r.report.canvas import (
    INK,
    NARROW,
    WIDE,
    Drawing,
    apart,
    drawing,
    mode_colour,
    mode_marker,
    new_sheet,
    plain,
    text_width,
)
from p2r.report.tables import Cell, aggregate, label_of, protocol_of, series_name, series_of, split_of
from p2r.report.text import for_picture

_DODGE = 0.018  # fraction of the axis, between modes: otherwise their draws overlap
_LINES = ("solid", "dashed", "dotted", "dashdot")


def few_shot_curve(
    rows: Sequence[TrialRow],
    task: str,
    *,
    title: str | None = None,
    intervals: Sequence[Interval] = (),
    level: str = "95 %",
    source: str = "",
) -> Drawing:
    """Draw mean Dice over the number of labelled patients.

    Large marks are means over draws, small points the draws themselves. Bands are intervals of a bootstrap over draws and
    patients; a mode without intervals has no band.

    Args:
        rows: Rows of any tasks; the rows of `task` must have one protocol.
        task: Name of the task to draw.
        title: Headline; None: derived from the task's name.
        intervals: `intervals` of `p2r.evaluate.statistics.few_shot_statistics`.
        level: Their confidence.
        source: Source line below the picture.

    Raises:
        ValueError: There is nothing to draw, or protocols would be mixed.
    """
    rows = [row for row in rows if row.task == task and row.dice_mean is not None]
    if not rows:
        raise ValueError(f"no row of task {task} has a Dice")
    protocols = {protocol_of(row) for row in rows}
    if len(protocols) > 1:
        raise ValueError(f"one curve shows one protocol, got {', '.join(sorted(protocols))}")
    cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
    bands: dict[tuple[tuple[str, str], int], tuple[float, float]] = {
        (series_of(interval), interval.num_labelled): (interval.lower, interval.upper)
        for interval in intervals
        if interval.task == task and protocol_of(interval) in protocols
    }
    headline = (title or f"{task}: Dice by number of labelled patients") + label_of(rows)
    figures = [_figure(rows, cells, bands, level, headline, source, width) for width in (WIDE, NARROW)]
    return drawing(*figures)


def _figure(
    rows: Sequence[TrialRow],
    cells: Sequence[Cell],
    bands: Mapping[tuple[tuple[str, str], int], tuple[float, float]],
    level: str,
    title: str,
    source: str,
    width: float,
) -> Figure:
    numbers = sorted({cell.num_labelled for cell in cells})
    lines = list(dict.fromkeys(cell.series for cell in cells))
    num_draws = sorted({cell.num_draws for cell in cells})
    draws = f"{num_draws[0]}" if len(num_draws) == 1 else f"{num_draws[0]} to {num_draws[-1]}"
    subtitle = f"mean of {', '.join(cells[0].dice)}; points: draws of the labelled patients ({draws})"
    subtitle += ", line: their mean" if len(numbers) > 1 else ", large: their mean"
    subtitle += f", band: {level} of a bootstrap over draws and patients" if bands else ""
    is_wide = width > NARROW
    height, left, most, size = (3.9, 0.62, 26, 9.5) if is_wide else (3.1, 0.52, 14, 8.5)
    last = {cell.series: cell.dice_mean.mean or 0.0 for cell in cells}  # cells of a mode come by number of patients
    labels = [f"{for_picture(series_name(series), most)} {last[series]:.2f}" for series in lines]
    right = max(text_width(label, size, bold=True) for label in labels) + 0.15
    sheet = new_sheet(width, height, title=title, subtitle=subtitle, source=source)
    axes = sheet.panel(left, 0.5, width - left - right, height - 0.58)
    low, high = math.log(numbers[0]), math.log(numbers[-1])
    span = max(high - low, 0.7)
    styles = {name: _LINES[n % 4] for n, name in enumerate(dict.fromkeys(backbone for _, backbone in lines))}
    for index, series in enumerate(lines):
        offset = (index - (len(lines) - 1) / 2) * _DODGE * span
        of_series = [cell for cell in cells if cell.series == series]
        draw_series(axes, of_series, rows, bands, offset, span, styles[series[1]])
    axes.set_ylim(0, 1)
    axes.set_xlim(math.exp(low - 0.08 * span), math.exp(high + 0.06 * span))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(number) for number in numbers])
    axes.set_xlabel("labelled patients", color=INK)
    axes.set_ylabel(f"Dice, {for_picture(split_of(rows))} patients", color=INK)
    plain(axes)
    gap = 0.17 / (height - 0.58)
    for series, label, place in zip(lines, labels, apart([last[series] for series in lines], gap), strict=True):
        axes.annotate(
            label,
            xy=(1.0, place),
            xytext=(5, 0),
            textcoords="offset points",
            xycoords=("axes fraction", "data"),
            va="center",
            color=mode_colour(series[0]),
            weight="bold",
            fontsize=size,
            annotation_clip=False,
        )
    return sheet.figure


def draw_series(
    axes: Axes,
    cells: Sequence[Cell],
    rows: Sequence[TrialRow],
    bands: Mapping[tuple[tuple[str, str], int], tuple[float, float]],
    offset: float,
    span: float,
    style: str,
) -> None:
    """Draw one mode: its draws, the line of their means, and its band."""
    series = cells[0].series
    colour = mode_colour(series[0])
    banded = [(cell.num_labelled, *bands[key]) for cell in cells if (key := (series, cell.num_labelled)) in bands]
    if len(banded) == 1:  # a band over one number of patients has no width: draw a bar
        at, lower, upper = banded[0]
        ends = [at * math.exp(offset - 0.006 * span), at * math.exp(offset + 0.006 * span)]
        axes.fill_between(ends, lower, upper, color=colour, alpha=0.22, linewidth=0)
    elif banded:
        at_all, lowers, uppers = zip(*banded, strict=True)
        axes.fill_between(at_all, lowers, uppers, color=colour, alpha=0.14, linewidth=0)
    draws = [(row.num_labelled * math.exp(offset), row.dice_mean) for row in rows if series_of(row) == series]
    axes.plot(*zip(*draws, strict=True), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
    means = [cell.dice_mean.mean or 0.0 for cell in cells]
    # With one number of patients, the means of all modes would overlap: each is shifted to its draws.
    shift = math.exp(offset) if len(cells) == 1 else 1.0
    axes.plot(
        [cell.num_labelled * shift for cell in cells],
        means,
        color=colour,
        linewidth=1.8,
        linestyle=style,
        marker=mode_marker(series[0]),
        markersize=6.5,
    )
