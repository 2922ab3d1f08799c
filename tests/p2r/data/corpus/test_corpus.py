"""Scans -> a corpus: complete, described, and growing revision by revision."""

import hashlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from p2r.config import IngestConfig
from p2r.data.build import Built, build_shard
from p2r.data.corpus import (
    BuildAll,
    IngestProgress,
    contains,
    corpus_digest,
    ingest,
    ingest_locally,
    load_manifest,
    manifest_sha256,
    report_progress,
    verify_corpus,
)
from p2r.data.growth import ShardPlan
from p2r.data.manifest import ledger_path
from p2r.data.shards import open_shard, voxels_sha256
from p2r.data.verify import unreferenced_files
from p2r.data.volume import read_volume
from p2r.errors import DataError
from p2r.storage import Storage, file_sha256
from tests.p2r.data.corpus.conftest import WriteScan, bytes_below, config_of, ledger_of, make, voxels


def test_a_corpus_is_complete_and_describes_itself(folder: Path, storage: Storage) -> None:
    config = config_of(folder, cohort="ours", provenance="made up")
    progress = list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert [report.done for report in progress] == list(range(1, len(progress) + 1))
    assert len(progress) == progress[0].num_shards == len(manifest["shards"]) > 1
    assert manifest["num_samples"] == sum(shard["num_samples"] for shard in manifest["shards"]) == 8 * 4
    assert (manifest["num_records"], manifest["num_subjects"], manifest["reasons"]) == (8, 4, {"accepted": 8})
    assert (manifest["num_volumes"], manifest["num_cross_subject_copies"]) == (8, 0)
    assert (manifest["format"], manifest["licence"]) == ("p2r-corpus/2", "CC0-1.0")
    assert (manifest["cohort"], manifest["provenance"]) == ("ours", "made up")
    assert (manifest["revision"], manifest["previous"]) == (1, None)
    assert manifest["preprocessing"]["slice_axis"] == "auto"
    assert manifest["asked"] == [corpus_digest(config)]
    assert manifest["deidentification"]["faces"] == "not removed"
    assert manifest["summary"]["shape"]["max"] == [18, 20, 4, 1]
    assert storage.read_json(f"manifests/{manifest_sha256(manifest)}.json") == manifest
    assert storage.read_bytes(ledger_path(manifest)) == storage.read_bytes("ledger.jsonl")
    assert (verify_corpus(storage), unreferenced_files(storage)) == ([], [])
    for number, shard in enumerate(manifest["shards"]):
        assert shard["name"] == f"shard-{number:06d}-{shard['sha256'][:12]}.tar"
        assert file_sha256(storage.local(shard["name"])) == shard["sha256"]


def test_the_ledger_has_the_outcome_of_every_scan(folder: Path, storage: Storage) -> None:
    make(storage, config_of(folder))
    path = folder / "sub-2_run-1.nii.gz"
    row = ledger_of(storage)["sub-2_run-1"]
    assert row["source"] == str(path)
    assert (row["num_bytes"], row["modified"]) == (path.stat().st_size, str(path.stat().st_mtime_ns))
    assert (row["subject"], row["status"], row["num_samples"]) == ("sub-2", "accepted", 4)
    assert (row["shape"], row["spacing_mm"], row["dtype"]) == ([18, 20, 4, 1], [1.5, 1.5, 8.0], "int16")
    assert row["percentiles"][0] == voxels(5).min() and row["percentiles"][-1] == voxels(5).max()
    reader = open_shard(storage.local(row["shard"]))
    assert "sub-2_run-1" in {reader.locate(sample)[0].key for sample in range(reader.num_samples)}


def test_ingesting_again_changes_no_byte(folder: Path, storage: Storage, tmp_path: Path) -> None:
    other = Storage(str(tmp_path / "other"))
    make(storage, config_of(folder))
    first = bytes_below(storage)
    assert make(storage, config_of(folder)) == [f"{storage.url} is complete"]
    make(other, config_of(folder))
    assert bytes_below(storage) == bytes_below(other) == first


def backwards(config: IngestConfig, storage: Storage) -> BuildAll:
    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        return ((plan, build_shard(plan, config, storage)) for plan in reversed(plans))

    return build_all


