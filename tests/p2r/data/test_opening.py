"""Streams of scans: truncated and damaged files, padding, bombs; memory is bounded by the header's stated size."""

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from p2r.data.volume import read_volume
from p2r.errors import RefusedScan

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


def test_a_gzip_cut_anywhere_is_truncated(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", voxels(np.int16))
    whole = path.read_bytes()
    for length in (20, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        assert code_of(path) == "truncated"


def test_a_cut_plain_file_is_truncated(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert code_of(path) == "truncated"
    path.write_bytes(gzip.compress(whole[:-2]))
    assert code_of(path) == "truncated"


def test_a_flipped_bit_in_a_gzip_is_refused(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", voxels(np.int16))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    assert code_of(path) in {"unreadable", "truncated"}


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 348, b"x" * 4000, gzip.compress(b"not an image", mtime=0)])
def test_other_files_are_not_nifti(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(content)
    assert code_of(tmp_path / "scan.nii.gz") == "not_nifti"


def test_an_absent_file_is_unreadable(tmp_path: Path) -> None:
    assert code_of(tmp_path / "absent.nii.gz") == "unreadable"
    (tmp_path / "folder.nii").mkdir()
    assert code_of(tmp_path / "folder.nii") == "unreadable"


@pytest.mark.parametrize("shape", [(3, 6, 30_001), (2000, 301, 3), (700, 2, 700), (2, 2, 3, 4)])
def test_scans_larger_than_a_chunk_are_converted_completely(write_scan: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int32)
    affine = np.array([[0, 0, -0.06, 1], [-0.03, 0, 0, 2], [0, 0.9, 0, 3], [0, 0, 0, 1]])
    volume = read_volume(write_scan("scan.nii", array, affine))
    reference = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine, dtype=np.int32))
    np.testing.assert_array_equal(volume.data.squeeze(), np.asarray(reference.dataobj).squeeze())


def test_every_bit_of_a_gzip_trailer_is_checked(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", voxels(np.int16))
    whole = path.read_bytes()
    for bit in range(64):
        raw = bytearray(whole)
        raw[-8 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert code_of(path) == "unreadable"


def test_a_gzip_in_several_members_and_padding_are_read(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole[:200]) + gzip.compress(whole[200:] + bytes(1000)) + bytes(512))
    np.testing.assert_array_equal(read_volume(path).data[..., 0], voxels(np.int16))


def test_padding_is_noted_and_other_trailing_bytes_are_unreadable(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    whole = path.read_bytes()
    zipped, some = gzip.compress(whole), b"some" * 9000
    for content in (whole + bytes(3 << 20), gzip.compress(whole + bytes(3 << 20)), whole + some, zipped + some):
        path.write_bytes(content)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.data[..., 0], voxels(np.int16))
        assert volume.notes == ("trailing_bytes",)
    for content in (whole + bytes(17 << 20), gzip.compress(whole + bytes(17 << 20)), whole + some * 100):
        path.write_bytes(content)
        assert code_of(path) == "unreadable"


def peak_mib(path: Path, **options: Any) -> float:
    tracemalloc.start()
    try:
        read_volume(path, **options)
    except RefusedScan:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak / 2**20


def test_a_gzip_bomb_is_read_only_to_the_size_in_its_header(write_scan: Any) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole + bytes(300 << 20), compresslevel=1))
    assert code_of(path) == "unreadable"
    assert peak_mib(path) < 4
    bent = bytearray(whole)
    bent[42:48] = np.array([1200, 1000, 1000], "<i2").tobytes()  # 2.4 GB in a file of some KB
    path.write_bytes(gzip.compress(bent))
    assert code_of(path) == "truncated"
    assert peak_mib(path) < 4


def test_the_size_in_a_header_is_bounded(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", np.random.default_rng(0).integers(0, 99, (64, 64, 64)).astype(np.int16))
    assert read_volume(path, max_mib=0.51).data.shape == (64, 64, 64, 1)
    with pytest.raises(RefusedScan, match=r"max_scan_mib") as refusal:
        read_volume(path, max_mib=0.5)
    assert refusal.value.code == "too_large"
    two = nibabel.Nifti2Image(voxels(np.int16), OBLIQUE)
    raw = bytearray(two.to_bytes())
    raw[24:32] = np.int64(2**62).tobytes()
    path.write_bytes(raw)
    assert code_of(path) == "too_large"


@pytest.mark.parametrize(
    ("dtype", "slope", "bytes_per_voxel"), [(np.int16, None, 2 + 2), (np.int16, 0.37, 2 + 4), (np.float64, None, 8 + 4)]
)
def test_peak_memory_is_that_of_the_stored_and_the_kept_voxels(
    write_scan: Any, dtype: Any, slope: float | None, bytes_per_voxel: int
) -> None:
    array = np.random.default_rng(0).normal(0, 100, (220, 200, 180)).astype(dtype)
    path = write_scan("scan.nii", array)
    if slope is not None:
        raw = bytearray(path.read_bytes())
        raw[112:116] = np.float32(slope).tobytes()
        path.write_bytes(raw)
    assert peak_mib(path) < bytes_per_voxel * array.size / 2**20 + 32


def test_frames_are_capped_evenly_and_recorded(write_scan: Any) -> None:
    four = voxels(np.int16, (7, 9, 5, 12))
    for name in ("four.nii", "four.nii.gz"):
        path = write_scan(name, four, OBLIQUE)
        whole = read_volume(path)
        assert whole.frames is None
        for limit, frames in ((1, (6,)), (3, (2, 6, 10)), (5, (1, 3, 6, 8, 10)), (11, None)):
            volume = read_volume(path, max_frames=limit)
            assert frames is None or volume.frames == frames
            assert volume.frames is not None
            assert len(set(volume.frames)) == limit
            np.testing.assert_array_equal(volume.data, whole.data[..., list(volume.frames)])
        assert read_volume(path, max_frames=12).frames is None


def test_omitted_frames_take_no_memory(write_scan: Any) -> None:
    path = write_scan("four.nii.gz", np.random.default_rng(0).integers(0, 9, (64, 64, 32, 100)).astype(np.int16))
    assert peak_mib(path, max_frames=2) < 8 < peak_mib(path)


@pytest.mark.parametrize(
    ("offset", "code"),
    [
        (0, None),
        (352, None),
        (-16, "not_nifti"),
        (100, "not_nifti"),
        (np.nan, "not_nifti"),
        (np.inf, "not_nifti"),
        (1e30, "too_large"),
        (1e6, "truncated"),
    ],
)
def test_the_offset_of_the_voxels_must_be_valid(write_scan: Any, offset: float, code: str | None) -> None:
    path = write_scan("scan.nii", voxels(np.int16))
    raw = bytearray(path.read_bytes())
    raw[108:112] = np.float32(offset).tobytes()
    path.write_bytes(raw)
    if code is None:
        assert read_volume(path).data.sum() == voxels(np.int16).sum()
    else:
        assert code_of(path) == code
