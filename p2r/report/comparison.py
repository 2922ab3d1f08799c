"""Reports of several runs, or backbones -> what they reach side by side, and the difference patient by patient.

    Run (A, B, ...) -> comparison -> table for the terminal; comparison.html, comparison.json, pictures

Only what was asked alike is put side by side: the same task, protocol, split, mode and number of labelled patients. What
was not is named, and never mixed. A difference is paired where the draws had the same labelled patients and were read on
the same test patients; elsewhere both figures are shown, with the reason why there is no difference. Settings that differ
do not forbid a comparison, but stand above its figures: a difference may come of them.

The first run is what the others are compared with.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.table import Table
from rich.text import Text

from p2r.errors import DataError
from p2r.evaluate.statistics import few_shot_statistics
from p2r.report.canvas import INK, NARROW, WIDE, Drawing, apart, drawing, mode_colour, new_sheet, plain
from p2r.report.curve import draw_series
from p2r.report.document import source_line
from p2r.report.forest import Difference, figures_text, forest, p_text
from p2r.report.page import Block, Grid, Heading, Paragraph, Picture, html
from p2r.report.runs import Run, Setting, setting_of
from p2r.report.tables import LEAK_FREE, Row, aggregate, label_of, series_name, series_order
from p2r.report.text import for_file_name, for_picture, one_line, shortened
from p2r.storage import Storage

FORMAT = "p2r-comparison/1"

_MOST_NAMES = 3
_MOST_SETTINGS = 3  # in one sentence; the list below it has all
_SEED = 0
_PANEL, _BELOW = 1.9, 0.6  # inches
_DODGE = 0.06  # of the axis, between runs: a panel is small, and the marks of means would hide the draws
_LINES = ("solid", "dashed", "dotted", "dashdot")
_NO_FIGURE = (
    "publish_model",
    "backbone_signed_by",
    "allow_transductive",
    "modes",
    "num_labelled",
    "num_labelled_by_mode",
)
"""Settings that change no figure which two runs share; what only one of them has is named anyway."""
_TOLERANCE = "finetune.nsd_tolerance_mm"  # changes NSD alone
_SETTINGS, _CHOSEN = "Settings that differ", "chosen for "
_OF_TRIAL = ("task", "mode", "num_labelled", "draw", "split", "dice_mean", "dice", "seed", "code", "backbone_sha256")


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what runs reach side by side, as plain values for JSON.

    Returns:
        `runs` (all of them but their rows); `settings`: what `differ`s in the jobs' sections finetune (`name`, and `values` by
        letter), what was `chosen` differently (by task and mode), and whose settings are `unknown`; `cells`: task, protocol,
        split, num_labelled, mode, and by letter `dice` (mean over draws), `sd` and `draws`; `rows`: the draws of these means;
        `intervals` of the means; `differences`: each run from the first one, paired by patient, with interval, `p` and `p_holm`;
        `unpaired`: cells without such a difference, with the `reason`; `not_compared`: sentences about what only some have.

    Raises:
        DataError: if nothing was asked alike.
    """
    first, others = runs[0], runs[1:]
    not_compared: list[str] = []
    shared = _settings(first)
    for run in others:
        shared = shared & _settings(run)
        not_compared += _only_in_one(first, run)
    of_run = {run.letter: _cells(run, shared) for run in runs}
    keys = [key for key in of_run[first.letter] if all(key in cells for cells in of_run.values())]
    for key in sorted({key for cells in of_run.values() for key in cells} - set(keys), key=_order):
        there = [letter for letter, cells in of_run.items() if key in cells]
        not_compared.append(f"{_name(key)}: only in {' and '.join(there)}")
    if not keys:
        raise DataError(
            "there is nothing that all of these reports were asked alike (same task, protocol, split, mode and number of labelled "
            "patients): " + "; ".join(dict.fromkeys(not_compared))
        )
    keys.sort(key=_order)
    reasons = {
        (run.letter, key): _why_unpaired(of_run[first.letter][key], of_run[run.letter][key], first.letter, run.letter)
        for run in others
        for key in keys
    }
    differences = []
    for run in others:
        paired = [key for key in keys if not reasons[run.letter, key]]
        of_both = [row for letter in (first.letter, run.letter) for row in _as_one_run(of_run[letter], paired, letter)]
        found = few_shot_statistics(of_both, seed=_SEED)
        differences += [
            {
                **{
                    name: one[name]
                    for name in ("task", "protocol", "split", "mode", "num_labelled", "draws", "patients")
                },
                "run": one["backbone"],
                "against": one["against_backbone"],
                **{name: one[name] for name in ("difference", "lower", "upper", "p", "p_holm")},
            }
            for one in found["between_backbones"]
        ]
    rows = [
        {**{name: row.get(name) for name in _OF_TRIAL}, "protocol": key[0][1], "run": letter}
        for letter, cells in of_run.items()
        for key in keys
        for row in cells[key]
    ]
    intervals = [
        {
            **{name: one[name] for name in ("task", "protocol", "split", "mode", "num_labelled", "draws", "patients")},
            "run": letter,
            **{name: one[name] for name in ("mean", "lower", "upper")},
        }
        for letter, cells in of_run.items()
        for one in few_shot_statistics(_as_one_run(cells, keys, letter), seed=_SEED)["intervals"]
    ]
    cells = []
    for key in keys:
        by_letter = {letter: aggregate(cells[key])[0] for letter, cells in of_run.items()}
        cells.append(
            {
                **_named(key),
                "dice": {letter: cell.dice_mean.mean for letter, cell in by_letter.items()},
                "sd": {letter: cell.dice_mean.sd for letter, cell in by_letter.items()},
                "draws": {letter: cell.num_draws for letter, cell in by_letter.items()},
            }
        )
    return {
        "format": FORMAT,
        "runs": [{name: value for name, value in asdict(run).items() if name != "rows"} for run in runs],
        "settings": _settings_that_differ(runs, keys),
        "seed": _SEED,
        "cells": cells,
        "rows": rows,
        "intervals": intervals,
        "differences": differences,
        "unpaired": [
            {**_named(key), "run": letter, "against": first.letter, "reason": reason}
            for (letter, key), reason in reasons.items()
            if reason
        ],
        "not_compared": list(dict.fromkeys(not_compared)),
    }


