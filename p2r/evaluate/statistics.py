"""Rows of final trials -> intervals, paired differences with tests, and the number of labelled patients that scratch needs.

    rows (task x protocol x backbone x mode x n x draw) -> Dice (D, P) of each mode and n -> `few_shot_statistics`

All statistics use one number per draw and test patient: Dice, averaged over the patient's frames and classes
(`dice_by_subject` of a row). Patients without any class in prediction and reference have none and are left out.

**Intervals** are percentiles of a hierarchical bootstrap: draws of labelled patients, then test patients. All draws are
evaluated on the same test patients, so a resample uses one choice of patients for all its draws. (An independent choice per
draw would treat one patient as D different ones. Its nominal 95 % interval of 5 draws covered 74 %, with spreads of draws,
patients and noise of 0.5 : 2 : 1.) Each level resamples m - 1 of m items (Rao and Wu, JASA 83, 1988). With m of m, the
variance would be too small by the factor (m - 1) / m, which matters for 3 draws.

Measured coverage of the nominal 95 % interval, on normal models with 20 patients (1,000 data sets each):

    spread of draws : patients : noise    1 draw    3 draws    5 draws    10 draws
    0   : 1 : 1                           93 %      97 %       97 %       95 %
    0.5 : 2 : 1                           82 %      94 %       94 %       94 %
    0.5 : 1 : 1                           69 %      93 %       94 %       95 %
    1   : 1 : 1                           45 %      88 %       91 %       95 %

So if the choice of labelled patients matters as much as the test patients, as for n = 1, intervals of 3 or 5 draws are **too
narrow**. Intervals of one draw do not cover the variation between draws at all.

**Differences** are paired: the same labelled patients, the same test patients. Draws are averaged within a patient. Wilcoxon's
signed-rank test (two-sided) then tests whether the patients' differences are symmetric about zero. Zero differences are
dropped, as by Wilcoxon; differences that agree to 12 decimals count as equal. The test is exact up to 50 patients without ties
and up to 13 with ties, and above uses a normal approximation with correction for ties. Holm's correction covers the numbers
of labelled patients of one comparison. The test does not cover variation between draws. The interval does, and so does the
number of draws with the sign of the mean difference. Without an effect, 5 of 5 occurs by chance in 6 % of comparisons, and
4 of 5 or more in 38 %.

**Label efficiency** is the number of patients at which scratch first reaches a mode's Dice, read from straight lines between
the means of scratch over log n. Outside the range of scratch, only the side is reported, without extrapolation.

All results depend on the seed and the content of the rows, not on their order or on other groups.

Shapes: D draws, P test patients, R resamples.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from p2r.errors import DataError
from p2r.evaluate.resampling import (
    Table,
    bootstrap_interval,
    draws_agree,
    efficiency_interval,
    holm,
    patients_needed,
    signed_rank_p,
)
from p2r.evaluate.rows import JsonModel, TrialRow
from p2r.modes import SCRATCH, facts_of
from p2r.randomness import keyed_generator


@dataclass(frozen=True, order=True)
class _Setting:
    """Settings that must be equal for results to be comparable."""

    task: str
    protocol: str
    transductive: bool
    split: str
    # Seeds of the resamples depend on the representation. Without this field, they stay those of earlier versions.
    corpora: str = field(default="", repr=False)


@dataclass(frozen=True, order=True)
class _Group:
    """One curve of a few-shot plot."""

    setting: _Setting
    backbone: str
    mode: str

    def names(self) -> "_Names":
        """Return the fields of `_Entry`."""
        setting = self.setting
        names: _Names = {
            "task": setting.task,
            "protocol": setting.protocol,
            "transductive": setting.transductive,
            "split": setting.split,
            "backbone": self.backbone or None,
            "mode": self.mode,
        }
        if setting.corpora:
            names["corpora"] = setting.corpora
        return names


class _Names(TypedDict):
    """Fields of an entry of the statistics, as keyword arguments."""

    task: str
    protocol: str
    transductive: bool
    split: str
    backbone: str | None
    mode: str
    corpora: NotRequired[str]


class _Entry(JsonModel):
    """Fields of every entry of the statistics that identify the results described."""

    task: str
    protocol: str
    transductive: bool
    split: str
    backbone: str | None
    """None if the rows name no backbone."""
    mode: str
    corpora: str | None = None
    """`unknown` as in the rows. Reports of earlier versions lack it."""


class Interval(_Entry):
    """Mean Dice of one mode and number of labelled patients.

    With one draw, the interval covers only patients, for this draw. With one draw and one patient, it has no width.
    """

    num_labelled: int
    draws: int
    patients: int
    mean: float
    lower: float
    upper: float


class PairedDifference(_Entry):
    """Difference of Dice from another mode (`against`) or the same mode of another backbone (`against_backbone`)."""

    against: str = ""
    against_backbone: str | None = None
    num_labelled: int
    draws: int
    patients: int
    difference: float
    lower: float
    upper: float
    p: float
    p_holm: float
    """Holm's correction of `p` over the numbers of labelled patients."""
    difference_by_draw: list[float]
    """Differences in the order of the draws."""
    draws_agree: int
    """Number of draws whose difference has the sign of `difference`."""


