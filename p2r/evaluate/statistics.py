"""Rows of final trials -> intervals, paired differences with tests, and how many labelled patients scratch would need.

    rows (task x protocol x backbone x mode x n x draw) -> Dice (D, P) of each mode and n -> `few_shot_statistics`

All figures stand on one number per draw and test patient: Dice, averaged over the patient's frames and classes
(`dice_by_subject` of a row). A patient without any class in prediction and reference has none, and is left out.

**Intervals** are percentiles of a hierarchical bootstrap: draws of labelled patients, then test patients. Every draw is
read on the same test patients, so a resample takes one choice of patients for all of its draws. (Choosing them anew
within every draw treats one patient as D different ones: its "95 %" interval of 5 draws covered 74 % where the spreads
of draws, patients and noise were 0.5 : 2 : 1.) Each level is resamples of one less than there are, because the spread of m
resampled out of m is too small by (m - 1) / m, which matters for 3 draws (Rao and Wu, JASA 83, 1988).

What it reaches is measured, on normal models with 20 patients, for a nominal 95 % (1,000 data sets each):

    spread of draws : patients : noise    1 draw    3 draws    5 draws    10 draws
    0   : 1 : 1                           93 %      97 %       97 %       95 %
    0.5 : 2 : 1                           82 %      94 %       94 %       94 %
    0.5 : 1 : 1                           69 %      93 %       94 %       95 %
    1   : 1 : 1                           45 %      88 %       91 %       95 %

So where the choice of labelled patients matters as much as the test patients, which is what n = 1 looks like, intervals
of 3 or 5 draws are **too narrow**; and of one draw they say nothing about other draws at all.

**Differences** are paired: the same labelled patients, the same test patients. Draws are averaged within a patient, and
Wilcoxon's signed-rank test (two-sided) asks whether patients' differences lie about zero. Zero differences are left
out, as Wilcoxon did; differences are equal where 12 decimals are. The test is exact up to 50 patients without ties and
up to 13 with ties, and a normal approximation with correction for ties above. Holm's correction is over the numbers of
labelled patients of one comparison. A test of patients says nothing about other draws: the interval does.

**Label efficiency** reads, off the straight lines between scratch's means over log n, where scratch first reaches a
mode's Dice. Outside of what scratch was trained with, the side is named and nothing is extrapolated.

All of it depends on the seed and on what the rows say, not on their order, nor on what other groups there are.

Shapes: D draws, P test patients, R resamples.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from p2r.errors import DataError
from p2r.modes import SCRATCH, facts_of
from p2r.randomness import keyed_generator

_DECIMALS = 12  # differences of means are equal up to rounding, or ties and zeros would be broken by it

_Draw = tuple[int, tuple[str, ...]]
_Table = dict[_Draw, dict[str, float]]


@dataclass(frozen=True, order=True)
class _Setting:
    """What figures must share to be put beside one another."""

    task: str
    protocol: str
    transductive: bool
    split: str


@dataclass(frozen=True, order=True)
class _Group:
    """One line of a few-shot plot."""

    setting: _Setting
    backbone: str
    mode: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.setting), "backbone": self.backbone or None, "mode": self.mode}


def few_shot_statistics(
    rows: Iterable[Mapping[str, Any]], *, seed: int, num_resamples: int = 2000, confidence: float = 0.95
) -> dict[str, Any]:
    """Return what the rows of final trials say together.

    Args:
        rows: Rows of `report.json`, in any order. A row's `protocol`, `transductive`, `split` and `backbone` (a short name,
            where several are compared) keep apart what must not be mixed.
        seed: Of the resamples.
        num_resamples: R.
        confidence: Of the intervals, in (0, 1).

    Returns:
        Plain values for JSON. Every entry of a list says its `task`, `protocol`, `transductive`, `split`, `backbone` (None
        where rows name none) and `mode`.

        - `confidence`, `num_resamples`, `seed`;
        - `intervals`: `num_labelled`, `draws`, `patients`, `mean`, `lower`, `upper`. With one draw, the interval is that of
          the patients for this draw; with one patient as well, it has no width;
        - `differences`: of each mode from `against`: scratch where there is one (of the same backbone, or of no backbone), and
          the mode's own control from random weights; else every pair of modes. `num_labelled`, `draws`, `patients`,
          `difference`, `lower`, `upper`, `p`, `p_holm`;
        - `between_backbones`: the same of one mode with `backbone` from that with `against_backbone`;
        - `label_efficiency`: `num_labelled`, `dice`, `scratch_patients`, `beyond`: `below` if scratch reaches that Dice with
          its fewest patients already, `above` if it nowhere does, else None; `scratch_interval`: the two ends of its interval,
          numbers, `below` or `above`;
        - `left_out`: comparisons that cannot be made, with the `reason`.

    Raises:
        DataError: if a row lacks a key, a Dice is no number in [0, 1], or two rows are of one trial.
        ValueError: if `num_resamples` or `confidence` is out of range.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_resamples must be positive and confidence in (0, 1), got {num_resamples} and {confidence}"
        )
    tables = _tables(rows)
    found: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    left_out: list[dict[str, Any]] = []

    def interval(dice: NDArray[np.float64], *key: object) -> tuple[float, float]:
        generator = keyed_generator(seed, "bootstrap", repr(key))
        return bootstrap_interval(dice, generator=generator, num_resamples=num_resamples, confidence=confidence)

    means: dict[_Group, dict[int, float]] = {}
    intervals = []
    for group, by_number in tables.items():
        for num_labelled, table in by_number.items():
            dice = _matrix(table)
            if not dice.size:
                left_out.append(
                    {**group.to_dict(), "num_labelled": num_labelled, "reason": "no test patient has a Dice"}
                )
                continue
            lower, upper = interval(dice, group, num_labelled)
            means.setdefault(group, {})[num_labelled] = mean = float(np.nanmean(dice))
            counts = {"num_labelled": num_labelled, "draws": dice.shape[0], "patients": dice.shape[1]}
            intervals.append({**group.to_dict(), **counts, "mean": mean, "lower": lower, "upper": upper})
    found["intervals"] = intervals

    def compared(pairs: Iterable[tuple[_Group, _Group]], other: str) -> list[dict[str, Any]]:
        entries = []
        for group, against in pairs:
            name = {other: against.mode if other == "against" else against.backbone or None}
            family = []
            for num_labelled in sorted(tables[group].keys() & tables[against].keys()):
                entry = {**group.to_dict(), **name, "num_labelled": num_labelled}
                differences = _differences(tables[group][num_labelled], tables[against][num_labelled])
                if not differences.size:
                    left_out.append(
                        {**entry, "reason": "no draw of the same labelled patients has a common test patient"}
                    )
                    continue
                lower, upper = interval(differences, group, against, num_labelled)
                family.append(
                    {
                        **entry,
                        "draws": differences.shape[0],
                        "patients": differences.shape[1],
                        "difference": float(np.nanmean(differences)),
                        "lower": lower,
                        "upper": upper,
                        "p": signed_rank_p(np.nanmean(differences, axis=0)),
                    }
                )
            adjusted = holm([entry["p"] for entry in family])
            entries += [{**entry, "p_holm": p} for entry, p in zip(family, adjusted, strict=True)]
        return entries

    found["differences"] = compared(_pairs_of_modes(tables), "against")
    found["between_backbones"] = compared(_pairs_of_backbones(tables), "against_backbone")
    efficiency = []
    for group, by_number_mean in means.items():
        scratch = _scratch_of(group, means)
        if group.mode == SCRATCH or scratch is None:
            continue
        for num_labelled, mean in by_number_mean.items():
            patients, beyond = patients_needed(mean, means[scratch])
            ends = efficiency_interval(
                tables[group][num_labelled],
                {number: tables[scratch][number] for number in means[scratch]},
                generator=keyed_generator(seed, "bootstrap", repr((group, num_labelled, "label_efficiency"))),
                num_resamples=num_resamples,
                confidence=confidence,
            )
            named = {"num_labelled": num_labelled, "dice": mean, "scratch_patients": patients, "beyond": beyond}
            efficiency.append({**group.to_dict(), **named, "scratch_interval": list(ends)})
    found["label_efficiency"] = efficiency
    found["left_out"] = left_out
    return found


