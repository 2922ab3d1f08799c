"""A path or URL of a scan -> its bytes, gunzipped in a stream and followed no further than its header promises.

Files are gunzipped by isal, several times faster than nibabel's own way. Bytes that may follow the voxels are bounded: some
writers pad their files, and a stream could be endless.
"""

import gzip
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from p2r.data.names import local_path
from p2r.errors import RefusedScan, StorageError

_BLOCK_BYTES = 1 << 20
_MAX_EXCESS_BYTES = 1 << 20
_MAX_PADDING_BYTES = 16 << 20  # zeros behind the voxels
_MAX_DEFLATE_RATIO = 1032  # no gzip stream grows more


def bucket_client() -> Any:
    """Return the client for `s3://` paths: one for each process and set of keys, since making one takes a third of a second."""
    return _client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    # What lies in a bucket may change: no listing is kept.
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


class Stream:
    """The content of one open file, gunzipped as it is read.

    Args:
        file: Open at its start.
        path: Its name, for messages.
        limit: Most bytes that its content can have.
        zipped: The file below, if `file` gunzips it.
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
        """Return the next `size` bytes; fewer at the end."""
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
                f"{self._path} has room for {self._limit} bytes, its header promises {size}; copy it again",
            )

    def seek(self, position: int) -> None:
        """Pass over everything before `position`."""
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
        """Follow the stream to its end, where a gzip stream's checksum is.

        Returns:
            `trailing_bytes` if something harmless follows: zeros, up to a MiB of anything, or bytes behind the gzip stream.
        """
        excess, is_padding = 0, True
        try:
            while block := self.read(_BLOCK_BYTES):
                excess += len(block)
                is_padding = is_padding and block.count(0) == len(block)
                if excess > (_MAX_PADDING_BYTES if is_padding else _MAX_EXCESS_BYTES):
                    raise RefusedScan(
                        "unreadable",
                        f"{self._path} continues after the voxels that its header promises: one of both is wrong; correct the "
                        "header's dim, or write the file again",
                    )
        except gzip.BadGzipFile as error:
            if not _is_about_what_follows(error):
                raise
            return ("trailing_bytes",)
        return ("trailing_bytes",) if excess else ()

    def _reopen(self, error: gzip.BadGzipFile) -> None:
        """Gunzip by the standard library, which gives what comes before bytes that are not gzip; isal gives only the error."""
        if self._zipped is None or not _is_about_what_follows(error):
            raise error
        zipped, self._zipped = self._zipped, None
        zipped.seek(0)
        self._file = gzip.GzipFile(fileobj=zipped)
        position, self._position = self._position, 0
        self.seek(position)

    def _refuse_truncated(self, promised: int) -> None:
        raise RefusedScan(
            "truncated", f"{self._path} has {self._position} bytes, its header promises {promised}; copy it again"
        )


def _is_about_what_follows(error: gzip.BadGzipFile) -> bool:
    """Tell whether bytes behind a gzip stream are no further one."""
    return str(error).startswith("Not a gzipped file")


@contextmanager
def opened(path: str | Path) -> Iterator[Stream]:
    """Open a file, or a temporary copy of a remote one, for as long as the context is.

    Raises:
        RefusedScan: `unreadable`, `not_fetched` or `truncated`, also for what is read while the context is open.
        StorageError: if a remote file cannot be fetched, for another reason than that there is none.
    """
    with _fetched(path) as local:
        try:
            if "\0" in str(local) or not stat.S_ISREG((state := local.stat()).st_mode):
                # Opening a pipe would wait for its writer, and a device might never end.
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
            raise _unreadable(local, path, error) from error


def _unreadable(local: Path, path: str | Path, error: OSError) -> RefusedScan:
    """Return the refusal of a file that cannot be opened; of a link it names the target."""
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
            "unreadable", f"cannot read {path}: it is a link to {target}, which does not exist; mount or restore that"
        )
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return RefusedScan("unreadable", f"cannot read {path}: {reason}; check the path, and who may read it")


@contextmanager
def _fetched(path: str | Path) -> Iterator[Path]:
    """Give a local file with the content of `path`: itself, or a temporary copy, still zipped if it was."""
    if (local := local_path(path)) is not None:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="p2r-scan-") as folder:
        copy = Path(folder, "scan")
        try:
            files = bucket_client() if str(path).startswith("s3://") else fsspec.url_to_fs(str(path))[0]
            files.get_file(str(path), str(copy))
        except FileNotFoundError as error:
            raise RefusedScan("unreadable", f"cannot read {path}: there is no such object") from error
        except Exception as error:  # fsspec's file systems raise what they like
            # A network that fails says nothing about the scan: it must not vanish from the corpus for that.
            raise StorageError(
                f"cannot read {path}: {type(error).__name__}: {error}; check network and keys"
            ) from error
        yield copy
