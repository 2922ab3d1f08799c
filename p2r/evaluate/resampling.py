"""Intervals, tests and label efficiency of arrays of Dice; `p2r.evaluate.statistics` explains and applies them.

Shapes: D draws, P test patients, R resamples, N numbers of labelled patients.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_DECIMALS = 12  # differences are rounded, because floating-point noise would break ties and zeros

Draw = tuple[int, tuple[str, ...]]
"""Number of a draw, and its labelled patients."""
Table = dict[Draw, dict[str, float]]
"""Dice by draw and test patient."""


def bootstrap_interval(
    values: NDArray[np.float64], *, generator: np.random.Generator, num_resamples: int, confidence: float
) -> tuple[float, float]:
    """Return percentiles of the mean over resampled draws and patients; see `p2r.evaluate.statistics`.

    Args:
        values: (D, P), NaN if a patient has no value in a draw.
        generator: Random generator of the resamples.
        num_resamples: R.
        confidence: Fraction of resampled means in the interval, in (0, 1).
    """
    is_present = ~np.isnan(values)
    if not is_present.any():
        raise ValueError("there are no values to resample")
    draw_counts, patient_counts = (
        _draw_counts(size, generator, num_resamples) for size in values.shape
    )  # (R, D), (R, P)
    total = np.einsum("rd,rd->r", draw_counts, patient_counts @ np.where(is_present, values, 0.0).T)
    number = np.einsum("rd,rd->r", draw_counts, patient_counts @ is_present.T.astype(np.float64))
    means = total[number > 0] / number[number > 0]
    tail = (1 - confidence) / 2
    if not means.size:  # values are so sparse that no resample contains one
        means = values[is_present]
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return float(lower), float(upper)


def _draw_counts(size: int, generator: np.random.Generator, num_resamples: int) -> NDArray[np.float64]:
    """Draw the count of each of `size` items in each resample of `size - 1` items; a single item always counts once."""
    return generator.multinomial(max(1, size - 1), np.full(size, 1 / size), size=num_resamples).astype(np.float64)


def signed_rank_p(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 if all differences are zero."""
    rounded = np.round(differences, _DECIMALS)
    rounded = rounded[rounded != 0]
    return float(stats.wilcoxon(rounded, method="auto").pvalue) if rounded.size else 1.0


def draws_agree(differences: NDArray[np.float64]) -> int:
    """Return the number of draws whose difference has the sign of the mean difference.

    Args:
        differences: (D, P), NaN if a patient has no value. Differences that are zero to 12 decimals have no sign.
    """
    by_draw, mean = np.round(np.nanmean(differences, axis=1), _DECIMALS), np.round(np.nanmean(differences), _DECIMALS)
    return int((np.sign(by_draw) == np.sign(mean))[by_draw != 0].sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the given order; rejecting those up to alpha bounds the family-wise error by alpha."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def patients_needed(dice: float, scratch: Mapping[int, float]) -> tuple[float | None, str | None]:
    """Return the number of labelled patients at which scratch first reaches a Dice, or the side of its range.

    Args:
        dice: Dice to reach.
        scratch: Mean Dice of scratch by number of labelled patients; at least one.

    Returns:
        The number, interpolated over log n, and None; or None and `below` or `above`.
    """
    numbers = sorted(scratch)
    needed = float(_patients_needed(np.array([dice]), np.array([[scratch[number] for number in numbers]]), numbers)[0])
    return (needed, None) if math.isfinite(needed) else (None, "below" if needed < 0 else "above")


def efficiency_interval(
    ours: Table,
    scratch: Mapping[int, Table],
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
    of_patients = _draw_counts(len(patients), generator, num_resamples)

    def resampled(table: Table) -> NDArray[np.float64]:
        values = np.array([[dice.get(one, math.nan) for one in patients] for _, dice in sorted(table.items()) if dice])
        is_there = ~np.isnan(values)
        of_draws = _draw_counts(len(values), generator, num_resamples)
        total = np.einsum("rd,rd->r", of_draws, of_patients @ np.where(is_there, values, 0.0).T)
        number = np.einsum("rd,rd->r", of_draws, of_patients @ is_there.T.astype(np.float64))
        means: NDArray[np.float64] = np.divide(total, number, out=np.full(num_resamples, np.nan), where=number > 0)
        return means

    numbers = sorted(scratch)
    needed = _patients_needed(resampled(ours), np.stack([resampled(scratch[number]) for number in numbers], 1), numbers)
    needed = needed[~np.isnan(needed)]
    if not needed.size:
        return "below", "above"
    tail = (1 - confidence) / 2
    names = {-math.inf: "below", math.inf: "above"}
    lower, upper = np.quantile(needed, [tail, 1 - tail], method="inverted_cdf").tolist()
    return names.get(lower, lower), names.get(upper, upper)


def _patients_needed(
    dice: NDArray[np.float64], curves: NDArray[np.float64], numbers: Sequence[int]
) -> NDArray[np.float64]:
    """Return `patients_needed` of every resample (R,): minus infinity below, infinity above, NaN without a Dice.

    Args:
        dice: (R,) to be reached.
        curves: (R, N) Dice of scratch.
        numbers: N numbers of labelled patients, rising.
    """
    logs, first = np.log(numbers), curves[:, 0]
    needed = np.where(dice < first, -np.inf, np.where(dice == first, float(numbers[0]), np.inf))
    is_reached = (curves[:, 1:] >= dice[:, None]) & (dice > first)[:, None]
    rows = np.flatnonzero(is_reached.any(axis=1))
    if rows.size:  # empty also with a single number, where a curve has no steps
        step = is_reached[rows].argmax(axis=1)
        low, high = curves[rows, step], curves[rows, step + 1]
        needed[rows] = np.exp(logs[step] + (dice[rows] - low) / (high - low) * (logs[step + 1] - logs[step]))
    needed[np.isnan(dice) | np.isnan(curves).any(axis=1)] = np.nan
    return needed