def bootstrap_interval(
    values: NDArray[np.float64], *, generator: np.random.Generator, num_resamples: int, confidence: float
) -> tuple[float, float]:
    """Return percentiles of the mean of resampled draws and patients (see the module's text).

    Args:
        values: (D, P), NaN where a patient has no figure in a draw.
        generator: Source of the resamples.
        num_resamples: R.
        confidence: Share of resampled means between the two ends, in (0, 1).
    """
    is_there = ~np.isnan(values)
    if not is_there.any():
        raise ValueError("there are no values to resample")
    of_draws, of_patients = (_counts(size, generator, num_resamples) for size in values.shape)  # (R, D), (R, P)
    total = np.einsum("rd,rd->r", of_draws, of_patients @ np.where(is_there, values, 0.0).T)
    number = np.einsum("rd,rd->r", of_draws, of_patients @ is_there.T.astype(np.float64))
    means = total[number > 0] / number[number > 0]
    tail = (1 - confidence) / 2
    if not means.size:  # hardly any figure is there, and no resample met one
        means = values[is_there]
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return float(lower), float(upper)


def _counts(size: int, generator: np.random.Generator, num_resamples: int) -> NDArray[np.float64]:
    """How often each of `size` things is in each resample of `size - 1`; the only one is always in."""
    return generator.multinomial(max(1, size - 1), np.full(size, 1 / size), size=num_resamples).astype(np.float64)


