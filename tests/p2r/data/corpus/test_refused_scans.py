"""Refused scans in the ledger: each has its reason, and too many of them stop the job."""

from pathlib import Path

import numpy as np
import pytest

from p2r.data.corpus import ingest_locally, load_manifest, verify_corpus
from p2r.errors import DataError
from p2r.storage import Storage
from tests.p2r.data.corpus.conftest import WriteScan, bytes_below, config_of, ledger_of, make, voxels

# Refusals


def test_every_scan_has_a_row_with_the_reason(write_scan: WriteScan, storage: Storage) -> None:
    good = write_scan("sub-0_good.nii.gz", voxels(0))
    write_scan("sub-0_copy.nii", voxels(0))
    write_scan("sub-1_flat.nii", voxels(1, (20, 20)))
    write_scan("sub-2_constant.nii", np.ones((20, 20, 4), np.int16))
    write_scan("sub-3_small.nii", voxels(3, (12, 20, 4)))
    write_scan("sub-4_complex.nii", voxels(4).astype(np.complex64))
    write_scan("sub-5_infinite.nii", np.where(voxels(5) > 490, np.inf, 1.0).astype(np.float32))
    write_scan("sub-6_cut.nii.gz", voxels(6)).write_bytes(good.read_bytes()[:-40])
    (good.parent / "sub-7_text.nii").write_text("not an image")
    make(storage, config_of(good.parent, max_refused_fraction=1.0))
    ledger = ledger_of(storage)
    assert {key: row["reason"] for key, row in ledger.items()} == {
        "sub-0_copy": "accepted",
        "sub-0_good": "duplicate",
        "sub-1_flat": "not_3d",
        "sub-2_constant": "constant",
        "sub-3_small": "too_small",
        "sub-4_complex": "dtype",
        "sub-5_infinite": "nonfinite",
        "sub-6_cut": "truncated",
        "sub-7_text": "not_nifti",
    }
    assert {row["status"] for row in ledger.values()} == {"accepted", "refused"}
    assert all(row["message"] for row in ledger.values() if row["status"] == "refused")
    manifest = load_manifest(storage)
    assert manifest["reasons"]["duplicate"] == 1
    assert (manifest["num_records"], manifest["num_samples"]) == (1, 4)
    assert verify_corpus(storage) == []


def test_defects_that_were_ignored_are_in_the_ledger(write_scan: WriteScan, storage: Storage) -> None:
    """NaN voxels are counted; bytes after the voxels and a broken sidecar are named."""
    with_nan = voxels(0).astype(np.float32)
    with_nan[:3, 0, 0] = np.nan
    path = write_scan("sub-0_T1w.nii", with_nan)
    path.write_bytes(path.read_bytes() + b"more")
    path.with_suffix(".json").write_text("{")
    make(storage, config_of(path))
    assert ledger_of(storage)["sub-0_T1w"]["notes"] == ["trailing_bytes", "nan_voxels=3", "sidecar_ignored"]
    assert verify_corpus(storage) == []


def test_a_corpus_without_samples_is_refused_with_the_count_of_each_reason(
    write_scan: WriteScan, storage: Storage
) -> None:
    for subject in range(3):
        path = write_scan(f"sub-{subject}_T1w.nii", np.zeros((20, 20, 4), np.int16))
    with pytest.raises(DataError, match="3 constant"):
        make(storage, config_of(path.parent, max_refused_fraction=1.0))
    assert not storage.exists("manifest.json")
    assert len(ledger_of(storage)) == 3


@pytest.fixture
def many(write_scan: WriteScan) -> Path:
    """Forty scans of forty subjects, 75 % of them constant."""
    for number in range(40):
        array = voxels(number) if number % 4 == 0 else np.ones((18, 20, 4), np.int16)
        path = write_scan(f"sub-{number:02d}_T1w.nii", array)
    return path.parent


def test_a_job_that_refuses_too_many_scans_stops_early_with_the_reasons(many: Path, storage: Storage) -> None:
    reports = []
    with pytest.raises(
        DataError, match=r"of 2\d scans read were refused \(\d+ constant\).*0\.5.*ledger\.jsonl lists the reason"
    ):
        for report in ingest_locally(config_of(many, shard_size_mib=0.001), storage):
            reports.append(report)
    assert 20 <= reports[-1].scans_read < 30
    assert not storage.exists("manifest.json")
    assert 20 <= len(ledger_of(storage)) < 30


