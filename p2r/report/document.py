"""Rows of final trials, statistics and provenance -> `report.html`, `report.md`, `report.json` and pictures on a job's storage.

    pictures/NAME.png, NAME.svg · report.md · report.html (one file, pictures inside) · report.json, written last

The page is put together once, as a list of blocks, and written twice. What a reader must know before believing a figure
(caveats, other protocols than leak-free) stands above the figures; what is needed to check it (digests, seeds, patients,
readings of the test split) stands below them. What rows of an earlier report do not hold is left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from p2r.modes import SCRATCH
from p2r.report.canvas import Drawing
from p2r.report.curve import few_shot_curve
from p2r.report.distributions import by_stratum, class_boxes, where_in_the_organ
from p2r.report.forest import Difference, figures_text, forest, p_text
from p2r.report.page import Block, Cards, Folded, Grid, Heading, Paragraph, Picture, html, markdown
from p2r.report.patients import MEAN, THIRDS, Patient, mean_of, patients_of
from p2r.report.reliability import calibration_blocks
from p2r.report.tables import (
    LEAK_FREE,
    Cell,
    Row,
    aggregate,
    best_cells,
    code_of,
    gain_text,
    is_paper_compatible,
    is_transductive,
    is_unknown,
    label_of,
    protocol_of,
    series_name,
    series_of,
    series_order,
    split_of,
)
from p2r.report.text import for_file_name, signed
from p2r.report.training_curves import pseudo_label_blocks
from p2r.storage import Storage

FORMAT = "p2r-report/1"

_OWN_PLACE = (
    "title",
    "caveats",
    "captions",
    "places",
    "tasks",
    "searched",
    "chosen",
    "failed",
    "overhead",
    "spent",
    "test_reads",
    "left_out",
)
_SOFT = "soft_dice_with_background"
_FIRST = ("time", "task", "trial", "mode")
_WORDS = {
    "num_labelled": "labelled patients",
    "pretraining_s": "pretraining of the backbone, each worker",
    "num_pretraining_workers": "workers that pretrained",
    "search_s": "trials of the search",
    "num_trials": "trials that were run",
    "num_concurrent": "at a time",
    "trials_s": "the trials' own time, added up",
    "sweep_s": "the sweep from start to end",
    "overhead_fraction": "overhead",
    "validation_dice_mean": "validation Dice",
}
"""Names of fields that say little to who did not write them."""
_MAX_ENTRIES, _MAX_LINES = 30, 12
_HOW_TO_READ = (
    "Dice is hard, in 3D, on the scan's own grid, per patient (frames averaged first), then over patients. "
    "± is the standard deviation over draws of the labelled patients; every mode is given the same draws, and “over "
    "scratch” is the difference on them. HD95 and NSD are means over classes. A class that only the prediction or only "
    "the reference lacks counts as Dice 0, NSD 0, HD95 the grid's diagonal; one that both lack is left out. "
    "Bold: the best mode for that number of patients. Intervals are of a bootstrap over draws and patients: with one draw they are "
    "of the patients alone, and with three to five draws of one patient rather too narrow (p2r/evaluate/statistics.py)."
)
_TRANSDUCTIVE = (
    "Transductive: validation or test patients are in the corpus that the backbone was pretrained on. These figures say nothing "
    "about patients whom it has not seen, and must not be compared with leak-free ones. Rows are labelled in report.json."
)
_UNKNOWN = (
    "Corpora unknown: the backbone's manifest does not say what it was pretrained on. It may have seen validation or test patients: "
    "these figures must not be compared with leak-free ones. Rows are labelled in report.json."
)
_PAPER_COMPATIBLE = (
    "paper_compat: made by the choices of the paper's released code, in which the reference decides what the network is shown, "
    "at test too. These figures stand beside the paper's only, and must not be compared with leak-free ones."
)


def write_report(
    storage: Storage,
    *,
    rows: Sequence[Row],
    context: Mapping[str, Any],
    pictures: Mapping[str, Drawing | bytes],
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the report and return what `report.json` holds.

    Args:
        storage: The report's own folder.
        rows: One for each final trial.
        context: JSON values that say where the rows come from. These have places of their own, the rest becomes lines of
            the provenance, nested keys joined by dots:
            `title`; `caveats` (sentences, shown first); `tasks` (by name: title, licence, citation, splits);
            `captions` and `places` (by picture: its caption; the task that it belongs to, if any);
            `searched`, `chosen` and `failed` (mappings, or lists of mappings: trials of the search, what won, what failed);
            `overhead` and `spent` (mappings: what the sweep took beside its trials; what pretraining and search took);
            `test_reads` (a list of mappings); `left_out` (sentences: what could not be shown).
        pictures: Pictures that are not made of the rows, by name: drawings, or PNG files.
        statistics: What `p2r.evaluate.statistics.few_shot_statistics` says of the rows; None: no interval is shown.
    """
    drawn: dict[str, Drawing | bytes] = {}
    blocks = list(_blocks(rows, context, pictures, statistics or {}, drawn))
    for name, picture in drawn.items():
        if isinstance(picture, bytes):
            storage.write_bytes(f"pictures/{name}.png", picture)
        else:
            storage.write_bytes(f"pictures/{name}.png", picture.png)
            storage.write_bytes(f"pictures/{name}.svg", picture.svg)
    storage.write_bytes("report.md", markdown(blocks).encode())
    storage.write_bytes("report.html", html(blocks, drawn).encode())
    report = {
        "format": FORMAT,
        "rows": [dict(row) for row in rows],
        "context": dict(context),
        "pictures": [f"pictures/{name}.png" for name in drawn],
        **({"statistics": dict(statistics)} if statistics else {}),
    }
    storage.write_json("report.json", report)
    return report


