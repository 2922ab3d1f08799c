"""Cells: rows (one trial each) averaged over draws, by mode and number of patients; and their table for the terminal.

A row is a mean over patients. The spread of a cell is the standard deviation over draws of labelled patients, with n - 1 in
the denominator, and None for one draw. The gain of a mode over training from scratch is averaged over their common
draws, so that it compares networks trained on the same patients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from p2r.evaluate.rows import TrialRow
from p2r.modes import MODES, SCRATCH, facts_of
from p2r.report.text import one_line, signed

LEAK_FREE, TRANSDUCTIVE, UNKNOWN = "leak_free", "transductive", "corpora unknown"

CalibrationFigure = Literal["ece", "brier", "ece_whole", "brier_whole"]


class HasSeries(Protocol):
    """A row, or an entry of the statistics, of one mode and backbone."""

    @property
    def mode(self) -> str:
        """Name of the mode."""

    @property
    def backbone(self) -> str | None:
        """Short name of the backbone, if there are several."""


class HasProtocol(Protocol):
    """A row, or an entry of the statistics, by one protocol."""

    @property
    def protocol(self) -> str:
        """Name of the protocol."""

    @property
    def transductive(self) -> bool:
        """True if the backbone has seen the patients, or may have."""

    @property
    def corpora(self) -> str | None:
        """`unknown` if the backbone's corpora are unknown."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over draws. The mean is None without values, the deviation with fewer than two."""

    mean: float | None
    sd: float | None

    def text(self, digits: int) -> str:
        """Return `mean ± sd` with `digits` decimals, or a dash."""
        if self.mean is None:
            return "–"
        return self.mean_text(digits) + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")

    def mean_text(self, digits: int) -> str:
        """Return the mean with `digits` decimals, or a dash."""
        return "–" if self.mean is None else f"{self.mean:.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """All draws of one mode with one number of labelled patients."""

    task: str
    protocol: str
    mode: str
    num_labelled: int
    num_draws: int
    dice_mean: Spread
    dice: dict[str, Spread]
    hd95_mm: Spread
    nsd: Spread
    gain: float | None
    """Mean gain in Dice over training from scratch on the same patients."""
    backbone: str = ""
    """Short name of the backbone; empty if the table has only one."""
    ece: Spread = Spread(None, None)
    """Expected calibration error near the organs; without a mean if rows do not hold it."""
    brier: Spread = Spread(None, None)
    """Brier score near the organs."""

    @property
    def series(self) -> tuple[str, str]:
        """Mode and backbone, one line of a picture."""
        return self.mode, self.backbone

    @property
    def lowest_class(self) -> str:
        """Name and mean Dice of the class with the lowest Dice; a class without a value is the lowest."""
        name, spread = min(self.dice.items(), key=lambda item: -1.0 if item[1].mean is None else item[1].mean)
        return f"{name} {spread.mean_text(2)}"


def protocol_of(row: HasProtocol) -> str:
    """Return the protocol of a row, with `transductive` if the backbone has seen the patients, `corpora unknown` if it may have."""
    protocol = row.protocol.replace("-", "_")
    label = UNKNOWN if row.corpora == "unknown" else TRANSDUCTIVE
    if not row.transductive or label in protocol:
        return protocol
    return label if protocol == LEAK_FREE else f"{protocol}, {label}"


def series_of(row: HasSeries) -> tuple[str, str]:
    """Return mode and backbone of a row."""
    return row.mode, row.backbone or ""


def series_name(series: tuple[str, str]) -> str:
    """Return the display name of a mode, with its backbone if there are several."""
    mode, backbone = series
    return mode_title(mode) + (f" · {backbone}" if backbone else "")


def mode_title(mode: str) -> str:
    """Return the display name of a mode."""
    facts = facts_of(mode)
    return mode if facts is None else facts.title


def series_order(series: tuple[str, str]) -> tuple[int, str, str]:
    """Return the sort key of a series: training from scratch first, unknown modes last."""
    order: list[str] = list(MODES)
    return order.index(series[0]) if series[0] in order else len(order), *series


def aggregate(rows: Sequence[TrialRow]) -> list[Cell]:
    """Average rows over draws, sorted by task, protocol, number of patients, mode and backbone."""
    groups: dict[tuple[str, str, int, tuple[str, str]], dict[int, TrialRow]] = {}
    for row in rows:
        key = (row.task, protocol_of(row), row.num_labelled, series_of(row))
        if groups.setdefault(key, {}).setdefault(row.draw, row) is not row:
            raise ValueError(f"draw {row.draw} of {key} has two rows")
    keys = sorted(groups, key=lambda key: (*key[:3], series_order(key[3])))
    return [
        _cell(
            key,
            groups[key],
            groups.get((*key[:3], (SCRATCH, key[3][1]))) or groups.get((*key[:3], (SCRATCH, ""))),
        )
        for key in keys
    ]


def table(rows: Sequence[TrialRow]) -> Table:
    """Return the results of all tasks as one table for the terminal: a line a cell, within 80 columns for one task."""
    cells = aggregate(rows)
    tasks = list(dict.fromkeys(_task_text(cell) for cell in cells))
    of_one_task = f"{tasks[0]}, " if len(tasks) == 1 else ""
    result = Table(
        title=Text(
            f"{of_one_task}{split_of(rows)} patients: means over draws, Dice ± standard deviation{label_of(rows)}"
        ),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("patients", "mode") if of_one_task else ("task", "patients", "mode"):
        result.add_column(name, justify="right" if name == "patients" else "left", no_wrap=True)
    for name in ("Dice", "over\nscratch", "lowest class", "HD95\nmm", "NSD"):
        result.add_column(name, justify="left" if name == "lowest class" else "right")
    best = best_cells(cells)
    for index, cell in enumerate(cells):
        dice = cell.dice_mean.text(3)
        result.add_row(
            *(() if of_one_task else (Text(_task_text(cell)),)),
            str(cell.num_labelled),
            Text(one_line(series_name(cell.series))),
            f"[bold]{dice}[/bold]" if cell in best else dice,
            gain_text(cell),
            Text(one_line(cell.lowest_class)),
            cell.hd95_mm.mean_text(1),
            cell.nsd.mean_text(3),
            end_section=index + 1 == len(cells) or _setting(cells[index + 1]) != _setting(cell),
        )
    return result


def is_transductive(rows: Sequence[TrialRow]) -> bool:
    """Return True if any row is about patients that the backbone has seen."""
    return any(TRANSDUCTIVE in protocol_of(row) for row in rows)


def is_unknown(rows: Sequence[TrialRow]) -> bool:
    """Return True if any row is of a backbone whose corpora are unknown."""
    return any(UNKNOWN in protocol_of(row) for row in rows)


def label_of(rows: Sequence[TrialRow]) -> str:
    """Return the suffix of a title for rows that are not leak-free; else empty."""
    if is_unknown(rows):
        return " (corpora unknown: the backbone may have seen these patients)"
    if is_transductive(rows):
        return " (transductive: the backbone has seen these patients)"
    return " (paper_compat: the label leaks into the input)" if is_paper_compatible(rows) else ""


def is_paper_compatible(rows: Sequence[TrialRow]) -> bool:
    """Return True if any row follows the released code's protocol, which leaks labels."""
    return any("paper_compat" in protocol_of(row) for row in rows)


