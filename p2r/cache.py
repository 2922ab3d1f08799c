"""Cache of shards from object storage: local files in a folder of bounded size, shared by all processes of a node.

A lease on a shard is served from the folder, or fetches it, or waits for the process that is fetching it. The local file
stays until the lease ends. Besides shards, named by the SHA-256 of their content, the folder holds partial downloads
(`.tmp-*`) and locks.

Choices: no index and no server. The files are the state, and `flock`s on them are the leases, which end with their process.
Space is reserved before the first byte arrives, by giving the new file its final size, so the bound holds at every moment.
Files without a lease are evicted, least recently used first. A shard that does not fit into the bound or on the disk gets
no lease and no error; the caller then reads ranges from the storage.
"""

import errno
import fcntl
import functools
import logging
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import BinaryIO, Protocol

from p2r.counters import Counters
from p2r.errors import StorageError
from p2r.files import is_file_at, locked, mark_used

_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 2**30
_LOG = logging.getLogger(__name__)


class Source(Protocol):
    """The methods of `Storage` that a cache uses."""

    def at(self, path: str) -> str:
        """Return the URL of `path`."""

    def version(self, path: str) -> tuple[int, str]:
        """Return the size of `path`, and a text that differs if its content differs."""

    def fetch(self, path: str, file: BinaryIO, *, sha256: str | None, num_bytes: int | None) -> None:
        """Write the checked content of `path` into `file`."""


def cache_folder() -> Path:
    """Return the folder for files that can be made again: `$P2R_CACHE`, or `~/.cache/p2r`."""
    return Path(os.environ.get("P2R_CACHE") or Path.home() / ".cache" / "p2r")


def node_cache(counters: Counters) -> "ShardCache":
    """Return this node's cache: `objects` in `cache_folder()`, of size `$P2R_CACHE_GIB`.

    Without that variable its size is half of the disk's free space at the start of the process, its own files included.

    Raises:
        StorageError: `P2R_CACHE_GIB` is not a number above 0.
    """
    folder = cache_folder() / "objects"
    text = os.environ.get("P2R_CACHE_GIB")
    if not text:
        return ShardCache(folder, max_bytes=_half_of_free_space(folder), counters=counters)
    try:
        max_bytes = int(float(text) * _GIB)
    except (ValueError, OverflowError):
        max_bytes = 0
    if max_bytes <= 0:
        raise StorageError(f"P2R_CACHE_GIB must be a number above 0, the size of {folder} in GiB, got {text!r}")
    return ShardCache(folder, max_bytes=max_bytes, counters=counters)


class Lease:
    """A local file that stays as long as the lease is open. `close`, `with`, garbage collection and process exit close it.

    Attributes:
        path: File to open for reading.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle
        self._closed = weakref.finalize(self, os.close, handle)  # closing the file releases its lock

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lease; closing it again has no effect."""
        self._closed()

    def drop(self) -> None:
        """End the lease of a file with wrong content, and remove the file: the next lease fetches it again."""
        if self._closed.alive and is_file_at(self.path, self._handle):
            self.path.unlink(missing_ok=True)
        self.close()


