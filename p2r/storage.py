"""A folder or a bucket, behind one small interface: what a job reads and writes.

`Storage("file:///data/run")`, `Storage("/data/run")` and `Storage("s3://bucket/run")` behave alike. Every write is whole
or absent: a folder gets a temporary file that is renamed, a bucket's PUT is atomic by itself. Nothing here reads
credentials: `s3fs` takes them from the environment, so no job file ever needs one.

A reader that finds a manifest finds everything the manifest names, because writers put it last.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import fsspec

from p2r.errors import StorageError


def cache_folder() -> Path:
    """Folder for what can be made again: `$P2R_CACHE`, else `~/.cache/p2r`."""
    return Path(os.environ.get("P2R_CACHE") or Path.home() / ".cache" / "p2r")


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
        if not parsed.netloc:
            raise StorageError(f"storage URL {url!r} names no bucket: write s3://BUCKET/PREFIX")
        return url.rstrip("/")
    raise StorageError(f"storage URL {url!r}: scheme {parsed.scheme!r} is not supported; use file:// or s3://")


class Storage:
    """Files below one URL. Paths are relative to it and use `/`.

    Args:
        url: `file:///folder`, a plain path, or `s3://bucket/prefix`.
    """

    def __init__(self, url: str) -> None:
        self.url = normalise_url(url)
        self._root = self.url.removeprefix("file://").removeprefix("s3://")
        self._is_local = self.url.startswith("file://")
        # An instance per process: s3fs keeps an event loop thread that does not survive a fork.
        self._fs = fsspec.filesystem("file" if self._is_local else "s3", **({} if self._is_local else _s3_options()))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def at(self, path: str) -> str:
        """Return the full URL of `path`."""
        return f"{self.url}/{path}" if path else self.url

    def child(self, path: str) -> "Storage":
        """Return the storage below `path`."""
        return Storage(self.at(path))

    def read_bytes(self, path: str) -> bytes:
        """Return the content of `path`.

        Raises:
            StorageError: if it is absent or cannot be read.
        """
        full = self._full(path)
        try:
            content: bytes = self._fs.cat_file(full)
        except FileNotFoundError:
            raise StorageError(f"{self.at(path)} does not exist") from None
        except Exception as error:
            raise _explain(error, "read", self.at(path)) from error
        return content

    def read_json(self, path: str) -> Any:
        """Return the JSON value in `path`."""
        try:
            return json.loads(self.read_bytes(path))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StorageError(f"{self.at(path)} is not JSON: {error}") from None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Make `path` hold `data`: whole, or unchanged when something fails."""
        full = self._full(path)
        try:
            if self._is_local:
                with _replacing(Path(full)) as temporary:
                    temporary.write_bytes(data)
            else:
                self._fs.pipe_file(full, data)
        except Exception as error:
            raise _explain(error, "write", self.at(path)) from error

    def write_json(self, path: str, value: Any) -> None:
        """Make `path` hold `value` as JSON with sorted keys: equal values are equal bytes."""
        self.write_bytes(path, json_bytes(value))

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file to `path`: whole, or unchanged when something fails."""
        full = self._full(path)
        try:
            if self._is_local:
                with _replacing(Path(full)) as temporary:
                    shutil.copyfile(local, temporary)
            else:
                self._fs.put_file(str(local), full)
        except Exception as error:
            raise _explain(error, "write", self.at(path)) from error

    def exists(self, path: str) -> bool:
        """Tell whether `path` is a file (not a folder)."""
        full = self._full(path)
        try:
            if not self._is_local:
                self._fs.invalidate_cache()
            return bool(self._fs.isfile(full))
        except Exception as error:
            raise _explain(error, "read", self.at(path)) from error

    def list(self, prefix: str = "") -> list[str]:
        """Return the paths of all files below `prefix`, sorted; empty if there are none."""
        base = self._full(prefix)
        try:
            if not self._is_local:
                self._fs.invalidate_cache()
            found = self._fs.find(base)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _explain(error, "list", self.at(prefix)) from error
        names = (os.path.relpath(name, self._root) if self._is_local else name[len(self._root) + 1 :] for name in found)
        # A bucket may hold an empty object in the place of a folder.
        return sorted(
            name for name in names if name and not name.endswith("/") and not Path(name).name.startswith(".tmp-")
        )

    def local(self, path: str, *, sha256: str | None = None, num_bytes: int | None = None) -> Path:
        """Return a local file with the content of `path`: itself, or a download that is kept in the cache.

        Args:
            path: What to fetch.
            sha256: Expected digest, checked when the file is downloaded.
            num_bytes: Expected size, checked always.

        Raises:
            StorageError: if it is absent, or its size or digest is another.
        """
        full = self._full(path)
        if self._is_local:
            if not Path(full).is_file():
                raise StorageError(f"{self.at(path)} does not exist")
            local = Path(full)
        else:
            name = hashlib.sha256(f"{self.at(path)}\n{sha256}".encode()).hexdigest()[:32]
            local = cache_folder() / "objects" / name / Path(path).name
            if not local.is_file() or sha256 is None:
                self._download(full, local, sha256)
        if num_bytes is not None and local.stat().st_size != num_bytes:
            raise StorageError(
                f"{self.at(path)} has {local.stat().st_size} bytes, its manifest says {num_bytes}: it is damaged"
            )
        return local

    def delete(self, prefix: str) -> None:
        """Remove the file or everything below `prefix`; nothing happens if it is absent."""
        full = self._full(prefix)
        try:
            if self._fs.exists(full):
                self._fs.rm(full, recursive=True)
        except Exception as error:
            raise _explain(error, "delete", self.at(prefix)) from error

    def check_writable(self) -> None:
        """Write and remove a probe file.

        Raises:
            StorageError: if that fails: better now than after an hour of training.
        """
        probe = f".tmp-probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"p2r")
        self.delete(probe)

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"storage paths are relative and stay below the URL, got {path!r}")
        return f"{self._root}/{path}" if path else self._root

    def _download(self, full: str, local: Path, sha256: str | None) -> None:
        try:
            with _replacing(local) as temporary:
                self._fs.get_file(full, str(temporary))
                if sha256 is not None and file_sha256(temporary) != sha256:
                    raise StorageError(f"s3://{full} does not have the sha256 that its manifest states: it is damaged")
        except FileNotFoundError:
            raise StorageError(f"s3://{full} does not exist") from None
        except StorageError:
            raise
        except Exception as error:
            raise _explain(error, "read", f"s3://{full}") from error


def json_bytes(value: Any) -> bytes:
    """Serialise `value` so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a temporary file beside `target`; rename it over `target` on success, remove it on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _s3_options() -> dict[str, Any]:
    # s3fs reads keys, region and AWS_ENDPOINT_URL from the environment; a listing must never be a stale one.
    return {"skip_instance_cache": True, "use_listings_cache": False}


def _explain(error: Exception, verb: str, url: str) -> StorageError:
    if isinstance(error, StorageError):
        return error
    hint = (
        "check the path and its permissions"
        if url.startswith("file://")
        else (
            "check the bucket, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION in the environment"
        )
    )
    return StorageError(f"cannot {verb} {url}: {type(error).__name__}: {error}; {hint}")
