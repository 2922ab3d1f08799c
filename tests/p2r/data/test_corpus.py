"""From scans to a corpus: nothing is dropped in silence, and a manifest means that everything is there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.corpus import (
    Scan,
    build_shard,
    contains,
    corpus_digest,
    find_scans,
    finish_corpus,
    ingest_locally,
    load_manifest,
    manifest_sha256,
    plan_shards,
    verify_corpus,
)
from p2r.errors import DataError
from p2r.storage import Storage, file_sha256

WriteScan = Callable[..., Path]


def voxels(seed: int, shape: tuple[int, ...] = (18, 20, 4)) -> Any:
    return np.random.default_rng(seed).integers(1, 500, shape).astype(np.int16)


def config_of(folder: Path, **changes: Any) -> IngestConfig:
    return IngestConfig(**{"sources": (str(folder),), "licence": "CC0-1.0", "shard_size_mib": 0.01, **changes})


def scans_of(*names: str, num_bytes: int = 2**20) -> list[Scan]:
    return [Scan(f"/data/{name}.nii.gz", name, num_bytes) for name in names]


def bytes_below(storage: Storage) -> dict[str, str]:
    return {path: hashlib.sha256(storage.read_bytes(path)).hexdigest() for path in storage.list()}


def ledger_of(storage: Storage) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    return {row["key"]: row for row in rows}


@pytest.fixture
def folder(write_scan: WriteScan) -> Path:
    """Eight scans of four subjects."""
    for number in range(8):
        path = write_scan(f"sub-{number // 2}_run-{number % 2}.nii.gz", voxels(number))
    return path.parent


def test_a_subject_never_straddles_shards_and_every_scan_is_planned_once() -> None:
    names = [f"sub-{number:02d}_run-{run}" for number in range(20) for run in range(3)]
    config = IngestConfig(sources=("x",), licence="x", shard_size_mib=7)
    plans = plan_shards(scans_of(*names), config)
    assert sorted(scan.key for plan in plans for scan, _ in plan.scans) == sorted(names)
    homes = Counter(subject for plan in plans for subject in {subject for _, subject in plan.scans})
    assert set(homes.values()) == {1}
    assert [len(plan.scans) for plan in plans] == [9, 9, 9, 9, 9, 9, 6]
    assert [plan.name for plan in plans] == [f"shard-{number:06d}.tar" for number in range(7)]


def test_the_plan_depends_on_the_seed_and_not_on_the_order_of_scans() -> None:
    scans = scans_of(*[f"sub-{number:02d}_T1w" for number in range(20)])
    config = IngestConfig(sources=("x",), licence="x", shard_size_mib=3)
    assert plan_shards(scans, config) == plan_shards(scans[::-1], config)
    assert plan_shards(scans, config) != plan_shards(scans, config.model_copy(update={"seed": 1}))


def test_unselected_subjects_and_nameless_scans_are_in_the_ledger_only() -> None:
    scans = scans_of("sub-1_a", "sub-2_a", "sub-3_a", "other")
    config = IngestConfig(sources=("x",), licence="x", subject_pattern=r"^(sub-\d)", subjects=("sub-[1-2]",))
    plans = plan_shards(scans, config, allowed_subjects={"sub-2", "sub-3"})
    assert [scan.key for plan in plans for scan, _ in plan.scans] == ["sub-2_a"]
    rows = {row["key"]: (row["status"], row["reason"]) for row in plans[0].left_out}
    assert rows == {
        "sub-1_a": ("not_selected", "not_selected"),
        "sub-3_a": ("not_selected", "not_selected"),
        "other": ("refused", "no_subject"),
    }


def test_listed_subjects_without_scans_are_refused_by_name() -> None:
    config = IngestConfig(sources=("x",), licence="x", subjects=("sub-[1-3]",))
    with pytest.raises(DataError, match=r"sub-3.*no scan"):
        plan_shards(scans_of("sub-1_a", "sub-2_a"), config)


def test_a_selection_that_leaves_nothing_is_refused() -> None:
    config = IngestConfig(sources=("x",), licence="x")
    with pytest.raises(DataError, match="none of the 2 scans"):
        plan_shards(scans_of("sub-1_a", "sub-2_a"), config, allowed_subjects={"sub-9"})


@pytest.mark.parametrize("pattern", ["(", "sub"])
def test_a_pattern_without_a_group_is_refused(pattern: str) -> None:
    config = IngestConfig(sources=("x",), licence="x", subject_pattern=pattern)
    with pytest.raises(DataError, match="subject_pattern"):
        plan_shards(scans_of("sub-1_a"), config)


def test_a_corpus_is_whole_and_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    config = config_of(folder, cohort="ours", provenance="made up")
    progress = list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert [step.done for step in progress] == list(range(1, len(progress) + 1))
    assert manifest["num_samples"] == sum(shard["num_samples"] for shard in manifest["shards"]) == 8 * 4
    assert (manifest["num_records"], manifest["num_subjects"], manifest["reasons"]) == (8, 4, {"accepted": 8})
    assert (manifest["format"], manifest["licence"]) == ("p2r-corpus/1", "CC0-1.0")
    assert (manifest["cohort"], manifest["provenance"]) == ("ours", "made up")
    assert manifest["preprocessing"]["slice_axis"] == "auto"
    assert manifest["config_sha256"] == corpus_digest(config)
    assert manifest["num_duplicates"] == 0
    assert storage.read_json(f"manifests/{manifest_sha256(manifest)}.json") == manifest
    assert verify_corpus(storage) == []
    for shard in manifest["shards"]:
        assert file_sha256(storage.local(shard["name"])) == shard["sha256"]


def test_ingesting_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    first, second = Storage(str(tmp_path / "first")), Storage(str(tmp_path / "second"))
    for storage in (first, second, first):
        list(ingest_locally(config, storage))
    assert bytes_below(first) == bytes_below(second)
    assert len(first.list("manifests")) == 1


def test_shards_built_in_any_order_make_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    forwards, backwards = Storage(str(tmp_path / "forwards")), Storage(str(tmp_path / "backwards"))
    list(ingest_locally(config, forwards))
    built = [
        build_shard(plan, config, backwards)
        for plan in reversed(plan_shards(find_scans(config.sources, cache=tmp_path), config))
    ]
    finish_corpus(backwards, config, [entry for entry, _ in built], [row for _, rows in built for row in rows])
    assert bytes_below(forwards) == bytes_below(backwards)


def test_stopping_before_the_end_leaves_no_manifest(folder: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    progress = ingest_locally(config_of(folder), storage)
    next(progress)
    del progress
    assert not storage.exists("manifest.json")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        load_manifest(storage)


def test_being_killed_leaves_no_manifest_and_running_again_completes(folder: Path, tmp_path: Path) -> None:
    whole, killed = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "killed"))
    config = config_of(folder)
    list(ingest_locally(config, whole))
    program = f"""
