"""Slices of one DICOM acquisition -> one volume, by their positions.

dcm2niix joins the slices of most series, with three exceptions. The first is a cine stored as one series per slice. The second
is several images at one position with times that it does not understand: it then writes 0 mm between slices. The third is dates
or numbers that differ from slice to slice. For these, each position is converted separately and the slices are stacked.

The slices must be evenly spaced along one normal, with the same number of images at each position: nothing is interpolated.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray

from p2r.errors import RefusedScan

PLACE_TAGS = (
    "StudyInstanceUID", "FrameOfReferenceUID", "ImageOrientationPatient", "ImagePositionPatient", "Rows", "Columns", "PixelSpacing",
    "EchoTime", "SeriesDescription",
)  # fmt: skip
"""Tags that `place_of` reads."""

_SAME_PLACE_MM = 0.01
_MAX_UNEVENNESS = 0.05  # as a fraction of the distance between slices
_MAX_GAP_MM = 50.0  # between slices of one acquisition


@dataclass(frozen=True)
class Place:
    """Position of an image, and the tags that it shares with the rest of its acquisition."""

    alike: tuple[str, ...]
    """Equal for all slices of an acquisition. Never stored or logged: a series description may contain a person's name."""
    normal: tuple[float, ...]
    position_mm: tuple[float, ...]
    """Position of the image's corner."""

    @property
    def along_mm(self) -> float:
        """Position along the normal."""
        return float(np.dot(self.normal, self.position_mm))


def place_of(header: Mapping[str, str]) -> Place | None:
    """Return the place of an image from the text of its `PLACE_TAGS`; None if the header does not state it."""
    rows_columns = _parse_numbers(header.get("ImageOrientationPatient", ""))
    position = _parse_numbers(header.get("ImagePositionPatient", ""))
    if len(rows_columns) != 6 or len(position) != 3 or not np.isfinite([*rows_columns, *position]).all():
        return None
    normal = np.cross(rows_columns[:3], rows_columns[3:])
    if not 0.9 < np.linalg.norm(normal) < 1.1:
        return None
    description = re.sub(r"\d+", "", header.get("SeriesDescription", ""))
    others = ("StudyInstanceUID", "FrameOfReferenceUID", "Rows", "Columns", "PixelSpacing", "EchoTime")
    directions = " ".join(f"{value:.3f}" for value in np.add(rows_columns, 0.0))
    return Place(
        (description, directions, *(header.get(name, "") for name in others)), tuple(normal.tolist()), tuple(position)
    )


def is_stack(places: Sequence[Place]) -> bool:
    """Return whether slices are evenly spaced along their normal, each at a different position."""
    ordered = sorted(places, key=lambda place: place.along_mm)
    steps = np.diff([place.position_mm for place in ordered], axis=0)
    if not len(steps):
        return False
    mean, normal = steps.mean(axis=0), np.asarray(places[0].normal)
    gap = float(mean @ normal)
    is_straight = bool(np.linalg.norm(mean - gap * normal) <= _MAX_UNEVENNESS * abs(gap))
    is_even = float(np.abs(steps - mean).max()) <= _MAX_UNEVENNESS * gap
    return _SAME_PLACE_MM < gap <= _MAX_GAP_MM and is_straight and is_even


def by_position(files: Sequence[str], name: str) -> list[list[str]] | None:
    """Group the files of an acquisition by position, sorted; None if positions are not stated, or orientations differ.

    Raises:
        RefusedScan: `uneven_slices` if positions are unevenly spaced, or have different numbers of images.
    """
    places: list[Place] = []
    groups: dict[float, list[str]] = defaultdict(list)
    for file in files:
        place = place_of(header_of(file, *PLACE_TAGS))
        if place is None:
            return None
        same = next((known for known in groups if abs(known - place.along_mm) < _SAME_PLACE_MM), place.along_mm)
        if same not in groups:
            places.append(place)
        groups[same].append(file)
    if len(places) < 2 or len({place.alike[1] for place in places}) > 1:
        return None
    counts = sorted({len(group) for group in groups.values()})
    if len(counts) > 1:
        raise RefusedScan(
            "uneven_slices",
            f"{name} has {counts[0]} images at one position and {counts[-1]} at another: some are missing, or several series are mixed; "
            "copy the series again",
        )
    if not is_stack(places):
        raise RefusedScan(
            "uneven_slices", f"{name} has slices at uneven distances: one may be missing; copy the series again"
        )
    return [groups[along] for along in sorted(groups)]


