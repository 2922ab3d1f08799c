"""Every case of `scan_cases` is read correctly or refused with advice, and written files overlay their scan."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel import affines
from numpy.typing import NDArray

from p2r.config import IngestConfig
from p2r.data.growth import subject_of
from p2r.data.preprocess import Preparation, percentile_table
from p2r.data.read import read_scan
from p2r.data.scans import find_scans, search_scans
from p2r.data.volume import Volume, read_labels, read_volume, to_source_grid, write_nifti
from p2r.errors import DataError, RefusedScan
from p2r.evaluate.task_files import load_task
from p2r.evaluate.tasks import load_scan
from tests.dicom_cases import DICOM_CASES, DicomCase, voxels
from tests.folder_cases import FOLDER_CASES, FolderCase
from tests.scan_cases import CASES, PAIRS, READ, Case, PairCase, Scan, label_map, table

# Files that nibabel or ITK do not read, or read as other values; they cannot be compared.
NOT_FOR_NIBABEL = ("gzipped, under", "quaternion rounded", "vox_offset of 0")
NOT_FOR_ITK = ("NIfTI-2", "with shear", "gzipped, under a plain name", "scl_slope of 0", "vox_offset of 0")


def read(case: Case, path: Path) -> Volume:
    if case.is_label:
        return read_labels(path)
    volume = read_volume(path)
    percentile_table(volume.data, name=str(path))
    return volume


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_has_the_outcome_of_the_table(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    if case.refused:
        with pytest.raises(RefusedScan) as refusal:
            read(case, path)
        assert refusal.value.code == case.refused
        assert str(path) in refusal.value.message, "it names the file"
        assert case.way_out in refusal.value.message
        return
    volume = read(case, path)
    assert volume.data.shape == case.shape
    assert volume.spacing_mm == pytest.approx(case.mm, rel=1e-5)
    assert volume.notes == case.notes
    assert volume.data.dtype.kind in "iuf" and np.isfinite(volume.data).all()


@pytest.mark.parametrize("case", DICOM_CASES, ids=lambda case: case.name)
def test_every_series_has_the_outcome_of_the_table(case: DicomCase, tmp_path: Path) -> None:
    case.series.write(tmp_path / "p1")
    scans = find_scans([str(tmp_path)], cache=tmp_path)
    config = IngestConfig(sources=("anywhere",), licence="CC0-1.0", min_size=8)
    if case.refused:
        (scan,) = scans
        with pytest.raises(RefusedScan) as refusal:
            read_scan(scan, config)
        assert refusal.value.code == case.refused
        assert scan.path in refusal.value.message and case.way_out in refusal.value.message
        return
    volumes = [volume for scan in scans for volume in read_scan(scan, config)]
    assert sorted(volume.data.shape for volume in volumes) == sorted(case.shapes)
    if case.values is not None:
        assert volumes[0].spacing_mm == pytest.approx(case.mm, abs=0.01)
        # Columns run to the Left and rows to Posterior in the files; RAS turns both around.
        np.testing.assert_allclose(volumes[0].data[..., 0], case.values(voxels())[::-1, ::-1], rtol=1e-6)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_every_label_map_has_the_outcome_of_the_table(case: PairCase, tmp_path: Path) -> None:
    for name in ("P1", "P2", "P3"):
        for part, scan in (("images", Scan()), ("labels", case.label)):
            (tmp_path / part).mkdir(exist_ok=True)
            scan.write(tmp_path / part / f"{name}.nii.gz")
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: organs\ntitle: Organs\nimages: images\nlabels: labels\nlicence: CC0-1.0\ncohort: organs\n"
        "subject_pattern: ^(.+?)\\.nii\nclasses: {1: liver, 2: spleen}\nsplit_rule: {seed: 0, validation: 1, test: 1}\n"
    )
    task = load_task(path)
    preparation = Preparation(spacing_mm=1.5, image_size=32)
    if not case.refused:
        found = load_scan(task.scans[0], task, preparation).labels
        np.testing.assert_array_equal(found.data[..., 0], label_map()[::-1], "in RAS order, as the scan")
        return
    with pytest.raises(DataError) as refusal:
        load_scan(task.scans[0], task, preparation)
    assert str(task.scans[0].label) in str(refusal.value) and case.refused in str(refusal.value)


@pytest.mark.parametrize("case", FOLDER_CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_every_folder_list_and_task_has_the_outcome_of_the_table(case: FolderCase, tmp_path: Path) -> None:
    source = case.write(tmp_path)
    if case.refused:
        with pytest.raises(DataError) as refusal:
            described(case.kind, source)
        assert str(source) in str(refusal.value) and case.outcome in str(refusal.value)
    else:
        assert described(case.kind, source) == case.outcome


def described(kind: str, source: Path) -> str:
    """Return the outcome of a source, as stated in the table."""
    if kind == "task":
        task = load_task(source)
        return f"{len(task.scans)} cases of {sum(map(len, task.subjects.values()))} patients"
    found = search_scans([str(source)], cache=source.parent)
    scans = [scan for scan in found.scans if not scan.label_map]
    config = IngestConfig(sources=(str(source),), licence="CC0-1.0")
    subjects = sorted({str(subject_of(scan, config)) for scan in scans})
    num_maps, num_folders = len(found.scans) - len(scans), len(found.passed_over)
    return (
        f"{len(scans)} scan{'s' * (len(scans) != 1)} of {len(subjects)} subject{'s' * (len(subjects) != 1)}"
        + f", {subjects[0]}" * (len(subjects) == 1)
        + f", {num_maps} label maps" * bool(num_maps)
        + f", {num_folders} folders not read" * bool(num_folders)
    )


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_file_written_like_a_scan_overlays_it_in_nibabel_and_itk(case: Case, tmp_path: Path) -> None:
    path, output = case.write(tmp_path), tmp_path / "out" / "labels.nii.gz"
    volume = read_volume(path)
    stored = to_source_grid(volume.data, volume)
    write_nifti(output, stored[..., 0] if stored.shape[3] == 1 else stored, volume.source_affine, like=volume)
    rng = np.random.default_rng(0)
    voxels = np.stack([rng.integers(0, size, 20) for size in volume.source_shape], 1)
    if not any(words in case.name for words in NOT_FOR_NIBABEL):
        scan, written = nibabel.load(path), nibabel.load(output)
        world = affines.apply_affine(scan.affine, voxels)
        places = np.rint(affines.apply_affine(np.linalg.inv(written.affine), world)).astype(int)
        np.testing.assert_array_equal(places, voxels)
        assert written.header.get_zooms() == scan.header.get_zooms()[: len(written.shape)]
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert written.header[field] == scan.header[field], field
        _assert_close(_taken(written, places), _taken(scan, voxels))
    if not any(words in case.name for words in NOT_FOR_ITK):
        scan, written = (SimpleITK.ReadImage(str(file)) for file in (path, output))
        assert written.GetSpacing() == pytest.approx(scan.GetSpacing())
        for voxel in voxels:
            index = [int(number) for number in voxel] + [0] * (scan.GetDimension() - 3)
            world = scan.TransformIndexToPhysicalPoint(index)
            assert written.TransformPhysicalPointToIndex(world) == tuple(index)
            _assert_close(written.GetPixel(index), scan.GetPixel(index))


def test_the_table_of_the_documentation_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "inputs.md"
    assert page.read_text() == table(), "run: python -m tests.scan_cases > docs/inputs.md"


def _taken(image: nibabel.Nifti1Image, places: NDArray[np.int64]) -> NDArray[np.float64]:
    data = np.asarray(image.dataobj, np.float64).reshape(*image.shape[:3], -1)
    return data[tuple(places.T)]


def _assert_close(found: object, expected: object) -> None:
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.nan_to_num(np.asarray(expected, np.float64)), rtol=1e-6
    )