import os, signal
from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally
from p2r.storage import Storage
for step in ingest_locally(IngestConfig.model_validate_json({config.model_dump_json()!r}), Storage({killed.url!r})):
    if step.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert killed.exists("shard-000001.tar")
    assert not killed.exists("manifest.json")
    list(ingest_locally(config, killed))
    assert bytes_below(killed) == bytes_below(whole)


def test_a_manifest_is_withdrawn_before_a_shard_that_it_names_changes(folder: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config_of(folder), storage))
    same = ingest_locally(config_of(folder), storage)
    next(same)
    assert storage.exists("manifest.json")
    other = ingest_locally(config_of(folder, slice_axis=0), storage)
    next(other)
    assert not storage.exists("manifest.json")


def test_every_scan_has_a_row_with_the_reason(write_scan: WriteScan, tmp_path: Path) -> None:
    good = write_scan("sub-0_good.nii.gz", voxels(0))
    write_scan("sub-0_copy.nii", voxels(0))
    write_scan("sub-1_flat.nii", voxels(1, (20, 20)))
    write_scan("sub-2_constant.nii", np.ones((20, 20, 4), np.int16))
    write_scan("sub-3_small.nii", voxels(3, (12, 20, 4)))
    write_scan("sub-4_complex.nii", voxels(4).astype(np.complex64))
    write_scan("sub-5_nan.nii", np.where(voxels(5) > 490, np.nan, 1.0).astype(np.float32))
    write_scan("sub-6_cut.nii.gz", voxels(6)).write_bytes(good.read_bytes()[:-40])
    (good.parent / "sub-7_text.nii").write_text("not an image")
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config_of(good.parent), storage))
    ledger = ledger_of(storage)
    assert {key: row["reason"] for key, row in ledger.items()} == {
        "sub-0_copy": "accepted",
        "sub-0_good": "duplicate",
        "sub-1_flat": "not_3d",
        "sub-2_constant": "constant",
        "sub-3_small": "too_small",
        "sub-4_complex": "dtype",
        "sub-5_nan": "nonfinite",
        "sub-6_cut": "truncated",
        "sub-7_text": "not_nifti",
    }
    assert {row["status"] for row in ledger.values()} == {"accepted", "refused"}
    assert all(row["key"] in row["message"] for row in ledger.values() if row["status"] == "refused")
    manifest = load_manifest(storage)
    assert manifest["reasons"]["duplicate"] == 1
    assert (manifest["num_records"], manifest["num_samples"]) == (1, 4)
    assert verify_corpus(storage) == []


