"""A corpus -> the list of its defects, found by reading every byte.

The manifest has the digests of the tars, the indexes, the ledger and the previous revision, so one flipped bit anywhere is
found. The checksums of the index locate damage in a tar: a chunk of a record, or bytes outside the chunks.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from isal.isal_zlib import crc32

from p2r.data.index import MAX_INDEX_BYTES, IndexRow, index_name, index_shard, parse_index
from p2r.data.ledger import AcceptedRow, LedgerRow, count_reasons, is_accepted, parse_ledger
from p2r.data.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    Shard,
    ledger_path,
    parse_manifest,
    revision_path,
    thumbnails_path,
)
from p2r.data.shards import count_records, local_ranges
from p2r.errors import DataError, StorageError
from p2r.storage import Storage, file_sha256, json_bytes

_MAX_SHOWN = 3


def verify_corpus(storage: Storage) -> list[str]:
    """Read every byte of a corpus and compare it with the manifest.

    Returns:
        The problems found, one line each; empty for an intact corpus.

    Raises:
        DataError: if there is no manifest to compare with.
    """
    found = storage.read_tagged("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    if found is None:
        raise DataError(f"no corpus at {storage.url}: it has no manifest.json; make one with a job of kind ingest")
    content, _ = found
    try:
        manifest = parse_manifest(content, name="manifest.json")
    except DataError as error:
        return [str(error)]
    problems = _problems_of_history(storage, content, manifest)
    if hashlib.sha256(json_bytes(manifest["preprocessing"])).hexdigest() != manifest.facts.preprocessing_sha256:
        problems.append("manifest.json: preprocessing_sha256 is not the digest of preprocessing")
    ledger, ledger_problems = _check_ledger(storage, manifest)
    by_shard: dict[str, Counter[str]] = {}
    for row in filter(is_accepted, ledger):
        by_shard.setdefault(row.shard, Counter())[_volume_name(row)] += row.num_samples
    for shard in manifest.shards:
        problems += _problems_of_shard(storage, shard, by_shard.pop(shard.name, Counter()) if ledger else None)
    problems += [f"ledger: it names the shard {name}, which the manifest lacks" for name in sorted(by_shard)]
    return problems + ledger_problems + _problems_of_thumbnails(storage, manifest)


def unreferenced_files(storage: Storage) -> list[str]:
    """List the files of an intact corpus that no revision uses: left by runs that lost a race or were stopped.

    Receipts and the report are not listed, although they do not belong to a revision.
    """
    known = {"manifest.json", "ledger.jsonl"}
    content = storage.read_bytes("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    while True:
        manifest = parse_manifest(content, name=storage.url)
        known |= {revision_path(hashlib.sha256(content).hexdigest()), ledger_path(manifest), thumbnails_path(manifest)}
        known |= {name for shard in manifest.shards for name in (shard.name, index_name(shard.name))}
        if manifest.facts.previous is None:
            break
        content = storage.read_bytes(revision_path(manifest.facts.previous), max_bytes=MAX_MANIFEST_BYTES)
    return [name for name in storage.list() if name not in known and not name.startswith(("receipts/", "report/"))]


def _problems_of_history(storage: Storage, content: bytes, manifest: Manifest) -> list[str]:
    """Check all revisions, from the current one back to the first."""
    path = revision_path(hashlib.sha256(content).hexdigest())
    copy = storage.read_tagged(path, max_bytes=MAX_MANIFEST_BYTES)
    if copy is None or copy[0] != content:
        state = "absent" if copy is None else "damaged"
        return [f"{path}: {state}, although manifest.json is this revision; or manifest.json itself is damaged"]
    problems: list[str] = []
    while (previous := manifest.facts.previous) is not None:
        path = revision_path(previous)
        found = storage.read_tagged(path, max_bytes=MAX_MANIFEST_BYTES)
        if found is None or hashlib.sha256(found[0]).hexdigest() != previous:
            return [*problems, f"{path}: {'absent' if found is None else 'damaged'}, a later revision names it"]
        try:
            older = parse_manifest(found[0], name=path)
        except DataError as error:
            return [*problems, str(error)]
        if manifest.shards[: len(older.shards)] != older.shards:
            problems.append(f"{path}: the next revision does not begin with its shards")
        if older.facts.revision != manifest.facts.revision - 1 or older.facts.salt != manifest.facts.salt:
            problems.append(f"{path}: its number or salt does not fit the next revision")
        problems += _problems_of_digest(storage, ledger_path(older), older.facts.ledger_sha256)
        problems += _problems_of_digest(storage, thumbnails_path(older), older.facts.thumbnails_sha256)
        manifest = older
    return problems


def _problems_of_digest(storage: Storage, path: str, sha256: str) -> list[str]:
    found = storage.read_tagged(path)
    if found is None:
        return [f"{path}: absent"]
    return (
        []
        if hashlib.sha256(found[0]).hexdigest() == sha256
        else [f"{path}: damaged, its SHA-256 differs from its name"]
    )


def _problems_of_thumbnails(storage: Storage, manifest: Manifest) -> list[str]:
    return _problems_of_digest(storage, thumbnails_path(manifest), manifest.facts.thumbnails_sha256)


def _check_ledger(storage: Storage, manifest: Manifest) -> tuple[list[LedgerRow], list[str]]:
    """Return the rows of the current ledger, and its problems."""
    path = ledger_path(manifest)
    problems = _problems_of_digest(storage, path, manifest.facts.ledger_sha256)
    if problems:
        return [], problems
    content = storage.read_bytes(path)
    current = storage.read_tagged("ledger.jsonl")
    if current is None or current[0] != content:
        state = "absent" if current is None else "not the ledger of the current revision"
        problems.append(f"ledger.jsonl: {state}; run the ingest job again to repair it")
    try:
        rows = parse_ledger(content, name=path)
    except DataError as error:
        return [], [*problems, str(error)]
    if count_reasons(rows) != manifest.facts.reasons:
        problems.append(
            f"{path}: counts by reason are {count_reasons(rows)}, the manifest has {manifest.facts.reasons}"
        )
    return rows, problems


def _volume_name(row: AcceptedRow) -> str:
    """Return the name of a scan's volume in its shard."""
    return row.key if row.record is None else f"{row.record}.{row.contrast}"


