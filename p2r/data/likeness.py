"""Scans of different subjects that look alike: one person under two names would leak between splits.

Copies with equal voxels are known by their digest. These are found by what they show: the same scan with other intensities,
voxels, noise or margins. Every accepted scan gets an outline in the ledger: the low frequencies of its first frame,
119 numbers of 8 bits. Outlines are compared by their deviation from the corpus's mean outline, so that common anatomy does
not count.

Outlines are part of a revision, so equal volumes must give equal bytes on every machine: after the intensities are
quantised, all sums are in integers.

Shapes: X Y Z voxels; 16 x 16 x 16 blocks; K = 119 coefficients; N scans.
"""

import base64
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2r.data.ledger import AcceptedRow
from p2r.data.thumbnails import block_means
from p2r.data.volume import Volume

THRESHOLD = 0.9
"""Similarity above which two scans look alike. Of 200 ACDC, 156 LGG and 200 hippocampus scans, different persons reach .60, .85 and
.84; the same scan with other intensities, half the voxels or some noise has .98 to 1 in the median (jobs/RESULTS.md)."""
MIN_SCANS = 12
"""Fewest scans with a useful mean outline."""
MAX_SCANS = 100_000
"""Largest number of scans that are compared with each other; others are left out."""
MAX_PAIRS = 1000
"""Largest number of pairs that are returned, the most similar first."""

_BLOCKS, _MAX_ORDER = 16, 7
_COSINES = np.rint(1024 * np.cos(np.pi / _BLOCKS * np.outer(np.arange(_MAX_ORDER + 1), np.arange(_BLOCKS) + 0.5)))
_BASIS = _COSINES.astype(np.int64)  # (8, 16)
_ORDERS = np.indices((_MAX_ORDER + 1,) * 3).sum(axis=0)
_IS_KEPT = (_ORDERS > 0) & (_ORDERS <= _MAX_ORDER)  # 119 coefficients
_LEAST_DEVIATION = 1e-3
_AT_ONCE = 1024


@dataclass(frozen=True)
class Alike:
    """Two scans of different subjects that look alike."""

    first: str
    """Key of the scan that comes first by name."""
    first_subject: str
    second: str
    second_subject: str
    contrast: str
    """Contrast of both scans; empty without sessions."""
    similarity: float
    """Cosine of the two outlines, each as its deviation from the mean outline of the corpus; at most 1."""


def outline(volume: Volume) -> str:
    """Return the outline of a volume's first frame: 119 signed bytes in base64.

    The ranks of 16 x 16 x 16 block means replace intensities, so a change of contrast that keeps their order has no effect.
    """
    means = block_means(volume.data[..., 0], _BLOCKS)
    _, number, counts = np.unique(means, return_inverse=True, return_counts=True)
    twice_ranks = 2 * (np.cumsum(counts) - counts) + counts - means.size  # ties share their mean rank; centred on 0
    cube = twice_ranks[number].reshape(means.shape)
    coefficients = np.einsum("ai,bj,ck,ijk->abc", _BASIS, _BASIS, _BASIS, cube, optimize=True)[_IS_KEPT]
    scaled = coefficients / max(1, int(np.abs(coefficients).max()))
    # A root keeps small coefficients apart; 8 bits would round them to zero.
    levels = np.rint(127 * np.sign(scaled) * np.sqrt(np.abs(scaled))).astype(np.int8)
    return base64.b64encode(levels.tobytes()).decode()


def find_alike(accepted: Sequence[AcceptedRow], *, threshold: float = THRESHOLD) -> list[Alike]:
    """Compare the scans of different subjects, within each contrast.

    Args:
        accepted: Ledger rows of accepted scans. Exact copies, and rows of versions before outlines, are not compared.
        threshold: Smallest similarity of a pair.

    Returns:
        Pairs in decreasing order of similarity, at most `MAX_PAIRS`.
    """
    of_contrast: dict[str, list[AcceptedRow]] = defaultdict(list)
    for row in accepted:
        if row.outline is not None and row.copy_of is None:
            of_contrast[row.contrast or ""].append(row)
    pairs = [
        pair
        for contrast, rows in sorted(of_contrast.items())
        for pair in _alike_of_contrast(contrast, sorted(rows, key=lambda row: row.key), threshold)
    ]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))[:MAX_PAIRS]


def _alike_of_contrast(contrast: str, rows: Sequence[AcceptedRow], threshold: float) -> list[Alike]:
    rows = rows[:MAX_SCANS]
    if len(rows) < MIN_SCANS:
        return []
    deviations = _deviations(np.array([_coefficients(row.outline or "") for row in rows]))
    _, subject = np.unique([row.subject for row in rows], return_inverse=True)
    found: list[Alike] = []
    for start in range(0, len(rows), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(rows))
        similarity = deviations[start:stop] @ deviations[start:].T
        is_pair = (similarity >= threshold) & (subject[start:stop, None] != subject[None, start:])
        for i, j in np.argwhere(np.triu(is_pair, k=1)).tolist():
            first, second = rows[start + i], rows[start + j]
            found.append(
                Alike(first.key, first.subject, second.key, second.subject, contrast, round(float(similarity[i, j]), 4))
            )
        found = sorted(found, key=lambda pair: -pair.similarity)[:MAX_PAIRS]
    return found


def _coefficients(text: str) -> NDArray[np.float64]:
    """Return the coefficients (K,) of an outline, scaled to length 1."""
    levels = np.frombuffer(base64.b64decode(text), np.int8).astype(np.float64)
    coefficients = np.sign(levels) * levels**2
    length = np.linalg.norm(coefficients)
    return coefficients / length if length else coefficients


def _deviations(coefficients: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return deviations (N, K) from the mean, in units of each coefficient's spread, scaled to length 1."""
    spread = coefficients.std(axis=0) + _LEAST_DEVIATION
    deviations = (coefficients - coefficients.mean(axis=0)) / spread
    lengths = np.linalg.norm(deviations, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (deviations / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit
