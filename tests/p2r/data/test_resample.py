"""Resampling changes the voxel size, but neither positions nor intensities."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from p2r.config import IngestConfig
from p2r.data.read import read_scan
from p2r.data.resample import resample
from p2r.data.scans import find_scans
from p2r.data.volume import Volume, read_volume, to_source_grid
from p2r.errors import RefusedScan

OBLIQUE = np.array([[1.2, 0.3, -0.4, -30], [-0.3, 1.4, 0.2, 12], [0.35, -0.2, 3.8, 5], [0, 0, 0, 1.0]])


def volume_of(data: Any, affine: Any = OBLIQUE) -> Volume:
    data = data if data.ndim == 4 else data[..., None]
    spacing = tuple(float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(data, affine, affine, data.shape[:3], spacing, "scan")  # type: ignore[arg-type]


def ramp(shape: tuple[int, ...], affine: Any, slopes: tuple[float, float, float] = (3.0, -2.0, 1.5)) -> Any:
    """Return intensities linear in millimetres, which correct resampling preserves inside the volume."""
    index = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return (index @ affine[:3, :3].T + affine[:3, 3]) @ np.array(slopes)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.5, 2.0, 5.0), (0.7, 3.0, 3.8)])
def test_a_ramp_in_millimetres_is_unchanged(spacing_mm: tuple[float, float, float]) -> None:
    volume = volume_of(ramp((40, 44, 30), OBLIQUE).astype(np.float32))
    found = resample(volume, spacing_mm)
    np.testing.assert_allclose(found.spacing_mm, spacing_mm, rtol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), found.spacing_mm)
    expected = ramp(found.data.shape[:3], found.affine)
    inside = tuple(slice(size // 4, -size // 4) for size in found.data.shape[:3])  # the blur changes the ends
    np.testing.assert_allclose(found.data[..., 0][inside], expected[inside], atol=0.05)


def test_the_extent_and_its_centre_are_unchanged() -> None:
    volume = volume_of(ramp((40, 44, 30), OBLIQUE).astype(np.float32))
    found = resample(volume, (2.0, 2.0, 2.0))
    extent = np.array(volume.data.shape[:3]) * volume.spacing_mm
    np.testing.assert_allclose(np.array(found.data.shape[:3]) * found.spacing_mm, extent, atol=1.01)
    one, other = (v.affine @ [*((np.array(v.data.shape[:3]) - 1) / 2), 1] for v in (volume, found))
    np.testing.assert_allclose(one, other, atol=1e-9)
    np.testing.assert_allclose(
        found.affine[:3, :3] / found.spacing_mm, volume.affine[:3, :3] / volume.spacing_mm, atol=1e-12
    )


def test_finer_voxels_match_nibabel() -> None:
    data = np.random.default_rng(0).normal(size=(12, 14, 9)).astype(np.float32)
    found = resample(volume_of(data), (0.6, 1.0, 2.0))
    image = nibabel.Nifti1Image(data, OBLIQUE)
    expected = resample_from_to(image, (found.data.shape[:3], found.affine), order=1, mode="nearest")
    np.testing.assert_allclose(found.data[..., 0], np.asarray(expected.dataobj), atol=1e-4)


def test_frequencies_beyond_the_coarser_grid_are_filtered_first() -> None:
    stripes = np.zeros((64, 64, 8), np.float32)
    stripes[::2] = 1000
    found = resample(volume_of(stripes, np.eye(4)), (3.0, 1.0, 1.0))
    inside = found.data[4:-4, ..., 0]
    assert np.abs(inside - 500).max() < 50, "without the blur, stripes would alias"
    assert found.data.shape == (21, 64, 8, 1)


def test_integers_stay_integers_within_their_range_and_are_rounded() -> None:
    data = np.random.default_rng(0).integers(0, 60_000, (20, 20, 20)).astype(np.uint16)
    found = resample(volume_of(data, np.eye(4)), (0.8, 1.0, 1.7))
    exact = resample(volume_of(data.astype(np.float32), np.eye(4)), (0.8, 1.0, 1.7))
    assert found.data.dtype == np.uint16
    assert found.data.max() <= data.max()
    np.testing.assert_array_equal(found.data, np.rint(exact.data))


def test_the_same_spacing_changes_nothing() -> None:
    volume = volume_of(np.ones((5, 6, 7), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    assert resample(volume, (1.0, 2.0, 3.0)) is volume
    assert resample(volume, (1.0005, 2.0, 2.999)) is volume
    one_axis = resample(volume, (1.0, 2.0, 1.5))
    assert one_axis.data.shape == (5, 6, 14, 1)
    assert one_axis.spacing_mm == (1.0, 2.0, 1.5)
    assert one_axis.resampled_from_mm == (1.0, 2.0, 3.0)


def test_frames_are_resampled_one_by_one() -> None:
    data = np.random.default_rng(0).integers(0, 900, (10, 12, 8, 3)).astype(np.int16)
    found = resample(volume_of(data), (2.0, 2.0, 2.0))
    for frame in range(3):
        alone = resample(volume_of(data[..., frame]), (2.0, 2.0, 2.0))
        np.testing.assert_array_equal(found.data[..., frame], alone.data[..., 0])


def test_a_placeholder_affine_gets_the_true_size(tmp_path: Path) -> None:
    """As in ACDC: an affine of ones, and the true voxel size only in pixdim."""
    image = nibabel.Nifti1Image(np.arange(20 * 30 * 6, dtype=np.int16).reshape(20, 30, 6), np.diag([-1, -1, 1, 1.0]))
    image.set_qform(None)
    image.header.set_zooms((1.5, 1.5, 9.0))
    image.to_filename(tmp_path / "scan.nii.gz")
    found = resample(read_volume(tmp_path / "scan.nii.gz"), (3.0, 3.0, 3.0))
    assert found.data.shape == (10, 15, 18, 1)
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), 3.0)


def test_results_too_small_or_too_large_are_refused() -> None:
    volume = volume_of(np.ones((20, 20, 20), np.int16), np.eye(4))
    for spacing_mm, code in (((15.0, 1.0, 1.0), "too_small"), ((0.01, 0.01, 0.01), "too_large")):
        with pytest.raises(RefusedScan) as refusal:
            resample(volume, spacing_mm)
        assert refusal.value.code == code


def test_the_original_file_cannot_be_restored() -> None:
    found = resample(volume_of(np.ones((20, 20, 20), np.int16), np.eye(4)), (2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="resampled"):
        to_source_grid(found.data, found)


def test_a_job_states_one_spacing_or_three(tmp_path: Path, write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", np.random.default_rng(0).integers(0, 900, (40, 40, 10)).astype(np.int16))
    (scan,) = find_scans([str(path)], cache=tmp_path)
    shapes = []
    for asked in (2.0, (1.5, 1.5, 4.0), None):
        (volume,) = read_scan(scan, IngestConfig(sources=("x",), licence="CC0-1.0", resample_mm=asked))
        shapes.append(volume.data.shape)
    assert shapes == [(30, 30, 40, 1), (40, 40, 20, 1), (40, 40, 10, 1)]
