"""`p2r gc`: removal of published versions that nothing names, and of files that interrupted publishers left.

    plan      every version: kept, with the reason, or to be removed; nothing is written
    mark      manifest.json -> a document that takes the version out of use and holds the manifest (compare-and-swap)
    look      read all pointers and manifests again; a version that is named by now gets its manifest back
    sweep     delete the files, and the document last

Models are kept, because reports name them. So are backbones that a pointer names, or another artefact as parent or origin, and the newest
version of a name. Artefacts younger than the given age, and those that cannot be read, are kept, too. A publisher that meets the document
is refused, so it cannot commit beside a removal. A promotion that meets it moves its pointer back. A removal that was killed is completed
by the next one, an hour later: until then it may be at work.
"""

import contextlib
import hashlib
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from p2r.artefact import MANIFEST, MAX_MANIFEST_BYTES, REMOVED, open_artefact
from p2r.artefact_manifest import ModelManifest, is_file_name
from p2r.documents import read_json
from p2r.errors import DamagedError, StorageError
from p2r.files import is_temporary
from p2r.published.collection import Collection, Version, enclosing_storage, parents_named, read_collections
from p2r.reference import Reference
from p2r.storage import Storage, json_bytes

_DAY_S = 86_400.0
_ABANDONED_S = 3_600.0
"""Age at which the mark of another removal is taken over."""
_MAX_MARK_BYTES = 2 * MAX_MANIFEST_BYTES


@dataclass(frozen=True)
class Item:
    """One version, or the leftovers in one, and the decision."""

    version: Version
    reason: str
    is_removed: bool
    is_whole: bool = True
    """False if only leftovers in the version are meant."""
    files: tuple[str, ...] = ()
    """Files to remove."""
    num_bytes: int = 0

    def line(self) -> str:
        """Return the decision as one line for people."""
        verb = "remove" if self.is_removed else "keep"
        files = f"  {len(self.files)} files, {self.num_bytes / 2**20:.1f} MiB" if self.is_removed else ""
        return f"{verb:7} {self.version.storage.url}  {self.reason}{files}"


def plan_removal(url: str, *, min_age_days: float, now_s: float | None = None) -> list[Item]:
    """Decide on every version below a URL, without writing anything.

    Args:
        url: A job's storage, or the folder of a name.
        min_age_days: Age below which nothing is removed.
        now_s: Present time by the storage's clock; None: by this machine's.

    Raises:
        InputError: The URL cannot be read, or is one version.
    """
    now_s = time.time() if now_s is None else now_s
    collections = read_collections(url)
    parents = _parents_named(url, collections)
    return [item for one in collections for item in _decide(one, parents, now_s=now_s, min_age_s=min_age_days * _DAY_S)]


def _parents_named(url: str, collections: Sequence[Collection]) -> dict[str, str]:
    """Return what `parents_named` does, also of artefacts elsewhere in the job's storage that holds the URL."""
    storage = enclosing_storage(url)
    return parents_named(collections if storage is None else [*read_collections(storage), *collections])


def _decide(collection: Collection, parents: dict[str, str], *, now_s: float, min_age_s: float) -> Iterator[Item]:
    # A storage's clock may count seconds only: of versions written in one second, none is known to be older.
    newest_s = max((one.modified_s for one in collection.versions if one.artefact is not None), default=math.inf)
    young_s = now_s - min_age_s
    for version in collection.versions:
        if version.removed is not None:
            if version.modified_s > now_s - _ABANDONED_S:
                yield Item(version, f"another removal is at work on it since {version.removed}", is_removed=False)
            else:
                yield _removal(
                    version, version.files, f"put out of use on {version.removed} by a removal that did not end"
                )
            continue
        reason = _reason_to_keep(collection, version, parents, newest_s=newest_s, young_s=young_s)
        if reason is None:
            cause = "nothing names it" if version.artefact is not None else "it was never completed"
            yield _removal(version, version.files, f"{cause}; written {version.published}")
            continue
        yield Item(version, reason, is_removed=False)
        if leftovers := tuple(_leftovers(version, young_s)):
            yield _removal(version, leftovers, "leftovers of interrupted publishers", is_whole=False)


def _removal(version: Version, files: Sequence[str], reason: str, *, is_whole: bool = True) -> Item:
    sizes = [facts.num_bytes for file in files if (facts := version.storage.facts(file))]
    files = tuple(file for file in files if file != MANIFEST)
    return Item(version, reason, is_removed=True, is_whole=is_whole, files=files, num_bytes=sum(sizes))


def _reason_to_keep(
    collection: Collection, version: Version, parents: dict[str, str], *, newest_s: float, young_s: float
) -> str | None:
    if collection.damaged_pointers:
        return f"pointer {', '.join(collection.damaged_pointers)} is damaged and may name it"
    if named := collection.pointers_to(version):
        return ", ".join(f"@{name}" for name in named)
    if version.artefact is None and version.problem is not None and MANIFEST in version.files:
        return f"its manifest cannot be read: {version.problem}"
    if version.artefact is not None and isinstance(version.artefact.manifest, ModelManifest):
        return "model"
    if version.artefact is not None and version.artefact.sha256 in parents:
        return f"parent of {parents[version.artefact.sha256]}"
    if version.artefact is not None and version.modified_s >= newest_s:
        return "newest version"
    if version.modified_s > young_s:
        return f"young: written {version.published}"
    return None


