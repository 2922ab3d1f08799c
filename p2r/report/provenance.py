"""Bottom of the page: search, cost and provenance."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from p2r.evaluate.rows import TrialRow, digests_of
from p2r.report.context import ForeignWeights, ReportContext
from p2r.report.page import Block, Folded, Grid, Heading, Paragraph
from p2r.report.tables import series_name, series_of, series_order

_FIRST = ("time", "task", "trial", "mode")
_WORDS = {
    "num_labelled": "labelled patients",
    "pretraining_s": "pretraining of the backbone, each worker",
    "num_pretraining_workers": "pretraining workers",
    "search_s": "trials of the search",
    "num_trials": "trials run",
    "num_concurrent": "at a time",
    "trials_s": "sum of trial times",
    "sweep_s": "sweep, wall-clock time",
    "overhead_fraction": "overhead",
    "validation_dice_mean": "validation Dice",
}
"""Labels of fields whose names are not self-explanatory."""
_MAX_ENTRIES, _MAX_LINES = 30, 12


def run_blocks(rows: Sequence[TrialRow], context: ReportContext) -> Iterator[Block]:
    """Yield search, winners, failed trials, test-set evaluations and cost."""
    blocks: list[Block] = []
    for found, title in ((context.chosen, "Search winners"), (context.searched, "Search")):
        blocks += _value_blocks(found, title)
    failed = context.failed
    if failed:
        blocks += [
            Paragraph(
                f"{len(failed)} trial{'s' * (len(failed) > 1)} failed, and the results above are without.", note=True
            )
        ]
        blocks += _value_blocks(failed, "Trials that failed")
    elif failed is not None:
        blocks.append(Paragraph("No trial failed."))
    reads = context.test_reads
    if reads:
        blocks.append(
            Paragraph(
                f"The test split was evaluated {'once' if len(reads) == 1 else f'{len(reads)} times'}, with frozen recipes only."
            )
        )
        blocks += _value_blocks(reads, "Test-set evaluations")
    blocks += _compute(rows, context.overhead, context.spent)
    blocks += [Paragraph(f"Left out: {sentence}") for sentence in context.left_out]
    if blocks:
        yield Heading(2, "Run")
        yield from blocks


def _value_blocks(value: Any, title: str) -> list[Block]:
    """Return a list of mappings as a table, folded if it is long; anything else as lines of key and value."""
    if not value:
        return []
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, Mapping) for one in value):
        flat = [
            dict(
                _label_field(key.removeprefix("settings."), child) for key, child in _flatten(one) if child is not None
            )
            for one in value
        ]
        there = dict.fromkeys(name for one in flat for name in one)
        header = [*(name for name in _FIRST if name in there), *(name for name in there if name not in _FIRST)]
        grid = Grid(header, [[_abbreviated(one.get(name, "")) for name in header] for one in flat])
    else:
        grid = Grid(("fact", "value"), [_label_field(*line) for line in _flatten(value) if line[1] is not None])
    if len(grid.rows) > _MAX_LINES:
        return [Folded(f"{title} ({len(grid.rows)})", [grid])]
    return [Heading(3, title), grid]


def _abbreviated(text: str) -> str:
    """Shorten a digest, and a time to its minute; report.json has all of both."""
    if time := re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):[\d.]+(Z|\+00:00)", text):
        return f"{time[1]} {time[2]} UTC"
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _compute(rows: Sequence[TrialRow], overhead: Any, before: Mapping[str, object]) -> list[Block]:
    """Return the time of final trials by mode, of the steps before them, and of the sweep outside its trials."""
    spent: dict[tuple[tuple[str, str], str], list[float]] = {}
    for row in rows:
        if row.seconds is not None:
            spent.setdefault((series_of(row), row.device or ""), []).append(row.seconds)
    overhead = overhead if isinstance(overhead, Mapping) else {"overhead": overhead} if overhead else {}
    if not spent:
        return _value_blocks({**before, **overhead}, "Cost")
    lines = [
        (series_name(series), device, str(len(seconds)), f"{sum(seconds) / len(seconds):.0f}", hours_text(sum(seconds)))
        for (series, device), seconds in sorted(spent.items(), key=lambda item: (series_order(item[0][0]), item[0][1]))
    ]
    lines.append(("all", "", str(sum(map(len, spent.values()))), "", hours_text(sum(map(sum, spent.values())))))
    table = Grid(("mode", "device", "final trials", "seconds each", "total"), lines)
    facts = [_label_field(*line) for line in _flatten({**before, **overhead}) if line[1] is not None]
    about = [Grid(("before the final trials, and in total", "value"), facts)] if facts else []
    return [Heading(3, "Cost"), table, *about]


def provenance(rows: Sequence[TrialRow], context: ReportContext, names: Sequence[str]) -> Iterator[Block]:
    """Yield the facts of the context, and the patients of every split and draw."""
    rest = context.provenance()
    # Settings keep the names that they have in a job file.
    lines = [
        (key, _text(value)) if key.startswith("finetune.") else _label_field(key, value)
        for key, value in _flatten(rest)
    ]
    facts = [line for line in lines if line[1] not in ("", "None")]
    backbones = digests_of(rows)
    facts += [(key, value) for key, value in (("backbone in rows, sha256", ", ".join(backbones)),) if value]
    of_trials = [line for line in facts if line[0].startswith("finetune.")]
    facts = [line for line in facts if line not in of_trials]
    if facts:
        yield Grid(("fact", "value"), facts)
    yield from _initial_weights(context.initial_weights)
    if of_trials:
        yield Folded(f"All settings of the trials ({len(of_trials)})", [Grid(("setting", "value"), of_trials)])
    for name in names:
        splits = context.tasks[name].splits if name in context.tasks else {}
        if splits:
            yield Heading(3, f"Splits of {name}")
            yield Grid(
                ("split", "number", "subjects"),
                [(str(split), str(len(who)), ", ".join(map(str, who))) for split, who in splits.items()],
            )
        draws = _draws([row for row in rows if row.task == name])
        if len(draws.rows) > _MAX_LINES:
            yield Folded(f"Labelled patients of {name} ({len(draws.rows)} draws)", [draws])
        else:
            yield Heading(3, f"Labelled patients of {name}")
            yield draws


def _initial_weights(record: ForeignWeights | None) -> Iterator[Block]:
    """Yield the origin of weights from another tool, and the table of what was matched, left out, and why."""
    if not record:
        return
    yield Heading(3, "Weights of another tool")
    yield Paragraph(f"The backbone began with {record.source}, file {record.file}, sha256 {record.weights_sha256}.")
    if record.citations:
        yield Paragraph(f"Citations in the file: {record.citations}")
    names = ("outcome", "part", "num_tensors", "num_values", "reason")
    lines = [tuple(str(row.get(name, "")) for name in names) for row in record.table]
    yield Grid(("outcome", "part", "tensors", "values", "reason"), lines)


def _draws(rows: Sequence[TrialRow]) -> Grid:
    found = {(row.num_labelled, row.draw, row.seed, ", ".join(row.subjects)) for row in rows}
    lines = [tuple("" if value is None else str(value) for value in line) for line in sorted(found, key=_sortable)]
    return Grid(("labelled patients", "draw", "seed", "subjects"), lines)


def _sortable(line: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((value is not None, value) for value in line)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flatten(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        long = len(value) > _MAX_ENTRIES
        return f"{len(value)} entries, in report.json" if long else ", ".join(str(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _label_field(key: str, value: Any) -> tuple[str, str]:
    """Return the label of a field, and its value with the unit that ends the field's name."""
    where, dot, name = key.rpartition(".")
    text = _text(value)
    words = name.removeprefix("num_")
    if isinstance(value, int | float):
        for unit, in_unit in (("_s", hours_text), ("_fraction", lambda share: f"{100 * share:.2g} %")):
            if name.endswith(unit):
                words, text = name.removesuffix(unit), in_unit(value)
    if name == "mode":
        text = series_name((text, ""))
    return f"{where}{dot}{_WORDS.get(name) or words.replace('_', ' ')}", text


def hours_text(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
