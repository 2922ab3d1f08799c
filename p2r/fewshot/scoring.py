"""A segmenter and the scans of a split -> figures: of all, and of every case, with what it predicted.

A case is what is predicted and compared at once: all frames of a scan; or, with `paper_compat`, one frame, cropped by its
label. References are read here and in training only; nothing of a case but its images reaches the segmenter.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.data.preprocess import Frames, Planes, Preparation, slice_axis, volume_to_planes
from p2r.data.volume import Volume
from p2r.evaluate.calibration import CalibrationSums, calibration_row, calibration_sums, near_organs
from p2r.evaluate.inference import predict_images, predict_probabilities, size_read
from p2r.evaluate.metrics import (
    Score,
    Summary,
    dice_by_thirds,
    largest_components,
    score_volume,
    soft_dice_with_background,
    summarise,
)
from p2r.evaluate.prepared import prepared_scan
from p2r.evaluate.tasks import Task, TaskScan
from p2r.fewshot.paper_compat import Crop, cropped


@dataclass(frozen=True)
class Case:
    """What is predicted and compared at once."""

    scan: TaskScan
    frames: tuple[int, ...]
    images: Planes | Frames
    reference: NDArray[np.int16]
    """(X, Y, Z, T), T being the number of `frames`."""
    volume: Volume
    """Of the whole scan."""
    places: tuple[NDArray[np.int64], ...] | None = None
    """Of each axis of the whole scan, the voxels that `reference` holds; None: all."""


@dataclass(frozen=True)
class Scored:
    """The figures of a split."""

    summary: Summary
    cases: tuple[dict[str, Any], ...]
    """As they stand in a row of `report.json`."""
    predictions: Mapping[str, NDArray[np.uint8]]
    """Labels (X, Y, Z, T) on each scan's own grid, by the scan's key."""
    soft_dice_with_background: float | None
    """Mean over patients, with paper_compat only."""
    calibration: dict[str, Any] | None
    """The `calibration` of a row of `report.json`, if it was asked for."""


def cases_of(scans: Sequence[TaskScan], task: Task, preparation: Preparation, *, is_cropped: bool) -> Iterator[Case]:
    """Yield the cases of some scans; `is_cropped`: as paper_compat has them."""
    size = size_read(preparation)
    for scan in scans:
        if is_cropped:
            for crop in cropped(prepared_scan(scan, task, preparation), preparation, size=size):
                yield case_of_crop(crop)
        else:
            loaded = prepared_scan(scan, task, preparation, size=size)
            frames = tuple(range(loaded.labels.data.shape[3]))
            yield Case(scan, frames, loaded.planes, loaded.labels.data, loaded.volume)


def case_of_crop(crop: Crop) -> Case:
    """Return the case of a frame that was cropped by its label."""
    scan = crop.scan
    return Case(scan.scan, (crop.frame,), scan.planes, scan.labels.data, crop.whole, crop.places)


def score_cases(
    segmenter: nn.Module,
    cases: Iterable[Case],
    task: Task,
    preparation: Preparation,
    *,
    nsd_tolerance_mm: float | None,
    largest_component: bool,
    device: str,
    is_calibrated: bool = False,
    see: Callable[[Case], None] = lambda case: None,
) -> Scored:
    """Predict and compare.

    Args:
        segmenter: On `device`.
        cases: One after the other.
        task: Theirs.
        preparation: What the segmenter expects of a scan.
        nsd_tolerance_mm: Of the normalised surface Dice; None: Dice alone.
        largest_component: Keep the largest connected part of each predicted class alone.
        device: Where the segmenter runs.
        is_calibrated: Compute calibration, too (`p2r.evaluate.calibration`).
        see: Called with every case before it is predicted; it may refuse it.
    """
    scores: list[tuple[str, dict[str, Score]]] = []
    rows: list[dict[str, Any]] = []
    predictions: dict[str, NDArray[np.uint8]] = {}
    soft: dict[str, list[float]] = {}
    calibration: dict[str, CalibrationSums] = {}
    for case in cases:
        see(case)
        subject = case.scan.subject
        tally = _Calibration(case) if is_calibrated else None
        prediction, probabilities = _predicted(segmenter, case, task, preparation, largest_component, device, tally)
        if tally is not None:
            calibration[subject] = calibration.get(subject, CalibrationSums.empty()) + tally.sums
        axis = (
            case.images.axis
            if isinstance(case.images, Planes)
            else slice_axis(case.volume.spacing_mm, shape=case.volume.data.shape)
        )
        for index, frame in enumerate(case.frames):
            found, true = prediction[..., index], case.reference[..., index]
            of_frame = score_volume(
                found,
                true,
                classes=task.config.classes,
                spacing_mm=case.volume.spacing_mm,
                nsd_tolerance_mm=nsd_tolerance_mm,
            )
            scores.append((subject, of_frame))
            rows.append(
                {
                    "subject": subject,
                    "scan": case.scan.key,
                    "frame": frame,
                    "stratum": task.strata.get(subject),
                    "scores": {name: asdict(score) for name, score in of_frame.items()},
                    "thirds": dice_by_thirds(found, true, classes=task.config.classes, axis=axis),
                }
            )
            if probabilities is not None:
                of_classes = torch.from_numpy(probabilities[..., index, :]).movedim(-1, 0)
                figure = soft_dice_with_background(of_classes, torch.from_numpy(true).long())
                soft.setdefault(subject, []).append(figure)
        _put(prediction, case, predictions)
    soft_dice = fmean(fmean(of_subject) for of_subject in soft.values()) if soft else None
    calibrated = calibration_row(calibration) if is_calibrated else None
    return Scored(summarise(scores), tuple(rows), predictions, soft_dice, calibrated)


class _Calibration:
    """Compares the probabilities of a case with its reference, some images at a time."""

    def __init__(self, case: Case) -> None:
        near = near_organs(case.reference, case.volume.spacing_mm)
        self._reference, self._near = (_as_images(maps, case.images) for maps in (case.reference, near))
        self.sums = CalibrationSums.empty()

    def see(self, probabilities: Tensor, first: int) -> None:
        images = slice(first, first + len(probabilities))
        self.sums += calibration_sums(probabilities.cpu(), self._reference[images], self._near[images])


def _as_images(maps: NDArray[Any], images: Planes | Frames) -> Tensor:
    """Cut maps (X, Y, Z, T) as the images of their scan are cut, on the scan's own voxels."""
    cut = volume_to_planes(maps, images.axis) if isinstance(images, Planes) else np.moveaxis(maps, 3, 0)
    return torch.from_numpy(np.ascontiguousarray(cut))


