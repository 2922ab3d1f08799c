"""The shards of a corpus -> open readers, prefetched.

Local shards are read in place. Remote shards are prefetched whole into the node's cache, because the sample order is
known far ahead. Shards that do not fit into the cache are read from object storage by byte ranges, one chunk at a
time. A small, full or absent cache therefore makes a run slower, never wrong.

Every process of a node prefetches the shards of its own lanes on threads, and the cache ensures that each object is fetched
once. Threads, not forked processes: object storage clients do not survive a fork.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from p2r.cache import Lease, ShardCache
from p2r.counters import Counters
from p2r.data.manifest import Shard, shards_of
from p2r.data.shards import MAX_INDEX_BYTES, ShardReader, index_name, local_ranges, parse_index
from p2r.errors import DataError
from p2r.storage import Storage

Read = TypeVar("Read")

_MAX_OPEN_SHARDS = 256  # bounds file descriptors; up to this number of lanes per rank, shards stay open between samples


@dataclass(frozen=True)
class _Opened:
    reader: ShardReader
    lease: Lease | None
    """Lease of the cached copy."""
    by_range: bool
    """There is no local copy: every read is a request."""


class OpenShards:
    """Readers of the shards in use. Thread-safe.

    Args:
        storage: Storage of the corpus.
        manifest: Manifest of the corpus.
        cache: Shard cache of this node, for remote shards; None: read them by ranges.
        counters: Receives the event counts.
        num_fetchers: Number of shards fetched at the same time.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Mapping[str, object],
        *,
        cache: ShardCache | None,
        counters: Counters,
        num_fetchers: int = 4,
    ) -> None:
        self._storage = Storage(storage.url, counters=counters)
        self._entries = shards_of(manifest)
        self._cache, self._counters = cache, counters
        self._open: OrderedDict[int, Future[_Opened]] = OrderedDict()
        self._needed_until: dict[int, int] = {}
        self._lock = threading.Lock()
        self.is_remote = not storage.is_local
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix="p2r-stream-fetch")

    def plan(self, step: int, shards: Iterable[int]) -> None:
        """Register the shards that a step needs, and start fetching the remote ones."""
        if not self.is_remote:
            return
        for number in shards:
            self._needed_until[number] = step
            self._open_shard(number)

    def done(self, step: int) -> None:
        """Mark a step as finished: shards that no later planned step needs may leave the cache."""
        with self._lock:
            finished = [number for number, until in self._needed_until.items() if until <= step]
            for number in finished:
                del self._needed_until[number]

    def name(self, number: int) -> str:
        """Return the URL of a shard."""
        return self._storage.at(self._entries[number].name)

    def reader(self, number: int) -> ShardReader:
        """Return the reader of a shard, fetching the shard first if necessary."""
        return self._open_shard(number).result().reader

    def is_by_range(self, number: int) -> bool:
        """Return whether every read of this shard is a request."""
        return self._open_shard(number).result().by_range

    def read_again(self, number: int, read: Callable[[ShardReader], Read]) -> Read:
        """Call `read` with the original after a read returned damaged data; drop the cached copy, to be fetched again.

        Raises:
            DataError: if the original is damaged.
        """
        opened = self._open_shard(number).result()
        if opened.lease is None:
            result = read(opened.reader)
            self._counters.add("retries", cause="damaged_read")
            return result
        result = read(self._open_by_range(number).reader)
        self._counters.add("retries", cause="damaged_cache")
        opened.lease.drop()
        with self._lock:
            self._open.pop(number, None)
        return result

    def close(self) -> None:
        """Stop the threads and release the cached copies."""
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for future in self._open.values():
                _release_lease(future)
            self._open.clear()

    def _open_shard(self, number: int) -> Future[_Opened]:
        with self._lock:
            future = self._open.get(number)
            if future is None:
                future = self._open[number] = self._fetchers.submit(self._fetch, number)
            self._open.move_to_end(number)
            for other in list(self._open)[: max(0, len(self._open) - _MAX_OPEN_SHARDS)]:
                if other not in self._needed_until:
                    _release_lease(self._open.pop(other))  # a thread that still reads the file keeps it open
        return future

    def _fetch(self, number: int) -> _Opened:
        entry = self._entries[number]
        if not self.is_remote:
            path = self._storage.local(entry.name, num_bytes=entry.num_bytes)
            return _Opened(self._make_reader(number, local_ranges(path)), None, by_range=False)
        for _ in range(2):
            lease = self._lease_copy(entry)
            if lease is not None:
                return _Opened(self._make_reader(number, local_ranges(lease.path)), lease, by_range=False)
            self._release_idle()
        return self._open_by_range(number)

    def _lease_copy(self, entry: Shard) -> Lease | None:
        if self._cache is None:
            return None
        return self._cache.lease(self._storage, entry.name, sha256=entry.sha256, num_bytes=entry.num_bytes)

    def _open_by_range(self, number: int) -> _Opened:
        return _Opened(
            self._make_reader(number, partial(self._storage.read_range, self._entries[number].name)),
            None,
            by_range=True,
        )

    def _make_reader(self, number: int, read: Callable[[int, int], bytes]) -> ShardReader:
        entry = self._entries[number]
        name = index_name(entry.name)
        index = parse_index(
            self._storage.read_bytes(name, max_bytes=MAX_INDEX_BYTES),
            name=self._storage.at(name),
            sha256=entry.index_sha256,
            num_bytes=entry.num_bytes,
        )
        reader = ShardReader(self._storage.at(entry.name), index, read)
        found = {
            "num_records": reader.num_records,
            "num_samples": reader.num_samples,
            "num_volumes": reader.num_volumes,
        }
        for field, count in found.items():
            stated = getattr(entry, field)
            if count != stated:
                raise DataError(
                    f"{self._storage.at(name)}: {field} is {count}, the manifest has {stated}; ingest this corpus again"
                )
        return reader

    def _release_idle(self) -> None:
        """Release the cached copies that no planned step needs."""
        with self._lock:
            for number in [number for number in self._open if number not in self._needed_until]:
                if self._open[number].done():
                    _release_lease(self._open.pop(number))


def _release_lease(future: Future[_Opened]) -> None:
    if future.done() and not future.cancelled() and future.exception() is None:
        lease = future.result().lease
        if lease is not None:
            lease.close()