def settings_table(comparison: Mapping[str, Any]) -> Table:
    """Return every setting that differs as a table for the terminal; it has no row if none does."""
    header, lines = _settings_grid(comparison)
    table = Table(*header, title=_SETTINGS, title_justify="left")
    for line in lines:
        table.add_row(*(Text(one_line(text)) for text in line))
    return table


def notes_of(comparison: Mapping[str, Any]) -> list[str]:
    """Return, for people, what must be known of the settings before any figure."""
    letters = [run["letter"] for run in comparison["runs"]]
    everyone = " and ".join(letters)
    _, lines = _settings_grid(comparison)
    num_asked = len(comparison["settings"]["differ"])
    asked = [_brief(name, letters, texts) for name, *texts in lines[:num_asked] if name != _TOLERANCE]
    chosen = [_brief(name.removeprefix(_CHOSEN), letters, texts) for name, *texts in lines[num_asked:]]
    tolerance = next((texts for name, *texts in lines if name == _TOLERANCE), None)
    notes = []
    if asked:
        notes.append(
            f"{everyone} were run with different settings, and a difference of Dice may come of these: {_first_of(asked)}"
        )
    if chosen:
        notes.append(f"different settings were chosen on validation patients of {everyone}: {_first_of(chosen)}")
    if tolerance:
        of_each = ", ".join(f"{letter} {text} mm" for letter, text in zip(letters, tolerance, strict=True))
        notes.append(
            f"NSD is left out, for it was measured with different tolerances ({_TOLERANCE}: {of_each}); Dice does not depend on it"
        )
    if unknown := comparison["settings"]["unknown"]:
        notes.append(
            f"whether settings differ is not known of {' and '.join(unknown)}: a report without them, of an earlier version"
        )
    return notes


def _brief(name: str, letters: Sequence[str], texts: Sequence[str]) -> str:
    values = ", ".join(f"{letter} {shortened(text, 60)}" for letter, text in zip(letters, texts, strict=True))
    return f"{name} ({values})"


def _first_of(settings: Sequence[str]) -> str:
    more = len(settings) - _MOST_SETTINGS
    return "; ".join(settings[:_MOST_SETTINGS]) + (f"; and {more} more, in the list of settings" if more > 0 else "")