def test_shards_built_in_any_order_make_the_same_corpus(folder: Path, storage: Storage, tmp_path: Path) -> None:
    config, other = config_of(folder), Storage(str(tmp_path / "other"))
    make(storage, config)
    list(ingest(config, other, build_all=backwards(config, other)))
    assert bytes_below(other) == bytes_below(storage)


# Growing


def test_adding_scans_keeps_old_shards_and_old_revisions_readable(folder: Path, more: Path, storage: Storage) -> None:
    make(storage, config_of(folder))
    first = load_manifest(storage)
    root = Path(storage.url.removeprefix("file://"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("shard-*")}
    make(storage, config_of(folder, more))
    second = load_manifest(storage)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert second["shards"][: len(first["shards"])] == first["shards"]
    assert (second["revision"], second["previous"]) == (2, manifest_sha256(first))
    assert (second["num_records"], second["num_subjects"]) == (11, 5)
    assert load_manifest(storage, revision=manifest_sha256(first)) == first
    assert len(ledger_of(storage)) == 11
    assert (verify_corpus(storage), unreferenced_files(storage)) == ([], [])
    for manifest in (first, second):
        assert contains(manifest.facts, subject="sub-0")
    assert [contains(manifest.facts, subject="sub-4") for manifest in (first, second)] == [False, True]


def test_sources_may_be_added_one_job_at_a_time(folder: Path, more: Path, storage: Storage) -> None:
    make(storage, config_of(folder, provenance="here"))
    make(storage, config_of(more, provenance="there"))
    manifest = load_manifest(storage)
    assert manifest["num_records"] == 11
    assert manifest["source"] == [str(folder), str(more)]
    assert manifest["provenance"] == "here\nthere"
    assert len(set(manifest["asked"])) == 2


def test_a_copy_of_a_known_subject_s_scan_is_refused_also_in_a_later_revision(
    folder: Path, more: Path, storage: Storage
) -> None:
    make(storage, config_of(folder))
    (more / "sub-0_again.nii.gz").write_bytes((folder / "sub-0_run-0.nii.gz").read_bytes())
    make(storage, config_of(folder, more))
    row = ledger_of(storage)["sub-0_again"]
    assert (row["reason"], row["copy_of"]) == ("duplicate", "sub-0_run-0")
    assert load_manifest(storage)["num_records"] == 11


def test_a_refused_scan_is_read_again_after_it_changed(folder: Path, storage: Storage) -> None:
    path = folder / "sub-1_run-0.nii.gz"
    sound = path.read_bytes()
    path.write_bytes(sound[:-40])
    make(storage, config_of(folder))
    assert ledger_of(storage)["sub-1_run-0"]["reason"] == "truncated"
    assert make(storage, config_of(folder))[-1].endswith("is complete")
    path.write_bytes(sound)
    make(storage, config_of(folder))
    assert ledger_of(storage)["sub-1_run-0"]["status"] == "accepted"
    assert load_manifest(storage)["reasons"] == {"accepted": 8}
    assert verify_corpus(storage) == []


def test_an_accepted_scan_that_changed_keeps_its_record_and_is_named(
    folder: Path, storage: Storage, write_scan: WriteScan
) -> None:
    make(storage, config_of(folder))
    before = bytes_below(storage)
    write_scan("sub-1_run-0.nii.gz", voxels(77))
    said = make(storage, config_of(folder))
    assert "1 scans changed after they were accepted" in said[0] and "sub-1_run-0.nii.gz" in said[0]
    assert bytes_below(storage) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": "MIT"}, "licence: 'CC0-1.0' in the corpus, 'MIT' in the job"),
        ({"cohort": "theirs"}, "cohort: 'default' in the corpus, 'theirs'"),
        ({"min_size": 4}, "min_size: 16 in the corpus, 4"),
        ({"codec": "zstd"}, "codec: 'lz4' in the corpus, 'zstd'"),
        ({"slice_axis": 0}, "slice_axis: 'auto' in the corpus, 0"),
        ({"pseudonyms": True}, "names: "),
        ({"subjects": ("sub-[0-2]",)}, r"holds 1 subjects that this job does not select \(sub-3\)"),
        ({"exclude": ("*run-1*",)}, "holds 4 scans that this job does not select"),
    ],
)
def test_a_job_that_contradicts_the_corpus_is_refused(
    folder: Path, storage: Storage, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "0123456789abcdef")
    make(storage, config_of(folder))
    before = bytes_below(storage)
    with pytest.raises(DataError, match=message):
        make(storage, config_of(folder, **changes))
    assert bytes_below(storage) == before