@pytest.mark.parametrize(("shard_size_mib", "num_shards"), [(0.0001, 3), (64.0, 1)])
def test_copies_of_different_subjects_are_kept_and_counted_however_shards_are_cut(
    write_scan: WriteScan, tmp_path: Path, shard_size_mib: float, num_shards: int
) -> None:
    for subject in range(3):
        path = write_scan(f"sub-{subject}_T1w.nii.gz", voxels(0))
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config_of(path.parent, shard_size_mib=shard_size_mib), storage))
    manifest = load_manifest(storage)
    assert (len(manifest["shards"]), manifest["num_records"], manifest["num_duplicates"]) == (num_shards, 3, 2)


def test_a_corpus_without_samples_is_refused_with_the_count_of_each_reason(
    write_scan: WriteScan, tmp_path: Path
) -> None:
    for subject in range(3):
        path = write_scan(f"sub-{subject}_T1w.nii", np.zeros((20, 20, 4), np.int16))
    storage = Storage(str(tmp_path / "corpus"))
    with pytest.raises(DataError, match="3 constant"):
        list(ingest_locally(config_of(path.parent), storage))
    assert not storage.exists("manifest.json")
    assert len(ledger_of(storage)) == 3


def test_membership_is_answered_without_naming_anybody(folder: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config_of(folder, cohort="ours", subjects=("sub-[0-2]",)), storage))
    manifest = load_manifest(storage)
    assert contains(manifest, subject="sub-0")
    assert contains(manifest, cohort="ours", subject="sub-2")
    assert not contains(manifest, subject="sub-3")
    assert not contains(manifest, cohort="theirs", subject="sub-0")
    digest = ledger_of(storage)["sub-0_run-0"]["voxels_sha256"]
    assert contains(manifest, voxels_sha256=digest)
    assert not contains(manifest, voxels_sha256=hashlib.sha256(b"other").hexdigest())
    assert "sub-0" not in json.dumps({key: manifest[key] for key in manifest if key.endswith("digests")})


def test_the_digest_of_a_corpus_follows_what_was_asked(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert corpus_digest(config) == corpus_digest(config_of(tmp_path))
    others = [
        corpus_digest(config, {"sub-1"}),
        corpus_digest(config, {"sub-1", "sub-2"}),
        corpus_digest(config_of(tmp_path, seed=1)),
        corpus_digest(config_of(tmp_path, licence="MIT")),
    ]
    assert len({corpus_digest(config), *others}) == 5
    assert corpus_digest(config, {"a", "b"}) == corpus_digest(config, {"b", "a"})


@pytest.mark.data
def test_acdc_is_accepted_whole(tmp_path: Path) -> None:
    root = os.environ.get("P2R_DATA")
    if not root:
        pytest.skip("P2R_DATA is not set: it names the folder with the real MRI")
    storage = Storage(str(tmp_path / "corpus"))
    config = IngestConfig(sources=(f"{root}/acdc/images",), licence="CC-BY-NC-SA-4.0", cohort="acdc")
    list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert manifest["reasons"] == {"accepted": 200}
    assert (manifest["num_subjects"], manifest["num_samples"]) == (100, 1902)
