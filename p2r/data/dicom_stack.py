"""Slices of one DICOM acquisition -> one volume, where their positions say how they lie.

dcm2niix joins the slices of most series. It does not where a cine is stored as one series for each slice, where several
images of a series have one position and times that it does not understand (it then writes 0 mm between slices), or where
dates or numbers differ from slice to slice. Then each position is converted on its own, and the planes are put together.

All must lie evenly along one normal, and each position must have equally many images: nothing is interpolated or guessed.
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
_UNEVEN = 0.05  # of the distance between slices
_MAX_GAP_MM = 50.0  # between slices of one acquisition


@dataclass(frozen=True)
class Place:
    """Where an image is, and which others may belong to its acquisition."""

    alike: tuple[str, ...]
    """Equal for all slices of an acquisition. It never leaves memory: the description of a series may name somebody."""
    normal: tuple[float, ...]
    position_mm: tuple[float, ...]
    """Of the image's corner."""

    @property
    def along_mm(self) -> float:
        """Position along the normal."""
        return float(np.dot(self.normal, self.position_mm))


def place_of(header: Mapping[str, str]) -> Place | None:
    """Return the place of an image from `PLACE_TAGS` as text; None if the header does not say it."""
    rows_columns = _numbers(header.get("ImageOrientationPatient", ""))
    position = _numbers(header.get("ImagePositionPatient", ""))
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
    """Tell whether slices lie evenly along their normal, each at a position of its own."""
    ordered = sorted(places, key=lambda place: place.along_mm)
    steps = np.diff([place.position_mm for place in ordered], axis=0)
    if not len(steps):
        return False
    mean, normal = steps.mean(axis=0), np.asarray(places[0].normal)
    gap = float(mean @ normal)
    is_straight = bool(np.linalg.norm(mean - gap * normal) <= _UNEVEN * abs(gap))
    return _SAME_PLACE_MM < gap <= _MAX_GAP_MM and is_straight and float(np.abs(steps - mean).max()) <= _UNEVEN * gap


def by_position(files: Sequence[str], name: str) -> list[list[str]] | None:
    """Sort the files of an acquisition by position; None where they do not state one, or lie in several orientations.

    Raises:
        RefusedScan: `uneven_slices` if positions are uneven, or have unequal numbers of images.
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
            "copy it again",
        )
    if not is_stack(places):
        raise RefusedScan("uneven_slices", f"{name} has slices at uneven distances: is one missing? Copy it again")
    return [groups[along] for along in sorted(groups)]


def in_order(images: Sequence[Path]) -> list[Path]:
    """Sort images (X, Y, 1, T) by position along their normal; [] if they do not lie evenly along one."""
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
    """Put images (X, Y, 1, T) of neighbouring slices together to one (X, Y, Z, T), in the order given.

    Returns:
        Whether `output` was written: not if an image has several planes, or their grids differ.
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
    """Return how many images some files hold, a copy of one counted once, a file of several frames by its frames."""
    frames = (header_of(file, "NumberOfFrames")["NumberOfFrames"] for file in unique_files(files))
    return sum(int(number) if number.isdecimal() and len(number) < 7 else 1 for number in frames)


def unique_files(files: Sequence[str]) -> list[str]:
    """Return the files without copies of an image that another one holds."""
    return list({_identity(file): file for file in reversed(files)}.values())


def header_of(path: str | Path, *tags: str) -> dict[str, str]:
    """Return some tags of a file as text, and the kind of the file; empty where they are absent.

    Raises:
        RefusedScan: `unreadable`.
    """
    try:
        with warnings.catch_warnings():  # odd values are no reason to speak up: those that matter are checked
            warnings.simplefilter("ignore")
            # Files named .dcm may lack the preamble, and are DICOM nevertheless.
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(tags))
            found = {tag: header.get(tag) for tag in tags}
            found["MediaStorageSOPClassUID"] = header.file_meta.get("MediaStorageSOPClassUID")
            return {tag: "" if value is None else str(value).strip() for tag, value in found.items()}
    except Exception as error:  # pydicom raises whatever hostile bytes lead it to
        raise RefusedScan("unreadable", f"{path} has no DICOM header to be read ({type(error).__name__})") from error


def _identity(file: str) -> tuple[str, str]:
    # Some exports give all images of a series one UID.
    header = header_of(file, "SOPInstanceUID", "ImagePositionPatient")
    return header["SOPInstanceUID"] or file, header["ImagePositionPatient"]


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in re.findall(r"[-+.\deE]+", text)]
    except ValueError:
        return []
