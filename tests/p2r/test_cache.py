import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from p2r.cache import Lease, ShardCache, node_cache
from p2r.counters import Counters
from p2r.errors import StorageError
from p2r.storage import Storage
from tests.fault_proxy import FaultProxy

KIB = 2**10


@dataclass
class Shards:
    """A folder of shards named a, b, ..., and how often each was fetched from it."""

    storage: Storage
    content: dict[str, bytes]
    fetched: list[str]
    before: Callable[[str], object] = lambda path: None

    def at(self, path: str) -> str:
        return self.storage.at(path)

    def version(self, path: str) -> tuple[int, str]:
        return self.storage.version(path)

    def fetch(self, path: str, file: BinaryIO, *, sha256: str | None, num_bytes: int | None) -> None:
        self.fetched.append(path)
        self.before(path)
        self.storage.fetch(path, file, sha256=sha256, num_bytes=num_bytes)

    def lease(self, cache: ShardCache, path: str) -> Lease | None:
        content = self.content[path]
        return cache.lease(self, path, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))

    def use(self, cache: ShardCache, path: str) -> bool:
        lease = self.lease(cache, path)
        if lease is None:
            return False
        with lease:
            assert lease.path.read_bytes() == self.content[path]
        return True


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Six shards of 100 KiB."""
    content = {name: np.random.default_rng(ord(name)).bytes(100 * KIB) for name in "abcdef"}
    storage = Storage(str(tmp_path / "corpus"))
    for name, data in content.items():
        storage.write_bytes(name, data)
    return Shards(storage, content, [])


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """Room for three of them."""
    return ShardCache(tmp_path / "cache", max_bytes=350 * KIB, counters=Counters())


def counted(cache: ShardCache) -> dict[str, float]:
    return cache._counters.snapshot()


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_shard_is_fetched_once_and_read_from_a_local_file(shards: Shards, cache: ShardCache) -> None:
    assert shards.use(cache, "a")
    shards.storage.delete("a")
    assert shards.use(cache, "a")
    assert shards.fetched == ["a"]
    assert names_in(cache.folder) == [hashlib.sha256(shards.content["a"]).hexdigest()]
    assert counted(cache) == {"cache_misses": 1, "cache_hits": 1}


def test_the_longest_unused_is_evicted_first(shards: Shards, cache: ShardCache) -> None:
    for path in "abcabdace":
        assert shards.use(cache, path)
    # c went for d, b for c, d for e
    assert shards.fetched == list("abcdce")
    assert counted(cache)["cache_evictions"] == 3
    assert counted(cache)["cache_evicted_bytes"] == 300 * KIB
    for path in "ace":
        assert shards.use(cache, path)
    assert shards.fetched == list("abcdce")


def test_what_is_leased_stays_and_for_the_rest_there_is_no_room(shards: Shards, cache: ShardCache) -> None:
    leases = [shards.lease(cache, path) for path in "abc"]
    assert shards.lease(cache, "d") is None
    assert counted(cache)['cache_refusals{cause="leased"}'] == 1
    again = shards.lease(cache, "a")
    for lease in (leases[0], leases[1]):
        assert lease is not None
        lease.close()
        lease.close()
    with shards.lease(cache, "d") as lease:  # type: ignore[union-attr]
        assert lease.path.read_bytes() == shards.content["d"]
    assert again is not None
    assert again.path.read_bytes() == shards.content["a"]  # b had to go: a has another lease


def test_a_lease_that_nobody_has_any_more_is_over(shards: Shards, cache: ShardCache) -> None:
    leases = [shards.lease(cache, path) for path in "abc"]
    assert shards.lease(cache, "d") is None
    leases.clear()
    assert shards.use(cache, "d")


def test_a_shard_larger_than_the_cache_is_not_fetched(shards: Shards, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=50 * KIB, counters=Counters())
    assert shards.lease(cache, "a") is None
    assert shards.fetched == []
    assert counted(cache) == {'cache_refusals{cause="size"}': 1}


def test_threads_that_want_the_same_shard_wait_for_one_download(shards: Shards, cache: ShardCache) -> None:
    shards.before = lambda path: time.sleep(0.2)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: shards.use(cache, "a"), range(8)))
    assert shards.fetched == ["a"]
    assert counted(cache) == {"cache_misses": 1, "cache_hits": 7}


def test_the_bound_is_obeyed_at_every_moment(tmp_path: Path) -> None:
    rng = random.Random(0)
    storage = Storage(str(tmp_path / "corpus"))
    content = {f"{number}": rng.randbytes(rng.randrange(1, 120 * KIB)) for number in range(40)}
    for name, data in content.items():
        storage.write_bytes(name, data)
    shards = Shards(storage, content, [])
    cache = ShardCache(tmp_path / "cache", max_bytes=500 * KIB, counters=Counters())
    largest, is_over = 0, threading.Event()

    def measure() -> None:
        nonlocal largest
        while not is_over.is_set():
            largest = max(largest, size_of(cache.folder))

    shards.before = lambda path: time.sleep(0.001)
    observer = threading.Thread(target=measure)
    observer.start()
    with ThreadPoolExecutor(8) as pool:
        had = list(pool.map(lambda _: shards.use(cache, str(rng.randrange(40))), range(600)))
    is_over.set()
    observer.join()
    assert 300 * KIB < largest <= cache.max_bytes
    assert sum(had) > 300
    assert counted(cache)["cache_evictions"] > 100
    assert len(shards.fetched) + counted(cache)["cache_hits"] >= sum(had)


def test_a_working_set_larger_than_the_cache_goes_round(shards: Shards, cache: ShardCache) -> None:
    for _ in range(3):
        for path in "abcdef":
            assert shards.use(cache, path)
    assert size_of(cache.folder) == 300 * KIB


def test_a_wrong_digest_is_an_error_and_leaves_nothing(shards: Shards, cache: ShardCache) -> None:
    shards.storage.write_bytes("a", bytes(100 * KIB))
    with pytest.raises(StorageError, match=r"corpus/a does not have the sha256 .*damaged"):
        shards.lease(cache, "a")
    shards.storage.write_bytes("a", b"short")
    with pytest.raises(StorageError, match="has 5 bytes, its manifest says 102400"):
        shards.lease(cache, "a")
    assert names_in(cache.folder) == []


def test_a_shard_whose_content_turned_bad_is_dropped_and_fetched_again(shards: Shards, cache: ShardCache) -> None:
    lease = shards.lease(cache, "a")
    assert lease is not None
    lease.path.chmod(0o644)
    with lease.path.open("r+b") as file:
        file.write(b"!")
    lease.drop()
    lease.drop()
    assert shards.use(cache, "a")
    assert shards.fetched == ["a", "a"]


def test_a_file_that_was_cut_is_fetched_again(shards: Shards, cache: ShardCache) -> None:
    shards.use(cache, "a")
    os.truncate(next(cache.folder.iterdir()), 10)
    assert shards.use(cache, "a")
    assert shards.fetched == ["a", "a"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "A" * 64, "0" * 63])
def test_a_digest_that_is_none_is_refused(shards: Shards, cache: ShardCache, name: str) -> None:
    with pytest.raises(StorageError, match="where a SHA-256 belongs"):
        cache.lease(shards, "a", sha256=name, num_bytes=5)


def test_what_has_no_stated_digest_goes_by_its_version(shards: Shards, cache: ShardCache) -> None:
    for _ in range(2):
        with cache.lease(shards, "a", sha256=None, num_bytes=None) as lease:  # type: ignore[union-attr]
            assert lease.path.read_bytes() == shards.content["a"]
    assert shards.fetched == ["a"]
    shards.storage.write_bytes("a", b"another")
    with cache.lease(shards, "a", sha256=None, num_bytes=None) as lease:  # type: ignore[union-attr]
        assert lease.path.read_bytes() == b"another"


def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(shards: Shards, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot cache file://.*/a in .*; set P2R_CACHE to a folder"):
        shards.lease(ShardCache(tmp_path / "file/below", max_bytes=10**6, counters=Counters()), "a")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 380 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=380k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no small disk: mounting one needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_smaller_than_the_cache_bounds_it(shards: Shards, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", max_bytes=10**9, counters=Counters())
    for path in "abcdef":
        assert shards.use(cache, path)
    assert counted(cache)["cache_evictions"] == 3
    leases = [shards.lease(cache, path) for path in "def"]
    assert shards.lease(cache, "a") is None
    assert counted(cache)['cache_refusals{cause="disk"}'] == 1
    assert all(leases)


def test_a_disk_that_fills_up_during_a_download_gives_no_lease_and_no_error(shards: Shards, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", max_bytes=10**9, counters=Counters())
    assert shards.use(cache, "a")

    def fill(path: str) -> None:
        with pytest.raises(OSError) as caught, (small_disk / "foreign").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert caught.value.errno == errno.ENOSPC

    shards.before = fill
    assert shards.lease(cache, "b") is None
    assert counted(cache)['cache_refusals{cause="disk"}'] == 1
    assert names_in(cache.folder) == [hashlib.sha256(shards.content["a"]).hexdigest()]
    shards.before = lambda path: None
    assert shards.use(cache, "a")
    (small_disk / "foreign").unlink()
    assert shards.use(cache, "b")


def test_a_file_size_limit_is_met_like_a_full_disk(shards: Shards, cache: ShardCache, repository: Path) -> None:
    code = f"""