def source_line(rows: Sequence[Row], context: Mapping[str, Any]) -> str:
    """Return what every picture says below itself: backbone, task, protocol, patients, draws, seed and code."""
    backbones = sorted({str(row["backbone_sha256"])[:12] for row in rows if row.get("backbone_sha256")})
    numbers = sorted({row["num_labelled"] for row in rows})
    draws = sorted({cell.num_draws for cell in aggregate(rows)})
    parts = [
        f"backbone {', '.join(backbones)}" if backbones else "",
        series_name((SCRATCH, "")) if all(row["mode"] == SCRATCH for row in rows) else "",
        f"task {', '.join(sorted({str(row['task']) for row in rows}))}",
        f"{', '.join(sorted({protocol_of(row) for row in rows}))}, {split_of(rows)} patients",
        f"n = {', '.join(map(str, numbers))}",
        f"{draws[0]} draw{'s' * (draws[0] > 1)}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]} draws",
        *_seed_and_code(rows, context),
    ]
    return " · ".join(filter(None, parts))


def trials_line(rows: Sequence[Row], context: Mapping[str, Any], *, patient: str) -> str:
    """Return what a picture of single trials says below itself: which they are, of which backbone, if of any, and by which code.

    Args:
        rows: Of the trials, all from the same labelled patients.
        context: As `write_report` takes it.
        patient: Who is shown, of which split.
    """
    backbones = [str(row.get("backbone_sha256") or "")[:12] for row in rows]
    trials = [
        series_name(series_of(row)) + (f" of backbone {backbone}" if backbone else "")
        for row, backbone in zip(rows, backbones, strict=True)
    ]
    parts = [
        "; ".join(trials),
        f"task {rows[0]['task']}",
        f"{', '.join(sorted({protocol_of(row) for row in rows}))}, {patient}",
        f"n = {rows[0]['num_labelled']}, draw {rows[0]['draw']}",
        *_seed_and_code(rows, context),
    ]
    return " · ".join(parts)


def _seed_and_code(rows: Sequence[Row], context: Mapping[str, Any]) -> Iterator[str]:
    if seeds := sorted({str(row["seed"]) for row in rows if row.get("seed") is not None}):
        yield f"seed {', '.join(seeds)}"
    if code := code_of(rows, context):
        yield f"code {code}"


