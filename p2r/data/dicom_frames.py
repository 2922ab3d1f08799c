"""Check of converted multi-frame DICOM: that no slices of different times were mixed, and that their distance is right.

dcm2niix orders the frames of some files by their dimension indices, last index first, whatever the indices mean. Where a
position has several frames, slices of different times may then form one volume, without any warning. So each slice of the
result is looked up among the frames of the file, by its sum and sum of squares, which are invariant to reflection.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray

Signature = tuple[int, int]


def mixes_frames(file: str, images: Sequence[Path]) -> bool:
    """Return whether any slice of a conversion is at another position than its frame in the file.

    Args:
        file: An enhanced multi-frame image.
        images: NIfTI files converted from it.

    Returns:
        Also True if it cannot be checked: frames without positions, or with a compression that is not decoded here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file)
            positions = _read_positions(dataset)
            if len(set(positions)) in (1, len(positions)):
                return False  # every position has one frame, or all frames have one position
            frames = dataset.pixel_array
    except Exception:  # hostile bytes can make pydicom raise anything
        return True
    found: dict[Signature, set[float]] = defaultdict(set)
    for position, frame in zip(positions, frames, strict=True):
        found[_signature(frame)].add(position)
    return not all(_is_in_order(image, found) for image in images)


def slice_distance_mm(file: str) -> float | None:
    """Return the distance between neighbouring slices, from the frame positions of an enhanced image.

    dcm2niix uses the slice thickness instead if the header has no distance.

    Returns:
        None if the frames have several orientations or uneven positions, or if the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            if len(_read_orientations(dataset)) > 1:
                return None
            steps = np.diff(sorted(set(_read_positions(dataset))))
    except Exception:  # hostile bytes can make pydicom raise anything
        return None
    if not len(steps) or np.ptp(steps) > 0.05 * steps.mean():
        return None
    return float(steps.mean())


def _read_orientations(dataset: Any) -> set[tuple[float, ...]]:
    """Return the distinct orientations of the frames, rounded to three decimals."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    frames = dataset.PerFrameFunctionalGroupsSequence
    sources = [frame if "PlaneOrientationSequence" in frame else shared for frame in frames]
    return {
        tuple(round(float(value), 3) for value in source.PlaneOrientationSequence[0].ImageOrientationPatient)
        for source in sources
    }


def _read_positions(dataset: Any) -> list[float]:
    """Return the position of every frame along the normal, in mm, rounded to 0.01 mm."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    positions = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        source = frame if "PlaneOrientationSequence" in frame else shared
        orientation = [float(value) for value in source.PlaneOrientationSequence[0].ImageOrientationPatient]
        place = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
        positions.append(round(float(np.cross(orientation[:3], orientation[3:]) @ place), 2))
    return positions


def _is_in_order(image: Path, found: dict[Signature, set[float]]) -> bool:
    loaded = nibabel.nifti1.Nifti1Image.from_filename(image)
    stored = np.asarray(loaded.dataobj.get_unscaled())
    planes = stored.reshape(*stored.shape[:3], -1)
    along: list[float] = []
    for z in range(planes.shape[2]):
        places = set.intersection(*(found.get(_signature(planes[:, :, z, t]), set()) for t in range(planes.shape[3])))
        if not places:
            return False
        along.append(min(places))
    steps = np.diff(along)
    return bool((steps > 0).all() or (steps < 0).all())


def _signature(plane: NDArray[Any]) -> Signature:
    wide = plane.astype(np.int64)
    return int(wide.sum()), int((wide**2).sum())
