"""Rows of an ablation's variants -> a table and a picture that put them side by side."""

from collections.abc import Iterator, Sequence

from matplotlib.ticker import FixedLocator
from rich.table import Table
from rich.text import Text

from p2r.report.canvas import INK, headline, mode_colour, new_figure, plain, to_png
from p2r.report.tables import MODE_NAMES, Cell, Row, aggregate, label_of, split_of
from p2r.report.text import for_markdown, for_picture, one_line

_COLUMNS = ("variant", "task", "labelled patients", "mode", "Dice", "per class", "backbone")


def variants_table(rows: Sequence[Row]) -> Table:
    """Return the variants' figures as a table for the terminal; rows have a `variant`."""
    result = Table(
        *_COLUMNS, title=f"Dice on {split_of(rows)} patients, mean ± standard deviation over draws{label_of(rows)}"
    )
    for line in _lines(rows):
        result.add_row(*(Text(one_line(cell)) for cell in line))
    return result


def markdown_variants(rows: Sequence[Row]) -> list[str]:
    """Return the same table as lines of Markdown."""
    lines = (_COLUMNS, ("---",) * len(_COLUMNS), *([for_markdown(cell) for cell in line] for line in _lines(rows)))
    return [f"| {' | '.join(line)} |" for line in lines]


def variants_picture(rows: Sequence[Row], *, title: str) -> bytes:
    """Draw Dice by variant: a large point is a mean over draws, its bar the standard deviation, a small point one draw."""
    names = list(dict.fromkeys(str(row["variant"]) for row in rows))
    groups = sorted({(row["task"], row["num_labelled"], row["mode"]) for row in rows})
    figure = new_figure(8.4, 4.6)
    axes = figure.add_axes((0.085, 0.125, 0.86, 0.68))
    for index, (task, num_labelled, mode) in enumerate(groups):
        offset = (index - (len(groups) - 1) / 2) * 0.6 / max(1, len(groups))
        colour = mode_colour(mode)
        marker = "os^D"[sorted({group[1] for group in groups}).index(num_labelled) % 4]
        label = f"{MODE_NAMES.get(mode, mode)}, {num_labelled} labelled"
        label += f", {for_picture(task)}" if len({group[0] for group in groups}) > 1 else ""
        for place, name in enumerate(names):
            chosen = [row for row in rows if _key(row) == (name, task, num_labelled, mode)]
            for row in chosen:
                if row["dice_mean"] is not None:
                    axes.plot(place + offset, row["dice_mean"], marker, color=colour, alpha=0.35, markersize=4.5)
            for cell in aggregate(chosen):
                if cell.dice_mean.mean is not None:
                    axes.errorbar(
                        place + offset,
                        cell.dice_mean.mean,
                        yerr=cell.dice_mean.sd or 0.0,
                        color=colour,
                        marker=marker,
                        markersize=8,
                        label=label if place == 0 else None,
                    )
    axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_xticklabels([for_picture(name, 24) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel(f"mean Dice on {split_of(rows)} patients", color=INK)
    plain(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    headline(
        figure,
        for_picture(title, 80) + label_of(rows),
        "points: mean over draws of the labelled patients, bars: standard deviation, dots: draws",
    )
    return to_png(figure)


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(str(row["variant"]) for row in rows):
        of_variant = [row for row in rows if row["variant"] == name]
        digests = {str(row["backbone_sha256"])[:12] for row in of_variant if row.get("backbone_sha256")}
        for cell in aggregate(of_variant):
            yield _line(name, cell, ", ".join(sorted(digests)))


def _line(name: str, cell: Cell, digests: str) -> tuple[str, ...]:
    per_class = ", ".join(f"{of} {spread.text(2).split(' ')[0]}" for of, spread in cell.dice.items())
    mode = MODE_NAMES.get(cell.mode, cell.mode)
    return name, cell.task, str(cell.num_labelled), mode, cell.dice_mean.text(3), per_class, digests


def _key(row: Row) -> tuple[str, str, int, str]:
    return str(row["variant"]), row["task"], row["num_labelled"], row["mode"]