import resource, hashlib
from pathlib import Path
from p2r.cache import ShardCache; from p2r.counters import Counters; from p2r.storage import Storage
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
cache = ShardCache(Path({str(cache.folder)!r}), max_bytes=10**9, counters=Counters())
assert cache.lease(Storage({shards.storage.url!r}), "a", sha256=None, num_bytes=None) is None
assert cache._counters.snapshot()['cache_refusals{{cause="disk"}}'] == 1
"""
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=60)
    assert names_in(cache.folder) == []


HOLD = """
import sys, time
from pathlib import Path
from p2r.cache import ShardCache; from p2r.counters import Counters; from p2r.storage import Storage
class Slow(Storage):
    def fetch(self, path, file, **words):
        if {is_slow}:
            file.write(b"half"); file.flush(); print("held", flush=True); time.sleep(60)
        super().fetch(path, file, **words)
cache = ShardCache(Path({folder!r}), max_bytes={max_bytes}, counters=Counters())
lease = cache.lease(Slow({url!r}), "a", sha256={sha256!r}, num_bytes={num_bytes})
print("held", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("is_slow", [True, False])
def test_what_a_killed_process_leased_or_was_fetching_is_free_again(
    shards: Shards, cache: ShardCache, repository: Path, is_slow: bool
) -> None:
    content = shards.content["a"]
    code = HOLD.format(
        is_slow=is_slow, folder=str(cache.folder), max_bytes=cache.max_bytes, url=shards.storage.url,
        sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content),
    )  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        leases = [shards.lease(cache, path) for path in "bc"]
        assert all(leases)
        assert shards.lease(cache, "d") is None  # two are ours, the third is its
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    lease = shards.lease(cache, "d")
    assert lease is not None
    lease.close()
    assert shards.use(cache, "a")
    assert not [name for name in names_in(cache.folder) if name.startswith(".")]
    assert size_of(cache.folder) == 300 * KIB


