"""Rows of one task -> the curve that the whole project is about: Dice over the number of labelled patients, by mode."""

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from p2r.report.canvas import INK, MODE_COLOURS, headline, new_figure, plain, to_png
from p2r.report.tables import MODE_NAMES, Cell, Row, aggregate, label_of, split_of

_DODGE = 0.022  # of the axis, between modes: otherwise their error bars hide one another
_LABEL_GAP = 0.062  # least distance of two labels, of the axis


def few_shot_curve(rows: Sequence[Row], task: str, *, title: str | None = None) -> bytes:
    """Draw mean Dice over the number of labelled patients.

    Large points are means over draws, bars their standard deviation, small points the draws themselves.

    Args:
        rows: Rows of any tasks.
        task: Name of the one to draw.
        title: Headline; None: made from the task's name.
    """
    rows = [row for row in rows if row["task"] == task and row["dice_mean"] is not None]
    if not rows:
        raise ValueError(f"no row of task {task} has a Dice")
    cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
    numbers = sorted({cell.num_labelled for cell in cells})
    modes = list(dict.fromkeys(cell.mode for cell in cells))
    figure = new_figure(8.4, 4.6)
    axes = figure.add_axes((0.085, 0.125, 0.695, 0.70))

    low, high = math.log(numbers[0]), math.log(numbers[-1])
    span = max(high - low, 0.7)
    ends = []
    for index, mode in enumerate(modes):
        offset = (index - (len(modes) - 1) / 2) * _DODGE * span
        ends.append(_draw_mode(axes, [cell for cell in cells if cell.mode == mode], rows, mode, offset))

    drawn = [row["dice_mean"] for row in rows]
    bottom, top = max(0.0, math.floor(min(drawn) * 10 - 0.3) / 10), min(1.0, math.ceil(max(drawn) * 10 + 0.3) / 10)
    axes.set_ylim(bottom, top)
    axes.set_xlim(math.exp(low - 0.1 * span), math.exp(high + (0.06 if high > low else 0.1) * span))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))  # two digits, beside the axis's name
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(number) for number in numbers])
    axes.set_xlabel("labelled patients", color=INK)
    axes.set_ylabel(f"mean Dice on {split_of(rows)} patients", color=INK)
    plain(axes)
    axes.spines["bottom"].set_color("#b0b0b0")

    spread = (top - bottom) * _LABEL_GAP
    for (mode, dice), height in zip(ends, _apart([dice for _, dice in ends], spread), strict=True):
        axes.annotate(
            f"{MODE_NAMES.get(mode, mode)}  {dice:.2f}",
            xy=(1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            color=_colour(mode),
            weight="bold",
            fontsize=10,
            annotation_clip=False,
        )
    num_draws = sorted({cell.num_draws for cell in cells})
    draws = f"{num_draws[0]}" if len(num_draws) == 1 else f"{num_draws[0]} to {num_draws[-1]}"
    classes = ", ".join(cells[0].dice)
    subtitle = (
        f"mean of {classes}; points: mean over draws of the labelled patients ({draws}), bars: standard deviation"
    )
    headline(figure, (title or f"{task}: what a few labels are worth") + label_of(rows), subtitle)
    return to_png(figure)


def _draw_mode(axes: Axes, cells: list[Cell], rows: Sequence[Row], mode: str, offset: float) -> tuple[str, float]:
    """Draw one mode, and return it with the height of its right end."""
    colour = _colour(mode)
    x = [cell.num_labelled * math.exp(offset) for cell in cells]
    means = [cell.dice_mean.mean or 0.0 for cell in cells]
    for row in rows:
        if row["mode"] == mode:
            at = row["num_labelled"] * math.exp(offset)
            axes.plot(at, row["dice_mean"], "o", color=colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
    bars = [cell.dice_mean.sd or 0.0 for cell in cells]
    axes.errorbar(x, means, yerr=bars, color=colour, linewidth=2, elinewidth=1.2, marker="o", markersize=7, capsize=0)
    return mode, means[-1]


def _colour(mode: str) -> str:
    return MODE_COLOURS.get(mode, INK)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Move labels up and down until neighbours are `gap` apart, each group about its own middle."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups = [[index] for index in order]

    def middle(group: list[int]) -> float:
        return sum(heights[index] for index in group) / len(group)

    merged = True
    while merged:
        merged = False
        for a, b in pairwise(groups):
            if middle(b) - middle(a) < gap * (len(a) + len(b)) / 2 - 1e-9:
                groups[groups.index(a)] = a + b
                groups.remove(b)
                merged = True
                break
    placed = list(heights)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = middle(group) + (rank - (len(group) - 1) / 2) * gap
    return placed
