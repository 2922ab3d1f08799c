"""A segmenter and the scans of a split -> metrics, overall and for every case, and the predictions.

A case is the unit of prediction: all frames of a scan; or, with `paper_compat`, one frame, cropped by its label. References
are read only here and in training; the segmenter gets nothing but the images of a case.
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
from p2r.evaluate.rows import CalibrationRow, CaseRow, CaseScore
from p2r.evaluate.tasks import Task, TaskScan
from p2r.fewshot.paper_compat import Crop, cropped


@dataclass(frozen=True)
class Case:
    """Unit of prediction and comparison."""

    scan: TaskScan
    frames: tuple[int, ...]
    images: Planes | Frames
    reference: NDArray[np.int16]
    """(X, Y, Z, T), with T the number of `frames`."""
    volume: Volume
    """The whole scan; with several contrasts, the one whose grid all have."""
    volumes: tuple[Volume, ...]
    """The whole scans of all contrasts."""
    places: tuple[NDArray[np.int64], ...] | None = None
    """Voxel indices of `reference` along each axis of the whole scan; None: all."""


@dataclass(frozen=True)
class Scored:
    """Metrics of a split."""

    summary: Summary
    cases: tuple[CaseRow, ...]
    predictions: Mapping[str, NDArray[np.uint8]]
    """Labels (X, Y, Z, T) on each scan's own grid, by the scan's key."""
    soft_dice_with_background: float | None
    """Mean over patients, only with paper_compat."""
    calibration: CalibrationRow | None
    """If requested."""


def cases_of(scans: Sequence[TaskScan], task: Task, preparation: Preparation, *, is_cropped: bool) -> Iterator[Case]:
    """Yield the cases of scans; with `is_cropped`, cropped as in paper_compat."""
    size = size_read(preparation)
    for scan in scans:
        if is_cropped:
            for crop in cropped(prepared_scan(scan, task, preparation), preparation, size=size):
                yield case_of_crop(crop)
        else:
            loaded = prepared_scan(scan, task, preparation, size=size)
            frames = tuple(range(loaded.labels.data.shape[3]))
            yield Case(scan, frames, loaded.planes, loaded.labels.data, loaded.volume, loaded.volumes)


def case_of_crop(crop: Crop) -> Case:
    """Return the case of a frame cropped by its label."""
    scan = crop.scan
    return Case(scan.scan, (crop.frame,), scan.planes, scan.labels.data, crop.whole, (crop.whole,), crop.places)


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
    """Predict all cases and compare them with their references.

    Args:
        segmenter: Segmenter on `device`.
        cases: Cases, read one after another.
        task: Task of the cases.
        preparation: Preparation of scans for the segmenter.
        nsd_tolerance_mm: Tolerance of the normalised surface Dice; None: only Dice.
        largest_component: Keep only the largest connected component of each predicted class.
        device: Device of the segmenter.
        is_calibrated: Also compute calibration (`p2r.evaluate.calibration`).
        see: Called with every case before its prediction; it may raise an error to refuse the case.
    """
    scores: list[tuple[str, dict[str, Score]]] = []
    rows: list[CaseRow] = []
    predictions: dict[str, NDArray[np.uint8]] = {}
    soft: dict[str, list[float]] = {}
    calibration: dict[str, CalibrationSums] = {}
    for case in cases:
        see(case)
        subject = case.scan.subject
        tally = _CalibrationTally(case) if is_calibrated else None
        prediction, probabilities = _predict_case(segmenter, case, task, preparation, largest_component, device, tally)
        if tally is not None:
            calibration[subject] = calibration.get(subject, CalibrationSums.empty()) + tally.sums
        axis = (
            case.images.axis
            if isinstance(case.images, Planes)
            else slice_axis(case.volume.spacing_mm, shape=case.volume.data.shape)
        )
        for index, frame in enumerate(case.frames):
            found, true = prediction[..., index], case.reference[..., index]
            frame_scores = score_volume(
                found,
                true,
                classes=task.config.classes,
                spacing_mm=case.volume.spacing_mm,
                nsd_tolerance_mm=nsd_tolerance_mm,
            )
            scores.append((subject, frame_scores))
            rows.append(
                CaseRow(
                    subject=subject,
                    scan=case.scan.key,
                    frame=frame,
                    stratum=task.strata.get(subject),
                    scores={name: CaseScore.model_validate(asdict(one)) for name, one in frame_scores.items()},
                    thirds=dice_by_thirds(found, true, classes=task.config.classes, axis=axis),
                )
            )
            if probabilities is not None:
                class_maps = torch.from_numpy(probabilities[..., index, :]).movedim(-1, 0)
                frame_dice = soft_dice_with_background(class_maps, torch.from_numpy(true).long())
                soft.setdefault(subject, []).append(frame_dice)
        _store_prediction(prediction, case, predictions)
    soft_dice = fmean(fmean(frame_dices) for frame_dices in soft.values()) if soft else None
    calibrated = calibration_row(calibration) if is_calibrated else None
    return Scored(summarise(scores), tuple(rows), predictions, soft_dice, calibrated)


class _CalibrationTally:
    """Calibration sums of a case, updated a few images at a time."""

    def __init__(self, case: Case) -> None:
        near = near_organs(case.reference, case.volume.spacing_mm)
        self._reference, self._near = (_cut_like_images(maps, case.images) for maps in (case.reference, near))
        self.sums = CalibrationSums.empty()

    def see(self, probabilities: Tensor, first: int) -> None:
        images = slice(first, first + len(probabilities))
        self.sums += calibration_sums(probabilities.cpu(), self._reference[images], self._near[images])


def _cut_like_images(maps: NDArray[Any], images: Planes | Frames) -> Tensor:
    """Cut maps (X, Y, Z, T) like the images of their scan, on the scan's own voxels."""
    cut = volume_to_planes(maps, images.axis) if isinstance(images, Planes) else np.moveaxis(maps, 3, 0)
    return torch.from_numpy(np.ascontiguousarray(cut))


def _predict_case(
    segmenter: nn.Module,
    case: Case,
    task: Task,
    preparation: Preparation,
    largest_component: bool,
    device: str,
    tally: _CalibrationTally | None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    if case.places is None:
        predicted = predict_images(
            segmenter,
            case.images,
            preparation=preparation,
            num_classes=task.num_classes,
            device=device,
            largest_component=largest_component,
            see=None if tally is None else tally.see,
        )
        return predicted, None
    probabilities = predict_probabilities(
        segmenter, case.images, preparation=preparation, num_classes=task.num_classes, device=device
    )
    if tally is not None:
        images = [_cut_like_images(probabilities[..., value], case.images) for value in range(task.num_classes)]
        tally.see(torch.stack(images, dim=1), 0)
    labels = probabilities.argmax(-1).astype(np.uint8)
    return largest_components(labels, classes=task.config.classes) if largest_component else labels, probabilities


def _store_prediction(prediction: NDArray[np.uint8], case: Case, predictions: dict[str, NDArray[np.uint8]]) -> None:
    """Insert the prediction at its position in the whole scan, which is background elsewhere."""
    if case.places is None:
        predictions[case.scan.key] = prediction
        return
    whole = predictions.setdefault(case.scan.key, np.zeros(case.volume.data.shape, np.uint8))
    whole[..., case.frames[0]][np.ix_(*case.places)] = prediction[..., 0]


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a compressed `.npz`, for `np.load(..., allow_pickle=False)`; equal arrays give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, for reproducible bytes
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w") as part:
                np.lib.format.write_array(part, array, allow_pickle=False)
    return file.getvalue()