def _settings_grid(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a table of what differs: what was asked for, then what was chosen."""
    letters = [run["letter"] for run in comparison["runs"]]
    settings = comparison["settings"]
    lines = [
        [one["name"], *(_json_text(one["values"].get(letter)) for letter in letters)] for one in settings["differ"]
    ]
    for one in settings["chosen"]:
        texts = (
            ", ".join(f"{name} {_json_text(value)}" for name, value in one["values"].get(letter, {}).items())
            for letter in letters
        )
        lines.append([f"{_CHOSEN}{one['task']}, {series_name((one['mode'], ''))}", *(text or "–" for text in texts)])
    return ["setting", *letters], lines


def _json_text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return a comparison as a table for the terminal."""
    letters = [run["letter"] for run in comparison["runs"]]
    table = Table(title="Dice, mean ± standard deviation over draws", title_justify="left")
    for name in ("task", "patients", "mode", *letters):
        table.add_column(name, justify="left" if name in ("task", "mode") else "right", no_wrap=True)
    for letter in letters[1:]:
        table.add_column(f"{letter} - {letters[0]} [95 %]", justify="right")
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    for cell in comparison["cells"]:
        table.add_row(*(Text(one_line(text)) for text in _line(comparison, cell, letters)))
    return table


def reasons_of(comparison: Mapping[str, Any]) -> list[str]:
    """Return, for people, why some figures have no difference, and what was not compared at all."""
    unpaired: dict[str, list[str]] = {}
    for one in comparison["unpaired"]:
        unpaired.setdefault(f"{one['run']} and {one['against']} unpaired: {one['reason']}", []).append(
            f"{one['task']} n = {one['num_labelled']} {series_name((one['mode'], ''))}"
        )
    lines = [f"{reason} ({shortened(', '.join(cells), 120)})" for reason, cells in unpaired.items()]
    return lines + [f"not compared: {sentence}" for sentence in comparison["not_compared"]]


def write_comparison(storage: Storage, comparison: Mapping[str, Any]) -> str:
    """Write `comparison.html`, `comparison.json` and pictures, and return the URL of the page."""
    drawn: dict[str, Drawing | bytes] = {}
    blocks = list(_blocks(comparison, drawn))
    for name, picture in drawn.items():
        assert isinstance(picture, Drawing)
        storage.write_bytes(f"pictures/{name}.png", picture.png)
        storage.write_bytes(f"pictures/{name}.svg", picture.svg)
    storage.write_bytes("comparison.html", html(blocks, drawn).encode())
    storage.write_json("comparison.json", {**comparison, "pictures": [f"pictures/{name}.png" for name in drawn]})
    return storage.at("comparison.html")


def _settings_that_differ(runs: Sequence[Run], keys: Sequence["_Key"]) -> dict[str, Any]:
    asked = {run.letter: dict(_leaves(run.finetune, "finetune")) for run in runs if run.finetune}
    differ = [
        {"name": name, "values": {letter: values[name] for letter, values in asked.items() if name in values}}
        for name in _names_that_differ(asked)
        if name.split(".")[1] not in _NO_FIGURE
    ]
    chosen = []
    for task, mode in dict.fromkeys((task, mode) for (task, _, _), _, mode in keys):
        found = {
            run.letter: one["settings"]
            for run in runs
            for one in run.chosen
            if (one.get("task"), one.get("mode")) == (task, mode)
        }
        names = [
            name
            for name in _names_that_differ(found)
            # What no search chose is as the section says it, and listed already.
            if any(found[run.letter].get(name) != run.finetune.get(name) for run in runs if run.letter in found)
        ]
        if names:
            values = {letter: {name: of[name] for name in names if name in of} for letter, of in found.items()}
            chosen.append({"task": task, "mode": mode, "values": values})
    return {
        "differ": differ,
        "chosen": chosen,
        "unknown": [run.letter for run in runs if not run.finetune],
    }


def _names_that_differ(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for of in values.values() for name in of)
    return [
        name
        for name in names
        if any(of.get(name) != one.get(name) for of in values.values() for one in values.values())
    ]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, and the keys that lead there joined by dots."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}")
    else:
        yield name, value


