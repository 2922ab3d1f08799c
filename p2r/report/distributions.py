"""Distributions of patients' Dice: boxes by class, by third of the organ, and by stratum.

A point is one patient (frames and draws averaged). A box holds the middle half of the patients, its line is the median, and
whiskers reach the farthest patient within one and a half box lengths. Groups under `_LEAST` patients have only the line.
"""

from collections.abc import Callable, Sequence
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from p2r.report.canvas import (
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
from p2r.report.patients import MEAN, THIRDS, Patient, classes_of
from p2r.report.tables import series_name, series_order
from p2r.report.text import for_picture

_LEAST = 5
_MOST_POINTS = 200
_LETTERS = 14  # per line of a tilted name
_PANEL = 1.95  # inches
_NOT_GIVEN = "no stratum given"

Group = tuple[str, Callable[[Patient], float | None]]


def class_boxes(patients: Sequence[Patient], *, title: str, source: str = "") -> Drawing:
    """Draw every patient's Dice, one panel for each class, by number of labelled patients and mode.

    Args:
        patients: Patients of one task and protocol, from `patients_of`.
        title: Headline.
        source: Line below that states the source of the results.
    """
    names = classes_of(patients)
    names = [name for name in names if any(patient.dice.get(name) is not None for patient in patients)]
    panels = [(name, [patient for patient in patients if patient.dice.get(name) is not None]) for name in names]
    numbers = sorted({patient.num_labelled for patient in patients})

    def draw(axes: Axes, index: int) -> None:
        name, of_panel = panels[index]
        groups = [
            (str(number), [(one, one.dice[name]) for one in of_panel if one.num_labelled == number])
            for number in numbers
        ]
        _draw_groups(axes, [(label, _drop_missing(pairs)) for label, pairs in groups], _list_series(patients))
        axes.set_title(
            for_picture(name, 30), fontsize=10, color=INK, loc="left", weight="bold" if name == MEAN else None
        )

    subtitle = "a point: one patient, draws averaged; box: quartiles; by number of labelled patients"
    return drawing(
        *(
            _draw_panels(
                len(panels),
                draw,
                patients,
                title,
                subtitle,
                source,
                width,
                "labelled patients",
                list(map(str, numbers)),
            )
            for width in (WIDE, NARROW)
        )
    )


def where_in_the_organ(
    patients: Sequence[Patient], *, title: str, names: Sequence[str] = THIRDS, source: str = ""
) -> Drawing | None:
    """Draw Dice in the lower, middle and upper third of the slices with any class; None if thirds are unknown.

    Args:
        patients: Patients of one task and protocol, from `patients_of`.
        title: Headline.
        names: Names of the lower, middle and upper third.
        source: Line below that states the source of the results.
    """
    known = [patient for patient in patients if any(third is not None for third in patient.thirds)]
    if not known:
        return None
    groups: list[Group] = [
        (name, lambda patient, number=number: patient.thirds[number])  # type: ignore[misc]
        for number, name in enumerate(names)
    ]
    subtitle = "a point: one patient, mean of classes; thirds of the labelled slices, along the slice axis"
    return _draw_by_group(known, groups, title, subtitle, source, "third of the slices")


def by_stratum(patients: Sequence[Patient], *, title: str, source: str = "") -> Drawing | None:
    """Draw patients' mean Dice by stratum, such as pathology; None if the task has no strata."""
    strata = sorted({patient.stratum for patient in patients if patient.stratum})
    if not strata:
        return None
    groups: list[Group] = [
        (name, lambda patient, name=name: patient.dice[MEAN] if patient.stratum == name else None)  # type: ignore[misc]
        for name in strata
    ]
    if any(patient.stratum is None for patient in patients):
        groups.append((_NOT_GIVEN, lambda patient: patient.dice[MEAN] if patient.stratum is None else None))
    return _draw_by_group(patients, groups, title, "a point: one patient, mean of classes", source, "stratum")


def _draw_by_group(
    patients: Sequence[Patient], groups: Sequence[Group], title: str, subtitle: str, source: str, axis: str
) -> Drawing:
    """Draw one panel per number of labelled patients: the smallest, a middle one, the largest."""
    numbers = sorted({patient.num_labelled for patient in patients})
    shown = list(dict.fromkeys((numbers[0], numbers[len(numbers) // 2], numbers[-1])))

    def draw(axes: Axes, index: int) -> None:
        here = [patient for patient in patients if patient.num_labelled == shown[index]]
        _draw_groups(
            axes,
            [(name, _drop_missing([(patient, dice(patient)) for patient in here])) for name, dice in groups],
            _list_series(patients),
        )
        axes.set_title(f"{shown[index]} labelled", fontsize=10, color=INK, loc="left")

    names = [name for name, _ in groups]
    return drawing(
        *(
            _draw_panels(len(shown), draw, patients, title, subtitle, source, width, axis, names)
            for width in (WIDE, NARROW)
        )
    )


def _draw_panels(
    number: int,
    draw: Callable[[Axes, int], None],
    patients: Sequence[Patient],
    title: str,
    subtitle: str,
    source: str,
    width: float,
    across: str,
    names: Sequence[str],
) -> Figure:
    columns = 1 if width <= NARROW else next(n for n in (4, 3, 2, 1) if n <= number) if number != 4 else 2
    columns = min(columns, 3) if number > 4 else columns
    rows = -(-number // columns)
    left, gap, below = 0.6, 0.28, 1.2 if _are_long(names) else 0.62
    each = (width - left - 0.15 - (columns - 1) * gap) / columns
    entries = [
        KeyEntry(for_picture(series_name(one), 24), mode_marker(one[0]), mode_colour(one[0]), mode_colour(one[0]))
        for one in _list_series(patients)
    ]
    key = key_lines(entries, width - 0.3)
    height = rows * (_PANEL + below) + KEY_LINE * len(key) + 0.14
    sheet = new_sheet(width, height, title=title, subtitle=subtitle, source=source)
    sheet.key(key, 0.15, height - 0.02)
    for index in range(number):
        row, column = divmod(index, columns)
        low = (rows - 1 - row) * (_PANEL + below) + below - 0.1
        axes = sheet.panel(left + column * (each + gap), low, each, _PANEL - 0.2)
        draw(axes, index)
        axes.set_ylim(0, 1.0)
        plain(axes)
        if column == 0:
            axes.set_ylabel("Dice", color=INK)
        else:
            axes.set_yticklabels([])
        if index + columns >= number:
            axes.set_xlabel(across, color=INK)
    return sheet.figure


def _draw_groups(
    axes: Axes,
    groups: Sequence[tuple[str, Sequence[tuple[Patient, float]]]],
    series: Sequence[tuple[str, str]],
) -> None:
    """Draw groups side by side, with the modes of each next to one another."""
    step = 0.8 / len(series)
    for index, one in enumerate(series):
        at = [place + (index - (len(series) - 1) / 2) * step for place in range(len(groups))]
        dice = [[dice for patient, dice in members if patient.series == one] for _, members in groups]
        _draw_boxes(axes, at, step * 0.72, dice, mode_colour(one[0]))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.xaxis.set_major_locator(FixedLocator(range(len(groups))))
    names = [for_picture(label, 24) for label, _ in groups]
    tilted = _are_long(names)
    axes.set_xticklabels(
        # On one line, a long name would exceed the picture's left edge.
        ["\n".join(wrap(name, _LETTERS)) if tilted else name for name in names],
        fontsize=8.5,
        rotation=40 if tilted else 0,
        rotation_mode="anchor" if tilted else "default",
        ha="right" if tilted else "center",
        linespacing=0.9,
    )


def _are_long(names: Sequence[str]) -> bool:
    return sum(map(len, names)) > 24


def _draw_boxes(
    axes: Axes, places: Sequence[float], width: float, groups: Sequence[Sequence[float]], colour: str
) -> None:
    """Draw the boxes of one mode with few artists, because a page has hundreds of boxes."""
    points: list[tuple[float, float]] = []
    outlines: list[list[tuple[float, float]]] = []
    medians = []
    for at, dice in zip(places, groups, strict=True):
        if not dice:
            continue
        left, right = at - width / 2, at + width / 2
        median = float(np.median(dice))
        medians.append(((left, median), (right, median)))
        if len(dice) <= _MOST_POINTS:
            # Spread patients by rank instead of at random, so that the picture is always the same.
            order = np.argsort(np.argsort(dice))
            points += zip(at + ((order * 0.618) % 1.0 - 0.5) * width * 0.8, dice, strict=True)
        if len(dice) >= _LEAST:
            (box,) = boxplot_stats(dice)
            low, high = box["q1"], box["q3"]
            outlines.append([(left, low), (right, low), (right, high), (left, high), (left, low)])
            outlines += [[(at, low), (at, box["whislo"])], [(at, high), (at, box["whishi"])]]
    if points:
        across, up = zip(*points, strict=True)
        axes.plot(across, up, "o", markersize=2.6, color=colour, alpha=0.45, markeredgewidth=0)
    axes.add_collection(LineCollection(outlines, colors=colour, linewidths=1.1))
    axes.add_collection(LineCollection(medians, colors=colour, linewidths=2.4, capstyle="butt"))


def _list_series(patients: Sequence[Patient]) -> list[tuple[str, str]]:
    return sorted({patient.series for patient in patients}, key=series_order)


def _drop_missing(pairs: Sequence[tuple[Patient, float | None]]) -> list[tuple[Patient, float]]:
    return [(patient, dice) for patient, dice in pairs if dice is not None]