def _blocks(
    rows: Sequence[Row],
    context: Mapping[str, Any],
    pictures: Mapping[str, Drawing | bytes],
    statistics: Mapping[str, Any],
    drawn: dict[str, Drawing | bytes],
) -> Iterator[Block]:
    """Yield the page; what is drawn for it is added to `drawn`, in the order of the page."""
    page = _Page(context, pictures, statistics, drawn)
    yield Heading(1, str(context.get("title", "Few-shot segmentation")) + label_of(rows))
    if is_unknown(rows):
        yield Paragraph(_UNKNOWN, note=True)
    if is_transductive(rows):
        yield Paragraph(_TRANSDUCTIVE, note=True)
    if is_paper_compatible(rows):
        yield Paragraph(_PAPER_COMPATIBLE, note=True)
    for caveat in context.get("caveats", ()):
        yield Paragraph(str(caveat), note=True)
    if rows:
        yield Heading(2, "At a glance")
        yield from page.glance(rows)
        yield Heading(2, "What was asked")
        yield page.asked(rows)
    else:
        yield Paragraph("There are no figures.")
    tasks = context.get("tasks", {})
    names = sorted({row["task"] for row in rows})
    for name in names:
        about = tasks.get(name, {})
        yield Heading(2, str(about.get("title", name)))
        of_task = [row for row in rows if row["task"] == name]
        for protocol in sorted({protocol_of(row) for row in of_task}, key=lambda one: (one != LEAK_FREE, one)):
            yield from page.figures([row for row in of_task if protocol_of(row) == protocol], protocol)
        shown = list(page.given(name))
        if shown:
            yield Heading(3, "Single patients")
            yield from shown
        for key in ("licence", "citation"):
            if about.get(key):
                yield Paragraph(f"{key.capitalize()} of the data: {about[key]}")
    if rows:
        yield Paragraph(_HOW_TO_READ)
    others = list(page.given(None))
    if others:
        yield Heading(2, "The backbone")
        yield from others
    yield from _how_it_ran(rows, context)
    yield Heading(2, "Provenance")
    yield from _provenance(rows, context, names)