def _settings(run: Run) -> set[Setting]:
    return {setting_of(row) for row in run.rows}


def _only_in_one(first: Run, run: Run) -> Iterator[str]:
    """Say what one of two runs has and the other lacks: tasks, or other protocols and splits of one task."""
    tasks = [{task for task, _, _ in _settings(one)} for one in (first, run)]
    for task in sorted(tasks[0] ^ tasks[1]):
        yield f"task {task}: only in {first.letter if task in tasks[0] else run.letter}"
    for task in sorted(tasks[0] & tasks[1]):
        ours, theirs = (
            sorted({f"{protocol} on {split} patients" for name, protocol, split in _settings(one) if name == task})
            for one in (first, run)
        )
        if ours != theirs:
            yield (
                f"task {task}: {first.letter} is {' and '.join(ours)}, {run.letter} is {' and '.join(theirs)}; figures of "
                "different protocols or splits are never mixed"
            )


_Key = tuple[Setting, int, str]


def _cells(run: Run, settings: set[Setting]) -> dict[_Key, list[Row]]:
    cells: dict[_Key, list[Row]] = {}
    for row in run.rows:
        if setting_of(row) in settings:
            cells.setdefault((setting_of(row), row["num_labelled"], row["mode"]), []).append(row)
    return cells


def _as_one_run(cells: Mapping[_Key, Sequence[Row]], keys: Sequence[_Key], letter: str) -> list[dict[str, Any]]:
    """Return the rows of some cells under the letter of their run, for statistics."""
    return [
        {**row, "protocol": key[0][1], "transductive": False, "backbone": letter} for key in keys for row in cells[key]
    ]


def _order(key: _Key) -> tuple[Any, ...]:
    return (*key[0], key[1], series_order((key[2], "")))


def _name(key: _Key) -> str:
    (task, protocol, split), num_labelled, mode = key
    return f"{task} ({protocol}, {split}), n = {num_labelled}, {series_name((mode, ''))}"


def _named(key: _Key) -> dict[str, Any]:
    (task, protocol, split), num_labelled, mode = key
    return {"task": task, "protocol": protocol, "split": split, "num_labelled": num_labelled, "mode": mode}


def _why_unpaired(ours: Sequence[Row], theirs: Sequence[Row], our_letter: str, their_letter: str) -> str:
    """Return why two cells cannot be compared patient by patient; nothing if they can."""
    mine, yours = ({subject for row in rows for subject in row["dice_by_subject"]} for rows in (ours, theirs))
    if mine != yours:
        parts = [
            f"only {letter} has {_few(sorted(there))}"
            for letter, there in ((our_letter, mine - yours), (their_letter, yours - mine))
            if there
        ]
        return f"the patients read differ: {', '.join(parts)}"
    draws = [{row["draw"]: sorted(row["subjects"]) for row in rows} for rows in (ours, theirs)]
    common = sorted(draws[0].keys() & draws[1].keys())
    if not common:
        return "they have no draw in common"
    if not any(draws[0][draw] == draws[1][draw] for draw in common):
        draw = common[0]
        return (
            f"the labelled patients differ: draw {draw} is {_few(draws[0][draw])} in {our_letter}, {_few(draws[1][draw])} in "
            f"{their_letter}"
        )
    return ""


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _line(comparison: Mapping[str, Any], cell: Mapping[str, Any], letters: Sequence[str]) -> list[str]:
    line = [
        cell["task"] if cell["protocol"] == LEAK_FREE else f"{cell['task']} ({cell['protocol']})",
        str(cell["num_labelled"]),
        series_name((cell["mode"], "")),
    ]
    for letter in letters:
        mean, sd = cell["dice"][letter], cell["sd"][letter]
        line.append("–" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}"))
    for letter in letters[1:]:
        one = next((one for one in comparison["differences"] if one["run"] == letter and _is_of(one, cell)), None)
        if one is None:
            line += ["unpaired", "–"]
        else:
            line += [figures_text(one["difference"], one["lower"], one["upper"]), p_text(one["p_holm"])]
    return line