class LabelEfficiency(_Entry):
    """Number of labelled patients at which training from scratch reaches the Dice of a mode."""

    num_labelled: int
    dice: float
    scratch_patients: float | None
    beyond: str | None
    """`below` if scratch exceeds that Dice with its fewest patients, `above` if it never reaches it, else None."""
    scratch_interval: list[float | str] | None = None
    """Ends of the interval of `scratch_patients`: numbers, `below` or `above`. None in reports of earlier versions."""


class LeftOut(_Entry):
    """An interval or comparison that cannot be computed."""

    num_labelled: int
    reason: str


class Statistics(JsonModel):
    """Statistics of the rows of final trials."""

    confidence: float = 0.95
    num_resamples: int
    seed: int
    intervals: list[Interval]
    differences: list[PairedDifference]
    """Differences from scratch (of the same backbone or of none) and from the mode's control with random weights; without
    scratch, of every pair of modes."""
    between_backbones: list[PairedDifference]
    label_efficiency: list[LabelEfficiency]
    left_out: list[LeftOut]


def few_shot_statistics(
    rows: Iterable[TrialRow], *, seed: int, num_resamples: int = 2000, confidence: float = 0.95
) -> Statistics:
    """Compute the statistics of final trials together.

    Args:
        rows: Rows of `report.json`, in any order. Rows with different `protocol`, `transductive`, `corpora`, `split` or `backbone`
            (a short name, if several are compared) are never mixed.
        seed: Seed of the resamples.
        num_resamples: R.
        confidence: Confidence level of the intervals, in (0, 1).

    Raises:
        DataError: if a row has no `dice_by_subject`, a Dice is not in [0, 1], or two rows are of one trial.
        ValueError: if `num_resamples` or `confidence` is out of range.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_resamples must be positive and confidence in (0, 1), got {num_resamples} and {confidence}"
        )
    tables = _tabulate(rows)
    left_out: list[LeftOut] = []
    draw = _Bootstrap(seed, num_resamples, confidence)
    intervals = _compute_intervals(tables, draw, left_out)
    means: dict[_Group, dict[int, float]] = {}
    for group, one in intervals:
        means.setdefault(group, {})[one.num_labelled] = one.mean
    modes, backbones = _pair_modes(tables), _pair_backbones(tables)
    return Statistics(
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
        intervals=[one for _, one in intervals],
        differences=_compare_pairs(tables, [(*pair, {"against": pair[1].mode}) for pair in modes], draw, left_out),
        between_backbones=_compare_pairs(
            tables, [(*pair, {"against_backbone": pair[1].backbone or None}) for pair in backbones], draw, left_out
        ),
        label_efficiency=list(_compute_efficiency(means, tables, draw)),
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Bootstrap:
    """Bootstrap intervals; each has resamples keyed by the seed and the results described."""

    seed: int
    num_resamples: int
    confidence: float

    def interval(self, dice: NDArray[np.float64], *key: object) -> tuple[float, float]:
        generator = keyed_generator(self.seed, "bootstrap", repr(key))
        return bootstrap_interval(
            dice, generator=generator, num_resamples=self.num_resamples, confidence=self.confidence
        )


def _compute_intervals(
    tables: Mapping[_Group, Mapping[int, Table]], draw: _Bootstrap, left_out: list[LeftOut]
) -> list[tuple[_Group, Interval]]:
    found = []
    for group, by_number in tables.items():
        for num_labelled, table in by_number.items():
            dice = _to_matrix(table)
            if not dice.size:
                reason = "no test patient has a Dice"
                left_out.append(LeftOut(**group.names(), num_labelled=num_labelled, reason=reason))
                continue
            lower, upper = draw.interval(dice, group, num_labelled)
            draws, patients = dice.shape
            mean = float(np.nanmean(dice))
            interval = Interval(
                **group.names(),
                num_labelled=num_labelled,
                draws=draws,
                patients=patients,
                mean=mean,
                lower=lower,
                upper=upper,
            )
            found.append((group, interval))
    return found


def _compare_pairs(
    tables: Mapping[_Group, Mapping[int, Table]],
    pairs: Iterable[tuple[_Group, _Group, dict[str, str | None]]],
    draw: _Bootstrap,
    left_out: list[LeftOut],
) -> list[PairedDifference]:
    """Compare pairs of groups; the last item of each tuple has the entry's fields that name the second group."""
    entries: list[PairedDifference] = []
    for group, against, name in pairs:
        family = []
        for num_labelled in sorted(tables[group].keys() & tables[against].keys()):
            entry = {**group.names(), **name, "num_labelled": num_labelled}
            differences = _subtract_tables(tables[group][num_labelled], tables[against][num_labelled])
            if not differences.size:
                reason = "no draw of the same labelled patients has a common test patient"
                left_out.append(LeftOut.model_validate({**entry, "reason": reason}))
                continue
            lower, upper = draw.interval(differences, group, against, num_labelled)
            draws, patients = differences.shape
            figures = {
                "difference": float(np.nanmean(differences)),
                "lower": lower,
                "upper": upper,
                "difference_by_draw": np.nanmean(differences, axis=1).tolist(),
                "draws_agree": draws_agree(differences),
            }
            p = signed_rank_p(np.nanmean(differences, axis=0))
            family.append((p, {**entry, "draws": draws, "patients": patients, **figures, "p": p}))
        adjusted = holm([p for p, _ in family])
        entries += [
            PairedDifference.model_validate({**entry, "p_holm": p})
            for (_, entry), p in zip(family, adjusted, strict=True)
        ]
    return entries


