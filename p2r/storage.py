"""A folder or a bucket, behind one small interface: what a job reads and writes.

`Storage("file:///data/run")`, `Storage("/data/run")` and `Storage("s3://bucket/run")` behave alike. Every write is whole
or absent: a folder gets a temporary file that is renamed, a bucket's PUT is atomic by itself. `create` and `replace` are
for what several writers want at once: exactly one of them succeeds, and learns it. Nothing here reads credentials:
botocore takes them from the environment or `~/.aws`, so no job file ever needs one.

A reader that finds a manifest finds everything the manifest names, because writers put it last.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urlparse

from p2r import documents
from p2r.cache import cache_folder as cache_folder
from p2r.cache import node_cache
from p2r.counters import Counters
from p2r.errors import DamagedError, StorageError
from p2r.files import file_sha256 as file_sha256
from p2r.files import locked, replacing, temporary_beside
from p2r.masking import looks_secret

if TYPE_CHECKING:
    from p2r.s3 import S3

MAX_JSON_BYTES = 2**28
"""Largest JSON value that is read, unless its reader states another size."""
MAX_ROWS_BYTES = 2**30
"""Largest file of JSON lines that is read, unless its reader states another size."""
_MAX_ROWS_MEMORY_BYTES = 2**33

_CHUNK_BYTES = 2**20
_DELETE_THREADS = 8
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FileFacts(NamedTuple):
    """What a storage knows of a file without reading it."""

    num_bytes: int
    version: str
    """Another text when the content is another."""
    modified_s: float
    """When it was written: seconds since 1970, by the clock of the file system or the server."""


def normalise_url(url: str) -> str:
    """Return `url` absolute, with its scheme, without a trailing slash.

    Raises:
        StorageError: for a scheme other than `file` and `s3`, or an S3 URL without a bucket.
    """
    parsed = urlparse(url)
    if parsed.scheme in ("", "file"):
        if parsed.scheme == "file" and parsed.netloc:
            raise StorageError(f"storage URL {url!r}: a file URL has three slashes, as in file:///data/run")
        path = parsed.path if parsed.scheme == "file" else url
        return "file://" + str(Path(path).expanduser().absolute())
    if parsed.scheme == "s3":
        if looks_secret(url):
            raise StorageError(
                "a storage URL holds credentials; they come from the environment only (AWS_ACCESS_KEY_ID and the like)"
            )
        if not parsed.netloc:
            raise StorageError(f"storage URL {url!r} names no bucket: write s3://BUCKET/PREFIX")
        return url.rstrip("/")
    raise StorageError(f"storage URL {url!r}: scheme {parsed.scheme!r} is not supported; use file:// or s3://")


class Storage:
    """Files below one URL. Paths are relative to it and use `/`.

    All methods raise `StorageError` for what cannot be read or written. Threads may share a storage; another process gets
    its own by pickling, with counters of its own.

    Args:
        url: `file:///folder`, a plain path, or `s3://bucket/prefix`.
        counters: Where bytes, seconds and retries are counted; None: nobody wants to know.
    """

    def __init__(self, url: str, *, counters: Counters | None = None) -> None:
        self.url = normalise_url(url)
        self.counters = Counters() if counters is None else counters
        self._root = self.url.removeprefix("file://").removeprefix("s3://")
        self._s3: S3 | None = None
        if self.url.startswith("s3://"):
            bucket, _, self._root = self._root.partition("/")
            self._s3 = _bucket(bucket, self.counters)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether this is a folder, whose files can be opened where they lie."""
        return self._s3 is None

    def at(self, path: str) -> str:
        """Return the full URL of `path`."""
        return f"{self.url}/{path}" if path else self.url

    def child(self, path: str) -> "Storage":
        """Return the storage below `path`, with the same counters and connections."""
        child = Storage(self.at(path), counters=self.counters)
        child._s3 = self._s3
        return child

    def read_bytes(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Return the content of `path`; more than `max_bytes` of it is a `DamagedError`, before all of it is read."""
        tagged = self._read(path, max_bytes)
        if tagged is None:
            raise DamagedError(f"{self.at(path)} does not exist")
        return tagged[0]

    def read_tagged(self, path: str, *, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return the content of `path` and a tag of this version of it, for `replace`; None if it is absent.

        More than `max_bytes` of content is a `DamagedError`, before all of it is read.
        """
        tagged = self._read(path, max_bytes)
        if tagged is not None and self._s3 is None:
            return tagged[0], hashlib.sha256(tagged[0]).hexdigest()
        return tagged

    def read_json(self, path: str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
        """Return the JSON value in `path`, read within the bounds of `p2r.documents`."""
        content = self.read_bytes(path, max_bytes=max_bytes)
        return documents.read_json(content, where=self.at(path), max_bytes=max_bytes, error=DamagedError)

    def read_rows(
        self, path: str, *, max_bytes: int = MAX_ROWS_BYTES, nan_as_none: bool = False
    ) -> list[dict[str, Any]]:
        """Return the JSON objects in `path`, one a line, read within the bounds of `p2r.documents`."""
        content = self.read_bytes(path, max_bytes=max_bytes)
        rows = []
        where = self.at(path)
        for number, row in documents.read_lines(
            content,
            where=where,
            max_bytes=max_bytes,
            max_memory_bytes=_MAX_ROWS_MEMORY_BYTES,
            nan_as_none=nan_as_none,
            error=DamagedError,
        ):
            if not isinstance(row, dict):
                raise DamagedError(f"{where}, line {number} is no JSON object: it is damaged")
            rows.append(row)
        return rows

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes of `path` from `start` to before `stop`; a file that ends before `stop` is an error."""
        full = self._full(path)
        if not 0 <= start <= stop:
            raise ValueError(f"a range of bytes is 0 <= start <= stop, got {start} to {stop}")
        self.counters.add("range_reads")
        if self._s3 is not None:
            return self._s3.read_range(full, start, stop) if start < stop else b""
        with _explained("read", self.at(path)), Path(full).open("rb", buffering=0) as file:
            file.seek(start)
            content = b"".join(iter(lambda: file.read(stop - file.tell()), b""))
        if len(content) != stop - start:
            raise DamagedError(
                f"{self.at(path)} has {start + len(content)} bytes, asked for those before {stop}: it is damaged"
            )
        return content

    def write_bytes(self, path: str, data: bytes) -> None:
        """Make `path` hold `data`: whole, or unchanged when something fails."""
        full = self._full(path)
        if self._s3 is not None:
            self._s3.write(full, data)
            return
        with _explained("write", self.at(path)), replacing(Path(full)) as temporary:
            temporary.write_bytes(data)

    def write_json(self, path: str, value: Any) -> None:
        """Make `path` hold `value` as JSON with sorted keys: equal values are equal bytes."""
        self.write_bytes(path, json_bytes(value))

    def create(self, path: str, data: bytes) -> bool:
        """Make `path` hold `data` if it is absent; return whether it was. Of many at once exactly one gets True."""
        full = self._full(path)
        if self._s3 is not None:
            return self._s3.write(full, data, if_absent=True)
        with _explained("write", self.at(path)), temporary_beside(Path(full)) as temporary:
            temporary.write_bytes(data)
            return _linked(temporary, Path(full))

    def replace(self, path: str, data: bytes, *, tag: str | None) -> bool:
        """Make `path` hold `data` if nobody changed it meanwhile; return whether it does. Of many at once exactly one gets True.

        Args:
            path: What to write.
            data: Its new content.
            tag: From `read_tagged`, when this content was decided on; None: it was absent.
        """
        full = self._full(path)
        if tag is None:
            return self.create(path, data)
        if self._s3 is not None:
            return self._s3.write(full, data, if_match=tag)
        target = Path(full)
        with _explained("write", self.at(path)), locked(_lock_of(target)):
            if not target.is_file() or file_sha256(target) != tag:
                return False
            with replacing(target) as temporary:
                temporary.write_bytes(data)
        return True

    def upload(self, local: Path, path: str, *, if_absent: bool = False) -> bool:
        """Copy a local file to `path`: whole, or unchanged when something fails.

        Args:
            local: The file.
            path: Where to.
            if_absent: Leave what is there as it is.

        Returns:
            Whether it was written.
        """
        full = self._full(path)
        with _explained("write", self.at(path)):
            if self._s3 is not None:
                return self._s3.upload(local, full, if_absent=if_absent)
            with temporary_beside(Path(full)) as temporary:
                shutil.copyfile(local, temporary)
                if if_absent:
                    return _linked(temporary, Path(full))
                temporary.replace(full)
        return True

    def exists(self, path: str) -> bool:
        """Tell whether `path` is a file (not a folder)."""
        full = self._full(path)
        if self._s3 is not None:
            return self._s3.head(full) is not None
        with _explained("read", self.at(path)):
            return Path(full).is_file()

    def version(self, path: str) -> tuple[int, str]:
        """Return the size of `path`, and what is another text when its content is another."""
        facts = self.facts(path)
        if facts is None:
            raise DamagedError(f"{self.at(path)} does not exist")
        return facts.num_bytes, facts.version

    def facts(self, path: str) -> FileFacts | None:
        """Return what is known of the file `path` without reading it; None if it is absent."""
        full = self._full(path)
        if self._s3 is not None:
            head = self._s3.head(full)
            return None if head is None else FileFacts(head.num_bytes, head.etag, head.modified_s)
        with _explained("read", self.at(path)):
            try:
                found = Path(full).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return FileFacts(found.st_size, str(found.st_mtime_ns), found.st_mtime)

    def list(self, prefix: str = "") -> list[str]:
        """Return the paths of all files below `prefix`, sorted; empty if there are none. A file is below itself."""
        found = list(self._below(prefix))
        if not found and prefix and self.exists(prefix):
            found = [prefix]
        # A bucket may hold an empty object in the place of a folder.
        return sorted(path for path in found if not path.endswith("/") and not Path(path).name.startswith(".tmp-"))

    def local(self, path: str, *, sha256: str | None = None, num_bytes: int | None = None) -> Path:
        """Return a local file with the content of `path`: itself, or a copy in the node's cache.

        For what is read soon and once: the cache may evict the copy when it needs the room, the latest last. What is
        read for longer is leased from `p2r.cache.node_cache`.

        Args:
            path: What to fetch.
            sha256: Expected digest, checked when the file is downloaded.
            num_bytes: Expected size, checked always.

        Raises:
            StorageError: if it is absent, its size or digest is another, or it is larger than the cache.
        """
        full = self._full(path)
        if self._s3 is not None:
            cache = node_cache(self.counters)
            lease = cache.lease(self, path, sha256=sha256, num_bytes=num_bytes)
            if lease is None:
                raise StorageError(
                    f"{self.at(path)} has no room in the cache {cache.folder} ({cache.max_bytes / 2**30:.3g} GiB): "
                    "set P2R_CACHE_GIB, or P2R_CACHE to a folder on a larger disk"
                )
            with lease:
                return lease.path
        local = Path(full)
        if not local.is_file():
            raise DamagedError(f"{self.at(path)} does not exist")
        self._check_size(path, local.stat().st_size, num_bytes)
        return local

    def download(self, path: str, target: Path, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Make the local file `target` a copy of `path`: whole and checked, or unchanged when something fails.

        Raises:
            StorageError: also if its size or digest is another.
        """
        with _explained("write", str(target)), replacing(target) as temporary, temporary.open("wb") as file:
            self.fetch(path, file, sha256=sha256, num_bytes=num_bytes)

    def fetch(self, path: str, file: BinaryIO, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Write the content of `path` into an open local file, from its beginning, and cut the file where it ends.

        Raises:
            StorageError: also if its size or digest is another.
            OSError: from `file`, such as a full disk.
        """
        full = self._full(path)
        if self._s3 is not None:
            self._s3.fetch(full, file, sha256=sha256, num_bytes=num_bytes)
            return
        if not Path(full).is_file():
            raise DamagedError(f"{self.at(path)} does not exist")
        digest = hashlib.sha256()
        with ExitStack() as opened:
            with _explained("read", self.at(path)):
                source = opened.enter_context(Path(full).open("rb", buffering=0))
            self._check_size(path, os.fstat(source.fileno()).st_size, num_bytes)
            file.seek(0)
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
            file.truncate()
        if sha256 not in (None, digest.hexdigest()):
            raise DamagedError(f"{self.at(path)} does not have the sha256 that its manifest states: it is damaged")

    def delete(self, prefix: str) -> None:
        """Remove the file or everything below `prefix`; nothing happens if it is absent."""
        full = self._full(prefix)
        if self._s3 is not None:
            keys = [self._full(path) for path in self._below(prefix)] + ([full] if full else [])
            with ThreadPoolExecutor(_DELETE_THREADS, thread_name_prefix="p2r-s3") as pool:
                list(pool.map(self._s3.delete, keys))
            return
        with _explained("delete", self.at(prefix)):
            if Path(full).is_dir() and not Path(full).is_symlink():
                shutil.rmtree(full)
            else:
                Path(full).unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write and remove a probe file.

        Raises:
            StorageError: if that fails: better now than after an hour of training.
        """
        probe = f".tmp-probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"p2r")
        self.delete(probe)

    def check_conditional(self) -> None:
        """Check that `create` leaves alone what is there: some S3 servers ignore conditions, and two writers would both win.

        Raises:
            StorageError: It does not.
        """
        probe = f".tmp-probe-{uuid.uuid4().hex}"
        try:
            if not self.create(probe, b"1") or self.create(probe, b"2"):
                raise StorageError(
                    f"{self.url}: its server ignores If-None-Match, so two jobs at once could spoil each other's work: "
                    "use a server with conditional writes"
                )
        finally:
            self.delete(probe)

    def _full(self, path: str) -> str:
        """Return the local path, or the key."""
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise ValueError(f"storage paths are relative and stay below the URL, got {path!r}")
        return f"{self._root}/{path}" if path and self._root else path or self._root

    def _read(self, path: str, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return the content of `path`, and its ETag in a bucket; None if it is absent."""
        full = self._full(path)
        if self._s3 is not None:
            return self._s3.read(full, max_bytes=max_bytes)
        with _explained("read", self.at(path)):
            try:
                with Path(full).open("rb") as file:
                    content = file.read() if max_bytes is None else file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if max_bytes is not None and len(content) > max_bytes:
            raise DamagedError(f"{self.at(path)} has more than the {max_bytes:,} bytes that such a file may have")
        return content, ""

    def _below(self, prefix: str) -> Iterator[str]:
        """Yield the paths of all files below a folder, as they come."""
        full = self._full(prefix)
        if self._s3 is not None:
            start = len(self._root) + 1 if self._root else 0
            yield from (key[start:] for key in self._s3.keys(f"{full.rstrip('/')}/" if full else ""))
            return
        with _explained("list", self.at(prefix)):
            for folder, _, names in os.walk(full, onerror=_refuse, followlinks=True):
                yield from (os.path.relpath(Path(folder, name), self._root) for name in names)

    def _check_size(self, path: str, found: int, expected: int | None) -> None:
        if expected not in (None, found):
            raise DamagedError(f"{self.at(path)} has {found} bytes, its manifest says {expected}: it is damaged")


def json_bytes(value: Any) -> bytes:
    """Serialise `value` so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _bucket(name: str, counters: Counters) -> "S3":
    from p2r.s3 import S3  # botocore takes a fifth of a second to import: commands about folders need not wait

    return S3(name, counters=counters)


def _linked(temporary: Path, target: Path) -> bool:
    """Give a whole file the name `target`; tell whether that name was free."""
    try:
        target.hardlink_to(temporary)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    with locked(_lock_of(target)):
        is_free = not target.exists()
        if is_free:
            temporary.replace(target)
        return is_free


def _lock_of(target: Path) -> Path:
    return target.with_name(f".tmp-lock-{target.name}")


def _refuse(error: OSError) -> None:
    """Raise for a folder that cannot be listed; one that is absent, or gone meanwhile, has no files."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


@contextmanager
def _explained(verb: str, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {verb} {where}: {type(error).__name__}: {error}; check the path, its permissions and the free space"
        ) from error
