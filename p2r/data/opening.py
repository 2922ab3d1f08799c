"""A path or URL of a scan -> a stream of its bytes, decompressed, and read no further than its header states.

Files are decompressed by isal, several times faster than by nibabel. The number of bytes after the voxels is bounded: some
writers pad their files, and a stream could be endless.
"""

import gzip
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from p2r.data.names import local_path, pair_of
from p2r.errors import RefusedScan, StorageError

_BLOCK_BYTES = 1 << 20
_MAX_EXCESS_BYTES = 1 << 20
_MAX_PADDING_BYTES = 16 << 20  # zeros after the voxels
_MAX_DEFLATE_RATIO = 1032  # the largest expansion of a gzip stream


def bucket_client() -> Any:
    """Return the client for `s3://` paths: one per process and set of keys, because creating one takes a third of a second."""
    return _create_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _create_client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    # The content of a bucket may change, so listings are not cached.
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


class Stream:
    """The content of an open file, decompressed on the fly.

    Args:
        file: File open at its start.
        path: Path of the file, for messages.
        limit: Largest possible size of its content, bytes.
        zipped: The underlying file, if `file` decompresses it.
    """

    def __init__(
        self,
        file: BufferedReader | igzip.GzipFile,
        path: str | Path,
        limit: int,
        *,
        zipped: BufferedReader | None = None,
    ) -> None:
        self._file: BufferedReader | igzip.GzipFile | gzip.GzipFile = file
        self._zipped = zipped
        self._path = path
        self._limit = limit
        self._position = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end of the file."""
        try:
            content = self._file.read(size)
        except gzip.BadGzipFile as error:
            self._reopen(error)
            content = self._file.read(size)
        self._position += len(content)
        return content

    def expect(self, size: int) -> None:
        """Refuse the file if it cannot have `size` bytes."""
        if size > self._limit:
            raise RefusedScan(
                "truncated",
                f"{self._path} has at most {self._limit} bytes, its header states {size}; copy it again",
            )

    def seek(self, position: int) -> None:
        """Skip to `position`."""
        while self._position < position:
            if not self.read(min(_BLOCK_BYTES, position - self._position)):
                self._refuse_truncated(position)

    def fill(self, target: NDArray[np.uint8]) -> None:
        """Fill `target` with the next bytes."""
        view, filled = target.data, 0
        while filled < target.size:
            try:
                count = self._file.readinto(view[filled : filled + _BLOCK_BYTES])
            except gzip.BadGzipFile as error:
                self._reopen(error)
                count = self._file.readinto(view[filled : filled + _BLOCK_BYTES])
            if not count:
                self._refuse_truncated(self._position + target.size - filled)
            filled += count
            self._position += count

    def finish(self) -> tuple[str, ...]:
        """Read the stream to its end, where the checksum of a gzip stream is.

        Returns:
            `trailing_bytes` if harmless bytes follow: zeros, up to a MiB of other bytes, or bytes after the gzip stream.
        """
        excess, is_padding = 0, True
        try:
            while block := self.read(_BLOCK_BYTES):
                excess += len(block)
                is_padding = is_padding and block.count(0) == len(block)
                if excess > (_MAX_PADDING_BYTES if is_padding else _MAX_EXCESS_BYTES):
                    raise RefusedScan(
                        "unreadable",
                        f"{self._path} continues after the voxels that its header states: the header or the data is wrong; correct the "
                        "header's dim, or write the file again",
                    )
        except gzip.BadGzipFile as error:
            if not _is_trailing_data(error):
                raise
            return ("trailing_bytes",)
        return ("trailing_bytes",) if excess else ()

    def _reopen(self, error: gzip.BadGzipFile) -> None:
        """Decompress with the standard library, which returns the data before trailing bytes; isal only raises the error."""
        if self._zipped is None or not _is_trailing_data(error):
            raise error
        zipped, self._zipped = self._zipped, None
        zipped.seek(0)
        self._file = gzip.GzipFile(fileobj=zipped)
        position, self._position = self._position, 0
        self.seek(position)

    def _refuse_truncated(self, promised: int) -> None:
        raise RefusedScan(
            "truncated", f"{self._path} has {self._position} bytes, its header states {promised}; copy it again"
        )


def _is_trailing_data(error: gzip.BadGzipFile) -> bool:
    """Return whether the error is about bytes after a gzip stream that do not form another one."""
    return str(error).startswith("Not a gzipped file")


@contextmanager
def opened(path: str | Path) -> Iterator[Stream]:
    """Open a file, or a temporary copy of a remote one, as a context manager.

    Raises:
        RefusedScan: `unreadable`, `not_fetched` or `truncated`; reading inside the context raises the same.
        StorageError: if a remote file exists but cannot be fetched.
    """
    with _fetch_file(path) as local:
        try:
            if "\0" in str(local) or not stat.S_ISREG((state := local.stat()).st_mode):
                # Opening a pipe would block until there is a writer, and reading a device may never end.
                raise RefusedScan(
                    "unreadable", f"cannot read {path}: it is not a file; give the path of a .nii, .nii.gz or .hdr file"
                )
            with local.open("rb") as file:
                is_zipped = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                if is_zipped:
                    with igzip.GzipFile(fileobj=file) as unzipped:
                        yield Stream(unzipped, path, state.st_size * _MAX_DEFLATE_RATIO, zipped=file)
                else:
                    yield Stream(file, path, state.st_size)
        except EOFError as error:
            raise RefusedScan("truncated", f"{path} ends in the middle of its gzip stream; copy it again") from error
        except (isal_zlib.IsalError, zlib.error, gzip.BadGzipFile) as error:  # type: ignore[misc]  # its stub says instance
            raise RefusedScan(
                "unreadable", f"{path} is damaged: its gzip stream does not decode ({error}); copy it again"
            ) from error
        except OSError as error:
            raise _refuse_unreadable(local, path, error) from error


def _refuse_unreadable(local: Path, path: str | Path, error: OSError) -> RefusedScan:
    """Return the refusal of a file that cannot be opened; for a link it names the target."""
    try:
        target = str(local.readlink()) if local.is_symlink() else ""
    except OSError:
        target = ""
    if isinstance(error, FileNotFoundError) and "annex/objects/" in target:
        return RefusedScan(
            "not_fetched",
            f"{path} is a link to {target}, whose content is not on this machine; fetch it: datalad get {path} (or git annex "
            "get), and run again",
        )
    if isinstance(error, FileNotFoundError) and target:
        return RefusedScan(
            "unreadable",
            f"cannot read {path}: it is a link to {target}, which does not exist; mount or restore the target",
        )
    if isinstance(error, FileNotFoundError) and (pair := pair_of(str(path))):
        return RefusedScan(
            "unreadable",
            f"cannot read {path}: no such file; a scan in two files needs both, {' and '.join(pair)}: restore it, or leave the other out",
        )
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return RefusedScan("unreadable", f"cannot read {path}: {reason}; check the path and its permissions")


@contextmanager
def _fetch_file(path: str | Path) -> Iterator[Path]:
    """Yield a local file with the content of `path`: the file itself, or a temporary copy, not decompressed."""
    if (local := local_path(path)) is not None:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="p2r-scan-") as folder:
        copy = Path(folder, "scan")
        with _remote_files(path) as files:
            files.get_file(str(path), str(copy))
        yield copy


def remote_version(url: str) -> str:
    """Return a text that differs if the content of a remote file differs, without reading it: its size and its ETag or time.

    It differs in each call if the server states neither.

    Raises:
        RefusedScan: `unreadable`: there is no such file.
        StorageError: if its server cannot be asked.
    """
    with _remote_files(url) as files:
        facts = {re.sub(r"[-_]", "", name).lower(): value for name, value in files.info(url).items()}
    stamps = (facts.get(name) for name in ("etag", "lastmodified", "mtime", "modify", "created"))
    return f"{facts.get('size')} {next((stamp for stamp in stamps if stamp), uuid4().hex)}"


@contextmanager
def _remote_files(url: str | Path) -> Iterator[Any]:
    """Yield fsspec's client for a remote file; errors inside the context become those of `opened`."""
    try:
        yield bucket_client() if str(url).startswith("s3://") else fsspec.url_to_fs(str(url))[0]
    except Exception as error:  # fsspec's file systems raise arbitrary exceptions
        # fsspec's client for http raises FileNotFoundError for every failed request.
        cause = error.__cause__ if str(url).startswith("http") else None
        if isinstance(error, FileNotFoundError) and isinstance(cause, FileNotFoundError | None):
            raise RefusedScan("unreadable", f"cannot read {url}: there is no such object") from error
        failure = cause or error
        # A network failure is not the scan's fault: a refusal would drop the scan from the corpus.
        raise StorageError(f"cannot read {url}: {type(failure).__name__}: {failure}; check network and keys") from error
