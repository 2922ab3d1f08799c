"""One segmented scan and its reference -> Dice, HD95 and NSD per class; many scans -> means over patients.

    prediction, reference (X, Y, Z) on the scan's own grid -> {class: Score} -> Summary

MONAI measures; the rules for absent classes are ours, because MONAI answers NaN or infinity there and its mean drops
NaN, so that a model which finds nothing would look better than one which finds a little:

    absent in         Dice   NSD   HD95
    both              left out of every mean, and counted
    one of the two    0      0     the grid's diagonal, mm

Dice is hard and in 3D. HD95 is the larger of the two directed 95th percentiles of distances between border voxels, mm.
NSD is the fraction of both borders' voxels that lie within the tolerance of the other border. Borders are voxels that a
3D erosion removes, so that with thick slices the first and the last slice of an organ are border as a whole.

`soft_dice_with_background` is no such figure: it is what published code calls Dice, for comparison with it alone.
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
    """One class of one scan. The three figures are None where the class is absent in both; HD95 and NSD, if not asked for."""

    dice: float | None
    hd95_mm: float | None
    nsd: float | None
    absent: Absent


@dataclass(frozen=True)
class Summary:
    """Means over patients; None where no patient has the class, in prediction or reference."""

    dice: dict[str, float | None]
    hd95_mm_by_class: dict[str, float | None]
    nsd_by_class: dict[str, float | None]
    dice_mean: float | None
    hd95_mm: float | None
    nsd: float | None
    dice_by_subject: dict[str, float | None]
    absent: dict[str, dict[str, int]]
    """For each class, in how many scans it is absent in both, only in the prediction, only in the reference."""
    num_test_subjects: int
    num_scans: int

    def to_row(self) -> dict[str, Any]:
        """Return the figures as they stand in a row of `report.json`."""
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
        nsd_tolerance_mm: Largest distance of borders that NSD calls equal, mm. None: Dice alone, in a third less time.

    Raises:
        ValueError: for grids that differ or are not 3D, values that are no class, or a spacing that is not positive.
    """
    _check_grids(prediction, reference)
    if len(spacing_mm) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive numbers, got {list(spacing_mm)}")
    for name, labels in (("prediction", prediction), ("reference", reference)):
        unknown = sorted(set(np.unique(labels).tolist()) - {0, *classes})
        if unknown:
            raise ValueError(f"{name} holds labels {unknown}, which are no class of {dict(classes)}")
    diagonal_mm = math.hypot(*(size * mm for size, mm in zip(prediction.shape, spacing_mm, strict=True)))
    scores = {}
    for value, name in classes.items():
        found, true = torch.from_numpy(prediction == value), torch.from_numpy(reference == value)
        in_prediction, in_reference = bool(found.any()), bool(true.any())
        if in_prediction and in_reference:
            scores[name] = _measure(found, true, spacing_mm=spacing_mm, tolerance_mm=nsd_tolerance_mm)
        elif in_prediction or in_reference:
            hd95_mm, nsd = (None, None) if nsd_tolerance_mm is None else (diagonal_mm, 0.0)
            scores[name] = Score(0.0, hd95_mm, nsd, absent="reference" if in_prediction else "prediction")
        else:
            scores[name] = Score(None, None, None, absent="both")
    return scores


def _measure(found: Tensor, true: Tensor, *, spacing_mm: Sequence[float], tolerance_mm: float | None) -> Score:
    # One crop around both masks: MONAI would make a dense copy of the whole grid for every figure.
    nonzero = (found | true).nonzero()
    low, high = nonzero.amin(dim=0), nonzero.amax(dim=0) + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    y_pred, y = found[box][None, None].float(), true[box][None, None].float()  # (1, 1, x, y, z)
    spacing = [float(mm) for mm in spacing_mm]
    with warnings.catch_warnings():
        # MONAI 1.6 passes this argument to itself and warns of it once per figure.
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
            f"prediction and reference must share one 3D grid, got {prediction.shape} and {reference.shape}"
        )


def dice_by_thirds(
    prediction: NDArray[Any], reference: NDArray[Any], *, classes: Mapping[int, str], axis: int
) -> dict[str, list[float | None]]:
    """Return hard Dice in the lower, middle and upper third of the organs: where along the slices a model fails.

    The slices in which the reference holds any class are parted by their middles: of 5, two are lower, one is middle, two
    are upper; a single one is middle. Other slices count nowhere, so three good thirds do not rule out a bad volume.

    Args:
        prediction: Labels (X, Y, Z), whole numbers; 0 is background.
        reference: Labels on the same grid.
        classes: Name of each foreground label.
        axis: Across which slices lie; the lower third has the smaller indices: the left, posterior or inferior in RAS.

    Returns:
        For each class three figures; None where neither holds the class in that third.
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
    """Return Dice in the manner of the released code of Pix2Rep: of probabilities, with the background as a class.

    It rewards large backgrounds and is not hard Dice: only `paper_compat` reports it, to compare with published figures.

    Args:
        probabilities: (K, *S) of one volume or slice, channel 0 the background.
        reference: (*S) labels 0 to K - 1.

    Returns:
        The mean over all K classes of (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5); 1 for a class that nobody has.
    """
    if probabilities.shape[1:] != reference.shape:
        raise ValueError(
            f"probabilities (K, *S) and reference (*S) must share one grid, got {tuple(probabilities.shape)} and "
            f"{tuple(reference.shape)}"
        )
    loss = DiceLoss(include_background=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5)
    return 1.0 - float(loss(probabilities[None].float(), reference[None, None]))


def largest_components(labels: NDArray[Any], *, classes: Iterable[int]) -> NDArray[Any]:
    """Keep the largest connected part of each class and make the rest background.

    Voxels that share a corner are connected. Of equally large parts the one that comes first along the axes stays. It is
    an option after prediction, off by default: it looks at no reference, but presumes that an organ is in one piece.

    Args:
        labels: (X, Y, Z), or (X, Y, Z, T), whose frames are cleaned one by one.
        classes: Labels to clean; others stay as they are.

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
        scores: Pairs of subject and that scan's scores; a subject may come several times (end-diastole, end-systole).

    Returns:
        The means; `dice_mean`, `hd95_mm` and `nsd` are means of the classes' means.
    """
    by_subject: dict[str, list[Mapping[str, Score]]] = {}
    for subject, scan in scores:
        by_subject.setdefault(subject, []).append(scan)
    if not by_subject:
        raise ValueError("there are no scores to summarise")
    scans = [scan for of_subject in by_subject.values() for scan in of_subject]
    classes = list(scans[0])
    if any(list(scan) != classes for scan in scans):
        raise ValueError(f"every scan must be scored on the same classes {classes}")

    def mean_over_patients(figure: str) -> dict[str, float | None]:
        return {
            name: _mean(_mean(getattr(scan[name], figure) for scan in of_subject) for of_subject in by_subject.values())
            for name in classes
        }

    dice, hd95_mm, nsd = (mean_over_patients(figure) for figure in ("dice", "hd95_mm", "nsd"))
    return Summary(
        dice=dice,
        dice_mean=_mean(dice.values()),
        hd95_mm=_mean(hd95_mm.values()),
        nsd=_mean(nsd.values()),
        hd95_mm_by_class=hd95_mm,
        nsd_by_class=nsd,
        dice_by_subject={
            subject: _mean(_mean(scan[name].dice for scan in of_subject) for name in classes)
            for subject, of_subject in by_subject.items()
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


def _mean(figures: Iterable[float | None]) -> float | None:
    present = [figure for figure in figures if figure is not None]
    return fmean(present) if present else None
