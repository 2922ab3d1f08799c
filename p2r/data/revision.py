"""A corpus and its additions -> the next revision, published by compare-and-swap.

    ledgers/<sha256>.jsonl, thumbnails/<sha256>.jsonl, manifests/<sha256>.json      immutable, written first
    manifest.json                                                                   replaced if it is still the base revision
    ledger.jsonl                                                                    a copy of the current ledger

A run that loses the race starts again from the winner's revision. Nothing that another run relies on is overwritten.
New shards are appended to the shards of the previous revision, so sample positions do not change. All revisions use the
salt of the first one, so digests of subjects stay comparable.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from p2r.config import IngestConfig
from p2r.data.growth import preprocessing_of
from p2r.data.ledger import AcceptedRow, LedgerRow, count_reasons, is_accepted, ledger_bytes, read_ledger
from p2r.data.manifest import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    Manifest,
    Shard,
    ledger_path,
    load_manifest,
    make_manifest,
    manifest_bytes,
    parse_manifest,
    revision_path,
    subject_digest,
    thumbnails_path,
    voxel_digest,
)
from p2r.data.pseudonyms import Names
from p2r.data.thumbnails import MAX_BYTES, MOST, Thumbnails, from_bytes, lowest_lots, to_bytes
from p2r.errors import DataError, StorageError
from p2r.storage import Storage, json_bytes
from p2r.version import __version__, code_version

_MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class Revision:
    """A corpus at one moment; empty if there is no corpus yet."""

    manifest: Manifest | None = None
    tag: str | None = None
    """Version of `manifest.json`, for `Storage.replace`."""
    sha256: str | None = None
    rows: tuple[LedgerRow, ...] = ()
    thumbnails: Thumbnails = field(default_factory=dict)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Manifest entries of its shards."""
        return () if self.manifest is None else self.manifest.shards


