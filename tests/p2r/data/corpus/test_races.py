"""Concurrent, killed and repeated ingest runs converge to one complete corpus."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from p2r.config import IngestConfig
from p2r.data.build import Built, build_shard
from p2r.data.corpus import ingest, load_manifest, verify_corpus
from p2r.data.growth import ShardPlan
from p2r.data.verify import unreferenced_files
from p2r.errors import DataError
from p2r.storage import Storage
from tests.p2r.data.corpus.conftest import bytes_below, config_of, ledger_of, make


def accepted_in(storage: Storage) -> set[str]:
    return {key for key, row in ledger_of(storage).items() if row["status"] == "accepted"}


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
