from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import SegmentationStorage

from p2r.data.dicom_seg import DicomScan, read_series, write_segmentation
from p2r.errors import InputError, RefusedScan
from tests.dicom_cases import Series

hd: Any = pytest.importorskip("highdicom", reason="highdicom is not installed: pip install -e '.[dicom-seg]'")


@pytest.fixture
def scan(tmp_path: Path) -> DicomScan:
    Series().write(tmp_path / "series")
    return read_series(tmp_path / "series")


def _write(path: Path, labels: Any, scan: DicomScan) -> Any:
    write_segmentation(path, labels, scan, classes={1: "DARK", 2: "BRIGHT"}, name="toy-1", details="sha256:0")
    return hd.seg.segread(path)


def test_every_pixel_of_the_source_has_the_label_of_its_own_voxel(scan: DicomScan, tmp_path: Path) -> None:
    data = scan.volume.data[..., 0]
    made = _write(tmp_path / "seg.dcm", ((data < 300) + 2 * (data > 600)).astype(np.uint8), scan)
    sources = [pydicom.dcmread(file) for file in scan.files]
    frames = made.get_pixels_by_source_instance([one.SOPInstanceUID for one in sources], combine_segments=True)
    for source, frame in zip(sources, frames, strict=True):
        pixels = source.pixel_array
        np.testing.assert_array_equal(frame, (pixels < 300) + 2 * (pixels > 600))


def test_a_segmentation_refers_to_its_source_and_keeps_patient_and_study(scan: DicomScan, tmp_path: Path) -> None:
    _write(tmp_path / "seg.dcm", np.ones(scan.volume.data.shape[:3], np.uint8), scan)
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    source = pydicom.dcmread(scan.files[0])
    assert found.SOPClassUID == SegmentationStorage
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert found[keyword].value == source[keyword].value
    (series,) = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    referred = {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence}
    assert referred == {pydicom.dcmread(file).SOPInstanceUID for file in scan.files}
    assert [one.SegmentLabel for one in found.SegmentSequence] == ["DARK", "BRIGHT"]
    assert found.SeriesInstanceUID != source.SeriesInstanceUID


def test_an_empty_segmentation_is_written_with_all_its_frames(scan: DicomScan, tmp_path: Path) -> None:
    made = _write(tmp_path / "seg.dcm", np.zeros(scan.volume.data.shape[:3], np.uint8), scan)
    assert made.NumberOfFrames >= len(scan.files)
    assert not made.pixel_array.any()


def test_images_that_are_not_on_the_voxels_of_the_volume_are_refused(scan: DicomScan, tmp_path: Path) -> None:
    moved = pydicom.dcmread(scan.files[0])
    moved.ImagePositionPatient = [-8.5, -10, 0]
    moved.save_as(scan.files[0])
    with pytest.raises(RefusedScan, match=r"are not voxels of the converted volume.*write NIfTI"):
        _write(tmp_path / "seg.dcm", np.ones(scan.volume.data.shape[:3], np.uint8), scan)
    assert not (tmp_path / "seg.dcm").exists()


def test_a_folder_of_several_series_is_refused(tmp_path: Path) -> None:
    Series().write(tmp_path / "series")
    Series(each=lambda k: {"SeriesInstanceUID": "1.2.9", "SOPInstanceUID": f"1.2.9.{k}"}, name="other{:04d}.dcm").write(
        tmp_path / "second"
    )
    for file in (tmp_path / "second").iterdir():
        file.rename(tmp_path / "series" / file.name)
    with pytest.raises(InputError, match="holds 2 DICOM series: give the folder of one"):
        read_series(tmp_path / "series")
