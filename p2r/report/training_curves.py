"""Pseudo-labels over training, one panel for each trial of the modes that use them.

A panel shows the fraction of the scans' pixels that count at each step, and the fraction of these in each foreground class. The axis is
logarithmic: a class that collapses drops out of it. Dotted lines mark the steps at which a round of self-training labelled all images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from p2r.evaluate.rows import PseudoLabelRow, RoundRow, TrialRow
from p2r.report.canvas import (
    CLASS_COLOURS,
    FAINT,
    INK,
    KEY_LINE,
    NARROW,
    WIDE,
    Drawing,
    KeyEntry,
    drawing,
    key_lines,
    new_sheet,
    plain,
)
from p2r.report.page import Block, Folded, Grid, Heading, Picture
from p2r.report.tables import label_of, series_name, series_of, series_order
from p2r.report.text import for_picture

_MOST = 12  # panels
_PANEL = 1.6  # inches
_LEAST = 1e-5  # fraction of pixels at the lower end of the axis
_ENDS = {"rounds": "it was the last one", "change": "little changed"}
Put = Callable[[str, Drawing, str], Picture]
"""Function that adds a picture to the page: name, drawing, caption."""


def pseudo_label_blocks(
    rows: Sequence[TrialRow], *, task: str, classes: Sequence[str], tag: str, source: str, put: Put
) -> Iterator[Block]:
    """Yield the part of a page on pseudo-labels; empty without a mode that uses them.

    Args:
        rows: Rows of one task and protocol.
        task: Name of the task.
        classes: Names of its classes in the order of their labels, as in pictures of segmentations.
        tag: Part of the picture's name.
        source: Source line below the picture.
        put: Adds the picture to the page.
    """
    trials = sorted(
        (row for row in rows if row.pseudo_labels is not None and row.pseudo_labels.steps),
        key=lambda row: (row.num_labelled, series_order(series_of(row)), row.draw),
    )
    if not trials:
        return
    yield Heading(3, "Pseudo-labels over training")
    left_out = f" The first {_MOST} of {len(trials)} trials." if len(trials) > _MOST else ""
    yield put(
        f"pseudo-labels-{tag}",
        pseudo_label_curves(
            trials[:_MOST],
            classes=classes,
            title=f"{task}: pseudo-labels over training{label_of(rows)}",
            source=source,
        ),
        "Fraction of the unlabelled scans' pixels that count, and of these in each class, for every trial; zero is on the lower "
        f"edge.{left_out}",
    )
    rounds = [(_name(row), one) for row in trials for one in _pseudo_labels_of(row).rounds or ()]
    if rounds:
        yield Folded(
            f"Rounds of self-training ({len(rounds)})",
            [
                Grid(
                    ("trial", "before step", "labelled by", "pixels that count", "plausible frames", "changed", "then"),
                    [(name, *_round_line(one)) for name, one in rounds],
                )
            ],
        )


def _round_line(told: RoundRow) -> tuple[str, ...]:
    change = told.change
    ended = "" if told.ended_by is None else f"rounds end ({_ENDS.get(told.ended_by, told.ended_by)})"
    return (
        str(told.step + 1),
        told.by,
        f"{100 * told.counted_fraction:.1f} %",
        f"{told.plausible_frames} of {told.frames}",
        "–" if change is None else f"{100 * change:.1f} %",
        ended,
    )


def _pseudo_labels_of(row: TrialRow) -> PseudoLabelRow:
    return row.pseudo_labels or PseudoLabelRow()


def _name(row: TrialRow) -> str:
    return f"{series_name(series_of(row))}, n = {row.num_labelled}, draw {row.draw}"


def pseudo_label_curves(rows: Sequence[TrialRow], *, classes: Sequence[str], title: str, source: str = "") -> Drawing:
    """Draw the pseudo-labels of some trials over their training.

    Args:
        rows: At least one row, each with its `pseudo_labels`.
        classes: Names of the classes in the order of their labels.
        title: Headline.
        source: Source line below the picture.
    """
    colours = {name: CLASS_COLOURS[number % len(CLASS_COLOURS)] for number, name in enumerate(classes)}
    return drawing(*(_figure(rows, colours, title, source, width) for width in (WIDE, NARROW)))


def _figure(rows: Sequence[TrialRow], colours: Mapping[str, str], title: str, source: str, width: float) -> Figure:
    entries = [KeyEntry("pixels that count", "o", INK)]
    entries += [KeyEntry(for_picture(name, 30), "o", colour) for name, colour in colours.items()]
    key = key_lines(entries, width - 0.3)
    columns = min(len(rows), 3 if width > NARROW else 1)
    lines = -(-len(rows) // columns)
    left, below, gap, above = 0.65, 0.45, 0.65, 0.25
    panel = (width - left - 0.15 - (columns - 1) * 0.6) / columns
    height = below + lines * (_PANEL + above) + (lines - 1) * gap + KEY_LINE * len(key) + 0.1
    subtitle = "fraction of the scans' pixels, and of these by class; dotted: a round labels all images"
    sheet = new_sheet(width, height, title=title, subtitle=subtitle, source=source)
    sheet.key(key, 0.15, height - 0.02)
    for index, row in enumerate(rows):
        low = below + (lines - 1 - index // columns) * (_PANEL + above + gap)
        axes = sheet.panel(left + (index % columns) * (panel + 0.6), low, panel, _PANEL)
        _draw(axes, _pseudo_labels_of(row), colours)
        axes.set_title(for_picture(_name(row), 40), fontsize=9, loc="left", color=INK)
        if index + columns >= len(rows):
            axes.set_xlabel("step", color=INK)
    return sheet.figure


def _draw(axes: Axes, told: PseudoLabelRow, colours: Mapping[str, str]) -> None:
    steps = told.steps
    for one in told.rounds or ():
        axes.axvline(one.step, color=FAINT, linestyle="dotted", linewidth=1)
    of_classes = ((colours[name], shares) for name, shares in told.class_fractions.items() if name in colours)
    for colour, shares in ((INK, told.confident_fraction), *of_classes):
        shown = [max(share, _LEAST) for share in shares]
        axes.plot(steps, shown, color=colour, linewidth=1.5, marker="o", markersize=2.5)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, 1.5)
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    plain(axes)
