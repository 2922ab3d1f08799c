"""Shared state of the parts of a page: context and statistics of the rows, given pictures, and pictures drawn so far."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from p2r.evaluate.rows import TrialRow
from p2r.evaluate.statistics import Interval, LabelEfficiency, PairedDifference, Statistics
from p2r.report.canvas import Drawing
from p2r.report.context import ReportContext
from p2r.report.page import Block, Picture
from p2r.report.tables import Cell, protocol_of, series_of
from p2r.report.text import for_file_name

Entry = TypeVar("Entry", Interval, PairedDifference, LabelEfficiency)


class Material:
    """Shared state of all functions that yield blocks of a page.

    Args:
        context: The source of the rows.
        pictures: Pictures that do not come from the rows, by name.
        statistics: Statistics of the rows; None: no intervals are shown.
    """

    def __init__(
        self, context: ReportContext, pictures: Mapping[str, Drawing | bytes], statistics: Statistics | None
    ) -> None:
        self.context, self.pictures, self.statistics = context, pictures, statistics
        self.drawn: dict[str, Drawing | bytes] = {}
        """Pictures of the page, in its order."""
        self.level = f"{100 * (0.95 if statistics is None else statistics.confidence):g} %"

    def intervals(self, rows: Sequence[TrialRow]) -> list[Interval]:
        """Return the intervals of the rows' tasks and protocols."""
        return [] if self.statistics is None else _matching_entries(self.statistics.intervals, rows)

    def differences(self, rows: Sequence[TrialRow]) -> list[PairedDifference]:
        """Return the paired differences of the rows' tasks and protocols."""
        return [] if self.statistics is None else _matching_entries(self.statistics.differences, rows)

    def efficiency(self, rows: Sequence[TrialRow]) -> list[LabelEfficiency]:
        """Return the label efficiency of the rows' tasks and protocols."""
        return [] if self.statistics is None else _matching_entries(self.statistics.label_efficiency, rows)

    def title_of(self, task: str) -> str:
        """Return the title of a task."""
        facts = self.context.tasks.get(task)
        return task if facts is None or facts.title is None else facts.title

    def put(self, name: str, picture: Drawing | bytes, caption: str) -> Picture:
        """Add a picture to the page under a unique name that is a valid file name."""
        name = unique = for_file_name(name)
        number = 1
        while unique in self.drawn:
            number += 1
            unique = f"{name}-{number}"
        self.drawn[unique] = picture
        return Picture(unique, caption)

    def given(self, task: str | None) -> Iterator[Block]:
        """Yield the given pictures of a task; None: pictures of no task."""
        for name, picture in self.pictures.items():
            if self.context.places.get(name) == task:
                caption = self.context.captions.get(name, name.replace("-", " "))
                yield self.put(name, picture, caption)


def entry_of(entries: Sequence[Entry], cell: Cell) -> Entry | None:
    """Return the entry of a cell."""
    return next(
        (one for one in entries if series_of(one) == cell.series and one.num_labelled == cell.num_labelled), None
    )


def _matching_entries(entries: Sequence[Entry], rows: Sequence[TrialRow]) -> list[Entry]:
    settings = {(row.task, protocol_of(row)) for row in rows}
    return [one for one in entries if (one.task, protocol_of(one)) in settings]
