"""Probabilities of a scan and its reference -> expected calibration error, Brier score and a reliability curve.

Confidence is the probability of the predicted class. With confidence 0.8, a calibrated model is right in 80 % of voxels. Almost
all of a scan is background, which every model predicts with a confidence near 1, so each metric is computed twice:

    near     voxels in the box around the reference's foreground, `MARGIN_MM` wider on every side; the same for all models
    whole    all voxels of the scan

ECE sorts voxels into `NUM_BINS` bins of confidence, equally wide from 0 to 1, and averages the distance between mean confidence
and accuracy over voxels. The Brier score is the squared distance between the probabilities of all classes and the reference's
one-hot vector, from 0 to 2. Both are computed per patient, over all frames of the patient, and then averaged over patients.
They measure the network's probabilities: postprocessing, such as removing small components, does not change them.

Letters: B images, K classes, *s a scan's own voxels.

Sources: Brier 1950 (the score); Naeini, Cooper and Hauskrecht 2015 (ECE); Guo et al. 2017 (networks, equally wide bins, 15 of them);
Mehrtash et al., IEEE TMI 39(12), 2020 (segmentation, a box around the organ, ensembles).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.evaluate.rows import CalibrationRow, Reliability

NUM_BINS = 15
MARGIN_MM = 10.0
REGIONS = ("near", "whole")
_COUNT, _CONFIDENCE, _CORRECT = range(3)


@dataclass(frozen=True)
class CalibrationSums:
    """Sums over voxels, by region. Sums of several images, frames or patients can be added."""

    bins: NDArray[np.float64]
    """(2, NUM_BINS, 3): number of voxels, sum of their confidences, number of correct voxels."""
    squares: NDArray[np.float64]
    """(2,): sums of the squared distances of the Brier score."""

    @classmethod
    def empty(cls) -> "CalibrationSums":
        """Return sums over no voxels."""
        return cls(np.zeros((len(REGIONS), NUM_BINS, 3)), np.zeros(len(REGIONS)))

    def __add__(self, other: "CalibrationSums") -> "CalibrationSums":
        return CalibrationSums(self.bins + other.bins, self.squares + other.squares)

    def figures(self) -> dict[str, float | None]:
        """Return `ece` and `brier` near the organs, and `ece_whole` and `brier_whole`; None for a region without voxels."""
        found: dict[str, float | None] = {}
        for region, name in enumerate(REGIONS):
            ending = "" if name == "near" else f"_{name}"
            bins = self.bins[region]
            number = float(bins[:, _COUNT].sum())
            distance = float(np.abs(bins[:, _CONFIDENCE] - bins[:, _CORRECT]).sum())
            found[f"ece{ending}"] = distance / number if number else None
            found[f"brier{ending}"] = float(self.squares[region]) / number if number else None
        return found


def calibration_sums(probabilities: Tensor, reference: Tensor, near: Tensor) -> CalibrationSums:
    """Compare probabilities with references.

    Args:
        probabilities: (B, K, *s), summing to 1 over K.
        reference: (B, *s) classes, 0 to K - 1.
        near: (B, *s) bool, voxels near the organs.

    Raises:
        ValueError: if the grids differ.
    """
    if not (probabilities.shape[:1] + probabilities.shape[2:] == reference.shape == near.shape):
        raise ValueError(
            f"probabilities (B, K, *s), reference and near (B, *s) must have the same grid, got {tuple(probabilities.shape)}, "
            f"{tuple(reference.shape)} and {tuple(near.shape)}"
        )
    true = reference.long()
    confidence, predicted = probabilities.max(1)
    true_probability = probabilities.gather(1, true[:, None])[:, 0]
    squares = (probabilities.square().sum(1) - 2 * true_probability + 1).double()
    place = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    values = torch.stack([torch.ones_like(squares), confidence.double(), (predicted == true).double()])
    bins, totals = [], []
    for region in (near, torch.ones_like(near)):
        columns = [torch.bincount(place[region], value[region], NUM_BINS) for value in values]
        bins.append(torch.stack(columns, dim=1))
        totals.append(squares[region].sum())
    return CalibrationSums(torch.stack(bins).cpu().numpy(), torch.stack(totals).cpu().numpy())


def near_organs(reference: NDArray[Any], spacing_mm: tuple[float, ...]) -> NDArray[np.bool_]:
    """Mark the box around each frame's foreground, `MARGIN_MM` wider on every side; a frame without foreground has none.

    Args:
        reference: Classes (X, Y, Z, T).
        spacing_mm: Voxel size along X, Y and Z.
    """
    near = np.zeros(reference.shape, dtype=np.bool_)
    for frame in range(reference.shape[3]):
        places = np.argwhere(reference[..., frame])  # (n, 3)
        if not len(places):
            continue
        margins = np.array([round(MARGIN_MM / mm) for mm in spacing_mm])
        (x, y, z), (last_x, last_y, last_z) = np.maximum(0, places.min(0) - margins), places.max(0) + margins
        near[x : last_x + 1, y : last_y + 1, z : last_z + 1, frame] = True
    return near


def calibration_row(by_subject: Mapping[str, CalibrationSums]) -> CalibrationRow:
    """Return the `calibration` of a row of `report.json`.

    Returns:
        `num_bins`, `margin_mm`; means over patients of `ece`, `brier` (near the organs), `ece_whole`, `brier_whole`; `by_subject`,
        the same metrics per patient; `reliability`, for each bin near the organs, over all patients: `num_voxels`, mean
        `confidence` and `accuracy`, None for an empty bin.
    """
    figures = {subject: sums.figures() for subject, sums in by_subject.items()}
    names = CalibrationSums.empty().figures()
    total = sum(by_subject.values(), CalibrationSums.empty()).bins[REGIONS.index("near")]
    counts = total[:, _COUNT]

    def means(column: int) -> list[float | None]:
        return [float(value / count) if count else None for value, count in zip(total[:, column], counts, strict=True)]

    return CalibrationRow(
        num_bins=NUM_BINS,
        margin_mm=MARGIN_MM,
        **{name: _mean_present([metrics[name] for metrics in figures.values()]) for name in names},
        by_subject=figures,
        reliability=Reliability(
            num_voxels=counts.astype(int).tolist(),
            confidence=means(_CONFIDENCE),
            accuracy=means(_CORRECT),
        ),
    )


def _mean_present(figures: list[float | None]) -> float | None:
    present = [figure for figure in figures if figure is not None]
    return fmean(present) if present else None
