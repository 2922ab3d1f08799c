"""Forest plot of paired differences with their intervals: one line each; right of zero is better."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from p2r.evaluate.statistics import PairedDifference
from p2r.report.canvas import (
    FAINT,
    INK,
    LINE,
    NARROW,
    RULE,
    WIDE,
    Drawing,
    drawing,
    mode_colour,
    mode_marker,
    new_sheet,
    plain,
)
from p2r.report.comparison import ComparedDifference
from p2r.report.text import for_picture, signed

_LINE, _GAP = 0.25, 0.16  # inches


@dataclass(frozen=True)
class Difference:
    """One line: a mean difference of Dice, its interval, and the p value of a test."""

    group: str
    """Heading; lines of one group are listed together below it."""
    name: str
    mode: str
    """Determines colour and marker."""
    difference: float
    lower: float
    upper: float
    p: float | None
    """Corrected for multiple tests, if there are several."""


def forest(differences: Sequence[Difference], *, title: str, subtitle: str, axis: str, source: str = "") -> Drawing:
    """Draw differences in the order given.

    Args:
        differences: At least one; lines of one group must be adjacent.
        title: Headline.
        subtitle: Description of the comparison.
        axis: Meaning of a difference.
        source: Line below that states the source of the results.
    """
    if not differences:
        raise ValueError("a forest plot needs at least one difference")
    return drawing(*(_draw_figure(differences, title, subtitle, axis, source, width) for width in (WIDE, NARROW)))


def figures_text(difference: float, lower: float, upper: float) -> str:
    """Return a difference and its interval with their signs."""
    return f"{signed(difference, 3)} [{signed(lower, 3)}, {signed(upper, 3)}]"


def difference_texts(one: PairedDifference | ComparedDifference) -> tuple[str, str, str]:
    """Return a paired difference for a table: its interval, the draws with its sign, and the corrected p value."""
    return figures_text(one.difference, one.lower, one.upper), f"{one.draws_agree} of {one.draws}", p_text(one.p_holm)


def p_text(p: float | None) -> str:
    """Return a p value as it is printed, or a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _draw_figure(
    differences: Sequence[Difference], title: str, subtitle: str, axis: str, source: str, width: float
) -> Figure:
    groups = list(dict.fromkeys(one.group for one in differences))
    is_wide = width > NARROW
    body = len(differences) * _LINE + len(groups) * (_LINE + _GAP) - _GAP
    sheet = new_sheet(width, body + 0.62, title=title, subtitle=subtitle, source=source)
    left, right = (1.75, 2.55) if is_wide else (1.22, 0.2)
    axes = sheet.panel(left, 0.5, width - left - right, body)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    axes.set_ylim(body, 0)
    ends = [0.0, *(one.lower for one in differences), *(one.upper for one in differences)]
    margin = 0.06 * max(max(ends) - min(ends), 0.05)
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.axvline(0, color=RULE, linewidth=1.1, zorder=0)
    down = 0.0
    indent = -(left - 0.15) / (width - left - right)
    for group in groups:
        down += _GAP * (down > 0)
        axes.text(
            indent, down + _LINE / 2, for_picture(group), transform=beside, va="center", fontsize=8.5, color=FAINT
        )
        down += _LINE
        for one in (one for one in differences if one.group == group):
            middle = down + _LINE / 2
            colour = mode_colour(one.mode)
            axes.plot((one.lower, one.upper), (middle, middle), color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(one.difference, middle, marker=mode_marker(one.mode), color=colour, markersize=7)
            name = for_picture(one.name, 26 if is_wide else 16)
            axes.text(indent, middle, name, transform=beside, va="center", fontsize=9.5, weight="bold", color=colour)
            if is_wide:
                figures = f"{figures_text(one.difference, one.lower, one.upper)}   p {p_text(one.p)}"
                axes.text(1.02, middle, figures, transform=beside, va="center", fontsize=8.5, color=INK)
            down += _LINE
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6 if is_wide else 4, steps=[1, 2, 5, 10]))
    plain(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_xlabel(axis, color=INK, fontsize=9.5)
    return sheet.figure
