"""The shards of a corpus -> open readers, fetched before they are needed.

Local shards are read where they lie. Remote ones come whole into the node's cache, ahead of need, since the order of
samples says long before which ones will be wanted; what the cache has no room for is read by ranges straight from the
object storage, chunk by chunk. So a cache that is small, or full, or absent makes a run slower and never wrong.

Every process of a node fetches what its own lanes need, on threads; the cache sees to it that no object is fetched twice.
No process is ever forked: clients of object storage do not survive that.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from p2r.cache import Lease, ShardCache
from p2r.counters import Counters
from p2r.data.shards import MAX_INDEX_BYTES, ShardReader, index_name, local_ranges, parse_index
from p2r.errors import DataError
from p2r.storage import Storage

Read = TypeVar("Read")

_MAX_OPEN_SHARDS = 256  # file descriptors; a plane finds its shard open as long as the rank has no more lanes than this


@dataclass(frozen=True)
class _Opened:
    reader: ShardReader
    lease: Lease | None
    """Of the copy in the cache."""
    by_range: bool
    """Nothing lies on this machine: every read is a request."""


class OpenShards:
    """Readers of the shards in use. Safe to share between threads.

    Args:
        storage: Of the corpus.
        manifest: Of the corpus.
        cache: Of this node, for remote shards; None: read them by ranges.
        counters: Receives what happens.
        num_fetchers: Shards that are fetched at the same time.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Mapping[str, Any],
        *,
        cache: ShardCache | None,
        counters: Counters,
        num_fetchers: int = 4,
    ) -> None:
        self._storage = Storage(storage.url, counters=counters)
        self._entries = manifest["shards"]
        self._cache, self._counters = cache, counters
        self._open: OrderedDict[int, Future[_Opened]] = OrderedDict()
        self._needed_until: dict[int, int] = {}
        self._lock = threading.Lock()
        self.is_remote = not storage.is_local
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix="p2r-stream-fetch")

    def plan(self, step: int, shards: Iterable[int]) -> None:
        """Say that these shards will be needed at a step; remote ones are fetched from now on."""
        if not self.is_remote:
            return
        for number in shards:
            self._needed_until[number] = step
            self._opened(number)

    def done(self, step: int) -> None:
        """Say that this step is over: shards that no later step was planned to need may leave the cache."""
        with self._lock:
            over = [number for number, until in self._needed_until.items() if until <= step]
            for number in over:
                del self._needed_until[number]

    def name(self, number: int) -> str:
        """URL of a shard."""
        return self._storage.at(self._entries[number]["name"])

    def reader(self, number: int) -> ShardReader:
        """Return the reader of a shard, fetching it first if need be."""
        return self._opened(number).result().reader

    def is_by_range(self, number: int) -> bool:
        """Tell whether every read of this shard is a request."""
        return self._opened(number).result().by_range

    def read_again(self, number: int, read: Callable[[ShardReader], Read]) -> Read:
        """Call `read` with the original, after what was read turned out damaged; a copy in the cache is fetched anew.

        Raises:
            DataError: The original is damaged.
        """
        opened = self._opened(number).result()
        if opened.lease is None:
            result = read(opened.reader)
            self._counters.add("retries", cause="damaged_read")
            return result
        result = read(self._by_range(number).reader)
        self._counters.add("retries", cause="damaged_cache")
        opened.lease.drop()
        with self._lock:
            self._open.pop(number, None)
        return result

    def close(self) -> None:
        """End the threads and give the cache free."""
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for future in self._open.values():
                _close(future)
            self._open.clear()

    def _opened(self, number: int) -> Future[_Opened]:
        with self._lock:
            future = self._open.get(number)
            if future is None:
                future = self._open[number] = self._fetchers.submit(self._fetch, number)
            self._open.move_to_end(number)
            for other in list(self._open)[: max(0, len(self._open) - _MAX_OPEN_SHARDS)]:
                if other not in self._needed_until:
                    _close(self._open.pop(other))  # a thread that still reads it keeps it open
        return future

    def _fetch(self, number: int) -> _Opened:
        entry = self._entries[number]
        if not self.is_remote:
            path = self._storage.local(entry["name"], num_bytes=entry["num_bytes"])
            return _Opened(self._reader(number, local_ranges(path)), None, by_range=False)
        for _ in range(2):
            lease = self._lease(entry)
            if lease is not None:
                return _Opened(self._reader(number, local_ranges(lease.path)), lease, by_range=False)
            self._release_idle()
        return self._by_range(number)

    def _lease(self, entry: Mapping[str, Any]) -> Lease | None:
        if self._cache is None:
            return None
        return self._cache.lease(self._storage, entry["name"], sha256=entry["sha256"], num_bytes=entry["num_bytes"])

    def _by_range(self, number: int) -> _Opened:
        return _Opened(
            self._reader(number, partial(self._storage.read_range, self._entries[number]["name"])), None, by_range=True
        )

    def _reader(self, number: int, read: Callable[[int, int], bytes]) -> ShardReader:
        entry = self._entries[number]
        name = index_name(entry["name"])
        index = parse_index(
            self._storage.read_bytes(name, max_bytes=MAX_INDEX_BYTES),
            name=self._storage.at(name),
            sha256=entry["index_sha256"],
            num_bytes=entry["num_bytes"],
        )
        reader = ShardReader(self._storage.at(entry["name"]), index, read)
        found = {"num_records": len(index), "num_samples": reader.num_samples, "num_volumes": reader.num_volumes}
        for field, count in found.items():
            if count != entry[field]:
                raise DataError(
                    f"{self._storage.at(name)}: {field} is {count}, the manifest has {entry[field]}; ingest this corpus again"
                )
        return reader

    def _release_idle(self) -> None:
        """Give the cache free what no planned step needs."""
        with self._lock:
            for number in [number for number in self._open if number not in self._needed_until]:
                if self._open[number].done():
                    _close(self._open.pop(number))


def _close(future: Future[_Opened]) -> None:
    if future.done() and not future.cancelled() and future.exception() is None:
        lease = future.result().lease
        if lease is not None:
            lease.close()
