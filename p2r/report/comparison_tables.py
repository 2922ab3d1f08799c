"""Tables and sentences of a comparison, for the terminal."""

from typing import Literal

from rich.table import Table
from rich.text import Text

from p2r.report.comparison import ComparedCell, Comparison
from p2r.report.forest import difference_texts
from p2r.report.settings_compared import notes_of_settings, settings_grid
from p2r.report.tables import series_name
from p2r.report.text import one_line, shortened

SETTINGS_TITLE = "Settings that differ"


def settings_table(comparison: Comparison) -> Table:
    """Return every setting that differs as a table for the terminal; it has no row if none does."""
    header, lines = settings_grid(comparison.settings, comparison.letters)
    table = Table(*header, title=SETTINGS_TITLE, title_justify="left")
    for line in lines:
        table.add_row(*(Text(one_line(text)) for text in line))
    return table


def notes_of(comparison: Comparison) -> list[str]:
    """Return the sentences about settings that are printed above all results."""
    return notes_of_settings(comparison.settings, comparison.letters)


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison as a table for the terminal: one line for each run, so that its width depends on no number of runs."""
    first = comparison.letters[0]
    table = Table(title="Dice, mean ± standard deviation over draws", title_justify="left")
    interval = f"minus {first} [95 %]"
    for name in ("task", "patients", "mode", "run", "Dice", interval, "draws of its sign", "p (Holm)"):
        justify: Literal["left", "right"] = "left" if name in ("task", "mode", "run") else "right"
        table.add_column(name, justify=justify, no_wrap=name in ("Dice", interval))
    for cell in comparison.cells:
        names = [cell.task_and_protocol, str(cell.num_labelled), series_name((cell.mode, ""))]
        for letter in comparison.letters:
            figures = ("", "", "") if letter == first else _difference(comparison, cell, letter)
            line = [*names, letter, _dice(cell, letter), *figures]
            table.add_row(*(Text(one_line(text)) for text in line), end_section=letter == comparison.letters[-1])
            names = ["", "", ""]
    return table


def reasons_of(comparison: Comparison) -> list[str]:
    """Return the reasons for missing differences, and the results that were not compared."""
    unpaired: dict[str, list[str]] = {}
    for one in comparison.unpaired:
        unpaired.setdefault(f"{one.run} and {one.against} unpaired: {one.reason}", []).append(
            f"{one.task} n = {one.num_labelled} {series_name((one.mode, ''))}"
        )
    lines = [f"{reason} ({shortened(', '.join(cells), 120)})" for reason, cells in unpaired.items()]
    return lines + [f"not compared: {sentence}" for sentence in comparison.not_compared]


def comparison_line(comparison: Comparison, cell: ComparedCell) -> list[str]:
    """Return a line of the page's table: the compared cell, the result of every run, and the differences from the first run."""
    line = [cell.task_and_protocol, str(cell.num_labelled), series_name((cell.mode, ""))]
    line += [_dice(cell, letter) for letter in comparison.letters]
    return line + [text for letter in comparison.letters[1:] for text in _difference(comparison, cell, letter)]


def _dice(cell: ComparedCell, letter: str) -> str:
    mean, sd = cell.dice[letter], cell.sd[letter]
    return "–" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def _difference(comparison: Comparison, cell: ComparedCell, letter: str) -> tuple[str, ...]:
    """Return the texts of a run's difference from the first run: the interval, the draws with its sign, and the p value."""
    one = comparison.difference(cell, letter)
    return ("unpaired", "–", "–") if one is None else difference_texts(one)
