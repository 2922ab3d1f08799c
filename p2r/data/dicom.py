"""One DICOM series -> NIfTI files, with `dcm2niix` in a subprocess; and files -> series, by their headers.

Isolation: the converter gets a temporary folder with links to the files of one series, a time limit, and no user settings.
From its sidecar only the tags in `sidecar.TAGS` are kept, because its anonymisation option keeps institution, station,
serial number and free text.

Refused: a series with unevenly spaced slices, mostly because one was lost (dcm2niix would interpolate; p2r does not
accept the guess). Anything other than MR images, and images marked as having text burned in. Also a series from which
dcm2niix makes fewer slices than it has images, because no image may be lost.

SeriesInstanceUID separates the series of a folder; a series spread over several folders counts once per folder. Series with
one slice each of one acquisition, such as a cine, are joined (`dicom_stack`), as are slices that dcm2niix does not join.
Each multi-frame file of a series is converted in a separate run. With several in one run, dcm2niix 1.0.20260724 fills all
images but the first with values that are in no file. A multi-frame image is refused if its slice distance contradicts its
slice positions.
"""

import hashlib
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel
import numpy as np

from p2r.data.dicom_frames import mixes_frames, slice_distance_mm
from p2r.data.dicom_stack import (
    PLACE_TAGS,
    Place,
    by_position,
    header_of,
    is_stack,
    num_images,
    place_of,
    sort_slices,
    stack_planes,
    unique_files,
)
from p2r.data.sidecar import allowed_tags, common_tags
from p2r.errors import RefusedScan

SUFFIXES = (".dcm", ".ima")
"""File names that are read as DICOM in any folder."""

_MAGIC_OFFSET = 128
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DIRECTORY = "1.2.840.10008.1.3.10"
_SINGLE_FRAME = "export the series as single-frame DICOM, at the scanner or with emf2sf of dcm4che"


@dataclass(frozen=True)
class Series:
    """The files of one series in one folder."""

    folder: str
    files: tuple[str, ...]
    """Sorted paths."""
    uid_digest: str | None
    """Short digest of SeriesInstanceUID; None for a file without one, or with an unreadable header."""
    number: int | None
    """SeriesNumber."""
    patient_id: str | None
    """PatientID. It identifies a person: it is used only where a job requests it, and to separate the series of two people."""
    place: Place | None = None
    """Position of its images, if all have the same one."""
    description: str = ""
    """SeriesDescription. It may contain a person's name."""
    study_digest: str = ""
    """Short digest of StudyInstanceUID; empty if the header has none."""


@dataclass(frozen=True)
class Part:
    """One image converted from a series."""

    path: Path | None
    """A `.nii` file; None if only tags were requested."""
    tags: dict[str, object]
    """Tags on the allow-list of `sidecar`."""
    num_ignored: int
    """Number of listed tags without a usable value."""