def test_scans_that_were_too_large_are_read_again_and_nothing_is_published_in_vain(
    folder: Path, storage: Storage, write_scan: WriteScan
) -> None:
    write_scan("sub-9_run-0.nii.gz", voxels(9, (200, 200, 8)))
    small = config_of(folder, max_scan_mib=0.1)
    make(storage, small)
    assert load_manifest(storage)["reasons"] == {"accepted": 8, "too_large": 1}
    before = bytes_below(storage)
    assert any("were tried again, in vain" in line for line in make(storage, small))
    assert {path: before[path] for path in before} == {path: bytes_below(storage)[path] for path in before}
    assert load_manifest(storage)["revision"] == 1
    make(storage, config_of(folder))
    assert load_manifest(storage)["reasons"] == {"accepted": 9} and verify_corpus(storage) == []


def test_shards_built_before_a_job_stopped_are_reused(many: Path, storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="were refused"):
        make(storage, config_of(many, shard_size_mib=0.001))
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")}
    make(storage, config_of(many, shard_size_mib=0.001, max_refused_fraction=0.9))
    assert built and {path: path.stat().st_mtime_ns for path in built} == built
    assert load_manifest(storage)["reasons"] == {"accepted": 10, "constant": 30}


def test_a_corpus_keeps_its_ledger_when_a_job_that_would_add_to_it_stops(
    folder: Path, many: Path, storage: Storage
) -> None:
    good = config_of(folder, include=("sub-?_run*",))
    make(storage, good)
    before = storage.read_bytes("ledger.jsonl")
    with pytest.raises(DataError, match=r"ledgers/[0-9a-f]{64}\.jsonl lists the reason"):
        make(storage, config_of(many))
    assert storage.read_bytes("ledger.jsonl") == before
    assert verify_corpus(storage) == []


def test_few_bad_scans_do_not_stop_a_growing_corpus(folder: Path, storage: Storage) -> None:
    make(storage, config_of(folder))
    (folder / "sub-9_text.nii").write_text("not an image")
    make(storage, config_of(folder))
    assert load_manifest(storage)["reasons"] == {"accepted": 8, "not_nifti": 1}


def test_a_pattern_that_matches_few_names_stops_the_job_before_reading(folder: Path, storage: Storage) -> None:
    with pytest.raises(DataError, match=r"6 of 6 scans read were refused \(6 no_subject\)"):
        make(storage, config_of(folder, subject_pattern="^(sub-0)"))
    assert not list(Path(storage.url.removeprefix("file://")).glob("shard-*"))


@pytest.mark.parametrize(("shard_size_mib", "num_shards"), [(0.0001, 3), (64.0, 1)])
def test_copies_of_different_subjects_are_kept_and_counted_for_any_shard_size(
    write_scan: WriteScan, storage: Storage, shard_size_mib: float, num_shards: int
) -> None:
    for subject in range(3):
        path = write_scan(f"sub-{subject}_T1w.nii.gz", voxels(0))
    make(storage, config_of(path.parent, shard_size_mib=shard_size_mib))
    manifest = load_manifest(storage)
    assert (len(manifest["shards"]), manifest["num_records"]) == (num_shards, 3)
    assert manifest["num_cross_subject_copies"] == 2
    originals = [row["copy_of"] for row in ledger_of(storage).values()]
    assert originals.count(None) == 1 and len(set(originals)) == 2


@pytest.mark.parametrize("shard_size_mib", [0.0001, 64.0])
def test_copies_of_different_subjects_can_be_refused(
    write_scan: WriteScan, storage: Storage, shard_size_mib: float
) -> None:
    for subject in range(4):
        path = write_scan(f"sub-{subject}_T1w.nii.gz", voxels(subject // 3))
    config = config_of(path.parent, shard_size_mib=shard_size_mib, cross_subject_copies="refuse")
    make(storage, config)
    assert load_manifest(storage)["reasons"] == {"accepted": 2, "cross_subject_copy": 2}
    assert load_manifest(storage)["num_cross_subject_copies"] == 0
    (original,) = {row["copy_of"] for row in ledger_of(storage).values()} - {None}
    assert ledger_of(storage)[original]["status"] == "accepted"
    assert verify_corpus(storage) == []
    path.with_name("sub-9_T1w.nii.gz").write_bytes(path.with_name("sub-0_T1w.nii.gz").read_bytes())
    make(storage, config)
    assert ledger_of(storage)["sub-9_T1w"]["copy_of"] == original
    assert load_manifest(storage)["num_records"] == 2