def sort_slices(images: Sequence[Path]) -> list[Path]:
    """Sort images (X, Y, 1, T) by position along their normal; [] unless they are parallel and evenly spaced."""
    affines = [nibabel.nifti1.Nifti1Image.from_filename(image).affine for image in images]
    normals = [np.cross(affine[:3, 0], affine[:3, 1]) for affine in affines]
    units = [normal / max(float(np.linalg.norm(normal)), 1e-9) for normal in normals]
    if not np.allclose(units, units[0], atol=1e-4):
        return []
    places = [Place((), tuple(units[0].tolist()), tuple(affine[:3, 3].tolist())) for affine in affines]
    if not is_stack(places):
        return []
    return [images[index] for index in np.argsort([place.along_mm for place in places])]


def stack_planes(images: Sequence[Path], output: Path) -> bool:
    """Stack images (X, Y, 1, T) of neighbouring slices into one (X, Y, Z, T), in the given order.

    Returns:
        True if `output` was written; False if an image has several slices, or the grids differ.
    """
    loaded = [nibabel.nifti1.Nifti1Image.from_filename(image) for image in images]
    if len(loaded) < 2:
        return False
    shape = loaded[0].shape
    if len(shape) < 3 or shape[2] != 1 or any(one.shape != shape for one in loaded):
        return False
    affines: NDArray[np.float64] = np.stack([one.affine for one in loaded])
    affine = affines[0].copy()
    affine[:3, 2] = (affines[-1, :3, 3] - affines[0, :3, 3]) / (len(loaded) - 1)
    planes = [np.asarray(one.dataobj).reshape(*shape[:2], 1, -1) for one in loaded]
    stack = nibabel.nifti1.Nifti1Image(np.concatenate(planes, axis=2), affine)
    stack.header.set_xyzt_units("mm", "sec")
    stack.to_filename(output)
    return True


def num_images(files: Sequence[str]) -> int:
    """Return the number of images in files: copies of an image count once, a multi-frame file counts its frames."""
    frames = (header_of(file, "NumberOfFrames")["NumberOfFrames"] for file in unique_files(files))
    return sum(int(number) if number.isdecimal() and len(number) < 7 else 1 for number in frames)


def unique_files(files: Sequence[str]) -> list[str]:
    """Return the files without those that repeat the image of another file."""
    return list({_image_identity(file): file for file in reversed(files)}.values())


def header_of(path: str | Path, *tags: str) -> dict[str, str]:
    """Return tags of a file as text, along with its MediaStorageSOPClassUID; absent tags are empty.

    Raises:
        RefusedScan: `unreadable`.
    """
    try:
        with warnings.catch_warnings():  # the values that matter are checked, so pydicom's warnings are noise
            warnings.simplefilter("ignore")
            # Some DICOM files lack the preamble.
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(tags))
            found = {tag: header.get(tag) for tag in tags}
            found["MediaStorageSOPClassUID"] = header.file_meta.get("MediaStorageSOPClassUID")
            return {tag: "" if value is None else str(value).strip() for tag, value in found.items()}
    except Exception as error:  # hostile bytes can make pydicom raise anything
        raise RefusedScan("unreadable", f"{path} has no readable DICOM header ({type(error).__name__})") from error


def _image_identity(file: str) -> tuple[str, str]:
    # The position is needed as well: some exports give all images of a series the same UID.
    header = header_of(file, "SOPInstanceUID", "ImagePositionPatient")
    return header["SOPInstanceUID"] or file, header["ImagePositionPatient"]


def _parse_numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in re.findall(r"[-+.\deE]+", text)]
    except ValueError:
        return []
