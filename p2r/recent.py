"""Small documents of published artefacts that this machine has read, by digest and by URL.

    $P2R_CACHE/documents/<sha256>            content, checked whenever it is read
    $P2R_CACHE/documents/at-<sha256>         digest of the content that a URL had when it was last read

With a pin, the document of that digest needs no request. Without one, the storage is asked. If it cannot be reached, the last content
of the URL is used, with a warning. Documents of folders on this machine are not kept. The folder keeps the documents used last.
"""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from p2r.cache import cache_folder
from p2r.errors import DamagedError, StorageError
from p2r.files import mark_used, open_regular, replacing
from p2r.storage import Storage

_MAX_FILES = 2000
_MAX_FOLDER_BYTES = 2**30
_DEADLINE_S = 5.0
"""Time limit of a request whose answer is at hand from before."""
_LOG = logging.getLogger(__name__)


def find(sha256: str) -> bytes | None:
    """Return the document of a digest; None if this machine does not have it."""
    path = _folder() / sha256
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != sha256:
        with suppress(OSError):
            path.unlink()
        return None
    mark_used(path)
    return content


def read_current(storage: Storage, path: str, *, max_bytes: int) -> bytes | None:
    """Return the present content of a small file, or, with a warning, the last known one if the storage cannot be reached.

    Returns:
        At most `max_bytes` + 1 bytes; None if the file is absent.

    Raises:
        StorageError: It cannot be read, and this machine never read it.
    """
    if storage.is_local:
        return read_bounded(storage, path, max_bytes)
    url = storage.at(path)
    before = _last_content(url)
    hurried = storage if before is None else storage.with_deadline(_DEADLINE_S)
    try:
        content = read_bounded(hurried, path, max_bytes)
    except DamagedError:
        raise
    except StorageError as error:
        if before is None:
            raise
        _LOG.warning("%s; using the content that %s had when it was last read", error, url)
        return before
    if content is not None and len(content) <= max_bytes:
        keep(content, url=url)
    return content


def read_bounded(storage: Storage, path: str, max_bytes: int) -> bytes | None:
    """Return at most `max_bytes` + 1 bytes of a file; None if it is absent."""
    facts = storage.facts(path)
    if facts is None:
        return None
    if facts.num_bytes > max_bytes:
        return storage.read_range(path, 0, max_bytes + 1)  # too long, which the caller sees
    # Whole, in one read: a document may be replaced by a longer one since its size was asked.
    found = storage.read_tagged(path, max_bytes=max_bytes)
    return None if found is None else found[0]


def keep(content: bytes, *, url: str) -> None:
    """Keep a document, and note it as the last content of a URL. A folder that cannot be written is left as it is."""
    sha256 = hashlib.sha256(content).hexdigest()
    with suppress(OSError):
        for path, data in ((_folder() / sha256, content), (_note_of(url), sha256.encode())):
            if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
                mark_used(path)
                continue
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        _evict()


def _last_content(url: str) -> bytes | None:
    try:
        sha256 = _note_of(url).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    is_digest = len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
    return find(sha256) if is_digest else None


def _note_of(url: str) -> Path:
    return _folder() / f"at-{hashlib.sha256(url.encode()).hexdigest()}"


def _folder() -> Path:
    return cache_folder() / "documents"


def _evict() -> None:
    """Remove the documents used least recently if there are too many."""
    with os.scandir(_folder()) as entries:
        found = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in entries)
    num_files, num_bytes = len(found), sum(size for _, size, _ in found)
    for _, size, path in found:
        if num_files <= _MAX_FILES and num_bytes <= _MAX_FOLDER_BYTES:
            return
        Path(path).unlink(missing_ok=True)
        num_files, num_bytes = num_files - 1, num_bytes - size