def _leftovers(version: Version, young_s: float) -> Iterator[str]:
    """Yield old files of publishers in the folder of a version in use that its manifest does not name."""
    if version.artefact is None:
        return
    named = {entry.name for entry in version.artefact.manifest.files.entries().values()}
    for file in version.files:
        if (is_file_name(file) and file not in named) or is_temporary(file):
            facts = version.storage.facts(file)
            if facts is not None and facts.modified_s <= young_s:
                yield file


def remove(url: str, *, min_age_days: float) -> list[Item]:
    """Carry out the decisions of `plan_removal`, and return them as they were carried out.

    Raises:
        InputError: As `plan_removal`.
        StorageError: Something cannot be written or deleted; running it again continues. Or the storage ignores conditions.
    """
    storage = Storage(url)
    storage.check_conditional()
    items = plan_removal(url, min_age_days=min_age_days, now_s=_clock_of(storage))
    whole = [item for item in items if item.is_removed and item.is_whole]
    marked = {item.version.storage.url for item in whole if _mark(item.version)}
    named = _named_now(url) if marked else {}
    done: list[Item] = []
    for item in items:
        where = item.version.storage
        if not item.is_removed:
            done.append(item)
        elif not item.is_whole:
            _delete_files(where, item.files)
            done.append(item)
        elif where.url not in marked:
            done.append(_kept(item, "it was changed meanwhile"))
        elif where.url in named:
            done.append(_kept(item, f"{named[where.url]} names it{_restore(where)}"))
        else:
            _delete_files(where, [file for file in where.list(with_temporary=True) if file != MANIFEST])
            where.delete(MANIFEST)
            done.append(item)
    return done


def _kept(item: Item, reason: str) -> Item:
    return Item(item.version, reason, is_removed=False)


def _mark(version: Version) -> bool:
    """Take a version out of use, unless its manifest was changed since it was read; return whether it is out of use."""
    storage = version.storage
    if version.removed is not None:
        return True  # by an earlier removal that did not end
    found = storage.read_tagged(MANIFEST, max_bytes=_MAX_MARK_BYTES)
    expected = None if version.artefact is None else version.artefact.sha256
    if (None if found is None else hashlib.sha256(found[0]).hexdigest()) != expected:
        return False
    mark = {
        "format": REMOVED,
        "manifest": None if found is None else found[0].decode(),
        "removed": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    return storage.replace(MANIFEST, json_bytes(mark), tag=None if found is None else found[1])


def _named_now(url: str) -> dict[str, str]:
    """Return the URLs of all versions out of use that something names, with the name."""
    collections = read_collections(url)
    parents = _parents_named(url, collections)
    named: dict[str, str] = {}
    for collection in collections:
        for version in collection.versions:
            if version.removed is None:
                continue
            pointers = [*collection.pointers_to(version), *collection.damaged_pointers]
            _, content, _ = _read_mark(version.storage)
            sha256 = None if content is None else hashlib.sha256(content).hexdigest()
            if pointers:
                named[version.storage.url] = f"@{pointers[0]}"
            elif sha256 in parents:
                named[version.storage.url] = parents[sha256]
    return named


def _read_mark(storage: Storage) -> tuple[bool, bytes | None, str]:
    """Return whether a version is out of use, the manifest that it had (None: it had none), and the tag of the document."""
    found = storage.read_tagged(MANIFEST, max_bytes=_MAX_MARK_BYTES)
    if found is None:
        return False, None, ""
    value = read_json(found[0], where=storage.at(MANIFEST), max_bytes=_MAX_MARK_BYTES, error=DamagedError)
    if not isinstance(value, dict) or value.get("format") != REMOVED:
        return False, None, found[1]
    content = value.get("manifest")
    return True, content.encode() if isinstance(content, str) else None, found[1]


def _restore(storage: Storage) -> str:
    """Put a version into use again, and return a remark on it."""
    is_removed, content, tag = _read_mark(storage)
    if not is_removed:
        return ""  # restored by another removal
    if content is None:
        storage.delete(MANIFEST)  # it was never published
        return "; it was never published"
    if not storage.replace(MANIFEST, content, tag=tag):
        raise StorageError(f"{storage.at(MANIFEST)} was changed while it was restored: run the command again")
    problems = open_artefact(Reference(storage.url), is_fresh=True).problems()
    return "; it is in use again" + (f", but DAMAGED: {'; '.join(problems)}" if problems else "")


def _delete_files(storage: Storage, files: Sequence[str]) -> None:
    for file in files:
        storage.delete(file)


def _clock_of(storage: Storage) -> float:
    """Return the present time by the clock of a storage, which dates its files."""
    probe = f".tmp-probe-{uuid.uuid4().hex}"
    storage.write_bytes(probe, b"p2r")
    facts = storage.facts(probe)
    with contextlib.suppress(StorageError):
        storage.delete(probe)
    return time.time() if facts is None else facts.modified_s
