"""DICOM files -> series -> volumes, without any patient data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from p2r.config import IngestConfig, QualityConfig
from p2r.data.dicom import converted, group_by_series, is_dicom
from p2r.data.read import read_scan, sidecar_of
from p2r.data.scans import Scan, find_scans
from p2r.errors import DataError, RefusedScan

WriteSeries = Callable[..., Any]

CONFIG = IngestConfig(sources=("anywhere",), licence="CC0-1.0")


def scans_of(folder: Path, **options: Any) -> list[Scan]:
    return find_scans([str(folder)], cache=folder, **options)


def code_of(scan: Scan, config: IngestConfig = CONFIG) -> str:
    with pytest.raises(RefusedScan) as refusal:
        read_scan(scan, config)
    assert "p2r-dicom-" not in str(refusal.value), "a temporary path would make two ledgers differ"
    return refusal.value.code


def test_a_series_becomes_one_volume_with_its_voxels(tmp_path: Path, write_series: WriteSeries) -> None:
    voxels = write_series(tmp_path / "p1" / "t1")
    (scan,) = scans_of(tmp_path)
    assert (scan.path, scan.key, scan.format) == (str(tmp_path / "p1" / "t1"), "t1_s003", "dicom")
    assert scan.files == tuple(sorted(str(file) for file in (tmp_path / "p1" / "t1").iterdir()))
    (volume,) = read_scan(scan, CONFIG)
    # DICOM: rows run to the Left along columns and to Posterior along rows; RAS turns both around.
    np.testing.assert_array_equal(volume.data[..., 0], voxels.transpose(1, 0, 2)[::-1, ::-1])
    np.testing.assert_allclose(volume.spacing_mm, (1.25, 1.5, 4.0))
    np.testing.assert_allclose((volume.affine @ [19, 23, 0, 1])[:3], [10, 20, 0], atol=1e-4)
    assert volume.key == "t1_s003"


def test_no_patient_data_is_kept(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1" / "t1")
    (scan,) = scans_of(tmp_path)
    (volume,) = read_scan(scan, CONFIG)
    assert volume.sidecar["EchoTime"] == 0.003
    assert volume.sidecar["MagneticFieldStrength"] == 3
    assert volume.sidecar["ScanningSequence"] == "GR"
    assert sidecar_of(scan) == volume.sidecar
    known = json.dumps([scan.key, scan.name, scan.subject, scan.entities, dict(volume.sidecar), volume.notes]).lower()
    assert "secret" not in known
    assert "1970" not in known
    assert "10:11" not in known


def test_conversion_is_reproducible(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1", echoes=2)
    (scan,) = scans_of(tmp_path)
    first, second = read_scan(scan, CONFIG), read_scan(scan, CONFIG)
    for one, other in zip(first, second, strict=True):
        assert one.data.tobytes() == other.data.tobytes()
        assert (one.key, one.sidecar) == (other.key, other.sidecar)


def test_a_series_with_two_echoes_is_two_volumes(tmp_path: Path, write_series: WriteSeries) -> None:
    voxels = write_series(tmp_path / "p1", echoes=2)
    (scan,) = scans_of(tmp_path)
    first, second = read_scan(scan, CONFIG)
    assert [first.key, second.key] == ["p1_s003_0", "p1_s003_1"]
    assert [first.sidecar["EchoTime"], second.sidecar["EchoTime"]] == [0.003, 0.006]
    np.testing.assert_array_equal(first.data[..., 0], voxels[..., :6].transpose(1, 0, 2)[::-1, ::-1])
    np.testing.assert_array_equal(second.data[..., 0], voxels[..., 6:].transpose(1, 0, 2)[::-1, ::-1])
    assert "EchoTime" not in sidecar_of(scan), "the value differs between the images"
    assert sidecar_of(scan)["FlipAngle"] == 9


def test_two_series_of_one_folder_are_separate_scans(tmp_path: Path, write_series: WriteSeries) -> None:
    first, second = write_series(tmp_path / "p1", number=3), write_series(tmp_path / "p1", number=4)
    scans = sorted(scans_of(tmp_path), key=lambda scan: scan.key)
    assert [scan.key for scan in scans] == ["p1_s003", "p1_s004"]
    for scan, voxels in zip(scans, (first, second), strict=True):
        folder, _, digest = scan.path.partition("#")
        assert folder == str(tmp_path / "p1")
        assert len(digest) == 8
        assert read_scan(scan, CONFIG)[0].data.sum() == voxels.sum()


def test_the_same_series_in_two_folders_is_two_scans(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1" / "t1")
    write_series(tmp_path / "p2" / "t1")
    assert [scan.key for scan in scans_of(tmp_path)] == ["p1_t1_s003", "p2_t1_s003"]
    assert [scan.name for scan in scans_of(tmp_path)] == ["p1", "p2"], (
        "the name that subject_pattern is matched against"
    )


def test_the_patient_id_is_the_subject_only_if_the_job_says_so(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "study" / "t1")
    assert scans_of(tmp_path)[0].subject is None
    (scan,) = scans_of(tmp_path, dicom_subject="patient_id")
    assert scan.subject == "SECRET-ID"
    assert "SECRET" not in scan.key + scan.path


def test_dicom_without_suffix_is_found_in_folders_without_nifti(
    tmp_path: Path, write_series: WriteSeries, write_scan: Any
) -> None:
    write_series(tmp_path / "raw" / "p1", suffix="")
    write_series(tmp_path / "mixed", suffix="", number=5)
    (tmp_path / "raw" / "notes.txt").write_text("no image")
    (tmp_path / "mixed" / "scan.nii").write_bytes(b"12345")
    assert [Path(scan.path).name for scan in scans_of(tmp_path)] == ["scan.nii", "p1"]
    write_series(tmp_path / "mixed", suffix=".IMA", number=6)
    assert [scan.key for scan in scans_of(tmp_path / "mixed")] == ["mixed_s006", "scan"]


def test_one_file_can_be_a_source(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1", size=2, suffix="")
    (scan,) = scans_of(tmp_path / "p1" / "IM030001")
    assert scan.path == str(tmp_path / "p1" / "IM030001")
    assert scan.files == (scan.path,)
    (volume,) = read_scan(scan, CONFIG)
    assert volume.data.shape == (20, 24, 1, 1), "a single slice"


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Modality": "CT"}, "not_mr"),
        ({"Modality": ""}, "not_mr"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary_capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "secondary_capture"),
        ({"BurnedInAnnotation": "YES"}, "burned_in_annotation"),
    ],
)
def test_images_other_than_mr_are_refused_by_name(
    tmp_path: Path, write_series: WriteSeries, tags: dict[str, str], code: str
) -> None:
    write_series(tmp_path, **tags)
    assert code_of(scans_of(tmp_path)[0]) == code


def test_a_missing_slice_is_not_interpolated(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path, size=8)
    sorted(tmp_path.iterdir())[3].unlink()
    assert code_of(scans_of(tmp_path)[0]) == "uneven_slices"


def test_a_truncated_file_makes_its_series_unreadable(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path)
    file = sorted(tmp_path.iterdir())[2]
    file.write_bytes(file.read_bytes()[:-100])
    assert code_of(scans_of(tmp_path)[0]) == "unreadable"


def test_a_localizer_in_three_orientations_is_three_planes(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path, size=3)
    turned = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1]]
    for file, orientation in zip(sorted(tmp_path.iterdir()), turned, strict=True):
        header = pydicom.dcmread(file)
        header.ImageOrientationPatient = orientation
        header.save_as(file)
    volumes = read_scan(scans_of(tmp_path)[0], CONFIG)
    assert sorted(volume.data.shape[:3].index(1) for volume in volumes) == [0, 1, 2]


def test_usable_images_of_a_split_series_are_kept_and_the_others_noted(
    tmp_path: Path, write_series: WriteSeries
) -> None:
    write_series(tmp_path / "p1", size=5)
    write_series(tmp_path / "p1", size=1, SeriesInstanceUID="1.2.3", number=4, EchoTime=30, EchoNumbers=2)
    for file in (tmp_path / "p1").iterdir():
        header = pydicom.dcmread(file)
        header.SeriesInstanceUID, header.SeriesNumber = "1.2.3", 3
        header.save_as(file)
    (scan,) = scans_of(tmp_path)
    assert [volume.data.shape[2] for volume in read_scan(scan, CONFIG)] == [5, 1]
    (volume,) = read_scan(scan, CONFIG.model_copy(update={"quality": QualityConfig(min_slices=2)}))
    assert volume.key == "p1_s003_0"
    assert volume.notes == ("part_slice_count",)


def test_conversion_has_a_time_limit(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path)
    assert code_of(scans_of(tmp_path)[0], CONFIG.model_copy(update={"dcm2niix_timeout_s": 1e-6})) == "timeout"


def test_each_file_that_only_looks_like_dicom_is_listed_and_refused(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1")
    (tmp_path / "p1" / "junk.dcm").write_bytes(b"x" * 3000)
    (tmp_path / "p1" / "empty.dcm").touch()
    (tmp_path / "p1" / "gone.dcm").symlink_to(tmp_path / "nowhere")
    scans = scans_of(tmp_path)
    assert [scan.key for scan in scans] == ["p1_s003", "empty_dcm", "gone_dcm", "junk_dcm"]
    assert len(read_scan(scans[0], CONFIG)) == 1
    assert [code_of(scan) in {"unreadable", "not_mr"} for scan in scans[1:]] == [True] * 3


def test_a_dicomdir_is_no_scan(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "p1")
    header = pydicom.dcmread(tmp_path / "p1" / "IM030001.dcm")
    del header.SeriesInstanceUID
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = UID("1.2.840.10008.1.3.10")
    header.save_as(tmp_path / "DICOMDIR")
    assert [scan.key for scan in scans_of(tmp_path)] == ["p1_s003"]


def test_frame_limit_resampling_and_quality_rules_apply_to_dicom(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path)
    (scan,) = scans_of(tmp_path)
    config = IngestConfig(sources=("anywhere",), licence="CC0-1.0", resample_mm=1.0)
    (volume,) = read_scan(scan, config)
    assert volume.data.shape == (25, 36, 24, 1)
    assert volume.resampled_from_mm == pytest.approx((1.25, 1.5, 4.0))
    assert code_of(scan, config.model_copy(update={"min_size": 30})) == "too_small"


@pytest.mark.parametrize("name", ["a b", "ü", "$(touch x)", "-o", "x\ny"])
def test_odd_folder_names_do_no_harm(tmp_path: Path, write_series: WriteSeries, name: str) -> None:
    write_series(tmp_path / name)
    (scan,) = scans_of(tmp_path)
    assert len(read_scan(scan, CONFIG)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_hostile_headers_are_refused_with_a_reason(tmp_path: Path, write_series: WriteSeries) -> None:
    """Flip bits anywhere in the headers of a series; it must be read or refused."""
    write_series(tmp_path / "whole", size=2)
    rng = np.random.default_rng(0)
    raw = (tmp_path / "whole" / "IM030001.dcm").read_bytes()
    for case in range(25):
        folder = tmp_path / f"case{case}"
        folder.mkdir()
        bent = bytearray(raw)
        for position in rng.integers(128, 1200, 8):
            bent[position] ^= 1 << rng.integers(8)
        (folder / "IM1.dcm").write_bytes(bent)
        (folder / "IM2.dcm").write_bytes((tmp_path / "whole" / "IM030002.dcm").read_bytes())
        try:
            for scan in scans_of(folder):
                read_scan(scan, CONFIG)
        except (RefusedScan, DataError):
            pass
        assert sorted(path.name for path in folder.iterdir()) == ["IM1.dcm", "IM2.dcm"]


def test_only_files_are_checked_for_the_magic_bytes(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\0" * 128 + b"DICM")
    assert is_dicom(tmp_path / "image")
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "absent")
    assert group_by_series([]) == []


def test_a_series_of_absent_files_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(RefusedScan) as refusal, converted([str(tmp_path / "absent.dcm")], "series", timeout_s=10):
        pass
    assert refusal.value.code == "unreadable"


# Slices that dcm2niix does not join


def cine(folder: Path, *, series_of: Callable[[int], int], drop: tuple[tuple[int, int], ...] = ()) -> Any:
    """Write a cine of 5 slices at 3 times, and return its voxels (X, Y, Z, T) as RAS."""
    voxels = np.random.default_rng(0).integers(0, 1000, (20, 24, 5, 3)).astype("<u2")
    number = 0
    for z in range(5):
        for t in range(3):
            number += 1
            path = folder / f"s{series_of(z)}" / f"{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = pydicom.Dataset()
            header.file_meta = pydicom.dataset.FileMetaDataset()
            header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.MRImageStorage
            header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = UID(f"1.2.3.{number}")
            header.Modality, header.PatientID, header.Manufacturer = "MR", "P", "SIEMENS"
            header.StudyInstanceUID, header.FrameOfReferenceUID = "1.2.4", "1.2.5"
            header.SeriesInstanceUID, header.SeriesNumber = f"1.2.6.{series_of(z)}", series_of(z)
            header.InstanceNumber, header.TriggerTime, header.SeriesDescription = number, 40.0 * t, f"sa {series_of(z)}"
            header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-9, -8, 8.0 * z]
            header.PixelSpacing, header.SliceThickness, header.SpacingBetweenSlices = [1.0, 1.0], 8.0, 8.0
            header.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
            header.Rows, header.Columns, header.SamplesPerPixel = 24, 20, 1
            header.PhotometricInterpretation = "MONOCHROME2"
            header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
            header.PixelData = np.ascontiguousarray(voxels[:, :, z, t].T).tobytes()
            if (z, t) not in drop:
                header.save_as(path, enforce_file_format=True)
    return voxels[::-1, ::-1]


@pytest.mark.parametrize("series_of", [lambda z: 10 + z, lambda z: 10], ids=["a series each", "one series"])
def test_a_cine_of_single_slices_is_one_volume_in_time(tmp_path: Path, series_of: Callable[[int], int]) -> None:
    voxels = cine(tmp_path / "p1", series_of=series_of)
    (scan,) = scans_of(tmp_path)
    assert scan.label == "p1" and len(scan.files) == 15
    (volume,) = read_scan(scan, CONFIG)
    np.testing.assert_array_equal(volume.data, voxels)
    assert volume.spacing_mm == pytest.approx((1.0, 1.0, 8.0))
    assert volume.sidecar["SliceThickness"] == 8


def test_two_patients_or_uneven_slices_are_not_joined(tmp_path: Path) -> None:
    cine(tmp_path, series_of=lambda z: 10 + z, drop=((2, 0), (2, 1), (2, 2)))
    assert len(scans_of(tmp_path)) == 4
    cine(tmp_path / "one", series_of=lambda z: 10, drop=((1, 1),))
    (scan,) = scans_of(tmp_path / "one")
    with pytest.raises(RefusedScan, match="2 images at one position and 3 at another") as refusal:
        read_scan(scan, CONFIG)
    assert refusal.value.code == "uneven_slices"
    cine(tmp_path / "two", series_of=lambda z: 10 + z, drop=tuple((z, t) for z in (2, 3, 4) for t in range(3)))
    assert len(scans_of(tmp_path / "two")) == 1
    for path in (tmp_path / "two" / "s11").iterdir():
        header = pydicom.dcmread(path)
        header.PatientID = "other"
        header.save_as(path)
    assert len(scans_of(tmp_path / "two")) == 2


def test_images_that_dcm2niix_would_lose_or_split_are_stacked(tmp_path: Path, write_series: WriteSeries) -> None:
    write_series(tmp_path / "whole", size=6)
    (expected,) = read_scan(scans_of(tmp_path / "whole")[0], CONFIG)
    for name, tag, value in (
        ("numbers", "InstanceNumber", lambda k: 1),
        ("times", "AcquisitionTime", lambda k: f"12{k:02d}00"),
    ):
        write_series(tmp_path / name, size=6)
        for k, path in enumerate(sorted((tmp_path / name).iterdir())):
            header = pydicom.dcmread(path)
            setattr(header, tag, value(k))
            header.StudyTime = f"12{k:02d}00"
            header.save_as(path)
        (volume,) = read_scan(scans_of(tmp_path / name)[0], CONFIG)
        np.testing.assert_array_equal(volume.data, expected.data)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


def enhanced(
    folder: Path,
    write_series: WriteSeries,
    *,
    times: int,
    manufacturer: str,
    part_of: Callable[[int, int], int] | None = None,
) -> Any:
    """Write 5 slices at some times as one multi-frame image, or as several of one series, and return the voxels (X, Y, Z, T) as RAS.

    Args:
        folder: Folder of the files.
        write_series: The fixture.
        times: Number of times.
        manufacturer: Manufacturer in the header; dcm2niix interprets frames accordingly.
        part_of: Function (z, t) -> number of the file with this slice at this time.
    """
    write_series(folder, size=1)
    (path,) = folder.iterdir()
    header = pydicom.dcmread(path)
    orientation, (spacing, thickness) = header.ImageOrientationPatient, (header.PixelSpacing, header.SliceThickness)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(header, tag)
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    voxels = np.random.default_rng(0).integers(0, 1000, (times, 5, header.Rows, header.Columns)).astype("<u2")
    header.NumberOfFrames, header.PixelData, header.Manufacturer = 5 * times, voxels.tobytes(), manufacturer

    def group(name: str, **tags: Any) -> pydicom.Dataset:
        inner, outer = pydicom.Dataset(), pydicom.Dataset()
        for tag, value in tags.items():
            setattr(inner, tag, value)
        setattr(outer, name, pydicom.Sequence([inner]))
        return outer

    shared = group("PlaneOrientationSequence", ImageOrientationPatient=orientation)
    shared.update(group("PixelMeasuresSequence", PixelSpacing=spacing, SliceThickness=thickness))
    frames = []
    for t in range(times):
        for z in range(5):
            frame = group("PlanePositionSequence", ImagePositionPatient=[0, 0, 4.0 * z])
            places = {"InStackPositionNumber": z + 1, "StackID": "1", "TemporalPositionIndex": t + 1}
            frame.update(group("FrameContentSequence", DimensionIndexValues=[1, z + 1, t + 1], **places))
            frames.append(frame)
    header.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    if part_of is None:
        header.save_as(path)
        return voxels.transpose(3, 2, 1, 0)[::-1, ::-1]
    path.unlink()
    frame_places = [(t, z) for t in range(times) for z in range(5)]
    for part in sorted({part_of(z, t) for t, z in frame_places}):
        wanted = [number for number, (t, z) in enumerate(frame_places) if part_of(z, t) == part]
        header.PixelData = voxels.reshape(-1, header.Rows, header.Columns)[wanted].tobytes()
        header.NumberOfFrames, header.InstanceNumber = len(wanted), part + 1
        header.PerFrameFunctionalGroupsSequence = pydicom.Sequence([frames[number] for number in wanted])
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.9.{part + 1}")
        header.save_as(folder / f"part{part}.dcm")
    return voxels.transpose(3, 2, 1, 0)[::-1, ::-1]


PARTS: dict[str, Callable[[int, int], int]] = {
    "time": lambda z, t: t,
    "slice": lambda z, t: z,
    "frame": lambda z, t: 3 * z + t,
}


@pytest.mark.parametrize("kind", PARTS)
def test_several_multi_frame_images_of_a_series_are_converted_one_by_one(
    tmp_path: Path, write_series: WriteSeries, kind: str
) -> None:
    """One file per time, or per slice. In one run, dcm2niix fills all but the first with values that are in no file."""
    voxels = enhanced(tmp_path / "p1", write_series, times=3, manufacturer="Philips", part_of=PARTS[kind])
    (scan,) = scans_of(tmp_path)
    volumes = read_scan(scan, CONFIG)
    assert [volume.key for volume in volumes] == (
        [f"{scan.key}_{t}" for t in range(3)] if kind == "time" else [scan.key]
    )
    np.testing.assert_array_equal(np.concatenate([volume.data for volume in volumes], axis=3), voxels)
    assert all(volume.spacing_mm == pytest.approx((1.25, 1.5, 4.0)) for volume in volumes)
    assert sidecar_of(scan)["SliceThickness"] == 4


@pytest.mark.parametrize("stated_mm", [None, 8.0])
def test_a_multi_frame_image_with_gaps_is_read_correctly_or_refused(
    tmp_path: Path, write_series: WriteSeries, stated_mm: float | None
) -> None:
    """Slices of 4 mm, 8 mm apart: without a distance in the header, dcm2niix uses the thickness instead."""
    enhanced(tmp_path / "p1", write_series, times=1, manufacturer="Siemens")
    (path,) = (tmp_path / "p1").iterdir()
    header = pydicom.dcmread(path)
    for frame in header.PerFrameFunctionalGroupsSequence:
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [2 * float(value) for value in place.ImagePositionPatient]
    if stated_mm is not None:
        header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = stated_mm
    header.save_as(path)
    (scan,) = scans_of(tmp_path)
    if stated_mm is None:
        with pytest.raises(RefusedScan, match=r"4 mm between slices whose positions are 8 mm apart: .* single-frame"):
            read_scan(scan, CONFIG)
        return
    (volume,) = read_scan(scan, CONFIG)
    assert volume.spacing_mm == pytest.approx((1.25, 1.5, 8.0))


@pytest.mark.parametrize(("times", "manufacturer"), [(1, "Siemens"), (3, "Siemens"), (3, "Philips")])
def test_slices_and_times_of_a_multi_frame_image_are_never_mixed(
    tmp_path: Path, write_series: WriteSeries, times: int, manufacturer: str
) -> None:
    voxels = enhanced(tmp_path / "p1", write_series, times=times, manufacturer=manufacturer)
    (scan,) = scans_of(tmp_path)
    if (times, manufacturer) == (3, "Siemens"):  # dcm2niix orders these frames by slice first
        with pytest.raises(RefusedScan, match=r"mixed up slices and times.*single-frame"):
            read_scan(scan, CONFIG)
        return
    (volume,) = read_scan(scan, CONFIG)
    np.testing.assert_array_equal(volume.data, voxels)
