"""Tables and pictures of one task by one protocol, each with the notes needed to read it."""

from collections.abc import Iterable, Iterator, Sequence

from p2r.evaluate.rows import TrialRow
from p2r.evaluate.statistics import LabelEfficiency
from p2r.modes import SCRATCH
from p2r.report.contrasts import contrast_blocks
from p2r.report.curve import few_shot_curve
from p2r.report.distributions import by_stratum, class_boxes, where_in_the_organ
from p2r.report.forest import Difference, figures_text, forest, p_text
from p2r.report.material import Material
from p2r.report.page import Block, Grid, Heading, Paragraph
from p2r.report.patients import MEAN, THIRDS, Patient, mean_of, patients_of
from p2r.report.reliability import calibration_blocks
from p2r.report.sources import source_line
from p2r.report.tables import (
    LEAK_FREE,
    Cell,
    aggregate,
    best_cells,
    gain_text,
    label_of,
    series_name,
    series_of,
    series_order,
    split_of,
)
from p2r.report.training_curves import pseudo_label_blocks


def figures(material: Material, rows: Sequence[TrialRow], protocol: str) -> Iterator[Block]:
    """Yield tables and pictures of one task by one protocol: results of different protocols are never shown together."""
    task = rows[0].task
    tag = task if protocol == LEAK_FREE else f"{task}-{protocol}"
    source = source_line(rows, material.context.code)
    num_patients = sorted({row.num_test_subjects for row in rows if row.num_test_subjects})
    where = (
        f" Evaluated on {', '.join(map(str, num_patients))} patients of the {split_of(rows)} split."
        if num_patients
        else ""
    )
    yield Paragraph(f"Protocol: {protocol}.{where}")
    if any(row.dice_mean is not None for row in rows):
        curve = few_shot_curve(rows, task, intervals=material.intervals(rows), level=material.level, source=source)
        yield material.put(
            f"few-shot-{tag}",
            curve,
            f"Dice on {split_of(rows)} patients against the number of labelled patients; a dot is one draw."
            + (
                f" Bands: {material.level} intervals of a bootstrap over draws, then patients."
                if material.intervals(rows)
                else ""
            ),
        )
    yield _table(rows)
    counted = _absences(rows)
    if counted:
        yield Paragraph(counted)
    yield from _differences(material, rows, task, tag, source)
    yield from _efficiency(material, rows)
    patients = patients_of(rows)
    if any(patient.dice[MEAN] is not None for patient in patients):
        yield Heading(3, "Patient by patient")
        boxes = class_boxes(patients, title=f"{task}: every patient, class by class{label_of(rows)}", source=source)
        yield material.put(
            f"classes-{tag}",
            boxes,
            f"Dice of every {split_of(rows)} patient, by class, mode and number of labelled patients.",
        )
    yield from _failures(material, patients, rows, task, tag, source)
    yield from calibration_blocks(rows, task=task, tag=tag, source=source, put=material.put)
    yield from contrast_blocks(rows)
    facts = material.context.tasks.get(task)
    classes = facts.classes if facts is not None and facts.classes else sorted(rows[0].dice)
    yield from pseudo_label_blocks(rows, task=task, classes=classes, tag=tag, source=source, put=material.put)


def _differences(material: Material, rows: Sequence[TrialRow], task: str, tag: str, source: str) -> Iterator[Block]:
    """Yield the forest of paired differences and its table."""
    found = material.differences(rows)
    if not found:
        return
    found.sort(key=lambda one: (one.num_labelled, series_order(series_of(one))))
    # A mode's own control is only in the table; the picture has one zero.
    shown = [one for one in found if one.against == SCRATCH] or found
    against = " and ".join(dict.fromkeys(against_text(one.against) for one in shown))
    yield Heading(3, f"Against {against}")
    lines = [
        Difference(
            f"{one.num_labelled} labelled patient{'s' * (one.num_labelled > 1)}",
            series_name(series_of(one)),
            str(one.mode),
            one.difference,
            one.lower,
            one.upper,
            one.p_holm,
        )
        for one in shown
    ]
    picture = forest(
        lines,
        title=f"{task}: difference to {against}{label_of(rows)}",
        subtitle=f"paired by patient; line: {material.level} interval of a bootstrap over draws and patients; p: Wilcoxon, Holm over n",
        axis=f"gain in Dice over {against}",
        source=source,
    )
    yield material.put(
        f"differences-{tag}",
        picture,
        f"Difference in Dice to {against}, paired by patient, with its {material.level} interval: right of zero is better.",
    )
    interval = f"difference, {material.level} interval"
    yield Grid(
        ("labelled patients", "mode", "against", interval, "draws of its sign", "p", "p (Holm)", "patients"),
        [
            (
                str(one.num_labelled),
                series_name(series_of(one)),
                series_name((one.against, "")),
                figures_text(one.difference, one.lower, one.upper),
                f"{one.draws_agree} of {one.draws}",
                p_text(one.p),
                p_text(one.p_holm),
                str(one.patients),
            )
            for one in found
        ],
    )


