"""A DICOM series -> its volume; and labels on that volume -> a DICOM segmentation (SEG) that refers to the images of the series.

    folder of one series -> `read_series` -> volume for the model -> labels -> `write_segmentation` -> one .dcm file

Each image of the series gets a frame with the labels at the centres of its own pixels. The converter only reorders voxels, so a
pixel has exactly one voxel; a series for which that does not hold is refused. `highdicom` writes the object and copies patient,
study and frame of reference from the source: the result identifies the patient as the source does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.data.dicom import converted, group_by_series, is_dicom, join_slices
from p2r.data.volume import Volume, read_volume
from p2r.errors import InputError, RefusedScan, how_to_install
from p2r.files import replacing
from p2r.version import __version__

_TIMEOUT_S = 600.0
_ON_VOXEL = 0.05  # of a voxel: tolerance for positions that headers round
_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's world is LPS
_SCHEME = "99P2R"
_SERIES_NUMBER = 9001


@dataclass(frozen=True)
class DicomScan:
    """A series and the volume made from it."""

    volume: Volume
    files: tuple[str, ...]
    """Images of the series."""


def read_series(folder: Path) -> DicomScan:
    """Read the only series of a folder.

    Raises:
        InputError: The folder holds no series, or several.
        RefusedScan: The series cannot be used; the code gives the reason.
    """
    paths = [path for path in sorted(folder.iterdir()) if is_dicom(path)]
    series = join_slices(group_by_series(paths))
    if len(series) != 1:
        raise InputError(f"{folder} holds {len(series)} DICOM series: give the folder of one, to have one segmentation")
    (one,) = series
    with converted(one.files, str(folder), timeout_s=_TIMEOUT_S) as parts:
        if len(parts) != 1 or parts[0].path is None:
            raise RefusedScan(
                "unreadable", f"{folder}: the series becomes {len(parts)} images: give a folder with one of them"
            )
        volume = read_volume(parts[0].path, key=folder.name)
    if volume.data.shape[3] != 1:
        raise RefusedScan("not_3d", f"{folder} is a series of {volume.data.shape[3]} frames in time: give one of them")
    return DicomScan(volume, one.files)


def write_segmentation(
    path: Path, labels: NDArray[np.uint8], scan: DicomScan, *, classes: Mapping[int, str], name: str, details: str
) -> int:
    """Write labels as a DICOM segmentation, with one binary segment per class.

    Args:
        path: File for the result.
        labels: (X, Y, Z) on the grid of `scan.volume.data`; 0 is the background.
        scan: The series.
        classes: Name of each label.
        name: Name of the model, at most 64 characters.
        details: Pin of the model; part of the object as a parameter of the algorithm.

    Returns:
        Number of images that the segmentation refers to.

    Raises:
        InputError: `highdicom` is not installed.
        RefusedScan: The pixels of the images are not voxels of the volume, or the images have headers that a segmentation cannot refer to.
    """
    hd, pydicom = _import_packages()
    images = [pydicom.dcmread(file) for file in scan.files]
    _complete_headers(images)
    frames = np.stack([_labels_of_image(image, labels, scan.volume) for image in images])
    segments = _describe_segments(hd, pydicom, classes, name=name, details=details)
    try:
        made = hd.seg.Segmentation(
            source_images=images,
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="p2r",
            manufacturer_model_name=name[:64],
            software_versions=__version__,
            device_serial_number="none",
            content_label="SEGMENTATION",
            omit_empty_frames=bool(frames.any()),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RefusedScan(
            "unreadable",
            f"{scan.volume.key}: no segmentation can refer to the images: {error}; write NIfTI (-o NAME.nii.gz)",
        ) from error
    with replacing(path) as temporary:
        made.save_as(temporary)
    return len(images)


def _describe_segments(hd: Any, pydicom: Any, classes: Mapping[int, str], *, name: str, details: str) -> list[Any]:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=name[:64],
        family=pydicom.sr.codedict.codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="p2r",
        parameters={"model": details},
    )
    category = pydicom.sr.codedict.codes.SCT.AnatomicalStructure
    return [
        hd.seg.SegmentDescription(
            segment_number=value,
            segment_label=title[:64],
            segmented_property_category=category,
            segmented_property_type=hd.sr.CodedConcept(f"p2r-{value}", _SCHEME, title[:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for value, title in classes.items()
    ]


def _import_packages() -> tuple[Any, Any]:
    try:
        import highdicom
        import highdicom.seg
        import pydicom
        import pydicom.sr.codedict
    except ModuleNotFoundError as error:
        raise InputError(
            f"a DICOM segmentation needs the package {error.name}, which is not installed here: {how_to_install('dicom-seg')}"
        ) from None
    return highdicom, pydicom


def _complete_headers(images: Sequence[Any]) -> None:
    """Add empty values for required attributes that anonymisation removed; highdicom copies them to the result."""
    for image in images:
        for keyword in (
            *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
            *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
        ):
            if keyword not in image:
                setattr(image, keyword, "")


def _labels_of_image(image: Any, labels: NDArray[np.uint8], volume: Volume) -> NDArray[np.uint8]:
    """Return the labels (rows, columns) at the pixels of one image."""
    if int(getattr(image, "NumberOfFrames", 1) or 1) != 1:
        raise RefusedScan("unreadable", f"{volume.key} has images of several frames: write NIfTI (-o NAME.nii.gz)")
    to_world = np.eye(4)
    along_row, along_column = np.split(np.asarray(image.ImageOrientationPatient, np.float64), 2)
    between_rows, between_columns = (float(mm) for mm in image.PixelSpacing)
    to_world[:3, 0], to_world[:3, 1] = along_column * between_rows, along_row * between_columns
    to_world[:3, 3] = np.asarray(image.ImagePositionPatient, np.float64)
    to_voxel = np.linalg.inv(volume.affine) @ _RAS @ to_world
    grid = np.stack(np.meshgrid(np.arange(int(image.Rows)), np.arange(int(image.Columns)), indexing="ij"), -1)
    places = grid @ to_voxel[:3, :2].T + to_voxel[:3, 3]  # (rows, columns, 3)
    nearest = np.rint(places).astype(np.int64)
    if np.abs(places - nearest).max() > _ON_VOXEL or (nearest < 0).any() or (nearest >= labels.shape).any():
        raise RefusedScan(
            "unreadable",
            f"{volume.key}: the pixels of {Path(str(image.filename)).name} are not voxels of the converted volume, as after a tilt of "
            "the gantry: write NIfTI (-o NAME.nii.gz)",
        )
    found: NDArray[np.uint8] = labels[nearest[..., 0], nearest[..., 1], nearest[..., 2]]
    return found
