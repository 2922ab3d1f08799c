"""Storage of a job: a local folder or a bucket behind one small interface.

`Storage("file:///data/run")`, `Storage("/data/run")` and `Storage("s3://bucket/run")` behave alike. So do `gs://` (Google Cloud
Storage) and `az://` (Azure Blob Storage), with an optional package (`p2r.clouds`). `hf://ORG/NAME@REVISION` is a
published folder on a hub, which can only be read (`p2r.hub`). Every write is atomic:
a folder gets a temporary file that is renamed, and a bucket's PUT is atomic by itself. `create` and `replace` resolve races
between writers: exactly one succeeds, and each learns whether it did. This module reads no credentials: the clients take them
from the environment or from files such as `~/.aws`, so no job file needs one.

Writers store the manifest last, so a reader that finds a manifest finds every file that it names.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pydantic import TypeAdapter

from p2r import documents
from p2r.cache import cache_folder as cache_folder
from p2r.cache import node_cache
from p2r.counters import Counters
from p2r.errors import DamagedError, StorageError
from p2r.files import (
    expanded,
    is_temporary,
    link_if_absent,
    lock_path,
    locked,
    open_regular,
    replacing,
    temporary_beside,
    translate_os_errors,
)
from p2r.files import file_sha256 as file_sha256
from p2r.hub import SCHEME, fetch_snapshot, parse_hub_url
from p2r.masking import looks_secret

if TYPE_CHECKING:
    from p2r.clouds import Cloud
    from p2r.s3 import S3

MAX_JSON_BYTES = 2**28
"""Largest JSON document that is read, unless the caller gives another limit."""
MAX_ROWS_BYTES = 2**30
"""Largest file of JSON lines that is read, unless the caller gives another limit."""
_MAX_ROWS_MEMORY_BYTES = 2**33

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BUCKETS = ("s3", "gs", "az")
_CHUNK_BYTES = 2**20
_DELETE_THREADS = 8


class FileFacts(NamedTuple):
    """Size, version and age of a file, known without reading it."""

    num_bytes: int
    version: str
    """Text that differs if the content differs."""
    modified_s: float
    """Time of writing, seconds since 1970, by the clock of the file system or server."""


def normalise_url(url: str) -> str:
    """Return `url` as an absolute URL with a scheme and no trailing slash.

    Every other character is part of the name: a folder may be called `run #1?`.

    Raises:
        StorageError: for a scheme other than `file`, `s3`, `gs`, `az` and `hf`, a URL without a bucket or repository, or a control
            character.
    """
    if _CONTROL.search(url):
        raise StorageError(f"storage URL {url!r} holds a control character or a line break; rename the folder")
    scheme, has_scheme, name = url.partition("://")
    if not has_scheme and not url.startswith(("file:", *(f"{one}:" for one in _BUCKETS))):
        return "file://" + str(expanded(Path(url)).absolute())
    if url.startswith("file:"):
        if not name.startswith("/"):
            raise StorageError(f"storage URL {url!r}: a file URL has three slashes, as in file:///data/run")
        return "file://" + str(Path(name).absolute())
    if (kind := url.partition(":")[0]) in _BUCKETS:
        if looks_secret(url):
            raise StorageError(
                "a storage URL holds credentials; they come from the environment only (AWS_ACCESS_KEY_ID and the like)"
            )
        if not name.partition("/")[0]:
            raise StorageError(f"storage URL {url!r} names no bucket: write {kind}://BUCKET/PREFIX")
        return url.rstrip("/")
    if scheme == "hf":
        return str(parse_hub_url(url))
    raise StorageError(f"storage URL {url!r}: scheme {scheme!r} is not supported; use file://, s3://, gs:// or az://")


class Storage:
    """Files below one URL. Paths are relative to it and use `/`.

    All methods raise `StorageError` if something cannot be read or written. Threads may share a storage. Pickling gives another
    process its own storage, with its own counters.

    Args:
        url: `file:///folder`, a plain path, `s3://bucket/prefix`, the same with `gs` or `az`, or `hf://ORG/NAME@REVISION`.
        counters: Counters of bytes, seconds and retries; None: not counted.
    """

    def __init__(self, url: str, *, counters: Counters | None = None) -> None:
        self.url = normalise_url(url)
        self.counters = Counters() if counters is None else counters
        scheme, _, self._root = self.url.partition("://")
        self._bucket: S3 | Cloud | None = None
        if scheme in _BUCKETS:
            bucket, _, self._root = self._root.partition("/")
            self._bucket = _open_bucket(scheme, bucket, self.counters)
        self._is_hub = self.url.startswith(SCHEME)
        if self._is_hub:
            found = fetch_snapshot(parse_hub_url(self.url))
            self.url, self._root = str(found.url), str(found.folder)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """True for a folder, whose files can be opened in place."""
        return self._bucket is None

    def at(self, path: str) -> str:
        """Return the full URL of `path`."""
        return f"{self.url}/{path}" if path else self.url

    def child(self, path: str) -> "Storage":
        """Return the storage below `path`, with the same counters and connections."""
        child = Storage(self.at(path), counters=self.counters)
        child._bucket = self._bucket
        return child

    def with_deadline(self, deadline_s: float) -> "Storage":
        """Return the same storage, whose requests are retried for at most this time."""
        hurried = Storage(self.url, counters=self.counters)
        if hurried._bucket is not None:
            settings = hurried._bucket.settings
            hurried._bucket.settings = replace(settings, deadline_s=min(deadline_s, settings.deadline_s))
        return hurried

    def read_bytes(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Return the content of `path`. Content over `max_bytes` is a `DamagedError`, raised before all of it is read."""
        tagged = self._read(path, max_bytes)
        if tagged is None:
            raise DamagedError(f"{self.at(path)} does not exist")
        return tagged[0]

    def read_tagged(self, path: str, *, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return the content of `path` and a tag of its version, for `replace`; None if it is absent.

        Content over `max_bytes` is a `DamagedError`, raised before all of it is read.
        """
        tagged = self._read(path, max_bytes)
        if tagged is not None and self._bucket is None:
            return tagged[0], hashlib.sha256(tagged[0]).hexdigest()
        return tagged

    def read_json(self, path: str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
        """Return the JSON value in `path`, within the limits of `p2r.documents`."""
        content = self.read_bytes(path, max_bytes=max_bytes)
        return documents.read_json(content, where=self.at(path), max_bytes=max_bytes, error=DamagedError)

    def read_checked(self, path: str, adapter: TypeAdapter[Any], *, max_bytes: int = MAX_JSON_BYTES) -> Any:
        """Return the JSON document in `path` as it is, after a pydantic model has checked it.

        Raises:
            DamagedError: It is absent, over a limit, or breaks a rule of the model; names the key and the way out.
        """
        with documents.way_out("restore the file, or delete it: the same command creates it again"):
            value = self.read_json(path, max_bytes=max_bytes)
            documents.checked(adapter, value, where=f"{self.at(path)} is damaged:", error=DamagedError)
        return value

    def read_rows(
        self, path: str, *, max_bytes: int = MAX_ROWS_BYTES, nan_as_none: bool = False
    ) -> list[dict[str, object]]:
        """Return the JSON objects in `path`, one per line, within the limits of `p2r.documents`."""
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
                raise DamagedError(f"{where}, line {number} is not a JSON object: it is damaged")
            rows.append(row)
        return rows

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes of `path` from `start` to before `stop`; a file that ends earlier is an error."""
        full = self._full_path(path)
        if not 0 <= start <= stop:
            raise ValueError(f"a byte range needs 0 <= start <= stop, got {start} to {stop}")
        self.counters.add("range_reads")
        if self._bucket is not None:
            return self._bucket.read_range(full, start, stop) if start < stop else b""
        with translate_os_errors("read", self.at(path)), open_regular(Path(full)) as file:
            file.seek(start)
            content = b"".join(iter(lambda: file.read(stop - file.tell()), b""))
        if len(content) != stop - start:
            raise DamagedError(
                f"{self.at(path)} has {start + len(content)} bytes, but bytes up to {stop} were requested: it is damaged"
            )
        return content

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` to `path` atomically."""
        full = self._writable_path(path)
        if self._bucket is not None:
            self._bucket.write(full, data)
            return
        with translate_os_errors("write", self.at(path)), replacing(Path(full)) as temporary:
            temporary.write_bytes(data)

    def write_json(self, path: str, value: Any) -> None:
        """Write `value` to `path` as JSON with sorted keys: equal values give equal bytes."""
        self.write_bytes(path, json_bytes(value))

    def create(self, path: str, data: bytes) -> bool:
        """Write `data` to `path` if it is absent, and return whether it was. Exactly one of several writers gets True."""
        full = self._writable_path(path)
        if self._bucket is not None:
            return self._bucket.write(full, data, if_absent=True)
        with translate_os_errors("write", self.at(path)), temporary_beside(Path(full)) as temporary:
            temporary.write_bytes(data)
            return link_if_absent(temporary, Path(full))

    def replace(self, path: str, data: bytes, *, tag: str | None) -> bool:
        """Write `data` to `path` if it is unchanged since `tag`, and return whether it was. Exactly one of several writers gets True.

        Args:
            path: File to write.
            data: New content.
            tag: Tag from `read_tagged` when the content was computed; None: the file was absent.
        """
        full = self._writable_path(path)
        if tag is None:
            return self.create(path, data)
        if self._bucket is not None:
            return self._bucket.write(full, data, if_match=tag)
        target = Path(full)
        with translate_os_errors("write", self.at(path)), locked(lock_path(target)):
            if not target.is_file() or file_sha256(target) != tag:
                return False
            with replacing(target) as temporary:
                temporary.write_bytes(data)
        return True

    def upload(self, local: Path, path: str, *, if_absent: bool = False) -> bool:
        """Copy a local file to `path` atomically.

        Args:
            local: File to copy.
            path: Target.
            if_absent: Keep an existing file unchanged.

        Returns:
            True if the file was written.
        """
        full = self._writable_path(path)
        with translate_os_errors("write", self.at(path)):
            if self._bucket is not None:
                return self._bucket.upload(local, full, if_absent=if_absent)
            with temporary_beside(Path(full)) as temporary:
                shutil.copyfile(local, temporary)
                if if_absent:
                    return link_if_absent(temporary, Path(full))
                temporary.replace(full)
        return True

    def exists(self, path: str) -> bool:
        """Return whether `path` is a file, not a folder."""
        full = self._full_path(path)
        if self._bucket is not None:
            return self._bucket.head(full) is not None
        with translate_os_errors("read", self.at(path)):
            return Path(full).is_file()

    def version(self, path: str) -> tuple[int, str]:
        """Return the size of `path`, and a text that differs if its content differs."""
        facts = self.facts(path)
        if facts is None:
            raise DamagedError(f"{self.at(path)} does not exist")
        return facts.num_bytes, facts.version

    def facts(self, path: str) -> FileFacts | None:
        """Return size, version and age of the file `path` without reading it; None if it is absent."""
        full = self._full_path(path)
        if self._bucket is not None:
            head = self._bucket.head(full)
            return None if head is None else FileFacts(head.num_bytes, head.etag, head.modified_s)
        with translate_os_errors("read", self.at(path)):
            try:
                found = Path(full).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return FileFacts(found.st_size, str(found.st_mtime_ns), found.st_mtime)

    def list(self, prefix: str = "", *, with_temporary: bool = False) -> list[str]:
        """Return the sorted paths of all files below `prefix`, which may itself be a file; empty if there are none.

        Args:
            prefix: Folder or file.
            with_temporary: Also list the files that writers at work, and killed ones, have in a folder.
        """
        found = list(self._walk(prefix))
        if not found and prefix and self.exists(prefix):
            found = [prefix]
        # A bucket may hold an empty object in place of a folder.
        return sorted(
            path
            for path in found
            if not path.endswith("/")
            and (not (name := Path(path).name).startswith(".tmp-") or (with_temporary and is_temporary(name)))
        )

    def local(self, path: str, *, sha256: str | None = None, num_bytes: int | None = None) -> Path:
        """Return a local file with the content of `path`: the file itself, or a copy in the node's cache.

        Use it for files read once and soon: the cache may evict the copy when it needs room, most recently used last. Lease a
        file that is read for longer from `p2r.cache.node_cache`.

        Args:
            path: File to fetch.
            sha256: Expected digest, checked when the file is downloaded.
            num_bytes: Expected size, always checked.

        Raises:
            StorageError: The file is absent, has another size or digest, or is larger than the cache.
        """
        full = self._full_path(path)
        if self._bucket is not None:
            cache = node_cache(self.counters)
            lease = cache.lease(self, path, sha256=sha256, num_bytes=num_bytes)
            if lease is None:
                raise StorageError(
                    f"{self.at(path)} does not fit into the cache {cache.folder} ({cache.max_bytes / 2**30:.3g} GiB): "
                    "set P2R_CACHE_GIB, or P2R_CACHE to a folder on a larger disk"
                )
            with lease:
                return lease.path
        local = Path(full)
        if not local.is_file():
            raise DamagedError(f"{self.at(path)} does not exist")
        self._check_size(path, local.stat().st_size, num_bytes)
        return local

    def read_hashed(self, path: str, *, sha256: str, num_bytes: int) -> bytes:
        """Return the content of `path`, hashed after reading, so that it cannot be exchanged between check and use.

        The node's cache keeps a copy of a file in a bucket. A copy with wrong content is dropped, and the file is fetched once more.

        Raises:
            StorageError: The file is absent, cannot be read, or has another size or digest.
        """
        for is_last in (self._bucket is None, True):
            local = self.local(path, sha256=sha256, num_bytes=num_bytes)
            with translate_os_errors("read", self.at(path)), open_regular(local) as file:
                content = file.read(num_bytes + 1)
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            if is_last:
                break
            node_cache(self.counters).drop(sha256, num_bytes)
        raise DamagedError(f"{self.at(path)} does not have the sha256 of its manifest: it is damaged")

    def download(self, path: str, target: Path, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Copy `path` to the local file `target`, checked and atomic.

        Raises:
            StorageError: The file is absent, cannot be copied, or has another size or digest.
        """
        with translate_os_errors("write", str(target)), replacing(target) as temporary, temporary.open("wb") as file:
            self.fetch(path, file, sha256=sha256, num_bytes=num_bytes)

    def fetch(self, path: str, file: BinaryIO, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Write the content of `path` into an open local file, from its start, and truncate the rest.

        Raises:
            StorageError: The file is absent, cannot be read, or has another size or digest.
            OSError: The local file cannot be written, for example on a full disk.
        """
        full = self._full_path(path)
        if self._bucket is not None:
            self._bucket.fetch(full, file, sha256=sha256, num_bytes=num_bytes)
            return
        if not Path(full).is_file():
            raise DamagedError(f"{self.at(path)} does not exist")
        digest = hashlib.sha256()
        with ExitStack() as opened:
            with translate_os_errors("read", self.at(path)):
                source = opened.enter_context(open_regular(Path(full)))
            self._check_size(path, os.fstat(source.fileno()).st_size, num_bytes)
            file.seek(0)
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
            file.truncate()
        if sha256 not in (None, digest.hexdigest()):
            raise DamagedError(f"{self.at(path)} does not have the sha256 that its manifest states: it is damaged")

    def delete(self, prefix: str) -> None:
        """Remove the file or everything below `prefix`; an absent prefix is not an error."""
        full = self._writable_path(prefix)
        if self._bucket is not None:
            keys = [self._full_path(path) for path in self._walk(prefix)] + ([full] if full else [])
            with ThreadPoolExecutor(_DELETE_THREADS, thread_name_prefix="p2r-s3") as pool:
                list(pool.map(self._bucket.delete, keys))
            return
        with translate_os_errors("delete", self.at(prefix)):
            if Path(full).is_dir() and not Path(full).is_symlink():
                shutil.rmtree(full)
            else:
                Path(full).unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write and remove a probe file, so that a job fails at its start and not after an hour of training.

        Raises:
            StorageError: The probe cannot be written or removed.
        """
        probe = f".tmp-probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"p2r")
        self.delete(probe)

    def check_conditional(self) -> None:
        """Check that `create` keeps an existing file, and `replace` a changed one.

        On S3 servers that ignore conditions, two racing writers would both win.

        Raises:
            StorageError: The server ignores a condition.
        """
        probe = f".tmp-probe-{uuid.uuid4().hex}"
        ignored = None
        try:
            if not self.create(probe, b"1") or self.create(probe, b"2"):
                ignored = "If-None-Match"
            elif (
                (found := self.read_tagged(probe)) is None
                or not self.replace(probe, b"3", tag=found[1])
                or self.replace(probe, b"4", tag=found[1])
            ):
                ignored = "If-Match"
        finally:
            with suppress(StorageError):  # keys may allow to write only
                self.delete(probe)
        if ignored is not None:
            raise StorageError(
                f"{self.url}: the server ignores {ignored}, so two concurrent jobs could overwrite each other's files: "
                "use a server with conditional writes"
            )

    def _writable_path(self, path: str) -> str:
        if self._is_hub:
            raise StorageError(
                f"{self.url} is a published folder on a hub, which is only read: write to a folder or a bucket, then p2r push"
            )
        return self._full_path(path)

    def _full_path(self, path: str) -> str:
        """Return the local path or the S3 key."""
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise ValueError(f"storage paths are relative and stay below the URL, got {path!r}")
        return f"{self._root}/{path}" if path and self._root else path or self._root

    def _read(self, path: str, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return the content of `path`, with its ETag if it is in a bucket; None if it is absent."""
        full = self._full_path(path)
        if self._bucket is not None:
            return self._bucket.read(full, max_bytes=max_bytes)
        with translate_os_errors("read", self.at(path)):
            try:
                with open_regular(Path(full)) as file:
                    content = file.read() if max_bytes is None else file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if max_bytes is not None and len(content) > max_bytes:
            raise DamagedError(f"{self.at(path)} has more than the {max_bytes:,} bytes allowed for such a file")
        return content, ""

    def _walk(self, prefix: str) -> Iterator[str]:
        """Yield the paths of all files below a folder, unsorted."""
        full = self._full_path(prefix)
        if self._bucket is not None:
            start = len(self._root) + 1 if self._root else 0
            yield from (key[start:] for key in self._bucket.keys(f"{full.rstrip('/')}/" if full else ""))
            return
        with translate_os_errors("list", self.at(prefix)):
            seen: set[str] = set()
            for folder, folders, names in os.walk(full, onerror=_raise_unless_absent, followlinks=True):
                # Links are followed, each folder is listed once: links to a folder above would never end.
                place = os.path.realpath(folder)
                if place in seen:
                    folders.clear()
                    continue
                seen.add(place)
                folders.sort(key=lambda name, folder=folder: Path(folder, name).is_symlink())  # type: ignore[misc]
                yield from (os.path.relpath(Path(folder, name), self._root) for name in names)

    def _check_size(self, path: str, found: int, expected: int | None) -> None:
        if expected not in (None, found):
            raise DamagedError(f"{self.at(path)} has {found} bytes, its manifest says {expected}: it is damaged")


def json_bytes(value: Any) -> bytes:
    """Serialise `value` so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _open_bucket(scheme: str, name: str, counters: Counters) -> "S3 | Cloud":
    if scheme != "s3":
        from p2r.clouds import Cloud

        return Cloud(scheme, name, counters=counters)
    from p2r.s3 import S3

    return S3(name, counters=counters)


def _raise_unless_absent(error: OSError) -> None:
    """Raise for a folder that cannot be listed; an absent or just deleted folder counts as empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