def _predicted(
    segmenter: nn.Module,
    case: Case,
    task: Task,
    preparation: Preparation,
    largest_component: bool,
    device: str,
    tally: _Calibration | None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    options: dict[str, Any] = {"preparation": preparation, "num_classes": task.num_classes, "device": device}
    if case.places is None:
        see = None if tally is None else tally.see
        return predict_images(segmenter, case.images, largest_component=largest_component, see=see, **options), None
    probabilities = predict_probabilities(segmenter, case.images, **options)
    if tally is not None:
        images = [_as_images(probabilities[..., value], case.images) for value in range(task.num_classes)]
        tally.see(torch.stack(images, dim=1), 0)
    labels = probabilities.argmax(-1).astype(np.uint8)
    return largest_components(labels, classes=task.config.classes) if largest_component else labels, probabilities


def _put(prediction: NDArray[np.uint8], case: Case, predictions: dict[str, NDArray[np.uint8]]) -> None:
    """Put what was predicted where it lies in the whole scan; where nothing was read, there is background."""
    if case.places is None:
        predictions[case.scan.key] = prediction
        return
    whole = predictions.setdefault(case.scan.key, np.zeros(case.volume.data.shape, np.uint8))
    whole[..., case.frames[0]][np.ix_(*case.places)] = prediction[..., 0]


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a compressed `.npz`, for `np.load(..., allow_pickle=False)`; equal arrays are equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # of 1980: no clock
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w") as part:
                np.lib.format.write_array(part, array, allow_pickle=False)
    return file.getvalue()
