"""Reading and writing scans: nibabel is the reference, and unusable files have a reason code."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel import affines
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from p2r.data.volume import Volume, local_path, pair_of, read_labels, read_volume, scan_key, to_source_grid, write_nifti
from p2r.errors import RefusedScan, StorageError

OBLIQUE = np.array(
    [[-0.72, 0.31, 3.9, -30.0], [0.35, 1.21, 1.7, 12.0], [-0.55, -0.38, 6.6, 5.0], [0, 0, 0, 1.0]], dtype=np.float64
)


def voxels(dtype: Any, shape: tuple[int, ...] = (7, 9, 5), seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 120, shape).astype(dtype)


def code_of(path: Path) -> str:
    with pytest.raises(RefusedScan) as refusal:
        read_volume(path)
    assert path.name in str(refusal.value), "a refusal names the file"
    return refusal.value.code


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_and_affine_are_those_of_as_closest_canonical(write_scan: Any, dtype: Any, suffix: str) -> None:
    path = write_scan(f"scan{suffix}", voxels(dtype), OBLIQUE)
    reference = nibabel.as_closest_canonical(nibabel.load(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data[..., 0], np.asarray(reference.dataobj))
    np.testing.assert_allclose(volume.affine, reference.affine)
    np.testing.assert_allclose(np.array(volume.spacing_mm), affines.voxel_sizes(reference.affine))
    np.testing.assert_array_equal(volume.source_affine, nibabel.load(path).affine)
    assert volume.source_shape == (7, 9, 5)
    assert volume.key == "scan"
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SRA", "PIL", "ASR", "IRP"])
def test_every_orientation_is_converted_to_ras_and_back_exactly(write_scan: Any, codes: str) -> None:
    orientation = axcodes2ornt(tuple(codes))
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(orientation, (7, 9, 5))
    path = write_scan("scan.nii", voxels(np.int16), affine)
    volume = read_volume(path)
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(to_source_grid(volume.data[..., 0], volume), nibabel.load(path).dataobj)
    vectors = np.stack([volume.data[..., 0], 2 * volume.data[..., 0]], axis=-1)
    assert to_source_grid(vectors, volume).shape == (7, 9, 5, 2)


def test_scaling_is_applied_once(write_scan: Any, tmp_path: Path) -> None:
    for name, slope, intercept in (("half", 0.5, 3.25), ("whole", 2.0, -100.0)):
        image = nibabel.Nifti1Image(voxels(np.int16), OBLIQUE)
        image.header.set_slope_inter(slope, intercept)
        path = tmp_path / f"{name}.nii"
        raw = bytearray(image.to_bytes())
        # nibabel scales on writing, so the factors are written by hand, as by a scanner's converter.
        raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
        raw[352:] = voxels(np.int16).tobytes(order="F")
        path.write_bytes(raw)
        np.testing.assert_allclose(
            to_source_grid(read_volume(path).data, read_volume(path))[..., 0], slope * voxels(np.int16) + intercept
        )
        np.testing.assert_array_equal(
            to_source_grid(read_volume(path).data, read_volume(path))[..., 0],
            np.asarray(nibabel.load(path).dataobj).astype(np.float32),
        )
    assert read_volume(tmp_path / "half.nii").data.dtype == np.float32
    assert read_volume(tmp_path / "whole.nii").data.dtype == np.int16


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 30_000], np.int16), ([-5, 30_000], np.int16), ([0, 60_000], np.uint16), ([-1, 60_000], np.float32)],
)
def test_wide_integers_are_narrowed_without_loss(write_scan: Any, values: list[int], dtype: Any) -> None:
    array = np.resize(np.array(values, np.int32), (4, 4, 4))
    volume = read_volume(write_scan("scan.nii", array, np.eye(4)))
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.data[..., 0], array)


def test_another_byte_order_is_read_correctly(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(np.int16), np.eye(4), nibabel.Nifti1Header(endianness=">"), dtype=np.int16)
    nibabel.save(image, tmp_path / "big.nii")
    assert read_volume(tmp_path / "big.nii").data.dtype == np.dtype("int16").newbyteorder("=")
    np.testing.assert_array_equal(read_volume(tmp_path / "big.nii").data[..., 0], voxels(np.int16))


def test_nifti_2_and_a_gzip_without_its_suffix_are_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(voxels(np.int16), OBLIQUE), tmp_path / "two.nii.gz")
    (tmp_path / "zipped.nii").write_bytes((tmp_path / "two.nii.gz").read_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii.gz").data, read_volume(tmp_path / "zipped.nii").data)


def test_time_is_the_last_axis_also_for_one_frame(write_scan: Any) -> None:
    four = voxels(np.int16, (7, 9, 5, 3))
    volume = read_volume(write_scan("four.nii.gz", four, OBLIQUE))
    reference = nibabel.as_closest_canonical(nibabel.Nifti1Image(four, OBLIQUE))
    np.testing.assert_array_equal(volume.data, np.asarray(reference.dataobj))
    assert read_volume(write_scan("one.nii", four[..., :1])).data.shape == (7, 9, 5, 1)


def test_a_url_is_read_like_a_path(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", voxels(np.int16))
    np.testing.assert_array_equal(read_volume(f"file://{path}").data, read_volume(path).data)
    assert read_volume(f"file://{path}").key == "scan"


@pytest.mark.parametrize(
    "name", ["a/b/scan.nii.gz", "scan.nii", "s3://bucket/scan.NII.GZ", "x/scan.hdr", "scan.img.gz", "scan.IMG"]
)
def test_keys_are_file_names_without_the_suffix(name: str) -> None:
    assert scan_key(name) == "scan"


def test_images_of_two_or_five_axes_and_lines_are_not_3d(write_scan: Any) -> None:
    assert code_of(write_scan("flat.nii", voxels(np.int16, (20, 20)))) == "not_3d"
    assert code_of(write_scan("line.nii", voxels(np.int16, (20, 1, 1)))) == "not_3d"
    assert code_of(write_scan("five.nii", voxels(np.int16, (5, 5, 5, 2, 3)))) == "not_3d"


def test_complex_and_rgb_images_are_refused_by_dtype(write_scan: Any) -> None:
    assert code_of(write_scan("complex.nii", voxels(np.complex64))) == "dtype"
    rgb = np.zeros((5, 5, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert code_of(write_scan("rgb.nii", rgb)) == "dtype"


def test_an_unknown_datatype_is_refused(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    raw = bytearray(path.read_bytes())
    raw[70:72] = np.int16(3333).tobytes()
    path.write_bytes(raw)
    assert code_of(path) == "dtype"


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_refused(write_scan: Any, value: float) -> None:
    array = voxels(np.float32)
    array[1, 2, 3] = value
    assert code_of(write_scan("scan.nii", array)) == "nonfinite"


@pytest.mark.parametrize(("shift", "background"), [(10.5, 0.0), (-10.5, -10.5)])
def test_nan_is_background_and_counted_unless_refused(write_scan: Any, shift: float, background: float) -> None:
    array = voxels(np.float32) + np.float32(shift)
    array[1, 2, 3] = array[0, 0, 1] = np.nan
    path = write_scan("scan.nii", array, np.eye(4))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data[..., 0], np.nan_to_num(array, nan=background))
    assert volume.notes == ("nan_voxels=2",)
    with pytest.raises(RefusedScan, match=r"2 voxels that are NaN.*nan_voxels: background"):
        read_volume(path, nan="refuse")
    assert code_of(write_scan("all.nii", np.full((4, 4, 4), np.nan, np.float32))) == "nonfinite"
    with pytest.raises(RefusedScan, match="NaN"):
        read_labels(path)


def test_values_beyond_float32_are_refused(write_scan: Any) -> None:
    array = voxels(np.float64)
    array[1, 2, 3] = 1e200
    assert code_of(write_scan("scan.nii", array)) == "nonfinite"


def test_constant_scans_are_refused(write_scan: Any) -> None:
    assert code_of(write_scan("zero.nii.gz", np.zeros((5, 5, 5), np.int16))) == "constant"
    assert code_of(write_scan("seven.nii", np.full((5, 5, 5), 7.0, np.float32))) == "constant"


def test_nan_becomes_the_background_of_its_own_frame(write_scan: Any) -> None:
    frames = np.stack([np.full((4, 4, 4), -500.0), np.full((4, 4, 4), 100.0)], -1).astype(np.float32)
    frames[1, 2, 3, 1] = frames[1, 1, 1, 0] = np.nan
    found = read_volume(write_scan("contrasts.nii", frames)).data
    assert (found[1, 1, 1, 0], found[1, 2, 3, 1]) == (-500, 0)


@pytest.mark.parametrize("broken", [[0, 0, 0], [1, 1, 0], [np.nan, 0, 1], [1e-9, 0, 0]])
def test_degenerate_affines_are_refused(write_scan: Any, broken: list[float]) -> None:
    path = write_scan("scan.nii", voxels(np.int16), np.eye(4))
    raw = bytearray(path.read_bytes())
    rows = np.array([[1, 1, broken[0], 0], [0, 1, broken[1], 0], [0, 0, broken[2], 0]], "<f4")
    if broken[2] == 0 and broken[1] == 1:
        rows[:, 0] = rows[:, 1] = rows[:, 2]  # all axes along one direction
    raw[254:256] = np.int16(1).tobytes()  # sform_code
    raw[280:328] = rows.tobytes()
    path.write_bytes(raw)
    assert code_of(path) == "degenerate_affine"


def test_an_axis_without_voxels_is_empty(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    raw = bytearray(path.read_bytes())
    raw[42:44] = np.int16(0).tobytes()  # dim[1]
    path.write_bytes(raw)
    assert code_of(path) == "empty"


def test_labels_may_be_empty_and_come_as_int16(write_scan: Any) -> None:
    assert read_labels(write_scan("zero.nii.gz", np.zeros((5, 5, 5), np.uint8))).data.dtype == np.int16
    floats = read_labels(write_scan("floats.nii.gz", voxels(np.float64)))
    np.testing.assert_array_equal(floats.data[..., 0], voxels(np.int16))


@pytest.mark.parametrize("array", [voxels(np.float32) + 0.5, voxels(np.int16) - 60, voxels(np.int32) * 1000])
def test_labels_are_small_nonnegative_integers(write_scan: Any, array: Any) -> None:
    path = write_scan("labels.nii", array)
    with pytest.raises(RefusedScan) as refusal:
        read_labels(path)
    assert refusal.value.code == "labels"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_written_volumes_are_read_back(tmp_path: Path, suffix: str, dtype: Any) -> None:
    path = tmp_path / "new" / f"scan{suffix}"
    write_nifti(path, voxels(dtype), OBLIQUE)
    image = nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), voxels(dtype))
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    assert image.get_data_dtype() == dtype
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 2


def test_booleans_and_wide_integers_are_written_as_narrow_integers(tmp_path: Path) -> None:
    for array, dtype in ((voxels(np.int64) > 50, "uint8"), (voxels(np.int64), "uint8"), (-voxels(np.int64), "int16")):
        write_nifti(tmp_path / "scan.nii", array, np.eye(4))
        assert nibabel.load(tmp_path / "scan.nii").get_data_dtype() == dtype
        np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "scan.nii").dataobj), array)


def test_writing_is_reproducible(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, voxels(np.int16), OBLIQUE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_forgotten_reorientation_is_caught_when_writing(write_scan: Any, tmp_path: Path) -> None:
    volume = read_volume(write_scan("scan.nii", voxels(np.int16), OBLIQUE))
    back = to_source_grid(volume.data[..., 0], volume)
    write_nifti(tmp_path / "out.nii", back, volume.source_affine, like=volume)
    with pytest.raises(ValueError, match="grid"):
        write_nifti(tmp_path / "wrong.nii", volume.data[..., 0], volume.affine, like=volume)
    assert not (tmp_path / "wrong.nii").exists()


def test_writing_to_an_impossible_path_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_nifti(tmp_path / "file" / "scan.nii", voxels(np.int16), np.eye(4))
    with pytest.raises(StorageError, match="must end in"):
        write_nifti(tmp_path / "scan.mgz", voxels(np.int16), np.eye(4))


def test_a_foreign_grid_is_a_value_error(write_scan: Any) -> None:
    volume: Volume = read_volume(write_scan("scan.nii", voxels(np.int16)))
    with pytest.raises(ValueError, match="grid"):
        to_source_grid(np.zeros((3, 3, 3)), volume)


def test_a_placeholder_affine_does_not_hide_the_voxel_size(tmp_path: Path) -> None:
    """As in ACDC: an sform of ones, no qform, and the true voxel size only in pixdim."""
    image = nibabel.Nifti1Image(np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_qform(None)
    image.header.set_zooms((1.5, 1.25, 10.0))
    image.to_filename(tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert volume.spacing_mm == (1.5, 1.25, 10.0)
    assert np.array_equal(volume.source_affine, image.affine)
    write_nifti(tmp_path / "labels.nii.gz", np.ones((6, 5, 4), np.uint8), volume.source_affine, like=volume)
    written = nibabel.load(tmp_path / "labels.nii.gz")
    assert written.header.get_zooms() == (1.5, 1.25, 10.0)
    assert np.array_equal(written.affine, image.affine)
    assert read_volume(tmp_path / "scan.nii.gz").spacing_mm == read_labels(tmp_path / "labels.nii.gz").spacing_mm


def test_true_voxels_of_one_millimetre_are_kept(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4))
    assert read_volume(tmp_path / "scan.nii.gz").spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_scan_in_two_files_is_read_by_either_name(tmp_path: Path, kind: Any, suffix: str) -> None:
    nibabel.save(kind(voxels(np.int16), OBLIQUE), tmp_path / f"scan.img{suffix}")
    reference = nibabel.as_closest_canonical(nibabel.load(tmp_path / f"scan.img{suffix}"))
    for name in (f"scan.hdr{suffix}", f"scan.img{suffix}"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.data[..., 0], np.asarray(reference.dataobj))
        np.testing.assert_allclose(volume.affine, reference.affine)
        assert volume.key == "scan"
    (tmp_path / f"scan.hdr{suffix}").rename(tmp_path / f"other.hdr{suffix}")
    for name, absent in (("scan.img", "scan.hdr"), ("other.hdr", "other.img")):
        with pytest.raises(RefusedScan, match=f"{absent}.*unreadable"):
            read_volume(tmp_path / f"{name}{suffix}")


def test_a_header_of_a_file_pair_is_refused_as_a_single_file(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(voxels(np.int16), OBLIQUE), tmp_path / "scan.hdr")
    (tmp_path / "alone.nii").write_bytes((tmp_path / "scan.hdr").read_bytes())
    assert code_of(tmp_path / "alone.nii") == "not_nifti"
    nibabel.save(nibabel.AnalyzeImage(voxels(np.int16), np.eye(4)), tmp_path / "old.hdr")
    assert code_of(tmp_path / "old.hdr") == "not_nifti", "ANALYZE does not define which side is left"


def test_names_of_header_and_voxel_files() -> None:
    assert pair_of("a/b.hdr") == pair_of("a/b.img") == ("a/b.hdr", "a/b.img")
    assert pair_of("b.HDR.GZ") == ("b.HDR.GZ", "b.IMG.GZ")
    assert pair_of("b.nii") is None
    assert local_path("file:///a%20b") == Path("/a%20b"), "as in a storage's URL"
    assert local_path("a%20b") == Path("a%20b")
    assert local_path("s3://bucket/a") is None


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([-3.0, 30_000.0], np.int16),
        ([0.0, 60_000.0], np.uint16),
        ([0.5, 60_000.0], np.float32),
        ([-1.0, 60_000.0], np.float32),
        ([0.0, 70_000.0], np.float32),
    ],
)
@pytest.mark.parametrize("stored", [np.float32, np.float64, ">f4"])
def test_integers_stored_as_floats_become_integers(
    write_scan: Any, values: list[float], dtype: Any, stored: Any
) -> None:
    array = np.resize(np.array(values, np.float64), (4, 4, 4)).astype(stored)
    volume = read_volume(write_scan("scan.nii.gz", array, np.eye(4)))
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.data[..., 0], array)


@pytest.mark.parametrize(
    ("value", "code"), [(1e38, "degenerate_affine"), (np.nan, "degenerate_affine"), (1e5, "extent")]
)
def test_absurd_voxel_sizes_are_refused(write_scan: Any, value: float, code: str) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    raw = bytearray(path.read_bytes())
    raw[254:256] = np.int16(1).tobytes()
    raw[280:284] = np.float32(value).tobytes()
    path.write_bytes(raw)
    assert code_of(path) == code
