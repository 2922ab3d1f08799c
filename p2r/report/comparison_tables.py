"""Tables and sentences of a comparison, for the terminal."""

from rich.table import Table
from rich.text import Text

from p2r.report.comparison import ComparedCell, Comparison
from p2r.report.forest import figures_text, p_text
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
    """Return a comparison as a table for the terminal."""
    letters = comparison.letters
    table = Table(title="Dice, mean ± standard deviation over draws", title_justify="left")
    for name in ("task", "patients", "mode", *letters):
        table.add_column(name, justify="left" if name in ("task", "mode") else "right", no_wrap=True)
    for letter in letters[1:]:
        table.add_column(f"{letter} - {letters[0]} [95 %]", justify="right")
        table.add_column("draws of its sign", justify="right", no_wrap=True)
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    for cell in comparison.cells:
        table.add_row(*(Text(one_line(text)) for text in comparison_line(comparison, cell)))
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
    """Return a line of the table: the compared cell, the result of every run, and the differences from the first run."""
    letters = comparison.letters
    line = [cell.task_and_protocol, str(cell.num_labelled), series_name((cell.mode, ""))]
    for letter in letters:
        mean, sd = cell.dice[letter], cell.sd[letter]
        line.append("–" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}"))
    for letter in letters[1:]:
        one = comparison.difference(cell, letter)
        if one is None:
            line += ["unpaired", "–", "–"]
        else:
            interval = figures_text(one.difference, one.lower, one.upper)
            line += [interval, f"{one.draws_agree} of {one.draws}", p_text(one.p_holm)]
    return line
