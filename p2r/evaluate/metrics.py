"""One segmented scan and its reference -> Dice, HD95 and NSD per class; many scans -> means over patients.

    prediction, reference (X, Y, Z) on the scan's own grid -> {class: Score} -> Summary

MONAI computes the metrics. The rules for absent classes are p2r's own: MONAI returns NaN or infinity there, and its mean
drops NaN, so that a model without any prediction would score better than a model with a poor one:

    absent in         Dice   NSD   HD95
    both              left out of every mean, and counted
    one of the two    0      0     the grid's diagonal, mm

Dice is hard and in 3D. HD95 is the larger of the two directed 95th percentiles of distances between border voxels, mm.
NSD is the fraction of both borders' voxels within the tolerance of the other border. Borders are voxels removed by a 3D
erosion, so with thick slices the first and the last slice of an organ are entirely border.

`soft_dice_with_background` is not one of these metrics. It reproduces the Dice of published code, for comparison only.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Absent = Literal["none", "both", "prediction", "reference"]


@dataclass(frozen=True)
class Score:
    """Scores of one class of one scan; None if the class is absent in both. HD95 and NSD are also None if not requested."""

    dice: float | None
    hd95_mm: float | None
    nsd: float | None
    absent: Absent


@dataclass(frozen=True)
class Summary:
    """Means over patients; None if no patient has the class in prediction or reference."""

    dice: dict[str, float | None]
    hd95_mm_by_class: dict[str, float | None]
    nsd_by_class: dict[str, float | None]
    dice_mean: float | None
    hd95_mm: float | None
    nsd: float | None
    dice_by_subject: dict[str, float | None]
    absent: dict[str, dict[str, int]]
    """For each class, the number of scans where it is absent in both, only in the prediction, or only in the reference."""
    num_test_subjects: int
    num_scans: int

    def to_row(self) -> dict[str, object]:
        """Return the metrics as in a row of `report.json`."""
        return asdict(self)


def score_volume(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    *,
    classes: Mapping[int, str],
    spacing_mm: Sequence[float],
    nsd_tolerance_mm: float | None,
) -> dict[str, Score]:
    """Compare one segmentation with its reference.

    Args:
        prediction: Labels (X, Y, Z), whole numbers; 0 is background.
        reference: Labels on the same grid.
        classes: Name of each foreground label.
        spacing_mm: Voxel size along the three axes, mm.
        nsd_tolerance_mm: Distance up to which NSD counts borders as equal, mm. None: only Dice, in a third less time.

    Raises:
        ValueError: if the grids differ or are not 3D, a value is not a class, or a spacing is not positive.
    """
    _check_grids(prediction, reference)
    if len(spacing_mm) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive numbers, got {list(spacing_mm)}")
    for name, labels in (("prediction", prediction), ("reference", reference)):
        unknown = sorted(set(np.unique(labels).tolist()) - {0, *classes})
        if unknown:
            raise ValueError(f"{name} holds labels {unknown}, which are not classes of {dict(classes)}")
    diagonal_mm = math.hypot(*(size * mm for size, mm in zip(prediction.shape, spacing_mm, strict=True)))
    scores = {}
    for value, name in classes.items():
        found, true = torch.from_numpy(prediction == value), torch.from_numpy(reference == value)
        in_prediction, in_reference = bool(found.any()), bool(true.any())
        if in_prediction and in_reference:
            scores[name] = _score_masks(found, true, spacing_mm=spacing_mm, tolerance_mm=nsd_tolerance_mm)
        elif in_prediction or in_reference:
            hd95_mm, nsd = (None, None) if nsd_tolerance_mm is None else (diagonal_mm, 0.0)
            scores[name] = Score(0.0, hd95_mm, nsd, absent="reference" if in_prediction else "prediction")
        else:
            scores[name] = Score(None, None, None, absent="both")
    return scores


def _score_masks(found: Tensor, true: Tensor, *, spacing_mm: Sequence[float], tolerance_mm: float | None) -> Score:
    # Crop around both masks, because MONAI makes a dense copy of the grid for every metric.
    nonzero = (found | true).nonzero()
    low, high = nonzero.amin(dim=0), nonzero.amax(dim=0) + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    y_pred, y = found[box][None, None].float(), true[box][None, None].float()  # (1, 1, x, y, z)
    spacing = [float(mm) for mm in spacing_mm]
    with warnings.catch_warnings():
        # MONAI 1.6 passes this argument itself, and warns about it for every metric.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        dice = compute_dice(y_pred, y, include_background=True)
        if tolerance_mm is None:
            return Score(float(dice.item()), None, None, absent="none")
        hd95_mm = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(y_pred, y, [float(tolerance_mm)], include_background=True, spacing=spacing)
    figures = [float(figure.item()) for figure in (dice, hd95_mm, nsd)]
    if not all(math.isfinite(figure) for figure in figures):
        raise ValueError(f"MONAI gave {figures} (Dice, HD95, NSD) although both masks hold voxels")
    return Score(figures[0], figures[1], figures[2], absent="none")


def _check_grids(prediction: NDArray[Any], reference: NDArray[Any]) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction and reference must have the same 3D grid, got {prediction.shape} and {reference.shape}"
        )


def dice_by_thirds(
    prediction: NDArray[Any], reference: NDArray[Any], *, classes: Mapping[int, str], axis: int
) -> dict[str, list[float | None]]:
    """Return hard Dice in the lower, middle and upper third of the organs, to locate failures along the slices.

    The slices in which the reference has any class are divided by their centres: of 5 slices, two are lower, one is middle,
    two are upper; a single slice is middle. Other slices are ignored, so a bad volume may have three good thirds.

    Args:
        prediction: Labels (X, Y, Z), whole numbers; 0 is background.
        reference: Labels on the same grid.
        classes: Name of each foreground label.
        axis: Axis perpendicular to the slices. The lower third has the smaller indices: left, posterior or inferior in RAS.

    Returns:
        Three Dice values per class; None where neither map has the class in that third.
    """
    _check_grids(prediction, reference)
    others = tuple(other for other in range(3) if other != axis)
    slices = np.flatnonzero(np.isin(reference, list(classes)).any(axis=others))
    third_of = (3 * (np.arange(len(slices)) + 0.5) / max(1, len(slices))).astype(np.int64)
    found: dict[str, list[float | None]] = {name: [] for name in classes.values()}
    for third in range(3):
        chosen = slices[third_of == third]
        ours, theirs = (labels.take(chosen, axis=axis) for labels in (prediction, reference))
        for value, name in classes.items():
            voxels = int((ours == value).sum()) + int((theirs == value).sum())
            shared = int(((ours == value) & (theirs == value)).sum())
            found[name].append(2 * shared / voxels if voxels else None)
    return found


def soft_dice_with_background(probabilities: Tensor, reference: Tensor) -> float:
    """Compute Dice as in the released code of Pix2Rep: of probabilities, with the background as a class.

    It rewards large backgrounds and is not hard Dice. Only `paper_compat` reports it, to compare with published results.

    Args:
        probabilities: (K, *S) of one volume or slice; channel 0 is the background.
        reference: (*S) labels 0 to K - 1.

    Returns:
        The mean over all K classes of (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5); 1 for a class absent in both.
    """
    if probabilities.shape[1:] != reference.shape:
        raise ValueError(
            f"probabilities (K, *S) and reference (*S) must have the same grid, got {tuple(probabilities.shape)} and "
            f"{tuple(reference.shape)}"
        )
    loss = DiceLoss(include_background=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5)
    return 1.0 - float(loss(probabilities[None].float(), reference[None, None]))


def largest_components(labels: NDArray[Any], *, classes: Iterable[int]) -> NDArray[Any]:
    """Keep the largest connected component of each class, and turn the rest into background.

    Voxels with a common corner are connected. Of equally large components, the first along the axes stays. This postprocessing
    is off by default: it uses no reference, but assumes that an organ is in one piece.

    Args:
        labels: (X, Y, Z), or (X, Y, Z, T), whose frames are cleaned one by one.
        classes: Labels to clean; other labels stay unchanged.

    Returns:
        A new array of the same type.
    """
    if labels.ndim not in (3, 4):
        raise ValueError(f"labels must be (X, Y, Z) or (X, Y, Z, T), got {labels.shape}")
    cleaned = labels.copy()
    for frame in (cleaned,) if labels.ndim == 3 else np.moveaxis(cleaned, 3, 0):  # views
        for value in classes:
            parts, num_parts = ndimage.label(frame == value, structure=np.ones((3, 3, 3)))
            if num_parts > 1:
                sizes = np.bincount(parts.ravel())[1:]
                frame[(parts > 0) & (parts != 1 + int(sizes.argmax()))] = 0
    return cleaned


def summarise(scores: Iterable[tuple[str, Mapping[str, Score]]]) -> Summary:
    """Average frames within a patient, then patients, class by class.

    Args:
        scores: Pairs of a subject and the scores of one scan; a subject may have several scans (end-diastole, end-systole).

    Returns:
        The means; `dice_mean`, `hd95_mm` and `nsd` are means of the class means.
    """
    by_subject: dict[str, list[Mapping[str, Score]]] = {}
    for subject, scan in scores:
        by_subject.setdefault(subject, []).append(scan)
    if not by_subject:
        raise ValueError("there are no scores to summarise")
    scans = [scan for subject_scans in by_subject.values() for scan in subject_scans]
    classes = list(scans[0])
    if any(list(scan) != classes for scan in scans):
        raise ValueError(f"every scan must be scored on the same classes {classes}")

    def mean_over_patients(metric: str) -> dict[str, float | None]:
        return {
            name: _mean_present(
                _mean_present(getattr(scan[name], metric) for scan in subject_scans)
                for subject_scans in by_subject.values()
            )
            for name in classes
        }

    dice, hd95_mm, nsd = (mean_over_patients(metric) for metric in ("dice", "hd95_mm", "nsd"))
    return Summary(
        dice=dice,
        dice_mean=_mean_present(dice.values()),
        hd95_mm=_mean_present(hd95_mm.values()),
        nsd=_mean_present(nsd.values()),
        hd95_mm_by_class=hd95_mm,
        nsd_by_class=nsd,
        dice_by_subject={
            subject: _mean_present(_mean_present(scan[name].dice for scan in subject_scans) for name in classes)
            for subject, subject_scans in by_subject.items()
        },
        absent={
            name: {
                where: sum(scan[name].absent == where for scan in scans)
                for where in get_args(Absent)
                if where != "none"
            }
            for name in classes
        },
        num_test_subjects=len(by_subject),
        num_scans=len(scans),
    )


def _mean_present(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None