def _efficiency(material: Material, rows: Sequence[TrialRow]) -> Iterator[Block]:
    """Yield the number of labelled patients that training from scratch needs for the same Dice."""
    found = [one for one in material.efficiency(rows) if one.mode != SCRATCH]
    if not found:
        return
    numbers = sorted({one.num_labelled for one in found})
    series = sorted({series_of(one) for one in found}, key=series_order)
    worth = {(series_of(one), one.num_labelled): worth_text(one, rows) for one in found}
    yield Heading(3, "Label efficiency")
    yield Grid(
        ("mode", *(f"n = {number}" for number in numbers)),
        [(series_name(one), *(worth.get((one, number), "–") for number in numbers)) for one in series],
        caption="Labelled patients that training from scratch needs for the same Dice (interpolated in log n)",
    )


def _failures(
    material: Material, patients: Sequence[Patient], rows: Sequence[TrialRow], task: str, tag: str, source: str
) -> Iterator[Block]:
    """Yield Dice by third of the organ and by stratum of the patients."""
    names = _names_of_thirds(material, task)
    thirds = where_in_the_organ(
        patients, title=f"{task}: Dice by third of the organ{label_of(rows)}", names=names, source=source
    )
    strata = by_stratum(patients, title=f"{task}: Dice by stratum of the patients{label_of(rows)}", source=source)
    if thirds is None and strata is None:
        return
    yield Heading(3, "Failure analysis")
    few = min(patient.num_labelled for patient in patients)
    here = [patient for patient in patients if patient.num_labelled == few]
    series = sorted({patient.series for patient in here}, key=series_order)
    if thirds is not None:
        where = f"Dice in {names[0]}, {names[1]} and {names[2]}: " if names != THIRDS else "Dice in "
        yield material.put(
            f"thirds-{tag}",
            thirds,
            where + "the lower, middle and upper third of the slices in which the reference holds any class.",
        )
        yield _thirds_table(here, series, names, caption=f"Mean Dice by third of the slices, n = {few}")
    if strata is not None:
        yield material.put(f"strata-{tag}", strata, "Dice of patients by their stratum, such as pathology.")
        yield _strata_table(here, series, caption=f"Mean Dice by stratum (number of patients), n = {few}")


def _thirds_table(
    patients: Sequence[Patient], series: Sequence[tuple[str, str]], names: Sequence[str], *, caption: str
) -> Grid:
    lines = [
        (
            series_name(one),
            *(
                _mean_text(patient.thirds[number] for patient in patients if patient.series == one)
                for number in range(3)
            ),
        )
        for one in series
    ]
    return Grid(("mode", *names), lines, caption=caption)


def _strata_table(patients: Sequence[Patient], series: Sequence[tuple[str, str]], *, caption: str) -> Grid:
    names = sorted({patient.stratum for patient in patients if patient.stratum})
    counts = [len({patient.subject for patient in patients if patient.stratum == name}) for name in names]

    def mean(one: tuple[str, str], name: str) -> str:
        return _mean_text(
            patient.dice[MEAN] for patient in patients if (patient.series, patient.stratum) == (one, name)
        )

    header = ("mode", *(f"{name} ({count})" for name, count in zip(names, counts, strict=True)))
    return Grid(header, [(series_name(one), *(mean(one, name) for name in names)) for one in series], caption=caption)


def _table(rows: Sequence[TrialRow]) -> Grid:
    cells = aggregate(rows)
    best = best_cells(cells)
    is_soft = any(row.soft_dice_with_background is not None for row in rows)
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
            *((_mean_text(row.soft_dice_with_background for row in rows_of_cell(rows, cell)),) if is_soft else ()),
        )
        for cell in cells
    ]
    header = ("labelled patients", "mode", "Dice", "over scratch", *classes, "HD95 (mm)", "NSD", "draws")
    if is_soft:
        header = (*header, "soft Dice with background (as published)")
    return Grid(header, lines, frozenset((index, 2) for index, cell in enumerate(cells) if cell in best))


def _absences(rows: Sequence[TrialRow]) -> str:
    """Return a sentence that counts missing classes over all trials, because means hide them."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, of_class in (row.absent or {}).items():
            for where, count in of_class.items():
                counts[name, where] = counts.get((name, where), 0) + count
    parts = [f"{name} in {where} {count} time{'s' * (count > 1)}" for (name, where), count in counts.items() if count]
    return f"Missing classes, over all trials and scans: {', '.join(parts)}." if parts else ""


def rows_of_cell(rows: Sequence[TrialRow], cell: Cell) -> list[TrialRow]:
    """Return the draws of a cell."""
    return [row for row in rows if series_of(row) == cell.series and row.num_labelled == cell.num_labelled]


def worth_text(efficiency: LabelEfficiency, rows: Sequence[TrialRow]) -> str:
    """Return the number of patients that training from scratch needs for the same Dice, or a bound beyond the tried numbers."""
    if efficiency.scratch_patients is not None:
        return f"{efficiency.scratch_patients:.1f}"
    tried = [row.num_labelled for row in rows if row.mode == SCRATCH]
    if not tried or efficiency.beyond not in ("above", "below"):
        return "–"
    return f"> {max(tried)}" if efficiency.beyond == "above" else f"< {min(tried)}"


def against_text(mode: str) -> str:
    """Return the name of the reference mode of a difference."""
    return "scratch" if mode == SCRATCH else series_name((mode, ""))


def _names_of_thirds(material: Material, task: str) -> tuple[str, ...]:
    facts = material.context.tasks.get(task)
    return THIRDS if facts is None or not facts.thirds else tuple(facts.thirds)


def _mean_text(figures: Iterable[float | None]) -> str:
    mean = mean_of(figures)
    return "–" if mean is None else f"{mean:.2f}"