def signed_rank_p(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 if no difference is other than zero."""
    rounded = np.round(differences, _DECIMALS)
    rounded = rounded[rounded != 0]
    return float(stats.wilcoxon(rounded, method="auto").pvalue) if rounded.size else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the given order: reject those up to alpha, and hardly any family errs."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def patients_needed(dice: float, scratch: Mapping[int, float]) -> tuple[float | None, str | None]:
    """Return with how many labelled patients scratch first reaches a Dice, or on which side of its range that lies.

    Args:
        dice: What is to be reached.
        scratch: Mean Dice by number of labelled patients; at least one.

    Returns:
        The number, interpolated over log n, and None; or None and `below` or `above`.
    """
    numbers = sorted(scratch)
    if dice < scratch[numbers[0]]:
        return None, "below"
    if dice == scratch[numbers[0]]:
        return float(numbers[0]), None
    for low, high in itertools.pairwise(numbers):
        if scratch[high] >= dice:
            share = (dice - scratch[low]) / (scratch[high] - scratch[low])
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low))), None
    return None, "above"


def efficiency_interval(
    ours: _Table,
    scratch: Mapping[int, _Table],
    *,
    generator: np.random.Generator,
    num_resamples: int,
    confidence: float,
) -> tuple[float | str, float | str]:
    """Return percentiles of `patients_needed` over resampled test patients, the same for all tables, and draws of each table.

    Args:
        ours: Dice of the mode with one number of labelled patients.
        scratch: Dice of training from scratch by number of labelled patients.
        generator: Source of the resamples.
        num_resamples: R.
        confidence: Share of the resamples between the two ends, in (0, 1).

    Returns:
        The ends: numbers, or `below` the fewest labelled patients of scratch, or `above` the most.
    """
    patients = sorted({patient for table in (ours, *scratch.values()) for dice in table.values() for patient in dice})
    of_patients = _counts(len(patients), generator, num_resamples)

    def resampled(table: _Table) -> NDArray[np.float64]:
        values = np.array([[dice.get(one, math.nan) for one in patients] for _, dice in sorted(table.items()) if dice])
        is_there = ~np.isnan(values)
        of_draws = _counts(len(values), generator, num_resamples)
        total = np.einsum("rd,rd->r", of_draws, of_patients @ np.where(is_there, values, 0.0).T)
        number = np.einsum("rd,rd->r", of_draws, of_patients @ is_there.T.astype(np.float64))
        means: NDArray[np.float64] = np.divide(total, number, out=np.full(num_resamples, np.nan), where=number > 0)
        return means

    reached, curves = resampled(ours), {number: resampled(table) for number, table in scratch.items()}
    beyond = {"below": -math.inf, "above": math.inf}
    needed = []
    for index, dice in enumerate(reached):
        curve = {number: float(means[index]) for number, means in curves.items() if not math.isnan(means[index])}
        if curve and not math.isnan(dice):
            number, side = patients_needed(float(dice), curve)
            needed.append(beyond[side] if side is not None else float(number or 0.0))
    if not needed:
        return "below", "above"
    tail = (1 - confidence) / 2
    names = {-math.inf: "below", math.inf: "above"}
    lower, upper = np.quantile(needed, [tail, 1 - tail], method="inverted_cdf").tolist()
    return names.get(lower, lower), names.get(upper, upper)


def _tables(rows: Iterable[Mapping[str, Any]]) -> dict[_Group, dict[int, _Table]]:
    """Sort the rows into Dice by group, number of labelled patients, draw and test patient."""
    tables: dict[_Group, dict[int, _Table]] = {}
    for row in rows:
        try:
            setting = _Setting(
                row["task"], row.get("protocol", "leak_free"), bool(row.get("transductive")), row.get("split", "test")
            )
            group = _Group(setting, row.get("backbone") or "", row["mode"])
            num_labelled, draw = int(row["num_labelled"]), (int(row["draw"]), tuple(sorted(row["subjects"])))
            dice = {subject: float(found) for subject, found in row["dice_by_subject"].items() if found is not None}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"row {row.get('id', dict(row))}: {type(error).__name__}: {error}; statistics need task, mode, num_labelled, "
                "draw, subjects and dice_by_subject of a final trial"
            ) from None
        trial = f"{setting.task}, {group.backbone or 'one backbone'}, {group.mode}, n = {num_labelled}, draw {draw[0]}"
        for subject, value in dice.items():
            if not 0 <= value <= 1:
                raise DataError(f"trial {trial}: the Dice of {subject} is {value}; it must lie between 0 and 1")
        table = tables.setdefault(group, {}).setdefault(num_labelled, {})
        if any(draw[0] == other for other, _ in table):
            raise DataError(
                f"trial {trial}: two rows; one trial has one row, and rows of two runs or backbones need a `backbone` each"
            )
        table[draw] = dice
    return {group: dict(sorted(tables[group].items())) for group in sorted(tables)}


def _matrix(table: _Table) -> NDArray[np.float64]:
    """(D, P) without patients that have no figure in any draw, and draws in which no patient has one."""
    patients = sorted({patient for dice in table.values() for patient in dice})
    draws = [table[draw] for draw in sorted(table) if table[draw]]
    return np.array([[dice.get(patient, math.nan) for patient in patients] for dice in draws], dtype=np.float64)


def _differences(ours: _Table, theirs: _Table) -> NDArray[np.float64]:
    """(D, P) of draws with the same labelled patients, on patients that both have a figure of."""
    return _matrix(
        {
            draw: {
                patient: dice - theirs[draw][patient] for patient, dice in of_draw.items() if patient in theirs[draw]
            }
            for draw, of_draw in ours.items()
            if draw in theirs
        }
    )


def _scratch_of(group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    """Scratch of the same backbone's architecture, or the one that all backbones share."""
    return _of_mode(SCRATCH, group, tables)


def _control_of(group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    """The same training from random weights, if the mode has such a control and it was run."""
    facts = facts_of(group.mode)
    return None if facts is None or facts.control is None else _of_mode(facts.control, group, tables)


def _of_mode(mode: str, group: _Group, tables: Mapping[_Group, object]) -> _Group | None:
    for backbone in (group.backbone, ""):
        found = _Group(group.setting, backbone, mode)
        if found in tables:
            return found
    return None


def _pairs_of_modes(tables: Mapping[_Group, object]) -> list[tuple[_Group, _Group]]:
    pairs = []
    for group in tables:
        scratch = _scratch_of(group, tables)
        if scratch is not None:
            pairs += [(group, scratch)] if group.mode != SCRATCH else []
            control = _control_of(group, tables)
            pairs += [(group, control)] if control not in (None, scratch) else []
        else:
            pairs += [
                (group, other)
                for other in tables
                if (other.setting, other.backbone) == (group.setting, group.backbone) and other.mode < group.mode
            ]
    return pairs


def _pairs_of_backbones(tables: Mapping[_Group, object]) -> list[tuple[_Group, _Group]]:
    return [
        (group, other)
        for other, group in itertools.combinations(tables, 2)
        if (other.setting, other.mode) == (group.setting, group.mode) and other.backbone and group.backbone
    ]