def is_dicom(path: Path) -> bool:
    """Return whether a file has DICOM's magic number."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(_MAGIC_OFFSET)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def group_by_series(paths: Iterable[Path]) -> list[Series]:
    """Read the headers of DICOM files and group them by folder and series. A `DICOMDIR` is left out: it only lists files."""
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    headers: dict[tuple[str, str], dict[str, str]] = {}
    places: dict[tuple[str, str], Place | None] = {}
    found: list[Series] = []
    for path in sorted(paths):
        try:
            header = header_of(path, "SeriesInstanceUID", "SeriesNumber", "PatientID", *PLACE_TAGS)
        except RefusedScan:
            header = {}
        if uid := header.get("SeriesInstanceUID"):
            key = str(path.parent), _short_digest(uid)
            place = place_of(header)
            if key in headers and _have_different_positions(places[key], place):
                place = None  # the series has several positions
            grouped[key].append(str(path))
            headers.setdefault(key, header)
            places[key] = place
        elif header.get("MediaStorageSOPClassUID") != _DIRECTORY:
            found.append(Series(str(path.parent), (str(path),), None, None, None))
    for (folder, digest), files in grouped.items():
        header = headers[folder, digest]
        number = header["SeriesNumber"]
        found.append(
            Series(
                folder,
                tuple(files),
                digest,
                int(number) if number.isdecimal() and len(number) < 10 else None,
                header["PatientID"] or None,
                places[folder, digest],
                header["SeriesDescription"],
                _short_digest(header["StudyInstanceUID"]) if header["StudyInstanceUID"] else "",
            )
        )
    return found


def join_slices(found: Sequence[Series]) -> list[Series]:
    """Join series that hold one slice each of one acquisition, at even distances; return the others unchanged."""
    groups: dict[Any, list[Series]] = defaultdict(list)
    for index, one in enumerate(found):
        groups[(one.place.alike, one.patient_id, len(one.files)) if one.place else index].append(one)
    joined: list[Series] = []
    for members in groups.values():
        places = [one.place for one in members if one.place is not None]
        if len(members) < 2 or not is_stack(places):
            joined += members
            continue
        digests = " ".join(sorted(str(one.uid_digest) for one in members))
        joined.append(
            Series(
                os.path.commonpath([one.folder for one in members]),
                tuple(sorted(file for one in members for file in one.files)),
                _short_digest(digests),
                min((one.number for one in members if one.number is not None), default=None),
                members[0].patient_id,
                description=members[0].description,
                study_digest=members[0].study_digest,
            )
        )
    return joined


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _have_different_positions(one: Place | None, other: Place | None) -> bool:
    return one is None or other is None or not np.allclose(one.position_mm, other.position_mm, atol=1e-3)


@contextmanager
def converted(files: Sequence[str], name: str, *, timeout_s: float, only_tags: bool = False) -> Iterator[list[Part]]:
    """Convert one series; the images exist until the context closes.

    Args:
        files: Files of the series.
        name: Name of the series, for messages.
        timeout_s: Time limit of each run of the converter.
        only_tags: Read the tags without making images.

    Raises:
        RefusedScan: `not_mr`, `secondary_capture`, `burned_in_annotation`, `uneven_slices`, `mosaic`, `timeout`, or `unreadable`.
    """
    _check_kind(files, name)
    with tempfile.TemporaryDirectory(prefix="p2r-dicom-") as folder:
        groups = _group_for_converter(files)
        if len(groups) > 1:
            yield _convert_groups(groups, name, Path(folder), timeout_s=timeout_s, only_tags=only_tags)
            return
        images, exit_code = _run_dcm2niix(files, name, Path(folder, "whole"), timeout_s=timeout_s, only_tags=only_tags)
        _check_even_spacing(images, name)
        _check_mosaic([] if only_tags else images, files, name)
        defect = None if only_tags and images else _find_defect(images, files, exit_code)
        parts = [_read_part(image) for image in images]
        if defect is not None:
            stack = _convert_as_stack(files, name, Path(folder, "slices"), timeout_s=timeout_s, only_tags=only_tags)
            if stack is None and not defect.is_harmless:
                raise RefusedScan(
                    "unreadable", f"{name}: {defect.description}; run dcm2niix on the folder to read its output"
                )
            parts = parts if stack is None else [stack]
        yield parts


def _group_for_converter(files: Sequence[str]) -> list[list[str]]:
    """Group the files of a series by run of the converter: each multi-frame file separately, the others together."""
    unique = set(unique_files(files))
    num_frames = {file: num_images([file]) for file in files if file in unique}
    groups = [[file] for file, number in num_frames.items() if number > 1]
    others = [file for file, number in num_frames.items() if number == 1]
    return [*groups, *([others] if others else [])]


def _convert_groups(
    groups: Sequence[Sequence[str]], name: str, folder: Path, *, timeout_s: float, only_tags: bool
) -> list[Part]:
    """Convert the groups one by one; images of one slice each are joined if they form a stack."""
    until_s, images = time.monotonic() + timeout_s, list[Path]()
    for number, group in enumerate(groups):
        rest_s = max(1.0, until_s - time.monotonic())
        made, exit_code = _run_dcm2niix(group, name, folder / f"{number:04d}", timeout_s=rest_s, only_tags=only_tags)
        _check_even_spacing(made, name)
        _check_mosaic([] if only_tags else made, group, name)
        defect = None if only_tags and made else _find_defect(made, group, exit_code)
        if defect is not None and not defect.is_harmless:
            raise RefusedScan(
                "unreadable", f"{name}: {defect.description}; run dcm2niix on {group[0]} to read its output"
            )
        images += made
    parts = [_read_part(image) for image in images]
    stack = folder / "stack.nii"
    if only_tags or not stack_planes(sort_slices(images), stack):
        return parts
    return [Part(stack, common_tags([part.tags for part in parts]), sum(part.num_ignored for part in parts))]


def _check_even_spacing(images: Sequence[Path], name: str) -> None:
    if any("_Eq" in image.stem for image in images):  # dcm2niix's suffix for interpolated images
        raise RefusedScan(
            "uneven_slices", f"{name} has slices at uneven distances: one may be missing; copy the series again"
        )


def _check_mosaic(images: Sequence[Path], files: Sequence[str], name: str) -> None:
    """Refuse an image of tiles, which is no slice. dcm2niix separates them if Siemens' private tags are present."""
    shapes = [(*nibabel.nifti1.Nifti1Image.from_filename(image).shape, 1)[2] for image in images]
    if 1 in shapes and "MOSAIC" in header_of(Path(files[0]), "ImageType")["ImageType"].upper():
        raise RefusedScan(
            "mosaic",
            f"{name} is a mosaic: each image holds all slices as tiles, and the private tags that describe them were removed. "
            "Export the series with its private tags (0029,xx10), or as one image per slice",
        )


@dataclass(frozen=True)
class _Defect:
    description: str
    is_harmless: bool = False


