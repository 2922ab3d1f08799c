"""Reports of several runs, or backbones -> what they reach side by side, and the difference patient by patient.

    report.json (A, B, ...) -> Run -> comparison -> table for the terminal; comparison.html, comparison.json, pictures

Only what was asked alike is put side by side: the same task, protocol, split, mode and number of labelled patients. What
was not is named, and never mixed. A difference is paired where the draws had the same labelled patients and were read on
the same test patients; elsewhere both figures are shown, with the reason why there is no difference.

The first run is what the others are compared with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from rich.table import Table
from rich.text import Text

from p2r.errors import DataError
from p2r.evaluate.statistics import few_shot_statistics
from p2r.report.canvas import INK, NARROW, WIDE, Drawing, apart, drawing, mode_colour, mode_marker, new_sheet, plain
from p2r.report.forest import Difference, figures_text, forest, p_text
from p2r.report.page import Block, Grid, Heading, Paragraph, Picture, html
from p2r.report.tables import LEAK_FREE, Row, aggregate, code_of, label_of, protocol_of, series_name, series_order
from p2r.report.text import for_file_name, for_picture, one_line, shortened
from p2r.storage import Storage

FORMAT = "p2r-comparison/1"

_MOST_RUNS = 8
_MOST_NAMES = 3
_SEED = 0
_PANEL, _BELOW = 1.9, 0.6  # inches
_LINES = ("solid", "dashed", "dotted", "dashdot")

Dice = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Setting = tuple[str, str, str]
"""Task, protocol, split: what figures must share to be put beside one another."""


class _Row(BaseModel):
    """What a comparison needs of a row; whatever else a report holds is let through."""

    model_config = ConfigDict(extra="allow", strict=True)

    task: str
    protocol: str
    mode: str
    num_labelled: PositiveInt
    draw: NonNegativeInt
    subjects: list[str]
    split: str = "test"
    transductive: bool = False
    dice_mean: Dice | None
    dice: dict[str, Dice | None]
    dice_by_subject: dict[str, Dice | None]
    hd95_mm: float | None = None
    nsd: float | None = None


@dataclass(frozen=True)
class Run:
    """One report, under the letter that stands for it."""

    letter: str
    url: str
    job: str
    backbone: str
    backbone_sha256: str
    code: str
    seed: str
    licence: str
    rows: tuple[dict[str, Any], ...]


def read_runs(urls: Sequence[str]) -> list[Run]:
    """Read the reports below several URLs: of a job's storage, of its report, or of a report.json.

    Raises:
        DataError: naming the URL that holds no report, or a report that breaks its own rules.
    """
    if not 2 <= len(urls) <= _MOST_RUNS:
        raise DataError(f"a comparison needs 2 to {_MOST_RUNS} reports, got {len(urls)}")
    runs = [_read_run(url, chr(ord("A") + number)) for number, url in enumerate(urls)]
    first: dict[str, str] = {}
    for run in runs:
        if first.setdefault(run.url, run.letter) != run.letter:
            raise DataError(f"{run.url} was given twice; give two reports")
    return runs


def _read_run(url: str, letter: str) -> Run:
    if url.endswith(".json"):
        folder, _, path = url.rpartition("/")
        storage, paths = Storage(folder or "."), [path]
    else:
        storage, paths = Storage(url), ["report/report.json", "report.json"]
    found = next((path for path in paths if storage.exists(path)), None)
    if found is None:
        raise DataError(
            f"there is no report at {storage.url} (looked for {', '.join(paths)}); give the storage of a job that has run, "
            "or the URL of a report.json"
        )
    where = storage.at(found)
    report = storage.read_json(found)
    if not isinstance(report, dict) or not str(report.get("format")).startswith("p2r-report/"):
        raise DataError(f"{where} is no report of p2r (format p2r-report/1)")
    rows = report.get("rows")
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where} holds no rows: there is nothing to compare")
    checked = []
    for number, row in enumerate(rows):
        try:
            checked.append(_Row.model_validate(row).model_dump())
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "the row"
            raise DataError(f"{where}: row {number}: {one_line(key)}: {one_line(problem['msg'])}") from None
    if len({row.get("backbone") for row in checked}) > 1:
        raise DataError(f"{where} holds rows of several backbones already; give reports of one backbone each")
    trials = [(*_setting(row), row["num_labelled"], row["mode"], row["draw"]) for row in checked]
    for number, trial in enumerate(trials):
        if trial in trials[:number]:
            raise DataError(f"{where}: rows {trials.index(trial)} and {number} are of one trial: {one_line(trial)}")
    context = _mapping(report.get("context"))
    backbone = _mapping(context.get("backbone"))
    digests = sorted({str(row["backbone_sha256"]) for row in checked if row.get("backbone_sha256")})
    return Run(
        letter,
        where,
        str(context.get("job") or ""),
        str(backbone.get("url") or ""),
        ", ".join(digests),
        code_of(checked, context),
        str(context.get("seed", "")),
        str(context.get("licence") or ""),
        tuple(checked),
    )


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what runs reach side by side, as plain values for JSON.

    Returns:
        `runs` (all of them but their rows); `cells`: task, protocol, split, num_labelled, mode, and by letter `dice` (mean over
        draws), `sd` and `draws`; `differences`: each run from the first one, paired by patient, with interval, `p` and `p_holm`;
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
        rows = [
            {**row, "protocol": key[0][1], "transductive": False, "backbone": letter}
            for letter in (first.letter, run.letter)
            for key in paired
            for row in of_run[letter][key]
        ]
        found = few_shot_statistics(rows, seed=_SEED)
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
        "seed": _SEED,
        "cells": cells,
        "differences": differences,
        "unpaired": [
            {**_named(key), "run": letter, "against": first.letter, "reason": reason}
            for (letter, key), reason in reasons.items()
            if reason
        ],
        "not_compared": list(dict.fromkeys(not_compared)),
    }


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


def _settings(run: Run) -> set[Setting]:
    return {_setting(row) for row in run.rows}


def _setting(row: Row) -> Setting:
    return str(row["task"]), protocol_of(row), str(row["split"])


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
        if _setting(row) in settings:
            cells.setdefault((_setting(row), row["num_labelled"], row["mode"]), []).append(row)
    return cells


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
    yield Heading(2, "Who is who")
    yield Grid(
        ("", "job", "backbone", "sha256", "code", "seed", "licence", "report"),
        [
            (
                run["letter"],
                run["job"],
                run["backbone"],
                run["backbone_sha256"],
                run["code"],
                run["seed"],
                run["licence"],
                run["url"],
            )
            for run in runs
        ],
    )
    source = " · ".join(
        f"{run['letter']}: backbone {run['backbone_sha256'][:12] or 'none'}, code {run['code'] or 'unknown'}"
        for run in runs
    )
    for setting in dict.fromkeys((cell["task"], cell["protocol"], cell["split"]) for cell in cells):
        task, protocol, split = setting
        here = [cell for cell in cells if (cell["task"], cell["protocol"], cell["split"]) == setting]
        name = for_file_name(task if protocol == LEAK_FREE else f"{task}-{protocol}")
        name = name if len({one["split"] for one in cells}) == 1 else f"{name}-{for_file_name(split)}"
        yield Heading(2, task)
        yield Paragraph(f"Protocol: {protocol}. Read on {split} patients.")
        of_source = f"task {task}, {protocol}, {split} patients · {source}"
        drawn[f"runs-{name}"] = _side_by_side(here, letters, task, of_source)
        yield Picture(
            f"runs-{name}", f"Mean Dice on {split} patients by number of labelled patients, one panel for each mode."
        )
        yield Grid(
            ("task", "labelled patients", "mode", *letters, *_flat_headers(letters)),
            [_line(comparison, cell, letters) for cell in here],
        )
        found = [one for one in comparison["differences"] if any(_is_of(one, cell) for cell in here)]
        if found:
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
                source=of_source,
            )
            yield Picture(
                f"differences-{name}",
                f"Difference of Dice to {letters[0]}, paired by patient: to the right of zero {letters[0]} is worse.",
            )
    reasons = reasons_of(comparison)
    if reasons:
        yield Heading(2, "What is not compared, and why")
        yield Grid(("", "reason"), [(str(number), reason) for number, reason in enumerate(reasons, start=1)])


def _flat_headers(letters: Sequence[str]) -> list[str]:
    return [text for letter in letters[1:] for text in (f"{letter} − {letters[0]}, 95 % interval", "p (Holm)")]


def _side_by_side(cells: Sequence[Mapping[str, Any]], letters: Sequence[str], task: str, source: str) -> Drawing:
    """Draw mean Dice over the number of labelled patients: a panel for each mode, a line for each run."""
    modes = list(dict.fromkeys(cell["mode"] for cell in sorted(cells, key=lambda one: series_order((one["mode"], "")))))
    numbers = sorted({cell["num_labelled"] for cell in cells})
    subtitle = "mean of classes, mean over draws of the labelled patients; " + ", ".join(
        f"{letter}: {_LINES[number % 4]}" for number, letter in enumerate(letters)
    )

    def figure(width: float) -> Figure:
        columns = min(len(modes), 1 if width <= NARROW else 3)
        rows = -(-len(modes) // columns)
        left, gap = 0.6, 0.45
        each = (width - left - 0.35 - (columns - 1) * gap) / columns
        height = rows * (_PANEL + _BELOW)
        sheet = new_sheet(
            width,
            height,
            title=f"{task}: {' and '.join(letters)} side by side{label_of(cells)}",
            subtitle=subtitle,
            source=source,
        )
        for index, mode in enumerate(modes):
            row, column = divmod(index, columns)
            low = (rows - 1 - row) * (_PANEL + _BELOW) + _BELOW - 0.1
            axes = sheet.panel(left + column * (each + gap), low, each, _PANEL - 0.25)
            here = [cell for cell in cells if cell["mode"] == mode]
            ends = []
            for number, letter in enumerate(letters):
                known = [
                    (cell["num_labelled"], cell["dice"][letter]) for cell in here if cell["dice"][letter] is not None
                ]
                if not known:
                    continue
                axes.plot(
                    *zip(*known, strict=True),
                    color=mode_colour(mode),
                    linestyle=_LINES[number % 4],
                    marker=mode_marker(mode),
                    markersize=5.5,
                    fillstyle="full" if number == 0 else "none",
                )
                ends.append((letter, known[-1]))
            places = apart([dice for _, (_, dice) in ends], 0.11)
            for (letter, (at, _)), place in zip(ends, places, strict=True):
                axes.annotate(
                    letter,
                    (at, place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    color=mode_colour(mode),
                    weight="bold",
                )
            axes.set_ylim(0, 1)
            span = max(math.log(numbers[-1] / numbers[0]), 0.7)
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
