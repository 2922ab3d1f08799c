"""Differing settings of several runs, as a table and as sentences printed above the results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from p2r.evaluate.rows import JsonModel
from p2r.report.runs import Run
from p2r.report.tables import series_name
from p2r.report.text import shortened

_MOST_SETTINGS = 3  # in one sentence; the table has all
_NO_FIGURE = (
    "publish_model",
    "backbone_signed_by",
    "allow_transductive",
    "modes",
    "num_labelled",
    "num_labelled_by_mode",
)
"""Settings that cannot change results shared by two runs. Results that only one run has are listed anyway."""
_TOLERANCE = "finetune.nsd_tolerance_mm"  # changes only NSD
_CHOSEN = "chosen for "


class DifferingSetting(JsonModel):
    """A setting of the section finetune, by letter of the run; runs without it are left out."""

    name: str
    values: dict[str, object]


class DifferingChoice(JsonModel):
    """Settings that were chosen differently for one task and mode, by letter of the run."""

    task: str
    mode: str
    values: dict[str, dict[str, object]]


class ComparedSettings(JsonModel):
    """Settings in which runs differ."""

    differ: list[DifferingSetting]
    chosen: list[DifferingChoice]
    unknown: list[str]
    """Letters of the runs whose report does not hold their settings."""

    def relevant_names(self) -> list[str]:
        """Return the names of differing settings that can change a Dice."""
        return [one.name for one in self.differ if one.name != _TOLERANCE]


def compare_settings(runs: Sequence[Run], compared: Sequence[tuple[str, str]]) -> ComparedSettings:
    """Return the settings in which runs differ, for the tasks and modes that are compared."""
    asked = {run.letter: dict(_leaves(run.finetune, "finetune")) for run in runs if run.finetune}
    return ComparedSettings(
        differ=[
            DifferingSetting(
                name=name, values={letter: values[name] for letter, values in asked.items() if name in values}
            )
            for name in _names_that_differ(asked)
            if name.split(".")[1] not in _NO_FIGURE
        ],
        chosen=[one for task, mode in dict.fromkeys(compared) for one in _chosen_differently(runs, task, mode)],
        unknown=[run.letter for run in runs if not run.finetune],
    )


def _chosen_differently(runs: Sequence[Run], task: str, mode: str) -> Iterator[DifferingChoice]:
    found = {run.letter: one.settings for run in runs for one in run.chosen if (one.task, one.mode) == (task, mode)}
    names = [
        name
        for name in _names_that_differ(found)
        # A setting that was not searched has the section's value, which is listed already.
        if any(found[run.letter].get(name) != run.finetune.get(name) for run in runs if run.letter in found)
    ]
    if names:
        values = {letter: {name: of[name] for name in names if name in of} for letter, of in found.items()}
        yield DifferingChoice(task=task, mode=mode, values=values)


def _names_that_differ(values: Mapping[str, Mapping[str, object]]) -> list[str]:
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


def settings_grid(settings: ComparedSettings, letters: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a table of differing settings: configured ones, then those chosen by the search."""
    lines = [[one.name, *(_json_text(one.values.get(letter)) for letter in letters)] for one in settings.differ]
    for choice in settings.chosen:
        texts = (
            ", ".join(f"{name} {_json_text(value)}" for name, value in choice.values.get(letter, {}).items())
            for letter in letters
        )
        name = f"{_CHOSEN}{choice.task}, {series_name((choice.mode, ''))}"
        lines.append([name, *(text or "–" for text in texts)])
    return ["setting", *letters], lines


def notes_of_settings(settings: ComparedSettings, letters: Sequence[str]) -> list[str]:
    """Return the sentences that are printed above all results."""
    everyone = " and ".join(letters)
    _, lines = settings_grid(settings, letters)
    num_asked = len(settings.differ)
    asked = [_format_setting(name, letters, texts) for name, *texts in lines[:num_asked] if name != _TOLERANCE]
    chosen = [_format_setting(name.removeprefix(_CHOSEN), letters, texts) for name, *texts in lines[num_asked:]]
    tolerance = next((texts for name, *texts in lines if name == _TOLERANCE), None)
    notes = []
    if asked:
        notes.append(
            f"{everyone} were run with different settings, which may explain a difference in Dice: {_join_first(asked)}"
        )
    if chosen:
        notes.append(f"different settings were chosen on validation patients of {everyone}: {_join_first(chosen)}")
    if tolerance:
        of_each = ", ".join(f"{letter} {text} mm" for letter, text in zip(letters, tolerance, strict=True))
        notes.append(
            f"NSD is left out, because it was measured with different tolerances ({_TOLERANCE}: {of_each}); Dice does not depend on them"
        )
    if unknown := settings.unknown:
        notes.append(
            f"the settings of {' and '.join(unknown)} are unknown: reports of earlier versions do not hold them"
        )
    return notes


def _format_setting(name: str, letters: Sequence[str], texts: Sequence[str]) -> str:
    values = ", ".join(f"{letter} {shortened(text, 60)}" for letter, text in zip(letters, texts, strict=True))
    return f"{name} ({values})"


def _join_first(settings: Sequence[str]) -> str:
    more = len(settings) - _MOST_SETTINGS
    return "; ".join(settings[:_MOST_SETTINGS]) + (f"; and {more} more, in the list of settings" if more > 0 else "")


def _json_text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
