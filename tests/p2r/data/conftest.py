"""Small scans with known voxels, and a small corpus of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.manifest import Manifest
from p2r.storage import Storage

WriteScan = Callable[..., Path]
WriteSeries = Callable[..., NDArray[np.uint16]]


@pytest.fixture
def write_scan(tmp_path: Path) -> WriteScan:
    """Write an array as NIfTI with nibabel, which shares no code with `p2r.data.volume.write_nifti`."""

    def write(name: str, array: NDArray[Any], affine: NDArray[np.float64] | None = None, **header: Any) -> Path:
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(
            array, np.diag([1.5, 1.5, 8.0, 1.0]) if affine is None else affine, dtype=array.dtype
        )
        for field, value in header.items():
            image.header[field] = value
        nibabel.save(image, path)
        return path

    return write


def _write_series(
    folder: Path, *, number: int = 3, size: int = 6, echoes: int = 1, suffix: str = ".dcm", **tags: Any
) -> NDArray[np.uint16]:
    """Write a small axial MR series, one file per slice, and return its voxels (rows, columns, slices x echoes)."""
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(number).integers(0, 1000, (24, 20, size * echoes)).astype("<u2")
    for index in range(size * echoes):
        slice_number, echo = index % size, index // size + 1
        uid = generate_uid(entropy_srcs=["image", str(folder), str(number), str(index)])
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = MRImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = uid
        values = {
            "SOPClassUID": MRImageStorage,
            "SOPInstanceUID": uid,
            "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
            "SeriesInstanceUID": generate_uid(entropy_srcs=["series", str(number)]),
            "FrameOfReferenceUID": generate_uid(entropy_srcs=["frame"]),
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
            "Modality": "MR",
            "Manufacturer": "SIEMENS",
            "InstitutionName": "Secret Hospital",
            "StationName": "SECRETMR1",
            "DeviceSerialNumber": "SECRET77",
            "SeriesDescription": "t1 secret",
            "ProtocolName": "t1 secret",
            "ImageComments": "secret comment",
            "PatientName": "Secret^Name",
            "PatientID": "SECRET-ID",
            "PatientBirthDate": "19700101",
            "StudyDate": "20200101",
            "AcquisitionTime": "101112",
            "MRAcquisitionType": "3D",
            "ScanningSequence": "GR",
            "MagneticFieldStrength": 3,
            "RepetitionTime": 2000,
            "EchoTime": 3 * echo,
            "EchoNumbers": echo,
            "FlipAngle": 9,
            "SeriesNumber": number,
            "AcquisitionNumber": 1,
            "InstanceNumber": index + 1,
            "SliceThickness": 4,
            "SpacingBetweenSlices": 4,
            "SliceLocation": 4.0 * slice_number,
            "PixelSpacing": [1.5, 1.25],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [-10, -20, 4.0 * slice_number],
            "Rows": 24,
            "Columns": 20,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "PixelData": voxels[..., index].tobytes(),
        }
        for name, value in {**values, **tags}.items():
            setattr(header, name, value)
        header.save_as(folder / f"IM{number:02d}{index + 1:04d}{suffix}", enforce_file_format=True)
    return voxels


@pytest.fixture(scope="session")
def write_series() -> WriteSeries:
    """Write a DICOM series with pydicom; see `_write_series`."""
    return _write_series


def some_voxels(seed: int, shape: tuple[int, ...] = (20, 24, 5)) -> NDArray[np.int16]:
    """Return a smooth blob with noise, similar to a scan."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:3]), indexing="ij")
    blob = 900 * np.exp(-3 * sum(axis**2 for axis in grid))
    voxels = blob.reshape(*shape[:3], *(1 for _ in shape[3:])) + rng.normal(0, 20, shape)
    return np.rint(np.clip(voxels, 0, None)).astype(np.int16)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    """Twelve scans of six subjects, of different shapes, in three shards: 62 slices. Tests must not change it."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        shape = (20 + number % 3, 24, 4 + number % 3) if number else (20, 24, 3, 2)
        path = folder / "scans" / f"sub-{number // 2:02d}_run-{number % 2}_T1w.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(some_voxels(number, shape), np.diag([-1.5, 1.5, 8.0, 1.0])), path)
    storage = Storage(str(folder / "corpus"))
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", shard_size_mib=0.012)
    progress = list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert len(progress) == len(manifest["shards"]) >= 3
    return storage, manifest


CONTRASTS_OF_SESSIONS = ("t1 t1ce flair", "flair", "t1 flair", "t1ce flair", "t1", "t1 t1ce flair", "t1 flair", "t1")


@pytest.fixture(scope="session")
def session_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    """Eight sessions of four subjects with up to three contrasts, in three shards: 40 slices. Tests must not change it.

    The contrast t1ce covers 18 of 20 rows.
    """
    folder = tmp_path_factory.mktemp("sessions")
    names = {"t1": "T1w", "t1ce": "ce-G_T1w", "flair": "FLAIR"}
    for number, contrasts in enumerate(CONTRASTS_OF_SESSIONS):
        for place, contrast in enumerate(contrasts.split()):
            shape = (18 if contrast == "t1ce" else 20, 24, 4 + number % 3)
            path = folder / "scans" / f"sub-{number // 2:02d}_ses-{number % 2}_{names[contrast]}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            voxels = some_voxels(10 * number + place, shape)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 8.0, 1.0])), path)
    storage = Storage(str(folder / "corpus"))
    sessions = SessionsConfig(
        contrasts={"t1": "T1w", "t1ce": "ce-*", "flair": "FLAIR"}, reference="flair", min_coverage=0.8
    )
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", shard_size_mib=0.005, sessions=sessions)
    list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert len(manifest["shards"]) >= 3 and manifest["num_records"] == 8
    return storage, manifest
