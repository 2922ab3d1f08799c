"""A copy of a scan under another subject's name is found without reading every scan."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from p2r.data.scans import search_scans
from p2r.data.twins import twins_of


def write(path: Path, *, seed: int, description: str = "") -> None:
    voxels = np.random.default_rng(seed).integers(0, 900, (8, 9, 3)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header["descrip"] = description
    image.to_filename(path)


def twins_in(folder: Path) -> dict[str, str]:
    scans = search_scans([str(folder)], cache=folder).scans
    subjects = sorted({scan.name.partition("_")[0] for scan in scans})
    return twins_of({name: [scan for scan in scans if scan.name.startswith(f"{name}_")] for name in subjects})


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_copies_are_found_and_the_first_subject_stays(suffix: str, tmp_path: Path) -> None:
    for subject, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 0), ("e", 2)):
        write(tmp_path / f"{subject}_t1{suffix}", seed=seed)
    assert twins_in(tmp_path) == {"c": "a", "d": "a"}


def test_another_compression_hides_no_copy(tmp_path: Path) -> None:
    write(tmp_path / "a_t1.nii.gz", seed=0)
    content = gzip.decompress((tmp_path / "a_t1.nii.gz").read_bytes())
    (tmp_path / "b_t1.nii.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=7))
    assert twins_in(tmp_path) == {"b": "a"}


def test_two_scans_of_one_subject_may_be_equal(tmp_path: Path) -> None:
    write(tmp_path / "a_t1.nii.gz", seed=0)
    write(tmp_path / "a_t2.nii.gz", seed=0)
    assert twins_in(tmp_path) == {}


def test_equal_marks_of_different_voxels_are_no_copies(tmp_path: Path) -> None:
    for subject in "ab":
        path = tmp_path / f"{subject}_t1.nii"
        write(path, seed=0)
        voxels = bytearray(path.read_bytes())
        voxels[352] ^= subject == "b"  # outside of the compared piece if that is short
        path.write_bytes(bytes(voxels) + b"\0" * (1 << 18))
    assert twins_in(tmp_path) == {}


def test_broken_copies_are_left_to_the_reader(tmp_path: Path) -> None:
    for subject in "ab":
        (tmp_path / f"{subject}_t1.nii.gz").write_bytes(b"no scan, twice")
        (tmp_path / f"{subject}_t2.nii").write_bytes(b"")
    assert twins_in(tmp_path) == {}