def _problems_of_shard(storage: Storage, entry: Shard, accepted: Counter[str] | None) -> list[str]:
    name = entry.name
    try:
        content = storage.read_bytes(index_name(name), max_bytes=MAX_INDEX_BYTES)
        rows = parse_index(content, name=index_name(name), sha256=entry.index_sha256, num_bytes=entry.num_bytes)
    except (StorageError, DataError) as error:
        return [_one_line(error)]
    problems = [
        f"{index_name(name)}: {field} is {count}, the manifest has {getattr(entry, field)}"
        for field, count in count_records(rows).items()
        if count != getattr(entry, field)
    ]
    found = {row.key if row.contrast is None else f"{row.key}.{row.contrast}": row.num_planes for row in rows}
    if accepted is not None and Counter(found) != accepted:
        problems.append(f"{name}: its records differ from the scans that the ledger lists for it")
    try:
        with _fetch_tar(storage, name) as tar:
            return problems + _problems_of_tar(tar, entry, rows)
    except (StorageError, DataError) as error:
        return [*problems, _one_line(error)]


def _problems_of_tar(tar: Path, entry: Shard, rows: list[IndexRow]) -> list[str]:
    name, num_bytes = entry.name, tar.stat().st_size
    if num_bytes != entry.num_bytes:
        return [f"{name}: it has {num_bytes} bytes, the manifest has {entry.num_bytes}"]
    is_intact = file_sha256(tar) == entry.sha256
    damaged = list(_damaged_chunks(tar, rows))
    if damaged:
        more = f" and {len(damaged) - _MAX_SHOWN} more" if len(damaged) > _MAX_SHOWN else ""
        where = ", ".join(damaged[:_MAX_SHOWN]) + more
        return [f"{name}: " + ("the index does not describe this tar: " if is_intact else "damaged: ") + where]
    if not is_intact:
        return [
            f"{name}: damaged, its SHA-256 differs from the manifest; voxels are intact, headers, texts or padding are not"
        ]
    try:
        described = index_shard(tar)
    except DataError as error:
        return [_one_line(error)]
    return [] if described == rows else [f"{name}: the index does not describe this tar"]


def _damaged_chunks(tar: Path, rows: list[IndexRow]) -> Iterator[str]:
    read = local_ranges(tar)
    for row in rows:
        for number, (start, stop) in enumerate(pairwise(row.chunk_offsets)):
            if crc32(read(start, stop)) != row.chunk_crc32[number]:
                yield f"chunk {number} of record {row.key}" + (f", contrast {row.contrast}" if row.contrast else "")


@contextmanager
def _fetch_tar(storage: Storage, name: str) -> Iterator[Path]:
    """Yield a local file with the content of `name`; a copy is deleted afterwards, as a whole corpus may not fit on this disk."""
    if storage.is_local:
        yield storage.local(name)
        return
    with tempfile.TemporaryDirectory(prefix="p2r-verify-") as folder:
        target = Path(folder, "shard.tar")
        storage.download(name, target)
        yield target


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