def current_revision(storage: Storage) -> Revision:
    """Read the current revision at `storage`.

    Raises:
        DataError: if it is damaged, or of another version.
    """
    found = storage.read_tagged("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    if found is None:
        return Revision()
    content, tag = found
    manifest = parse_manifest(content, name=storage.at("manifest.json"))
    return Revision(
        manifest=manifest,
        tag=tag,
        sha256=hashlib.sha256(content).hexdigest(),
        rows=tuple(read_ledger(storage, manifest)),
        thumbnails=read_thumbnails(storage, manifest),
    )


def read_thumbnails(storage: Storage, manifest: Manifest) -> Thumbnails:
    """Read the thumbnails of a revision.

    Raises:
        DataError: if they are absent, or their digest differs from the one in the manifest.
    """
    path = thumbnails_path(manifest)
    found = storage.read_tagged(path, max_bytes=MAX_BYTES)
    if found is None or hashlib.sha256(found[0]).hexdigest() != manifest.facts.thumbnails_sha256:
        raise DataError(f"{storage.at(path)} is {'absent' if found is None else 'damaged'}; restore the file")
    return from_bytes(found[0])


def next_manifest(
    base: Revision,
    config: IngestConfig,
    names: Names,
    *,
    asked: str,
    entries: Sequence[Shard],
    ledger: Sequence[LedgerRow],
    thumbnails: Thumbnails,
) -> Manifest:
    """Assemble the manifest of the next revision.

    Args:
        base: The revision to grow.
        config: The job's ingest section.
        names: Names as the corpus publishes them.
        asked: Digest of the job's request.
        entries: Manifest entries of the new shards.
        ledger: Complete ledger of the next revision.
        thumbnails: All thumbnails of the next revision.
    """
    before = _Inherited() if base.manifest is None else _Inherited.of(base.manifest)
    shards = [*base.shards, *entries]
    salt = before.salt or hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
    accepted = [row for row in ledger if is_accepted(row)]
    subjects, voxels = {row.subject for row in accepted}, {row.voxels_sha256 for row in accepted}
    preprocessing = preprocessing_of(config)
    provenance = [text for text in (before.provenance, config.provenance) if text]
    values = {
        "format": FORMAT,
        "revision": before.revision + 1,
        "previous": base.sha256,
        "licence": config.licence,
        "provenance": "\n".join(dict.fromkeys(line for text in provenance for line in text.split("\n"))),
        "cohort": config.cohort,
        "source": list(dict.fromkeys([*before.source, *map(names.source, config.sources)])),
        "asked": list(dict.fromkeys([*before.asked, asked])),
        "preprocessing": preprocessing,
        "preprocessing_sha256": hashlib.sha256(json_bytes(preprocessing)).hexdigest(),
        "deidentification": deidentification_of(names),
        **{
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("num_samples", "num_records", "num_volumes", "num_bytes")
        },
        "num_subjects": len(subjects),
        "num_cross_subject_copies": sum(row.copy_of is not None for row in accepted),
        **_count_contrasts(accepted, config),
        "reasons": count_reasons(ledger),
        "summary": _summarise(accepted),
        "shards": [shard._asdict() for shard in shards],
        "ledger_sha256": hashlib.sha256(ledger_bytes(ledger)).hexdigest(),
        "thumbnails_sha256": hashlib.sha256(to_bytes(thumbnails)).hexdigest(),
        "salt": salt,
        "subject_digests": sorted(subject_digest(salt, config.cohort, subject) for subject in subjects),
        "voxel_digests": sorted(voxel_digest(salt, digest) for digest in voxels),
        "code": {"p2r": __version__, "commit": code_version()},
    }
    return make_manifest(values, name="the next revision")


class _Inherited(NamedTuple):
    """Content of the base revision that the next one continues; empty for the first one."""

    revision: int = 0
    salt: str = ""
    provenance: str = ""
    source: Sequence[str] = ()
    asked: Sequence[str] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> "_Inherited":
        return cls(*(getattr(manifest.facts, name) for name in cls._fields))


def _count_contrasts(accepted: Sequence[AcceptedRow], config: IngestConfig) -> dict[str, dict[str, int]]:
    """Return the number of sessions with each contrast, also of contrasts that none has; nothing without sessions."""
    if config.sessions is None:
        return {}
    counts = Counter(row.contrast for row in accepted)
    return {"contrasts": {name: counts[name] for name in sorted(config.sessions.contrasts)}}


def deidentification_of(names: Names) -> dict[str, str]:
    """Return the statement of a corpus about the identifying data that was removed from its scans, or kept."""
    return {
        **names.statement(),
        "header_text": "not copied",
        "header_extensions": "not copied",
        "sidecars": "allow-list",
        "faces": "not removed",
    }


def publish_revision(
    storage: Storage, base: Revision, manifest: Manifest, ledger: Sequence[LedgerRow], thumbnails: Thumbnails
) -> bool:
    """Make `manifest` the current revision if `base` still is; return whether it was.

    Raises:
        StorageError: if the storage does not support conditional writes.
    """
    content = manifest_bytes(manifest)
    storage.create(ledger_path(manifest), ledger_bytes(ledger))
    storage.create(thumbnails_path(manifest), to_bytes(thumbnails))
    storage.create(revision_path(hashlib.sha256(content).hexdigest()), content)
    for attempt in range(_MAX_ATTEMPTS):
        if storage.replace("manifest.json", content, tag=base.tag):
            settle_ledger(storage)
            return True
        found = storage.read_tagged("manifest.json")
        if (found and found[1]) != base.tag:
            return False
        time.sleep(0.05 * 2**attempt)  # a store may refuse while another request is in progress
    raise StorageError(
        f"{storage.at('manifest.json')} cannot be replaced, although no other run replaced it: this storage lacks conditional "
        "writes (If-Match and If-None-Match on PUT); use one that has them"
    )


def settle_ledger(storage: Storage) -> None:
    """Copy the current revision's ledger to `ledger.jsonl`; this also repairs a run killed between the two writes.

    Concurrent runs converge: each checks the manifest again after its write, and repeats if the revision has changed.
    """
    while True:
        manifest = load_manifest(storage)
        content, found = storage.read_bytes(ledger_path(manifest)), storage.read_tagged("ledger.jsonl")
        if found is None or found[0] != content:
            storage.write_bytes("ledger.jsonl", content)
        if load_manifest(storage).facts.ledger_sha256 == manifest.facts.ledger_sha256:
            return


def write_refused_ledger(storage: Storage, ledger: Sequence[LedgerRow]) -> str:
    """Write the ledger of a job that stops, and return its URL. The `ledger.jsonl` of an existing corpus is kept."""
    content = ledger_bytes(ledger)
    path = f"ledgers/{hashlib.sha256(content).hexdigest()}.jsonl"
    storage.create(path, content)
    if storage.exists("manifest.json"):
        return storage.at(path)
    storage.write_bytes("ledger.jsonl", content)
    return storage.at("ledger.jsonl")


def choose_thumbnails(found: Thumbnails, ledger: Sequence[LedgerRow]) -> Thumbnails:
    """Return the thumbnails to show in a report of this ledger."""
    accepted = {row.key for row in ledger if is_accepted(row)}
    refused = {row.key for row in ledger if row.status == "refused"}
    groups = (lowest_lots(found.keys() & keys, MOST) for keys in (accepted, refused))
    return {key: found[key] for group in groups for key in group}


def _summarise(accepted: Sequence[AcceptedRow]) -> dict[str, object]:
    """Return the summary for `p2r inspect`: types, and the smallest, median and largest spacing and shape along each axis."""
    columns: dict[str, list[tuple[float, ...]]] = {
        "spacing_mm": list(zip(*(row.spacing_mm for row in accepted), strict=True)),
        "shape": list(zip(*(row.shape for row in accepted), strict=True)),
    }
    return {
        "dtypes": dict(sorted(Counter(row.dtype for row in accepted).items())),
        **{
            name: {
                word: [float(of(axis)) for axis in axes]
                for word, of in (("min", min), ("median", median), ("max", max))
            }
            for name, axes in columns.items()
        },
    }