def test_a_job_that_allows_fewer_subjects_than_the_corpus_holds_is_refused(folder: Path, storage: Storage) -> None:
    make(storage, config_of(folder))
    with pytest.raises(DataError, match="holds 2 subjects"):
        make(storage, config_of(folder), allowed_subjects={"sub-0", "sub-1"})
    make(storage, config_of(folder), allowed_subjects={"sub-0", "sub-1", "sub-2", "sub-3"})


def test_a_wider_selection_adds_subjects_left_out_before(folder: Path, storage: Storage) -> None:
    make(storage, config_of(folder, subjects=("sub-0",)))
    assert load_manifest(storage)["reasons"] == {"accepted": 2, "not_selected": 6}
    make(storage, config_of(folder))
    assert load_manifest(storage)["reasons"] == {"accepted": 8}


# Messages


def test_progress_is_reported_first_last_and_at_intervals(folder: Path, storage: Storage) -> None:
    (folder / "sub-9_text.nii").write_text("not an image")
    said: list[str] = []
    report_progress(ingest_locally(config_of(folder), storage), said.append, interval_s=60)
    assert len(said) == 2
    assert said[0].startswith("scans ") and "B/s" in said[0] and "left" in said[0]
    assert said[1].startswith("scans 9/9 | shards ") and said[1].endswith("refused: 1 not_nifti")


@pytest.mark.parametrize(("mb_per_s", "text"), [(123.4, "123 MB/s"), (4.56, "4.6 MB/s"), (0.0064, "6 kB/s")])
def test_a_slow_rate_is_not_shown_as_zero(mb_per_s: float, text: str) -> None:
    progress = IngestProgress(None, 1, 2, (), 3, 4, {}, mb_per_s, None)
    assert progress.line() == f"scans 3/4 | shards 1/2 | {text}"


def test_membership_is_answered_without_naming_a_subject(folder: Path, storage: Storage) -> None:
    make(storage, config_of(folder, cohort="ours", subjects=("sub-[0-2]",)))
    manifest = load_manifest(storage)
    assert contains(manifest.facts, subject="sub-0")
    assert contains(manifest.facts, cohort="ours", subject="sub-2")
    assert not contains(manifest.facts, subject="sub-3")
    assert not contains(manifest.facts, cohort="theirs", subject="sub-0")
    digest = ledger_of(storage)["sub-0_run-0"]["voxels_sha256"]
    assert contains(manifest.facts, voxels_sha256=digest)
    assert not contains(manifest.facts, voxels_sha256=hashlib.sha256(b"other").hexdigest())
    assert "sub-0" not in json.dumps({key: manifest[key] for key in manifest if key.endswith("digests")})


def test_a_scan_is_known_by_its_voxels_also_after_resampling(folder: Path, storage: Storage) -> None:
    (folder / "sub-3_zip.nii.gz").write_bytes((folder / "sub-3_run-0.nii.gz").read_bytes())
    make(storage, config_of(folder, resample_mm=2.0, min_size=8))
    assert ledger_of(storage)["sub-3_run-0"]["spacing_mm"] == [2.0, 2.0, 2.0]
    assert load_manifest(storage)["reasons"] == {"accepted": 8, "duplicate": 1}
    for path in folder.iterdir():
        assert contains(load_manifest(storage).facts, voxels_sha256=voxels_sha256(read_volume(path)))


def test_the_digest_of_a_corpus_depends_on_the_request(tmp_path: Path) -> None:
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
def test_all_scans_of_acdc_are_accepted(mri: Path, storage: Storage) -> None:
    make(storage, config_of(mri / "acdc/images", cohort="acdc", shard_size_mib=64))
    manifest = load_manifest(storage)
    assert manifest["reasons"] == {"accepted": 200}
    assert (manifest["num_subjects"], manifest["num_samples"]) == (100, 1902)
    assert manifest["num_cross_subject_copies"] == 2  # one patient has two names


@pytest.mark.data
def test_all_scans_of_hippocampus_are_accepted(mri: Path, storage: Storage) -> None:
    pattern = r"^(hippocampus_\d+)"
    make(
        storage,
        config_of(mri / "msd_hippocampus/images", cohort="hippocampus", shard_size_mib=64, subject_pattern=pattern),
    )
    assert set(load_manifest(storage)["reasons"]) == {"accepted"}
