"""Faults between a stream and its bucket cost time or stop it with a message, but never change a sample.

A proxy in front of a real S3 server causes the faults. Every test compares with the same corpus in a folder.
"""

import itertools
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.local.s3 import S3Server, make_bucket
from p2r.config import ImageConfig
from p2r.counters import Counters
from p2r.data.batch import Batch
from p2r.data.manifest import Manifest
from p2r.data.shards import index_name
from p2r.data.stream import Corpus, Quarantine, stream
from p2r.errors import DataError, StorageError
from p2r.storage import Storage
from tests.fault_proxy import ALWAYS, Fault, FaultProxy

pytestmark = pytest.mark.s3

IMAGE = ImageConfig(spacing_mm=2.0, size=32)
STEPS = 14  # two epochs
SmallCorpus = tuple[Storage, Manifest]
Run = Callable[..., list[Batch]]


def uploaded(small_corpus: SmallCorpus, url: str) -> Corpus:
    local, manifest = small_corpus
    remote = Storage(url)
    for entry in manifest["shards"]:
        for name in (entry["name"], index_name(entry["name"])):
            remote.upload(local.local(name), name)
    return Corpus(remote, manifest)


def batches(corpus: Corpus, *, between: Callable[[int], None] = lambda step: None, **options: Any) -> list[Batch]:
    taken = []
    names = corpus.manifest.facts.contrasts
    contrasts = None if names is None else tuple(names)
    with closing(stream(corpus, image=IMAGE, seed=3, global_batch=8, contrasts=contrasts, **options)) as source:
        for step, (batch, _) in enumerate(itertools.islice(source, STEPS)):
            taken.append(batch)
            between(step)
    return taken


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.positions.tolist() == b.positions.tolist()
        assert all(torch.equal(one, other) for one, other in zip(a.images(), b.images(), strict=True))


@pytest.fixture(scope="module", params=["one contrast", "three contrasts"])
def stored(request: pytest.FixtureRequest, small_corpus: SmallCorpus, session_corpus: SmallCorpus) -> SmallCorpus:
    """A corpus in a folder: records of one contrast, or of up to three."""
    return small_corpus if request.param == "one contrast" else session_corpus


