"""Local files: atomic writes, tables for spreadsheets, and locks that end with the process that holds them.

Locks are `flock`s. The kernel releases them when their process ends, however it ends, so nothing needs cleaning up after a
`kill -9`. They bind the processes of one machine; on NFS with locks enabled, all machines that mount it.
"""

import csv
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from p2r.console import visible
from p2r.errors import StorageError

_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|basic_ios::clear: iostream error|PytorchStreamWriter failed"
)
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TEMPORARY = re.compile(r"\.tmp-[a-z0-9_]{8}")
_FORMULA = re.compile(r"(?:^|(?<=[,;|\"]))(?=\s*[=+\-@\uff0b\uff0d\uff1d\uff20])")
"""Places where a spreadsheet could begin a formula: at the start of a cell, or after any character that it may take for a separator."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read it. A pipe would make its reader wait for a writer, and a device may have no end.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        yield file


def expanded(path: Path) -> Path:
    """Return a path with the home folder in place of `~` or `~USER`.

    Raises:
        StorageError: There is no such home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise StorageError(f"{str(path)!r}: there is no home folder for its ~; write the whole path") from None


def mark_used(file: Path | int) -> None:
    """Set the times of a file or open handle to now, if that is possible.

    The times of another user's file, or on a read-only file system, stay. The file may have been evicted by another process.
    """
    # The file system would use its last clock tick, milliseconds ago, which cannot order uses that follow one another closely.
    with suppress(OSError):
        os.utime(file, ns=(time.time_ns(),) * 2)


@contextmanager
def translate_os_errors(verb: str, where: str) -> Iterator[None]:
    """Raise an `OSError` of the block as a `StorageError`: `cannot VERB WHERE`, the cause, and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {verb} {where}: {type(error).__name__}: {error}; check the path, its permissions and the free space"
        ) from error


def lack_of_space(error: BaseException) -> StorageError | None:
    """Return an error for a full disk if that is the cause of `error`, at any depth of its chain; None otherwise.

    torch and Ray processes pass on only the system's message.
    """
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    full = [
        one
        for one in links
        if (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)) or _DISK_FULL.search(str(one))
    ]
    if not full:
        return None
    temporary = Path(tempfile.gettempdir())
    places = [str(one.filename) for one in full if isinstance(one, OSError) and one.filename]
    what = f" at {places[0]}" if places else ""
    free_mib = shutil.disk_usage(temporary).free / 2**20
    return StorageError(
        f"a disk is full{what}: {str(full[-1]).strip().splitlines()[-1]}. Temporary files are in {temporary} ({free_mib:.0f} MiB are "
        "free now). Make room there and in the storage, or set TMPDIR to a larger folder; then run the same command again"
    )


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside `target`; rename it to `target` on success, remove it on failure."""
    with temporary_beside(target) as temporary:
        yield temporary
        temporary.replace(target)


def is_temporary(name: str) -> bool:
    """Return whether a file has the name of a `temporary_beside`, which a killed writer leaves."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `target`, which is created; remove it afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
    os.fchmod(handle, 0o644)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    """Write a table as `csv_bytes`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(csv_bytes(columns, rows))


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> bytes:
    """Return a table that a spreadsheet opens without executing any of its text.

    Names come from strangers. In text, control characters become `?`, and an apostrophe precedes each `=`, `+`, `-` or `@`
    that could begin a formula. Numbers are written as they are.

    Source: OWASP, CSV Injection.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([_neutralise(column) for column in columns])
    writer.writerows([_neutralise(value) if isinstance(value, str) else value for value in row] for row in rows)
    return table.getvalue().encode()


def _neutralise(text: str) -> str:
    return _FORMULA.sub("'", visible(text))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` on this machine, waiting if necessary. The lock file is removed afterwards."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not is_file_at(path, handle):
                continue  # the previous holder removed this file; a new file, if any, is the lock now
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def is_file_at(path: Path, handle: int) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def link_if_absent(temporary: Path, target: Path) -> bool:
    """Rename a complete file to `target` if that name is free; return whether it was."""
    try:
        target.hardlink_to(temporary)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    with locked(lock_path(target)):
        is_free = not target.exists()
        if is_free:
            temporary.replace(target)
        return is_free


def lock_path(target: Path) -> Path:
    """Return the file that is locked while `target` is replaced."""
    return target.with_name(f".tmp-lock-{target.name}")
