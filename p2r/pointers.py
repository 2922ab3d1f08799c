"""Pointers: names such as `stable` that move from one published version to another.

    <name>/<version>/manifest.json    versions, each written once
    <name>/@stable.json               pointer: version, digest of its manifest, and the moves that led there

`resolve` turns `NAME@stable` into `NAME/VERSION@sha256:HEX`; everything else takes this pin, so a pointer is followed once. `move` is
a compare-and-swap: of several writers exactly one succeeds, and the others see its document. A pointer is not signed. The signature of
the version that it names is still checked.
"""

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter

from p2r import recent
from p2r.documents import Sha256, checked, read_json, way_out
from p2r.errors import DamagedError, InputError, StorageError
from p2r.reference import POINTER, Reference
from p2r.storage import Storage, json_bytes
from p2r.version import code_version

FORMAT = "p2r-pointer/1"
MAX_BYTES = 2**18
"""Largest document of a pointer."""
MAX_HISTORY = 50
"""Number of earlier moves that are kept."""
_MAX_DEPTH = 8
_SUFFIX = ".json"
_WAY_OUT = "restore the file, or delete it and run `p2r promote` again"

Text = Annotated[str, Field(max_length=2000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Move(_Strict):
    """One move of a pointer."""

    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    """Folder of the version, beside the pointer."""
    sha256: Sha256
    """Digest of the version's manifest."""
    moved: Annotated[str, Field(max_length=40)]
    """Time of the move, ISO 8601 in UTC."""
    code: Annotated[str, Field(max_length=100)] = ""
    """Commit of the program that moved it."""
    checks: Annotated[list[Text], Field(max_length=100), FailFast()] = []
    """Outcome of every check of the version."""
    forced: Text | None = None
    """Reason given for moving the pointer although a check failed; None: no check failed."""


class Pointer(_Strict):
    """Document of a pointer."""

    format: Annotated[str, Field(pattern=rf"^{FORMAT}$")] = FORMAT
    name: Text
    """Name of the folder that holds the versions."""
    pointer: Annotated[str, Field(pattern=rf"^{POINTER}$")]
    target: Move
    history: Annotated[list[Move], Field(max_length=MAX_HISTORY), FailFast()] = []
    """Earlier moves, newest first."""


_POINTER = TypeAdapter(Pointer)


def file_of(pointer: str) -> str:
    """Return the name of a pointer's document in the folder of the versions.

    Raises:
        InputError: The name is not one of a pointer.
    """
    if not re.fullmatch(POINTER, pointer):
        raise InputError(
            f"{pointer[:100]!r} is not the name of a pointer: use a word of lower-case letters, digits and hyphens, such as stable"
        )
    return f"@{pointer}{_SUFFIX}"


def pointer_in(file: str) -> str | None:
    """Return the pointer whose document has this file name; None if it is another file."""
    match = re.fullmatch(rf"@({POINTER}){re.escape(_SUFFIX)}", file)
    return match[1] if match else None


def read_pointer(versions: Storage, pointer: str) -> tuple[Pointer, str] | None:
    """Return a pointer and the tag of its document, for `move`; None if there is none.

    Args:
        versions: Folder that holds the versions.
        pointer: Name of the pointer.

    Raises:
        DamagedError: The document breaks a rule, or is of another name or pointer.
        StorageError: It cannot be read.
    """
    path = file_of(pointer)
    found = versions.read_tagged(path, max_bytes=MAX_BYTES)
    if found is None:
        return None
    return _parse(found[0], versions, pointer), found[1]


def _parse(content: bytes, versions: Storage, pointer: str) -> Pointer:
    where = versions.at(file_of(pointer))
    with way_out(_WAY_OUT):
        value = read_json(content, where=where, max_bytes=MAX_BYTES, max_depth=_MAX_DEPTH, error=DamagedError)
        document = checked(_POINTER, value, where=f"{where} is not a pointer:", error=DamagedError)
    named, own = (document.name, document.pointer), (name_of(versions), pointer)
    if named != own:
        raise DamagedError(f"{where} was written as {named[0]}@{named[1]}, not {own[0]}@{own[1]}: {_WAY_OUT}")
    return document


def name_of(versions: Storage) -> str:
    """Return the name of a folder of versions."""
    return versions.url.rpartition("/")[2]


def resolve(reference: Reference, *, is_fresh: bool = False) -> Reference:
    """Return the pin of the version that a reference's pointer names; a reference without a pointer is returned as it is.

    If the storage cannot be reached, the version that the pointer named when this machine last read it is used, with a warning.

    Args:
        reference: The reference.
        is_fresh: Read the pointer from the storage only, and raise if it cannot be reached.

    Raises:
        StorageError: The pointer is absent or damaged, cannot be read, or names another version than the reference's pin.
    """
    if reference.pointer is None:
        return reference
    versions = Storage(reference.url)
    read = recent.read_bounded if is_fresh else recent.read_current
    content = read(versions, file_of(reference.pointer), max_bytes=MAX_BYTES)
    if content is None:
        raise StorageError(_absent_message(reference, versions))
    target = _parse(content, versions, reference.pointer).target
    if reference.sha256 not in (None, target.sha256):
        raise DamagedError(
            f"{reference}: the pointer names {versions.at(target.version)}@sha256:{target.sha256}; leave the pointer or the pin out"
        )
    return Reference(versions.at(target.version), target.sha256)


def _absent_message(reference: Reference, versions: Storage) -> str:
    names = [pointer for file in versions.list() if "/" not in file and (pointer := pointer_in(file))]
    found = f"it has {', '.join(names)}" if names else "it has none"
    return (
        f"{versions.url} has no pointer {reference.pointer}: {found}; `p2r promote {versions.url}/VERSION --to {reference.pointer}` "
        "makes it. A folder whose name ends in it is given with a slash at its end"
    )


def move(
    versions: Storage,
    pointer: str,
    *,
    version: str,
    sha256: str,
    checks: list[str],
    forced: str | None,
    since: tuple[Pointer, str] | None,
) -> Pointer | None:
    """Move a pointer that is unchanged since it was read, and return its document; None if another writer moved it.

    Args:
        versions: Folder that holds the versions.
        pointer: Name of the pointer.
        version: Folder of the new version.
        sha256: Digest of its manifest.
        checks: Outcome of every check.
        forced: Reason for moving although a check failed.
        since: Result of `read_pointer` on which the decision is based.
    """
    before = None if since is None else since[0]
    target = Move(
        version=version,
        sha256=sha256,
        moved=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        code=code_version(),
        checks=checks,
        forced=forced,
    )
    history = [] if before is None else [before.target, *before.history][:MAX_HISTORY]
    document = Pointer(name=name_of(versions), pointer=pointer, target=target, history=history)
    content = json_bytes(document.model_dump(mode="json"))
    is_moved = versions.replace(file_of(pointer), content, tag=None if since is None else since[1])
    return document if is_moved else None