@pytest.fixture(scope="module")
def expected(stored: SmallCorpus) -> list[Batch]:
    return batches(Corpus(*stored))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objects"


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of one kilobyte, so that everything is read by ranges."""
    monkeypatch.setenv("P2R_CACHE_GIB", "0.000001")


@pytest.fixture
def remote(stored: SmallCorpus, s3_url: str, proxy: FaultProxy, cache: Path) -> Corpus:
    corpus = uploaded(stored, s3_url)
    proxy.clear()
    return corpus


def bytes_sent(proxy: FaultProxy) -> int:
    return sum(exchange.num_bytes for exchange in proxy.seen("GET .*tar"))


def test_a_cold_cache_fetches_every_shard_once(remote: Corpus, proxy: FaultProxy, expected: list[Batch]) -> None:
    counters = Counters()
    assert_same(batches(remote, counters=counters), expected)
    assert bytes_sent(proxy) == sum(entry["num_bytes"] for entry in remote.manifest["shards"])
    counted = counters.snapshot()
    assert counted["cache_misses"] == len(remote.manifest["shards"]) and "retries" not in str(counted)
    assert counted["bytes_fetched"] >= bytes_sent(proxy)
    proxy.clear()
    assert_same(batches(remote), expected)
    assert bytes_sent(proxy) == 0  # all in the cache now


def test_without_room_in_the_cache_samples_are_read_by_ranges(
    remote: Corpus, proxy: FaultProxy, expected: list[Batch], no_room: None, cache: Path
) -> None:
    assert_same(batches(remote), expected)
    assert all(exchange.range for exchange in proxy.seen("GET .*tar"))
    assert not list(cache.glob("*.tar"))


def test_a_cache_smaller_than_the_working_set_evicts_shards(
    remote: Corpus, expected: list[Batch], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    sizes = [entry["num_bytes"] for entry in remote.manifest["shards"]]
    assert len(sizes) >= 3
    monkeypatch.setenv("P2R_CACHE_GIB", str((max(sizes) + 4096) / 2**30))  # one shard, and not two
    counters = Counters()
    assert_same(batches(remote, counters=counters), expected)
    assert counters.snapshot()["range_reads"] > 0
    assert sum(path.stat().st_size for path in cache.iterdir() if path.is_file()) <= max(sizes) + 4096


@pytest.mark.parametrize("ranges", [False, True], ids=["cache", "ranges"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", on="GET .*tar", times=3, status=503),
        Fault("status", on="GET .*idx", times=2, status=500),
        Fault("drop", on="GET .*tar", times=2),
        Fault("truncate", on="GET .*tar", times=2, after_bytes=100),
        Fault("stall", on="GET .*tar", times=1, after_bytes=100, seconds=5),
        Fault("flip", on="GET .*tar", times=1, after_bytes=100),
    ],
    ids=["503", "500 for an index", "broken connection", "truncated body", "stalled body", "flipped byte"],
)
def test_a_temporary_fault_only_costs_time(
    remote: Corpus,
    proxy: FaultProxy,
    expected: list[Batch],
    fault: Fault,
    ranges: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ranges:
        monkeypatch.setenv("P2R_CACHE_GIB", "0.000001")
    proxy.add(Fault(**{**vars(fault)}))
    counters = Counters()
    assert_same(batches(remote, counters=counters), expected)
    assert any(name.startswith("retries") for name in counters.snapshot())


def test_a_damaged_byte_in_the_cache_is_detected_and_fetched_again(
    remote: Corpus, proxy: FaultProxy, expected: list[Batch], cache: Path
) -> None:
    batches(remote)
    for path in cache.iterdir():
        if path.is_file() and path.stat().st_size > 1000:
            content = bytearray(path.read_bytes())
            content[1000:-1000:50] = (byte ^ 1 for byte in content[1000:-1000:50])
            path.write_bytes(content)
    proxy.clear()
    counters = Counters()
    assert_same(batches(remote, counters=counters), expected)
    assert counters.snapshot()['retries{cause="damaged_cache"}'] >= 1
    counters = Counters()
    assert_same(batches(remote, counters=counters), expected)
    assert "retries" not in str(counters.snapshot()), "the copies in the cache are intact again"


def test_an_object_that_is_damaged_in_the_bucket_stops_the_stream_and_is_named(
    remote: Corpus, stored: SmallCorpus, tmp_path: Path
) -> None:
    name = remote.manifest["shards"][1]["name"]
    content = bytearray(stored[0].local(name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    remote.storage.upload(tmp_path / "damaged", name)
    with pytest.raises(StorageError, match=name):
        batches(remote)


def test_with_ranged_reads_only_the_damaged_sample_is_replaced(
    remote: Corpus, stored: SmallCorpus, tmp_path: Path, no_room: None
) -> None:
    from p2r.data.shards import read_index

    name = remote.manifest["shards"][1]["name"]
    row = read_index(stored[0].local(index_name(name)))[0]
    content = bytearray(stored[0].local(name).read_bytes())
    content[row.chunk_offsets[1] + 40] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    remote.storage.upload(tmp_path / "damaged", name)
    with pytest.raises(DataError, match="is damaged"):
        batches(remote)
    taken = batches(remote, quarantine=Quarantine(5))
    num_epochs = -(-STEPS // (remote.manifest["num_samples"] // 8))  # the sample is drawn at most once in each
    assert len(taken) == STEPS and 1 <= sum(len(batch.replaced) for batch in taken) <= num_epochs


def test_a_deleted_object_stops_the_stream_at_once(remote: Corpus, proxy: FaultProxy) -> None:
    name = remote.manifest["shards"][1]["name"]
    remote.storage.delete(name)
    with pytest.raises(StorageError, match=name):
        batches(remote)


def test_an_unreachable_server_stops_the_stream_with_the_url(
    remote: Corpus, proxy: FaultProxy, monkeypatch: Any
) -> None:
    monkeypatch.setenv("P2R_S3_DEADLINE_S", "0.5")
    proxy.add(Fault("status", on="GET .*tar", times=ALWAYS, status=503))
    with pytest.raises(StorageError, match=r"s3://.*\.tar"):
        batches(remote)


@pytest.fixture
def own_bucket(
    own_s3: S3Server, stored: SmallCorpus, cache: Path, few_retries: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Corpus]:
    for name, value in own_s3.environment.items():
        monkeypatch.setenv(name, value)
    make_bucket(own_s3.environment, "faults")
    yield uploaded(stored, "s3://faults/corpus")


def test_a_stream_survives_a_restart_of_the_server(
    own_s3: S3Server, own_bucket: Corpus, expected: list[Batch], no_room: None
) -> None:
    back = threading.Thread(target=lambda: (threading.Event().wait(1.0), own_s3.start()))

    def between(step: int) -> None:
        if step == 4:
            own_s3.kill()
            back.start()

    counters = Counters()
    assert_same(batches(own_bucket, between=between, counters=counters), expected)
    back.join()
    assert any(name.startswith("retries") for name in counters.snapshot())


def test_rotated_keys_are_read_from_the_credentials_file(
    own_s3: S3Server,
    own_bucket: Corpus,
    expected: list[Batch],
    no_room: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credentials = tmp_path / "credentials"

    def write_keys() -> None:
        credentials.write_text(
            f"[default]\naws_access_key_id = {own_s3.access_key}\naws_secret_access_key = {own_s3.secret_key}\n"
        )

    write_keys()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    def rotate(step: int) -> None:
        if step == 4:
            own_s3.kill()
            own_s3.set_keys("ROTATED", "another-secret")
            write_keys()
            own_s3.start()

    assert_same(batches(own_bucket, between=rotate), expected)

    own_s3.kill()
    own_s3.set_keys("ROTATED-AGAIN", "a-third-secret")
    own_s3.start()
    with pytest.raises(StorageError, match=r"s3://faults/corpus.*(403|InvalidAccessKeyId)") as stopped:
        batches(own_bucket)
    assert "another-secret" not in str(stopped.value)


def test_a_full_disk_is_not_an_error(
    remote: Corpus, expected: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        monkeypatch.setenv("P2R_CACHE", str(disk))
        monkeypatch.setenv("P2R_CACHE_GIB", "1")
        counters = Counters()
        assert_same(batches(remote, counters=counters), expected)
        assert counters.snapshot()["range_reads"] > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