class ShardCache:
    """A folder of at most `max_bytes`. Any number of processes may use the same folder; threads may share an instance.

    Args:
        folder: Created when first needed; used only by caches.
        max_bytes: Largest total size of the shards, partial downloads included.
        counters: Counters of cache_hits, cache_misses, cache_evictions, cache_evicted_bytes, cache_refusals{cause}.
    """

    def __init__(self, folder: Path, *, max_bytes: int, counters: Counters) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._counters = counters

    def lease(self, storage: Source, path: str, *, sha256: str | None, num_bytes: int | None) -> Lease | None:
        """Return a lease on the content of `path`, fetching it if necessary or waiting for the process that fetches it.

        Args:
            storage: Storage of the file.
            path: Path in the storage.
            sha256: Digest, checked during the download. None: unknown; the storage is asked for its version.
            num_bytes: Size. None: unknown; the storage is asked.

        Returns:
            The lease, or None if there is no room: the file exceeds the cache, too much is leased, or the disk is full.

        Raises:
            StorageError: The file cannot be fetched, has another size or digest, or the folder is not writable.
        """
        name = sha256
        if sha256 is None or num_bytes is None:
            num_bytes, version = storage.version(path)
            name = sha256 or sha256_of(f"{storage.at(path)}\n{version}".encode()).hexdigest()
        if name is None or not re.fullmatch("[0-9a-f]{64}", name):
            raise StorageError(f"{storage.at(path)}: its manifest has {name!r} where a SHA-256 belongs: it is damaged")
        if num_bytes > self.max_bytes:
            self._count_refusal("size")
            return None
        try:
            lease = self._lease_cached(name, num_bytes)
            if lease is None:
                with locked(self.folder / f".lock-{name}"):  # held by the process that fetches the file
                    lease = self._lease_cached(name, num_bytes) or self._lease_fetched(
                        storage, path, name, sha256, num_bytes
                    )
        except OSError as error:
            if error.errno in _DISK_IS_FULL:
                self._count_refusal("disk")
                return None
            raise StorageError(
                f"cannot cache {storage.at(path)} in {self.folder}: {type(error).__name__}: {error}; "
                "set P2R_CACHE to a folder that can be written"
            ) from error
        return lease

    def drop(self, sha256: str, num_bytes: int) -> None:
        """Remove a cached file with wrong content: the next lease fetches it again."""
        with suppress(OSError):
            if (lease := self._lease_cached(sha256, num_bytes)) is not None:
                lease.drop()

    def _lease_cached(self, name: str, num_bytes: int) -> Lease | None:
        """Lease a cached file. Waits only while another process moves or evicts it."""
        target = self.folder / name
        while True:
            try:
                handle = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(handle, fcntl.LOCK_SH)
            lease = Lease(target, handle)
            if not is_file_at(target, handle):
                lease.close()  # evicted between the two lines
            elif os.fstat(handle).st_size != num_bytes:
                lease.drop()  # truncated by a power failure
            else:
                mark_used(handle)
                self._counters.add("cache_hits")
                return lease

    def _lease_fetched(self, storage: Source, path: str, name: str, sha256: str | None, num_bytes: int) -> Lease | None:
        self._counters.add("cache_misses")
        partial, target = self.folder / f".tmp-{name}", self.folder / name
        handle = self._reserve_file(partial, num_bytes)
        if handle is None:
            return None
        try:
            with os.fdopen(handle, "r+b", closefd=False) as file:
                storage.fetch(path, file, sha256=sha256, num_bytes=num_bytes)
            # The file already has its final size, so after a power failure nothing would show that its content is missing.
            os.fsync(handle)
            with (
                self._lock_folder()
            ):  # a concurrent count must find the file under one of its names, and nothing may evict it
                partial.rename(target)
                fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(handle)
            raise
        mark_used(handle)
        return Lease(target, handle)

    def _reserve_file(self, partial: Path, num_bytes: int) -> int | None:
        """Create a locked file of this size without content, evicting others as needed. None: no room."""
        with self._lock_folder(), ExitStack() as held:
            self._remove_leftovers()
            used = unwritten = 0
            shards: list[tuple[int, str, int]] = []
            for entry, facts in _list_files(self.folder):
                used += facts.st_size
                if entry.name.startswith("."):
                    unwritten += max(0, facts.st_size - 512 * facts.st_blocks)
                else:
                    shards.append((facts.st_mtime_ns, entry.name, facts.st_size))
            disk = os.statvfs(self.folder)
            over = used + num_bytes - self.max_bytes
            missing = max(over, num_bytes + unwritten - disk.f_bavail * disk.f_frsize)
            victims: list[tuple[str, int]] = []
            for _, name, size in sorted(shards):
                if missing <= 0:
                    break
                victim = _lock_if_unused(self.folder / name)
                if victim is not None:
                    held.callback(os.close, victim)
                    victims.append((name, size))
                    missing -= size
            if missing > 0:
                self._count_refusal("leased" if over > 0 else "disk")
                return None
            for name, size in victims:
                (self.folder / name).unlink()
                self._counters.add("cache_evictions")
                self._counters.add("cache_evicted_bytes", size)
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                os.ftruncate(handle, num_bytes)
            except BaseException:
                partial.unlink()
                os.close(handle)
                raise
            return handle

    def _remove_leftovers(self) -> None:
        """Remove partial downloads and locks left by killed processes."""
        for entry, _ in _list_files(self.folder):
            if entry.name.startswith((".tmp-", ".lock-")):
                handle = _lock_if_unused(Path(entry.path))
                if handle is not None:
                    Path(entry.path).unlink(missing_ok=True)
                    os.close(handle)

    def _lock_folder(self) -> AbstractContextManager[None]:
        """Lock the folder for adding files or evicting them."""
        return locked(self.folder / ".lock")

    def _count_refusal(self, cause: str) -> None:
        self._counters.add("cache_refusals", cause=cause)


def _lock_if_unused(path: Path) -> int | None:
    """Open and lock a file that no process leases, writes or uses as a lock. None: in use, or gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_file_at(path, handle):
            return handle
    os.close(handle)
    return None


def _list_files(folder: Path) -> Iterator[tuple["os.DirEntry[str]", os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # deleted by another process
                if entry.is_file(follow_symlinks=False):
                    yield entry, entry.stat(follow_symlinks=False)


@functools.cache
def _half_of_free_space(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(folder)
    num_bytes = (disk.f_bavail * disk.f_frsize + sum(facts.st_size for _, facts in _list_files(folder))) // 2
    _LOG.info(
        "%s takes up to %.1f GiB, half of the free space; set P2R_CACHE_GIB for another size", folder, num_bytes / _GIB
    )
    return num_bytes