class _Page:
    """What all parts of the page share: where rows come from, what is said of them, and the pictures drawn so far."""

    def __init__(
        self,
        context: Mapping[str, Any],
        pictures: Mapping[str, Drawing | bytes],
        statistics: Mapping[str, Any],
        drawn: dict[str, Drawing | bytes],
    ) -> None:
        self.context, self.pictures, self.drawn = context, pictures, drawn
        self.statistics = statistics
        self.level = f"{100 * statistics.get('confidence', 0.95):g} %"

    def of(self, part: str, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
        """Return the entries of the statistics that are about these rows."""
        settings = {(row["task"], protocol_of(row)) for row in rows}
        return [one for one in self.statistics.get(part, ()) if (one["task"], protocol_of(one)) in settings]

    def put(self, name: str, picture: Drawing | bytes, caption: str) -> Picture:
        """Add a picture to the page under a name that can be a file's, and that no other has."""
        name = unique = for_file_name(name)
        number = 1
        while unique in self.drawn:
            number += 1
            unique = f"{name}-{number}"
        self.drawn[unique] = picture
        return Picture(unique, caption)

    def given(self, task: str | None) -> Iterator[Block]:
        """Yield the pictures that are not made of rows and belong to a task, or to none."""
        for name, picture in self.pictures.items():
            if self.context.get("places", {}).get(name) == task:
                caption = str(self.context.get("captions", {}).get(name, name.replace("-", " ")))
                yield self.put(name, picture, caption)

    def glance(self, rows: Sequence[Row]) -> Iterator[Block]:
        """Yield, for every task, the figures that a reader looks for first."""
        for task in sorted({row["task"] for row in rows}):
            for protocol in sorted({protocol_of(row) for row in rows if row["task"] == task}):
                chosen = [row for row in rows if row["task"] == task and protocol_of(row) == protocol]
                cards = list(self.cards(chosen))
                if cards:
                    title = str(self.context.get("tasks", {}).get(task, {}).get("title", task))
                    yield Heading(3, title if protocol == LEAK_FREE else f"{title} ({protocol})")
                    yield Cards(cards)
        facts = []
        for name, key in (("trials failed", "failed"), ("readings of the test split", "test_reads")):
            if isinstance(self.context.get(key), Sequence):
                facts.append(f"{name}: {len(self.context[key])}")
        seconds = sum(row.get("seconds") or 0.0 for row in rows)
        if seconds:
            facts.append(f"final trials took {_hours(seconds)}")
        if facts:
            yield Paragraph(f"{'; '.join(facts)}.".capitalize())

    def cards(self, rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
        """Yield the figures of one task for the fewest and the most labelled patients, by the mode that validation prefers."""
        cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
        numbers = sorted({cell.num_labelled for cell in cells})
        for number in dict.fromkeys((*numbers[:1], *numbers[-1:])):
            here = [cell for cell in cells if cell.num_labelled == number]
            cell = max(here, key=lambda cell: (_validation(rows, cell), cell.mode != SCRATCH))
            interval = self.entry("intervals", rows, cell)
            spread = f"{self.level} {interval['lower']:.2f} to {interval['upper']:.2f}" if interval else ""
            who = (
                f"{series_name(cell.series)}, best on validation patients"
                if len(here) > 1
                else series_name(cell.series)
            )
            labelled = f"{number} labelled patient{'s' * (number > 1)}"
            yield (
                f"Dice from {labelled}",
                f"{cell.dice_mean.mean:.2f}",
                _sentence("; ".join(filter(None, (who, spread)))),
            )
            differences = [one for one in self.of("differences", rows) if one["num_labelled"] == number]
            leader = max(
                (one for one in here if one.mode != SCRATCH), key=lambda cell: _validation(rows, cell), default=None
            )
            of_leader = [
                one
                for one in differences
                if leader and series_of(one) == leader.series and one["difference"] is not None
            ]
            for difference in of_leader:
                yield (
                    _sentence(
                        f"{series_name(series_of(difference))} over {_against(difference['against'])}, {labelled}"
                    ),
                    signed(difference["difference"], 3),
                    f"{self.level} {_interval(difference, 3)}; p (Holm) {p_text(difference['p_holm'])}, {difference['patients']} patients",
                )
            if leader and not of_leader and leader.gain is not None:
                yield (
                    _sentence(f"{series_name(leader.series)} over scratch, {labelled}"),
                    signed(leader.gain, 3),
                    f"mean of {leader.num_draws} draw{'s' * (leader.num_draws > 1)}",
                )
            if leader and number == numbers[0] and (efficiency := self.entry("label_efficiency", rows, leader)):
                yield (
                    f"{labelled.capitalize()}, {series_name(leader.series)}, is worth",
                    _worth(efficiency, rows),
                    "labelled patients from scratch, for the same Dice" + self.worth_interval(efficiency, rows),
                )

    def worth_interval(self, efficiency: Mapping[str, Any], rows: Sequence[Row]) -> str:
        """Return the interval of a number of labelled patients from scratch, for a card; empty if there is none."""
        tried = [row["num_labelled"] for row in rows if row["mode"] == SCRATCH]
        if not tried or "scratch_interval" not in efficiency:
            return ""
        ends = {"below": f"below {min(tried)}", "above": f"above {max(tried)}"}
        low, high = (ends.get(end) or f"{end:.1f}" for end in efficiency["scratch_interval"])
        return f"; {self.level} {low} to {high}" if low != high else f"; {self.level} {low}"

    def entry(self, part: str, rows: Sequence[Row], cell: Cell) -> Mapping[str, Any] | None:
        """Return what a part of the statistics says of a cell."""
        for one in self.of(part, rows):
            if (
                series_of(one) == cell.series
                and one["num_labelled"] == cell.num_labelled
                and one.get("lower", 0) is not None
            ):
                return one
        return None

    def asked(self, rows: Sequence[Row]) -> Grid:
        """Return what the job asked for."""
        draws = sorted({(cell.num_labelled, cell.num_draws) for cell in aggregate(rows)})
        series = sorted({series_of(row) for row in rows}, key=series_order)
        backbone = self.context.get("backbone") or {}
        digests = sorted({str(row["backbone_sha256"]) for row in rows if row.get("backbone_sha256")})
        lines = [
            ("task", ", ".join(sorted({str(row["task"]) for row in rows}))),
            ("protocol", ", ".join(sorted({protocol_of(row) for row in rows}))),
            ("read on", f"{split_of(rows)} patients"),
            ("modes", ", ".join(map(series_name, series))),
            ("labelled patients", "; ".join(f"{number} ({count} draw{'s' * (count > 1)})" for number, count in draws)),
            ("backbone", str(backbone.get("url") or "") if isinstance(backbone, Mapping) else str(backbone)),
            ("backbone, sha256", ", ".join(digests)),
            ("seed", ", ".join(sorted({str(row["seed"]) for row in rows if row.get("seed") is not None}))),
            ("code of the trials", code_of(rows, self.context)),
        ]
        return Grid(("what", "value"), [line for line in lines if line[1]])

    def figures(self, rows: Sequence[Row], protocol: str) -> Iterator[Block]:
        """Yield tables and pictures of one task by one protocol: figures of different ones must not be compared by accident."""
        task = rows[0]["task"]
        tag = task if protocol == LEAK_FREE else f"{task}-{protocol}"
        source = source_line(rows, self.context)
        num_patients = sorted({row["num_test_subjects"] for row in rows if row.get("num_test_subjects")})
        where = (
            f" Read on {', '.join(map(str, num_patients))} patients of the {split_of(rows)} split."
            if num_patients
            else ""
        )
        yield Paragraph(f"Protocol: {protocol}.{where}")
        if any(row["dice_mean"] is not None for row in rows):
            curve = few_shot_curve(rows, task, intervals=self.of("intervals", rows), level=self.level, source=source)
            yield self.put(
                f"few-shot-{tag}",
                curve,
                f"Dice on {split_of(rows)} patients against the number of labelled patients; a dot is one draw."
                + (
                    f" Bands: {self.level} intervals of a bootstrap over draws, then patients."
                    if self.of("intervals", rows)
                    else ""
                ),
            )
        yield _table(rows)
        counted = _absences(rows)
        if counted:
            yield Paragraph(counted)
        yield from self.differences(rows, task, tag, source)
        yield from self.efficiency(rows)
        patients = patients_of(rows)
        if any(patient.dice[MEAN] is not None for patient in patients):
            yield Heading(3, "Patient by patient")
            boxes = class_boxes(patients, title=f"{task}: every patient, class by class{label_of(rows)}", source=source)
            yield self.put(
                f"classes-{tag}",
                boxes,
                f"Dice of every one of the {split_of(rows)} patients, by class, mode and number of labelled patients.",
            )
        yield from self.failures(patients, rows, task, tag, source)
        yield from calibration_blocks(rows, task=task, tag=tag, source=source, put=self.put)
        yield from pseudo_label_blocks(rows, task=task, tag=tag, source=source, put=self.put)

    def differences(self, rows: Sequence[Row], task: str, tag: str, source: str) -> Iterator[Block]:
        """Yield the forest of paired differences and its table."""
        found = [
            one for one in self.of("differences", rows) if one["difference"] is not None and one["lower"] is not None
        ]
        if not found:
            return
        found.sort(key=lambda one: (one["num_labelled"], series_order(series_of(one))))
        # A mode's own control stands in the table; the picture has one zero.
        shown = [one for one in found if one["against"] == SCRATCH] or found
        against = " and ".join(dict.fromkeys(_against(one["against"]) for one in shown))
        yield Heading(3, f"Against {against}")
        lines = [
            Difference(
                f"{one['num_labelled']} labelled patient{'s' * (one['num_labelled'] > 1)}",
                series_name(series_of(one)),
                str(one["mode"]),
                one["difference"],
                one["lower"],
                one["upper"],
                one["p_holm"],
            )
            for one in shown
        ]
        picture = forest(
            lines,
            title=f"{task}: difference to {against}{label_of(rows)}",
            subtitle=f"paired by patient; line: {self.level} interval of a bootstrap over draws and patients; p: Wilcoxon, Holm over n",
            axis=f"Dice above that of {against}",
            source=source,
        )
        yield self.put(
            f"differences-{tag}",
            picture,
            f"Difference of Dice to {against}, paired by patient, with its {self.level} interval: to the right of zero is better.",
        )
        yield Grid(
            (
                "labelled patients",
                "mode",
                "against",
                f"difference, {self.level} interval",
                "draws of its sign",
                "p",
                "p (Holm)",
                "patients",
            ),
            [
                (
                    str(one["num_labelled"]),
                    series_name(series_of(one)),
                    series_name((one["against"], "")),
                    figures_text(one["difference"], one["lower"], one["upper"]),
                    f"{one['draws_agree']} of {one['draws']}" if "draws_agree" in one else "–",
                    p_text(one["p"]),
                    p_text(one["p_holm"]),
                    str(one["patients"]),
                )
                for one in found
            ],
        )

    def efficiency(self, rows: Sequence[Row]) -> Iterator[Block]:
        """Yield how many labelled patients training from scratch needs for the same Dice."""
        found = [one for one in self.of("label_efficiency", rows) if one["mode"] != SCRATCH]
        if not found:
            return
        numbers = sorted({one["num_labelled"] for one in found})
        series = sorted({series_of(one) for one in found}, key=series_order)
        worth = {(series_of(one), one["num_labelled"]): _worth(one, rows) for one in found}
        yield Heading(3, "How many labels it saves")
        yield Grid(
            ("mode", *(f"n = {number}" for number in numbers)),
            [(series_name(one), *(worth.get((one, number), "–") for number in numbers)) for one in series],
            caption="Labelled patients that training from scratch needs for the same Dice (interpolated in log n)",
        )

    def failures(
        self, patients: Sequence[Patient], rows: Sequence[Row], task: str, tag: str, source: str
    ) -> Iterator[Block]:
        """Yield where in the organ, and in which patients, it fails."""
        names = tuple(self.context.get("tasks", {}).get(task, {}).get("thirds") or THIRDS)
        thirds = where_in_the_organ(
            patients, title=f"{task}: where in the organ it fails{label_of(rows)}", names=names, source=source
        )
        strata = by_stratum(patients, title=f"{task}: which patients it fails{label_of(rows)}", source=source)
        if thirds is None and strata is None:
            return
        yield Heading(3, "Where it fails")
        few = min(patient.num_labelled for patient in patients)
        here = [patient for patient in patients if patient.num_labelled == few]
        series = sorted({patient.series for patient in here}, key=series_order)
        if thirds is not None:
            yield self.put(
                f"thirds-{tag}",
                thirds,
                (f"Dice in {names[0]}, {names[1]} and {names[2]}: " if names != THIRDS else "Dice in ")
                + "the lower, middle and upper third of the slices in which the reference holds any class.",
            )
            yield Grid(
                ("mode", *names),
                [
                    (
                        series_name(one),
                        *(_mean_text(p.thirds[number] for p in here if p.series == one) for number in range(3)),
                    )
                    for one in series
                ],
                caption=f"Mean Dice by third of the slices, n = {few}",
            )
        if strata is not None:
            yield self.put(f"strata-{tag}", strata, "Dice of patients by their stratum, such as pathology.")
            strata_names = sorted({patient.stratum for patient in here if patient.stratum})
            yield Grid(
                ("mode", *(f"{name} ({len({p.subject for p in here if p.stratum == name})})" for name in strata_names)),
                [
                    (
                        series_name(one),
                        *(
                            _mean_text(p.dice[MEAN] for p in here if p.series == one and p.stratum == name)
                            for name in strata_names
                        ),
                    )
                    for one in series
                ],
                caption=f"Mean Dice by stratum (number of patients), n = {few}",
            )


def _table(rows: Sequence[Row]) -> Grid:
    cells = aggregate(rows)
    best = best_cells(cells)
    is_soft = any(row.get(_SOFT) is not None for row in rows)
    classes = list(dict.fromkeys(name for cell in cells for name in cell.dice))
    lines = [
        (
            str(cell.num_labelled),
            series_name(cell.series),
            cell.dice_mean.text(3),
            gain_text(cell),
            *(cell.dice[name].text(3) if name in cell.dice else "–" for name in classes),
            cell.hd95_mm.text(1),
            cell.nsd.text(3),
            str(cell.num_draws),
            *((_mean_text(_of(rows, cell, _SOFT)),) if is_soft else ()),
        )
        for cell in cells
    ]
    header = ("labelled patients", "mode", "Dice", "over scratch", *classes, "HD95 (mm)", "NSD", "draws")
    if is_soft:
        header = (*header, "soft Dice with background (as published)")
    return Grid(header, lines, frozenset((index, 2) for index, cell in enumerate(cells) if cell in best))


def _absences(rows: Sequence[Row]) -> str:
    """Say how often a class was missing, summed over all trials: means alone hide it."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, of_class in (row.get("absent") or {}).items():
            for where, count in of_class.items():
                counts[name, where] = counts.get((name, where), 0) + count
    parts = [f"{name} in {where} {count} time{'s' * (count > 1)}" for (name, where), count in counts.items() if count]
    return f"Missing classes, over all trials and scans: {', '.join(parts)}." if parts else ""


def _how_it_ran(rows: Sequence[Row], context: Mapping[str, Any]) -> Iterator[Block]:
    """Yield what was searched and what won, what failed, how often test patients were read, and what it cost."""
    blocks: list[Block] = []
    for key, title in (("chosen", "What won the search"), ("searched", "What was searched")):
        blocks += _listed(context.get(key), title)
    failed = context.get("failed")
    if failed:
        blocks += [
            Paragraph(f"{len(failed)} trial{'s' * (len(failed) > 1)} failed; figures above are without.", note=True)
        ]
        blocks += _listed(failed, "Trials that failed")
    elif failed is not None:
        blocks.append(Paragraph("No trial failed."))
    reads = context.get("test_reads")
    if reads:
        blocks.append(
            Paragraph(
                f"The test split was read {'once' if len(reads) == 1 else f'{len(reads)} times'}, by frozen recipes only."
            )
        )
        blocks += _listed(reads, "Readings of the test split")
    blocks += _compute(rows, context.get("overhead"), context.get("spent") or {})
    blocks += [Paragraph(f"Left out: {sentence}") for sentence in context.get("left_out", ())]
    if blocks:
        yield Heading(2, "How it was run")
        yield from blocks


def _listed(value: Any, title: str) -> list[Block]:
    """Return a list of mappings as a table, folded if it is long; anything else as lines of key and value."""
    if not value:
        return []
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, Mapping) for one in value):
        flat = [
            dict(_in_words(key.removeprefix("settings."), child) for key, child in _flat(one) if child is not None)
            for one in value
        ]
        there = dict.fromkeys(name for one in flat for name in one)
        header = [*(name for name in _FIRST if name in there), *(name for name in there if name not in _FIRST)]
        grid = Grid(header, [[_abbreviated(one.get(name, "")) for name in header] for one in flat])
    else:
        grid = Grid(("what", "value"), [_in_words(*line) for line in _flat(value) if line[1] is not None])
    if len(grid.rows) > _MAX_LINES:
        return [Folded(f"{title} ({len(grid.rows)})", [grid])]
    return [Heading(3, title), grid]


def _abbreviated(text: str) -> str:
    """Return the beginning of a digest, and a time without its seconds; report.json has all of both."""
    if time := re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):[\d.]+(Z|\+00:00)", text):
        return f"{time[1]} {time[2]} UTC"
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _compute(rows: Sequence[Row], overhead: Any, before: Mapping[str, Any]) -> list[Block]:
    """Return what final trials took, by mode; what came before them; and what the sweep took beside all trials."""
    spent: dict[tuple[tuple[str, str], str], list[float]] = {}
    for row in rows:
        if row.get("seconds") is not None:
            spent.setdefault((series_of(row), str(row.get("device", ""))), []).append(float(row["seconds"]))
    overhead = overhead if isinstance(overhead, Mapping) else {"overhead": overhead} if overhead else {}
    if not spent:
        return _listed({**before, **overhead}, "What it cost")
    lines = [
        (series_name(series), device, str(len(seconds)), f"{sum(seconds) / len(seconds):.0f}", _hours(sum(seconds)))
        for (series, device), seconds in sorted(spent.items(), key=lambda item: (series_order(item[0][0]), item[0][1]))
    ]
    lines.append(("all", "", str(sum(map(len, spent.values()))), "", _hours(sum(map(sum, spent.values())))))
    table = Grid(("mode", "device", "final trials", "seconds each", "together"), lines)
    facts = [_in_words(*line) for line in _flat({**before, **overhead}) if line[1] is not None]
    about = [Grid(("before them, and all trials together", "value"), facts)] if facts else []
    return [Heading(3, "What it cost"), table, *about]


def _provenance(rows: Sequence[Row], context: Mapping[str, Any], names: Sequence[str]) -> Iterator[Block]:
    rest = {key: value for key, value in context.items() if key not in _OWN_PLACE}
    # Settings have the names that a job's file gives them.
    lines = [
        (key, _text(value)) if key.startswith("finetune.") else _in_words(key, value) for key, value in _flat(rest)
    ]
    facts = [line for line in lines if line[1] not in ("", "None")]
    backbones = sorted({str(row["backbone_sha256"]) for row in rows if row.get("backbone_sha256")})
    facts += [(key, value) for key, value in (("backbone in rows, sha256", ", ".join(backbones)),) if value]
    of_trials = [line for line in facts if line[0].startswith("finetune.")]
    facts = [line for line in facts if line not in of_trials]
    if facts:
        yield Grid(("what", "value"), facts)
    if of_trials:
        yield Folded(f"All settings of the trials ({len(of_trials)})", [Grid(("what", "value"), of_trials)])
    for name in names:
        splits = context.get("tasks", {}).get(name, {}).get("splits", {})
        if splits:
            yield Heading(3, f"Splits of {name}")
            yield Grid(
                ("split", "subjects", "who"),
                [(str(split), str(len(who)), ", ".join(map(str, who))) for split, who in splits.items()],
            )
        draws = _draws([row for row in rows if row["task"] == name])
        if len(draws.rows) > _MAX_LINES:
            yield Folded(f"Labelled patients of {name} ({len(draws.rows)} draws)", [draws])
        else:
            yield Heading(3, f"Labelled patients of {name}")
            yield draws


def _draws(rows: Sequence[Row]) -> Grid:
    keys = ("num_labelled", "draw", "seed")
    found = {(*(row.get(key) for key in keys), ", ".join(map(str, row["subjects"]))) for row in rows}
    lines = [tuple("" if value is None else str(value) for value in line) for line in sorted(found, key=_sortable)]
    return Grid(("labelled patients", "draw", "seed", "who"), lines)


def _sortable(line: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((value is not None, value) for value in line)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flat(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        long = len(value) > _MAX_ENTRIES
        return f"{len(value)} entries, in report.json" if long else ", ".join(str(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_words(key: str, value: Any) -> tuple[str, str]:
    """Return what a field is called for people, and its value with its unit, which stands at the end of a field's name."""
    where, dot, name = key.rpartition(".")
    text = _text(value)
    words = name.removeprefix("num_")
    if isinstance(value, int | float):
        for unit, in_unit in (("_s", _hours), ("_fraction", lambda share: f"{100 * share:.2g} %")):
            if name.endswith(unit):
                words, text = name.removesuffix(unit), in_unit(value)
    if name == "mode":
        text = series_name((text, ""))
    return f"{where}{dot}{_WORDS.get(name) or words.replace('_', ' ')}", text


def _validation(rows: Sequence[Row], cell: Cell) -> float:
    """Mean validation Dice of a cell: what is shown first is not chosen on test patients."""
    return mean_of(_of(rows, cell, "validation_dice_mean")) or 0.0


def _of(rows: Sequence[Row], cell: Cell, key: str) -> list[float | None]:
    return [row.get(key) for row in rows if series_of(row) == cell.series and row["num_labelled"] == cell.num_labelled]


def _worth(efficiency: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return how many labelled patients from scratch a mode is worth, or on which side of all that were tried that lies."""
    if efficiency.get("scratch_patients") is not None:
        return f"{efficiency['scratch_patients']:.1f}"
    tried = [row["num_labelled"] for row in rows if row["mode"] == SCRATCH]
    if not tried or efficiency.get("beyond") not in ("above", "below"):
        return "–"
    return f"> {max(tried)}" if efficiency["beyond"] == "above" else f"< {min(tried)}"


def _against(mode: str) -> str:
    return "scratch" if mode == SCRATCH else series_name((mode, ""))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _interval(one: Mapping[str, Any], digits: int) -> str:
    return f"{signed(one['lower'], digits)} to {signed(one['upper'], digits)}"


def _mean_text(figures: Iterable[float | None]) -> str:
    mean = mean_of(figures)
    return "–" if mean is None else f"{mean:.2f}"


def _hours(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
