"""Scans -> a corpus: every omission is recorded, and concurrent runs or crashes leave the corpus intact."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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

WriteScan = Callable[..., Path]


def voxels(seed: int, shape: tuple[int, ...] = (18, 20, 4)) -> Any:
    return np.random.default_rng(seed).integers(1, 500, shape).astype(np.int16)


def config_of(*folders: Path, **changes: Any) -> IngestConfig:
    return IngestConfig(
        **{"sources": tuple(map(str, folders)), "licence": "CC0-1.0", "shard_size_mib": 0.01, **changes}
    )


def bytes_below(storage: Storage) -> dict[str, str]:
    return {path: hashlib.sha256(storage.read_bytes(path)).hexdigest() for path in storage.list()}


def ledger_of(storage: Storage) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def accepted_in(storage: Storage) -> set[str]:
    return {key for key, row in ledger_of(storage).items() if row["status"] == "accepted"}


def make(storage: Storage, config: IngestConfig, **more: Any) -> list[str]:
    """Run ingestion to its end; return the progress lines."""
    said: list[str] = []
    for _ in ingest_locally(config, storage, say=said.append, **more):
        pass
    return said


@pytest.fixture
def folder(write_scan: WriteScan) -> Path:
    """Eight scans of four subjects."""
    for number in range(8):
        path = write_scan(f"sub-{number // 2}_run-{number % 2}.nii.gz", voxels(number))
    return path.parent


@pytest.fixture
def more(write_scan: WriteScan, folder: Path) -> Path:
    """Three more scans: one of a known subject, two of a new one."""
    for number, name in enumerate(["sub-3_run-2", "sub-4_run-0", "sub-4_run-1"]):
        path = write_scan(f"../more/{name}.nii.gz", voxels(100 + number))
    return path.parent.resolve()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "corpus"))


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


# Races and kills


def test_the_loser_of_a_race_continues_from_the_winner_and_builds_nothing_twice(
    folder: Path, more: Path, storage: Storage
) -> None:
    ours, theirs = config_of(folder), config_of(more, include=("sub-4*",))
    results: list[Built] = []

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        for plan in plans:
            results.append(build_shard(plan, ours, storage))
            yield plan, results[-1]
        if not storage.exists("manifest.json"):
            make(storage, theirs)  # another run publishes first

    said: list[str] = []
    list(ingest(ours, storage, build_all=build_all, say=said.append))
    assert any("another run published" in line for line in said)
    half = len(results) // 2
    assert [result.is_found for result in results] == [False] * half + [True] * half
    manifest = load_manifest(storage)
    assert (manifest["revision"], manifest["num_records"]) == (2, 10)
    assert verify_corpus(storage) == []
    lost = [name for name in unreferenced_files(storage) if name.startswith("manifests/")]
    assert len(lost) == 1  # the manifest that lost the race


@pytest.mark.s3
def test_the_same_holds_for_a_bucket(folder: Path, more: Path, s3_url: str, storage: Storage) -> None:
    """Lose a race in a bucket, then grow the corpus; compare with the same steps in sequence in a folder."""
    bucket = Storage(f"{s3_url}/corpus")
    ours, theirs = config_of(folder), config_of(more)

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        if not bucket.exists("manifest.json"):
            make(bucket, theirs)
        return ((plan, build_shard(plan, ours, bucket)) for plan in plans)

    list(ingest(ours, bucket, build_all=build_all))
    assert accepted_in(bucket) == {path.name.removesuffix(".nii.gz") for at in (folder, more) for path in at.iterdir()}
    assert (verify_corpus(bucket), load_manifest(bucket)["revision"]) == ([], 2)
    assert make(bucket, ours) == [f"{bucket.url} is complete"]
    make(storage, theirs)
    make(storage, ours)
    found, expected = load_manifest(bucket), load_manifest(storage)
    assert [shard["sha256"] for shard in found["shards"]] == [shard["sha256"] for shard in expected["shards"]]
    assert bucket.read_bytes("ledger.jsonl").count(b"\n") == storage.read_bytes("ledger.jsonl").count(b"\n") == 11


def test_the_loser_of_a_race_for_the_same_scans_has_nothing_left_to_do(folder: Path, storage: Storage) -> None:
    config = config_of(folder)

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        make(storage, config)
        for plan in plans:
            result = build_shard(plan, config, storage)
            assert result.is_found
            yield plan, result

    list(ingest(config, storage, build_all=build_all))
    assert load_manifest(storage)["revision"] == 1
    assert (verify_corpus(storage), unreferenced_files(storage)) == ([], [])


def _ingest_with_others(config: IngestConfig, url: str, meeting: Any) -> None:
    meeting.wait()  # start all processes at the same time
    make(Storage(url), config)


def test_concurrent_processes_build_one_corpus_of_all_scans(folder: Path, more: Path, storage: Storage) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["p2r.data.corpus", "pytest"])
    meeting = context.Barrier(4)
    runs = [
        context.Process(target=_ingest_with_others, args=(config_of(source), storage.url, meeting))
        for source in (folder, more, folder, more)
    ]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, 0, 0, 0]
    assert accepted_in(storage) == {path.name.removesuffix(".nii.gz") for at in (folder, more) for path in at.iterdir()}
    manifest = load_manifest(storage)
    assert (manifest["revision"], manifest["num_records"], manifest["num_samples"]) == (2, 11, 44)
    assert Counter(row["shard"] is None for row in ledger_of(storage).values()) == {False: 11}
    assert verify_corpus(storage) == []


PROGRAM = """
import os, signal, sys
from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally
from p2r.storage import Storage
for step in ingest_locally(IngestConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2])):
    if step.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_manifest_and_the_next_run_continues(
    folder: Path, storage: Storage, tmp_path: Path
) -> None:
    whole, config = Storage(str(tmp_path / "whole")), config_of(folder)
    make(whole, config)
    done = subprocess.run([sys.executable, "-c", PROGRAM, config.model_dump_json(), storage.url], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not storage.exists("manifest.json")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        load_manifest(storage)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")}
    assert len(finished) == 4
    make(storage, config)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert bytes_below(storage) == bytes_below(whole)


class Death(BaseException):
    """Simulated end of a process."""


class Dying(Storage):
    """A storage that raises `Death` after a number of writes."""

    writes_left = 0

    def _count_write(self) -> None:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise Death

    def write_bytes(self, path: str, data: bytes) -> None:
        self._count_write()
        super().write_bytes(path, data)

    def create(self, path: str, data: bytes) -> bool:
        self._count_write()
        return super().create(path, data)

    def replace(self, path: str, data: bytes, *, tag: str | None) -> bool:
        self._count_write()
        return super().replace(path, data, tag=tag)

    def upload(self, local: Path, path: str, *, if_absent: bool = False) -> bool:
        self._count_write()
        return super().upload(local, path, if_absent=if_absent)


def test_a_run_after_a_crash_at_any_write_repairs_the_corpus(folder: Path, more: Path, tmp_path: Path) -> None:
    whole = Storage(str(tmp_path / "whole"))
    make(whole, config_of(folder, shard_size_mib=0.02))
    make(whole, config_of(folder, more, shard_size_mib=0.02))
    expected = bytes_below(whole)
    deaths = 0
    for num_writes in range(1000):
        dying = Dying(str(tmp_path / f"dying-{num_writes}"))
        dying.writes_left = num_writes
        died = 0
        for sources in ((folder,), (folder, more)):
            try:
                make(dying, config_of(*sources, shard_size_mib=0.02))
            except Death:
                died += 1
                if dying.exists("manifest.json"):
                    left = [problem for problem in verify_corpus(dying) if "ledger.jsonl" not in problem]
                    assert left == []  # readers find a complete corpus at any time
                dying.writes_left = 1000
                make(dying, config_of(*sources, shard_size_mib=0.02))
        assert bytes_below(dying) == expected, num_writes
        deaths += died
        if not died:
            break
    assert deaths > 20


def test_a_truncated_shard_is_rebuilt(folder: Path, storage: Storage, tmp_path: Path) -> None:
    make(storage, config_of(folder))
    expected = bytes_below(storage)
    root = tmp_path / "corpus"
    for path in (root / "manifest.json", *root.glob("manifests/*")):
        path.unlink()
    (shard, *_) = sorted(root.glob("*.tar"))
    os.truncate(shard, 100)
    (_, receipt, *_) = sorted(root.glob("receipts/*"))
    receipt.write_text('{"entry": {"name": "../../elsewhere"}, "rows": 7}')
    make(storage, config_of(folder))
    assert bytes_below(storage) == expected


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