def test_the_node_s_cache_has_the_size_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path))
    free = os.statvfs(tmp_path)
    assert node_cache(Counters()).max_bytes == pytest.approx(free.f_bavail * free.f_frsize / 2, rel=0.1)
    monkeypatch.setenv("P2R_CACHE_GIB", "0.5")
    assert node_cache(Counters()).max_bytes == 2**29
    assert node_cache(Counters()).folder == tmp_path / "objects"
    for value in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("P2R_CACHE_GIB", value)
        with pytest.raises(StorageError, match="P2R_CACHE_GIB must be a number above 0"):
            node_cache(Counters())


@pytest.mark.s3
def test_processes_that_want_the_same_object_make_one_download(
    s3_url: str, proxy: FaultProxy, tmp_path: Path, repository: Path
) -> None:
    content = np.random.default_rng(0).bytes(2**22)
    Storage(s3_url).write_bytes("shard", content)
    proxy.clear()
    code = f"""
from pathlib import Path
from p2r.cache import ShardCache; from p2r.counters import Counters; from p2r.files import file_sha256
from p2r.storage import Storage
cache = ShardCache(Path({str(tmp_path / "cache")!r}), max_bytes=2**23, counters=Counters())
with cache.lease(Storage({s3_url!r}), "shard", sha256={hashlib.sha256(content).hexdigest()!r}, num_bytes=2**22) as lease:
    assert file_sha256(lease.path) == {hashlib.sha256(content).hexdigest()!r}
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=repository) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert [(exchange.request.split()[0], exchange.num_bytes) for exchange in proxy.exchanges] == [("GET", 2**22)]
