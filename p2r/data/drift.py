"""Groups of a corpus's scans by contrast and scanner, and the drift from one set of scans to another.

A quantity drifts if its distributions in the two sets differ: D is the largest difference of their cumulative distributions
(two-sample Kolmogorov-Smirnov), 0 for equal ones and 1 for disjoint ones. It counts as a change above 1.63 sqrt((n + m) / (n m)),
which scans of one distribution exceed in 1 % of comparisons. Source: Smirnov 1948, doi:10.1214/aoms/1177730256.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2r.config import PERCENTILES
from p2r.data.ledger import AcceptedRow

UNKNOWN = "not stated"
"""Value of a property that a scan does not state."""

_CRITICAL = 1.63
_MIDDLE, _HIGH = PERCENTILES.index(50.0), PERCENTILES.index(99.5)

QUANTITIES: dict[str, Callable[[AcceptedRow], float]] = {
    "spacing R, mm": lambda row: row.spacing_mm[0],
    "spacing A, mm": lambda row: row.spacing_mm[1],
    "spacing S, mm": lambda row: row.spacing_mm[2],
    "extent R, voxels": lambda row: row.shape[0],
    "extent A, voxels": lambda row: row.shape[1],
    "extent S, voxels": lambda row: row.shape[2],
    "frames": lambda row: row.shape[3],
    "intensity, median": lambda row: row.percentiles[_MIDDLE],
    "intensity, 99.5 %": lambda row: row.percentiles[_HIGH],
}
"""Quantities of a scan that are compared, by name."""


@dataclass(frozen=True)
class ScanGroup:
    """Scans of one contrast from one kind of scanner."""

    contrast: str
    """Empty without sessions."""
    scanner: str
    field_strength: str
    num_scans: int
    num_subjects: int
    spacing_mm: tuple[float, ...]
    """Median along R, A, S."""
    shape: tuple[float, ...]
    """Median along R, A, S."""


@dataclass(frozen=True)
class Shift:
    """One quantity in two sets of scans."""

    contrast: str
    """Empty without sessions."""
    quantity: str
    before: float
    """Median."""
    after: float
    """Median."""
    distance: float
    """D, in [0, 1]."""
    is_change: bool


@dataclass(frozen=True)
class Drift:
    """Comparison of two sets of scans."""

    num_before: int
    num_after: int
    num_shared: int
    """Scans of the later set that the earlier one has, by their voxels."""
    compares_new: bool
    """True if the earlier scans are compared with the new ones only, because the later set has all of them."""
    groups: tuple[tuple[str, int, int], ...]
    """(name, earlier scans, later scans) by contrast, scanner and field strength."""
    shifts: tuple[Shift, ...]
    """The largest distance first."""


def group_scans(accepted: Sequence[AcceptedRow]) -> list[ScanGroup]:
    """Return the scans of a corpus by contrast, scanner and field strength; the largest group of a contrast first."""
    groups: dict[tuple[str, str, str], list[AcceptedRow]] = defaultdict(list)
    for row in accepted:
        groups[row.contrast or "", scanner_of(row), field_strength_of(row)].append(row)
    found = [
        ScanGroup(
            *names,
            num_scans=len(rows),
            num_subjects=len({row.subject for row in rows}),
            spacing_mm=_medians([row.spacing_mm for row in rows]),
            shape=_medians([row.shape[:3] for row in rows]),
        )
        for names, rows in groups.items()
    ]
    return sorted(found, key=lambda one: (one.contrast, -one.num_scans, one.scanner, one.field_strength))


def measure_drift(earlier: Sequence[AcceptedRow], later: Sequence[AcceptedRow]) -> Drift:
    """Compare two sets of accepted scans.

    Args:
        earlier: Ledger rows of one corpus or revision.
        later: Ledger rows of another. If it has all scans of `earlier` and more, only the new ones are compared with them.
    """
    known = {row.voxels_sha256 for row in earlier}
    new = [row for row in later if row.voxels_sha256 not in known]
    num_shared = len(later) - len(new)
    compares_new = bool(new) and known <= {row.voxels_sha256 for row in later}
    after = new if compares_new else list(later)
    shifts = [
        _compare(
            contrast,
            name,
            *([of(row) for row in rows if (row.contrast or "") == contrast] for rows in (earlier, after)),
        )
        for contrast in sorted({row.contrast or "" for row in earlier} & {row.contrast or "" for row in after})
        for name, of in QUANTITIES.items()
    ]
    return Drift(
        num_before=len(earlier),
        num_after=len(later),
        num_shared=num_shared,
        compares_new=compares_new,
        groups=tuple(_count_groups(earlier, after)),
        shifts=tuple(sorted(shifts, key=lambda shift: (-shift.distance, shift.contrast, shift.quantity))),
    )


def _compare(contrast: str, quantity: str, before: Sequence[float], after: Sequence[float]) -> Shift:
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    distance = _distance(a, b)
    critical = _CRITICAL * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    return Shift(contrast, quantity, float(np.median(a)), float(np.median(b)), distance, distance > critical)


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the largest difference of two cumulative distributions."""
    values = np.concatenate([a, b])
    below = (np.searchsorted(np.sort(one), values, side="right") / len(one) for one in (a, b))
    return float(np.abs(np.subtract(*below)).max())


def _count_groups(earlier: Sequence[AcceptedRow], later: Sequence[AcceptedRow]) -> list[tuple[str, int, int]]:
    names: tuple[tuple[str, Callable[[AcceptedRow], str]], ...] = (
        ("contrast", lambda row: row.contrast or UNKNOWN),
        ("scanner", scanner_of),
        ("field strength", field_strength_of),
    )
    counts = []
    for name, of in names:
        before, after = (Counter(map(of, rows)) for rows in (earlier, later))
        counts += [(f"{name} {value}", before[value], after[value]) for value in sorted(before | after)]
    return counts


def scanner_of(row: AcceptedRow) -> str:
    """Return manufacturer and model of a scan's scanner, or `UNKNOWN`."""
    return row.scanner or UNKNOWN


def field_strength_of(row: AcceptedRow) -> str:
    """Return a scan's field strength, such as `1.5 T`, or `UNKNOWN`."""
    return UNKNOWN if row.field_strength_t is None else f"{row.field_strength_t:g} T"


def _medians(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(median) for median in np.median(np.asarray(rows, dtype=np.float64), axis=0))