def _is_of(one: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    return all(one[name] == cell[name] for name in ("task", "protocol", "split", "num_labelled", "mode"))


def _blocks(comparison: Mapping[str, Any], drawn: dict[str, Drawing | bytes]) -> Iterator[Block]:
    runs, cells = comparison["runs"], comparison["cells"]
    letters = [run["letter"] for run in runs]
    yield Heading(1, f"{' and '.join(letters)} side by side{label_of(cells)}")
    if any(cell["protocol"] != LEAK_FREE for cell in cells):
        yield Paragraph(
            "Not all figures are leak-free: each says its protocol, and different ones are never mixed.", note=True
        )
    for note in notes_of(comparison):
        yield Paragraph(f"{note[:1].upper()}{note[1:]}.", note=True)
    yield Heading(2, "Who is who")
    facts = [
        ("job", [run["job"] for run in runs]),
        ("backbone", [run["backbone"] for run in runs]),
        ("sha256", [_abbreviated(run["backbone_sha256"]) for run in runs]),
        ("code", [run["code"] for run in runs]),
        ("seed", [run["seed"] for run in runs]),
        ("licence", [run["licence"] for run in runs]),
        ("report", [run["url"] for run in runs]),
    ]
    yield Grid(("", *letters), [(name, *values) for name, values in facts])
    header, differ = _settings_grid(comparison)
    if differ:
        yield Grid(header, differ, caption=_SETTINGS)
    for setting in dict.fromkeys((cell["task"], cell["protocol"], cell["split"]) for cell in cells):
        task, protocol, split = setting
        here = [cell for cell in cells if (cell["task"], cell["protocol"], cell["split"]) == setting]
        name = for_file_name(task if protocol == LEAK_FREE else f"{task}-{protocol}")
        name = name if len({one["split"] for one in cells}) == 1 else f"{name}-{for_file_name(split)}"
        yield Heading(2, task)
        yield Paragraph(f"Protocol: {protocol}. Read on {split} patients.")
        if any(dice is not None for cell in here for dice in cell["dice"].values()):
            drawn[f"runs-{name}"] = _side_by_side(comparison, here, task)
            yield Picture(
                f"runs-{name}", f"Dice on {split} patients by number of labelled patients, one panel for each mode."
            )
        yield Grid(
            ("task", "labelled patients", "mode", *letters, *_flat_headers(letters)),
            [_line(comparison, cell, letters) for cell in here],
        )
        found = [one for one in comparison["differences"] if any(_is_of(one, cell) for cell in here)]
        if found:
            paired = [cell for cell in here if any(_is_of(one, cell) for one in found)]
            drawn[f"differences-{name}"] = forest(
                [
                    Difference(
                        f"{one['num_labelled']} labelled patient{'s' * (one['num_labelled'] > 1)}",
                        series_name((one["mode"], "" if len(letters) == 2 else one["run"])),
                        one["mode"],
                        one["difference"],
                        one["lower"],
                        one["upper"],
                        one["p_holm"],
                    )
                    for one in sorted(
                        found, key=lambda one: (one["num_labelled"], series_order((one["mode"], one["run"])))
                    )
                ],
                title=f"{task}: {', '.join(letters[1:])} against {letters[0]}{label_of(here)}",
                subtitle="paired by patient, same labelled patients; line: 95 % of a bootstrap over draws and patients; p: Wilcoxon, "
                "Holm over n",
                axis=f"Dice above that of {letters[0]}",
                source=_source(comparison, paired),
            )
            yield Picture(
                f"differences-{name}",
                f"Difference of Dice to {letters[0]}, paired by patient: to the right of zero {letters[0]} is worse.",
            )
    reasons = reasons_of(comparison)
    if reasons:
        yield Heading(2, "What is not compared, and why")
        yield Grid(("", "reason"), [(str(number), reason) for number, reason in enumerate(reasons, start=1)])


def _abbreviated(digests: str) -> str:
    """Return the beginning of each digest: comparison.json has all of it."""
    return ", ".join(digest[:12] for digest in digests.split(", "))


def _flat_headers(letters: Sequence[str]) -> list[str]:
    return [text for letter in letters[1:] for text in (f"{letter} − {letters[0]}, 95 % interval", "p (Holm)")]


def _side_by_side(comparison: Mapping[str, Any], of_task: Sequence[Mapping[str, Any]], task: str) -> Drawing:
    """Draw Dice over the number of labelled patients: a panel for each mode, a line with its draws and band for each run."""
    letters = [run["letter"] for run in comparison["runs"]]
    rows = [{**row, "backbone": row["run"]} for row in _rows_in(comparison, of_task)]
    cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
    bands = {
        ((one["mode"], one["run"]), one["num_labelled"]): (one["lower"], one["upper"])
        for one in comparison["intervals"]
        if any(_is_of(one, cell) for cell in of_task)
    }
    modes = sorted({cell.mode for cell in cells}, key=lambda mode: series_order((mode, "")))
    numbers = sorted({cell.num_labelled for cell in cells})
    span = max(math.log(numbers[-1] / numbers[0]), 0.7)
    subtitle = (
        f"mean of {', '.join(cells[0].dice)}; points: draws of the labelled patients, line: their mean, band: 95 % of a bootstrap "
        "over draws and patients; "
    ) + ", ".join(f"{letter}: {_LINES[number % 4]}" for number, letter in enumerate(letters))

    def figure(width: float) -> Figure:
        columns = min(len(modes), 1 if width <= NARROW else 3)
        lines = -(-len(modes) // columns)
        left, gap = 0.6, 0.45
        each = (width - left - 0.35 - (columns - 1) * gap) / columns
        sheet = new_sheet(
            width,
            lines * (_PANEL + _BELOW),
            title=f"{task}: {' and '.join(letters)} side by side{label_of(rows)}",
            subtitle=subtitle,
            source=_source(comparison, of_task),
        )
        for index, mode in enumerate(modes):
            line, column = divmod(index, columns)
            low = (lines - 1 - line) * (_PANEL + _BELOW) + _BELOW - 0.1
            axes = sheet.panel(left + column * (each + gap), low, each, _PANEL - 0.25)
            ends = []
            for number, letter in enumerate(letters):
                here = [cell for cell in cells if cell.series == (mode, letter)]
                if here:
                    offset = (number - (len(letters) - 1) / 2) * _DODGE * span
                    draw_series(axes, here, rows, bands, offset, span, _LINES[number % 4])
                    ends.append((letter, here[-1].num_labelled, here[-1].dice_mean.mean or 0.0))
            places = apart([dice for _, _, dice in ends], 0.11)
            for (letter, at, _), place in zip(ends, places, strict=True):
                axes.annotate(
                    letter,
                    (at, place),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    color=mode_colour(mode),
                    weight="bold",
                )
            axes.set_ylim(0, 1)
            axes.set_xscale("log")
            axes.set_xlim(numbers[0] * math.exp(-0.08 * span), numbers[-1] * math.exp(0.08 * span))
            axes.xaxis.set_major_locator(FixedLocator(numbers))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([str(number) for number in numbers])
            plain(axes)
            axes.set_title(
                for_picture(series_name((mode, "")), 30),
                fontsize=10,
                loc="left",
                color=mode_colour(mode),
                weight="bold",
            )
            if column == 0:
                axes.set_ylabel("Dice", color=INK)
            if index + columns >= len(modes):
                axes.set_xlabel("labelled patients", color=INK)
        return sheet.figure

    return drawing(figure(WIDE), figure(NARROW))


def _rows_in(comparison: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the draws of some cells as rows of a report; distances stay away, for Dice alone is compared."""
    return [
        {**row, "hd95_mm": None, "nsd": None} for row in comparison["rows"] if any(_is_of(row, cell) for cell in cells)
    ]


def _source(comparison: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """Return where the figures of some cells come from: what all runs share once, then what is each one's own."""
    rows = _rows_in(comparison, cells)
    of_run = {
        run["letter"]: source_line([row for row in rows if row["run"] == run["letter"]], run).split(" · ")
        for run in comparison["runs"]
    }
    own = {
        letter: [part for part in parts if any(part not in other for other in of_run.values())]
        for letter, parts in of_run.items()
    }
    first = next(iter(of_run))
    shared = [part for part in of_run[first] if part not in own[first]]
    differ = [one["name"] for one in comparison["settings"]["differ"] if one["name"] != _TOLERANCE]
    return " · ".join(
        [
            *shared,
            *(f"{letter}: {', '.join(parts)}" for letter, parts in own.items() if parts),
            *([f"settings differ: {shortened(', '.join(differ), 100)}"] if differ else []),
        ]
    )