def _compute_efficiency(
    means: Mapping[_Group, Mapping[int, float]], tables: Mapping[_Group, Mapping[int, Table]], draw: _Bootstrap
) -> Iterator[LabelEfficiency]:
    for group, by_number in means.items():
        scratch = _find_scratch(group, means)
        if group.mode == SCRATCH or scratch is None:
            continue
        for num_labelled, mean in by_number.items():
            patients, beyond = patients_needed(mean, means[scratch])
            ends = efficiency_interval(
                tables[group][num_labelled],
                {number: tables[scratch][number] for number in means[scratch]},
                generator=keyed_generator(draw.seed, "bootstrap", repr((group, num_labelled, "label_efficiency"))),
                num_resamples=draw.num_resamples,
                confidence=draw.confidence,
            )
            yield LabelEfficiency(
                **group.names(),
                num_labelled=num_labelled,
                dice=mean,
                scratch_patients=patients,
                beyond=beyond,
                scratch_interval=list(ends),
            )


def _tabulate(rows: Iterable[TrialRow]) -> dict[_Group, dict[int, Table]]:
    """Tabulate the Dice of the rows by group, number of labelled patients, draw and test patient."""
    tables: dict[_Group, dict[int, Table]] = {}
    for row in rows:
        if "dice_by_subject" not in row.model_fields_set:
            raise DataError(
                f"row {row.id or row.mode}: dice_by_subject is missing; statistics need rows of final trials"
            )
        setting = _Setting(row.task, row.protocol, row.transductive, row.split, row.corpora or "")
        group = _Group(setting, row.backbone or "", row.mode)
        num_labelled, draw = row.num_labelled, (row.draw, tuple(sorted(row.subjects)))
        dice = {subject: found for subject, found in row.dice_by_subject.items() if found is not None}
        trial = f"{setting.task}, {group.backbone or 'one backbone'}, {group.mode}, n = {num_labelled}, draw {draw[0]}"
        for subject, value in dice.items():
            if not 0 <= value <= 1:
                raise DataError(f"trial {trial}: the Dice of {subject} is {value}; it must be between 0 and 1")
        table = tables.setdefault(group, {}).setdefault(num_labelled, {})
        if any(draw[0] == other for other, _ in table):
            raise DataError(
                f"trial {trial} has two rows; rows of several runs or backbones need different values of `backbone`"
            )
        table[draw] = dice
    return {group: dict(sorted(tables[group].items())) for group in sorted(tables)}


def _to_matrix(table: Table) -> NDArray[np.float64]:
    """Return (D, P) without patients that have no value in any draw, and without draws that have no values."""
    patients = sorted({patient for dice in table.values() for patient in dice})
    draws = [table[draw] for draw in sorted(table) if table[draw]]
    return np.array([[dice.get(patient, math.nan) for patient in patients] for dice in draws], dtype=np.float64)


def _subtract_tables(ours: Table, theirs: Table) -> NDArray[np.float64]:
    """Return differences (D, P) for draws with the same labelled patients, on patients with a value in both."""
    return _to_matrix(
        {
            draw: {
                patient: dice - theirs[draw][patient] for patient, dice in patients.items() if patient in theirs[draw]
            }
            for draw, patients in ours.items()
            if draw in theirs
        }
    )


def _find_scratch(group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    """Return scratch with the architecture of the same backbone, else the scratch common to all backbones."""
    return _find_mode(SCRATCH, group, tables)


def _find_control(group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    """Return the same training from random weights, if the mode has such a control and it was run."""
    facts = facts_of(group.mode)
    return None if facts is None or facts.control is None else _find_mode(facts.control, group, tables)


def _find_mode(mode: str, group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    for backbone in (group.backbone, ""):
        found = _Group(group.setting, backbone, mode)
        if found in tables:
            return found
    return None


def _pair_modes(tables: Mapping[_Group, object]) -> list[tuple[_Group, _Group]]:
    pairs = []
    for group in tables:
        scratch = _find_scratch(group, tables)
        if scratch is not None:
            pairs += [(group, scratch)] if group.mode != SCRATCH else []
            control = _find_control(group, tables)
            pairs += [(group, control)] if control not in (None, scratch) else []
        else:
            pairs += [
                (group, other)
                for other in tables
                if (other.setting, other.backbone) == (group.setting, group.backbone) and other.mode < group.mode
            ]
    return pairs


def _pair_backbones(tables: Mapping[_Group, object]) -> list[tuple[_Group, _Group]]:
    return [
        (group, other)
        for other, group in itertools.combinations(tables, 2)
        if (other.setting, other.mode) == (group.setting, group.mode) and other.backbone and group.backbone
    ]