def _find_defect(images: Sequence[Path], files: Sequence[str], exit_code: int) -> _Defect | None:
    """Return the first defect of the images that dcm2niix made from a series; None if there is none."""
    if exit_code or not images:
        return _Defect(f"dcm2niix ended with exit code {exit_code} and {len(images)} images")
    headers = [nibabel.nifti1.Nifti1Image.from_filename(image).header for image in images]
    shapes = [(*header.get_data_shape(), 1, 1)[2:4] for header in headers]
    num_planes, num_files = sum(depth * times for depth, times in shapes), num_images(files)
    if len(files) == 1 and num_files > 1 and mixes_frames(files[0], images):
        return _Defect(
            f"dcm2niix mixed up slices and times of a multi-frame image, or they cannot be distinguished: {_SINGLE_FRAME}"
        )
    if num_planes < num_files:
        return _Defect(f"dcm2niix made {num_planes} slices of its {num_files} images: some would be lost")
    gaps = [float(np.linalg.norm(header.get_best_affine()[:3, 2])) for header in headers]
    stated_mm = slice_distance_mm(files[0]) if len(files) == 1 and num_files > 1 else None
    depths = [depth for depth, _ in shapes]
    if defect := _find_wrong_distance([gap for depth, gap in zip(depths, gaps, strict=True) if depth > 1], stated_mm):
        return defect
    if len(images) > 1 and max(depths) == 1:
        return _Defect(f"dcm2niix split it into {len(images)} single slices", is_harmless=True)
    return None


def _find_wrong_distance(gaps: Sequence[float], stated_mm: float | None) -> _Defect | None:
    """Compare distances between slices, mm, with the distance of their positions in the DICOM file, if it states one."""
    if stated_mm and any(abs(gap - stated_mm) > 0.05 * stated_mm for gap in gaps):
        return _Defect(
            f"dcm2niix wrote {max(gaps):.4g} mm between slices whose positions are {stated_mm:.4g} mm apart: {_SINGLE_FRAME}"
        )
    if any(not gap > 0 for gap in gaps):
        return _Defect("dcm2niix wrote 0 mm between its slices: they have the same position, or none")
    return None


def _convert_as_stack(
    files: Sequence[str], name: str, folder: Path, *, timeout_s: float, only_tags: bool
) -> Part | None:
    """Convert a series position by position and stack the slices; None if they do not form a stack."""
    groups = by_position(unique_files(files), name)
    if groups is None:
        return None
    folder.mkdir()
    images: list[Path] = []
    for number, group in enumerate(groups):
        made, exit_code = _run_dcm2niix(group, name, folder / f"{number:04d}", timeout_s=timeout_s, only_tags=only_tags)
        if exit_code or len(made) != 1:
            return None
        images += made
    parts = [_read_part(image) for image in images]
    stack = folder / "stack.nii"
    if not only_tags and not stack_planes(images, stack):
        return None
    tags = common_tags([part.tags for part in parts])
    return Part(None if only_tags else stack, tags, sum(part.num_ignored for part in parts))


def _run_dcm2niix(
    files: Sequence[str], name: str, folder: Path, *, timeout_s: float, only_tags: bool
) -> tuple[list[Path], int]:
    """Run dcm2niix on files; return the paths that it wrote, and its exit code."""
    links, output = folder / "series", folder / "output"
    links.mkdir(parents=True)
    output.mkdir()
    for number, file in enumerate(files):
        (links / f"{number:06d}.dcm").symlink_to(Path(file).absolute())
    sidecars = ["-b", "o" if only_tags else "y", "-ba", "y"]
    command = [dcm2niix.bin, "-g", "i", *sidecars, "-z", "n", "-f", "part", "-o", str(output), str(links)]
    try:
        # Its output may quote patient data, so it is discarded.
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, env={"HOME": str(folder)}, check=False)
    except subprocess.TimeoutExpired:
        raise RefusedScan(
            "timeout", f"{name}: dcm2niix took longer than {timeout_s:g} s; raise ingest.dcm2niix_timeout_s"
        ) from None
    return sorted(output.glob("part*.json" if only_tags else "part*.nii")), done.returncode


def _read_part(image: Path) -> Part:
    sidecar = image.with_suffix(".json")
    tags, num_ignored = allowed_tags(sidecar.read_bytes()) if sidecar.is_file() else ({}, 1)
    return Part(image if image.suffix == ".nii" else None, tags, num_ignored)


def _check_kind(files: Sequence[str], name: str) -> None:
    for file in files:
        header = header_of(Path(file), "Modality", "SOPClassUID", "BurnedInAnnotation")
        if header["SOPClassUID"].startswith(_SECONDARY_CAPTURE):
            raise RefusedScan(
                "secondary_capture", f"{name} holds secondary captures (pictures of images), not a scan; leave it out"
            )
        if header["Modality"] != "MR":
            raise RefusedScan(
                "not_mr",
                f"{name} has the modality {header['Modality'][:16]!r}, and only MR is read: leave it out with ingest.exclude, or convert "
                "the series to NIfTI if its Modality tag is wrong",
            )
        if header["BurnedInAnnotation"].upper() == "YES":
            raise RefusedScan(
                "burned_in_annotation",
                f"{name} has text burned into its images (BurnedInAnnotation is YES), possibly a name; leave it out",
            )