def split_of(rows: Sequence[TrialRow]) -> str:
    """Return the name of the split that the rows were evaluated on."""
    return " and ".join(sorted({row.split for row in rows})) or "test"


def code_of(rows: Sequence[TrialRow], code: str | None) -> str:
    """Return the commits that ran the trials; for rows without one, the report's commit."""
    codes = {row.code or code or "" for row in rows}
    return ", ".join(sorted(codes - {""}))


def best_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return, for every task and number of patients with several modes, the cell of the highest mean Dice."""
    settings: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if cell.dice_mean.mean is not None:
            settings.setdefault(_setting(cell), []).append(cell)
    return [max(group, key=lambda cell: cell.dice_mean.mean or 0.0) for group in settings.values() if len(group) > 1]


def calibration_of(row: TrialRow, name: CalibrationFigure) -> float | None:
    """Return a value of a row's `calibration`; None for rows without it, as in earlier versions."""
    figure: float | None = None if row.calibration is None else getattr(row.calibration, name)
    return figure


def gain_text(cell: Cell) -> str:
    """Return the gain over training from scratch with its sign, or nothing."""
    return "" if cell.gain is None or cell.mode == SCRATCH else signed(cell.gain, 3)


def _task_text(cell: Cell) -> str:
    return one_line(cell.task if cell.protocol == LEAK_FREE else f"{cell.task} ({cell.protocol})")


def _setting(cell: Cell) -> tuple[str, str, int]:
    return cell.task, cell.protocol, cell.num_labelled


def _cell(
    key: tuple[str, str, int, tuple[str, str]], draws: dict[int, TrialRow], scratch: dict[int, TrialRow] | None
) -> Cell:
    task, protocol, num_labelled, (mode, backbone) = key
    rows = list(draws.values())
    classes = list(rows[0].dice)
    pairs = [
        (row.dice_mean, scratch[draw].dice_mean if scratch and draw in scratch else None) for draw, row in draws.items()
    ]
    gains = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return Cell(
        task=task,
        protocol=protocol,
        mode=mode,
        num_labelled=num_labelled,
        num_draws=len(rows),
        dice_mean=spread_of(row.dice_mean for row in rows),
        dice={name: spread_of(row.dice.get(name) for row in rows) for name in classes},
        hd95_mm=spread_of(row.hd95_mm for row in rows),
        nsd=spread_of(row.nsd for row in rows),
        gain=fmean(gains) if gains else None,
        backbone=backbone,
        ece=spread_of(calibration_of(row, "ece") for row in rows),
        brier=spread_of(calibration_of(row, "brier") for row in rows),
    )


def spread_of(figures: Iterable[float | None]) -> Spread:
    """Return mean and standard deviation of the values that are present."""
    present = [figure for figure in figures if figure is not None]
    return Spread(fmean(present) if present else None, stdev(present) if len(present) > 1 else None)
