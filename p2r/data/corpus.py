"""Scans -> a plan of shards -> shards and their ledgers -> the manifest, which is written last.

    find_scans -> plan_shards -> build_shard (any number at once, on any machine) -> finish_corpus

Choices: which scan goes into which shard is settled from names and file sizes before anything is read, so every shard
can be built, or built again after a failure, alone, and always has the same bytes. A subject is never spread over two
shards. Every scan that was found has a row in the ledger, whatever became of it: nothing is dropped in silence.

Before a shard changes, a manifest that names its old bytes is withdrawn: whoever finds a manifest finds what it names.
"""

import hashlib
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p2r.config import IngestConfig
from p2r.data.manifest import FORMAT, subject_digest, voxel_digest
from p2r.data.manifest import contains as contains
from p2r.data.manifest import load_manifest as load_manifest
from p2r.data.manifest import manifest_sha256 as manifest_sha256
from p2r.data.manifest import verify_corpus as verify_corpus
from p2r.data.preprocess import percentile_table, plane_axes, slice_axis
from p2r.data.scans import Scan as Scan
from p2r.data.scans import expand_subjects as expand_subjects
from p2r.data.scans import find_scans as find_scans
from p2r.data.shards import voxels_sha256, write_shard
from p2r.data.volume import Volume, read_volume
from p2r.errors import DataError, RefusedScan
from p2r.randomness import keyed_generator
from p2r.storage import Storage, cache_folder, json_bytes

LedgerRow = dict[str, Any]
Entry = dict[str, Any]


@dataclass(frozen=True)
class ShardPlan:
    """What one shard will be made of. Small, and can be sent to another machine."""

    name: str
    """Of the tar."""
    scans: tuple[tuple[Scan, str], ...]
    """Scans with their subjects, in the order of the records."""
    left_out: tuple[LedgerRow, ...] = ()
    """Ledger rows of scans that enter no shard; the first plan carries them all."""


@dataclass(frozen=True)
class IngestProgress:
    """One shard is done."""

    shard: str
    """Name of the tar."""
    done: int
    """Shards done, this one included."""
    num_shards: int
    """Shards in all."""
    rows: tuple[LedgerRow, ...]
    """What became of the shard's scans."""


def plan_shards(
    scans: Sequence[Scan], config: IngestConfig, *, allowed_subjects: Set[str] | None = None
) -> list[ShardPlan]:
    """Deal scans to shards, subject by subject in an order shuffled by `config.seed`.

    Args:
        scans: From `find_scans`.
        config: The job's ingest section.
        allowed_subjects: The subjects that `config.subjects_of` stands for; None: all.

    Raises:
        DataError: for a subject that is listed and has no scan, or if no scan is left.
    """
    subjects = {scan: _subject(scan, config.subject_pattern) for scan in scans}
    selected = _selected({subject for subject in subjects.values() if subject}, config, allowed_subjects)
    groups: dict[str, list[Scan]] = defaultdict(list)
    left_out: list[LedgerRow] = []
    for scan, subject in subjects.items():
        if subject is None:
            message = f"{scan.name} does not match subject_pattern {config.subject_pattern!r}"
            left_out.append(_row(scan, None, "refused", "no_subject", message))
        elif subject not in selected:
            left_out.append(_row(scan, subject, "not_selected", "not_selected"))
        else:
            groups[subject].append(scan)
    if not groups:
        raise DataError(
            f"none of the {len(scans)} scans found is of a selected subject; "
            f"subjects found: {_listing({subject for subject in subjects.values() if subject})}"
        )
    shards = [
        [(scan, subject) for subject in part for scan in sorted(groups[subject])] for part in _dealt(groups, config)
    ]
    return [
        ShardPlan(f"shard-{number:06d}.tar", tuple(members), tuple(left_out) if number == 0 else ())
        for number, members in enumerate(shards)
    ]


def build_shard(plan: ShardPlan, config: IngestConfig, storage: Storage) -> tuple[Entry | None, list[LedgerRow]]:
    """Read a plan's scans, write its shard and index to `storage`; the same bytes on every run and every machine.

    Returns:
        The shard's entry in the manifest (None if every scan was refused), and a ledger row for each scan.
    """
    rows = list(plan.left_out)
    with tempfile.TemporaryDirectory(prefix="p2r-shard-") as folder:
        tar = Path(folder, plan.name)
        entry = write_shard(tar, _records(plan, config, rows))
        _withdraw_manifest(storage, plan.name, entry)
        if not entry["num_records"]:
            return None, rows
        for file in (tar, tar.with_suffix(".idx")):
            storage.upload(file, file.name)
    return entry, rows


def finish_corpus(
    storage: Storage,
    config: IngestConfig,
    entries: Iterable[Entry | None],
    ledger: Iterable[LedgerRow],
    *,
    allowed_subjects: Set[str] | None = None,
) -> dict[str, Any]:
    """Write the ledger, then the manifest under its digest, then the manifest itself: with it the corpus comes to be.

    A second copy of one subject's scan was refused by `build_shard`. Copies under the names of different subjects are
    kept, wherever they lie, and counted: which of the two names is right is not for us to say.

    Raises:
        DataError: if no scan was accepted; names how many were refused, and why.
    """
    shards = sorted((entry for entry in entries if entry is not None), key=lambda entry: str(entry["name"]))
    rows = sorted(ledger, key=lambda row: str(row["key"]))
    reasons = dict(sorted(Counter(str(row["reason"]) for row in rows).items()))
    num_samples = sum(entry["num_samples"] for entry in shards)
    storage.write_bytes("ledger.jsonl", b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows))
    if not num_samples:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no scan at all"
        raise DataError(f"no scan could be used ({counts}); {storage.at('ledger.jsonl')} says why, scan by scan")
    salt = hashlib.sha256("".join(entry["sha256"] for entry in shards).encode()).hexdigest()
    accepted = [row for row in rows if row["status"] == "accepted"]
    subjects, voxels = ({str(row[name]) for row in accepted} for name in ("subject", "voxels_sha256"))
    manifest = {
        "format": FORMAT,
        "licence": config.licence,
        "provenance": config.provenance,
        "cohort": config.cohort,
        "source": list(config.sources),
        "preprocessing": {
            "slice_axis": config.slice_axis,
            "min_size": config.min_size,
        },
        "config_sha256": corpus_digest(config, allowed_subjects),
        "num_samples": num_samples,
        "num_records": len(accepted),
        "num_subjects": len(subjects),
        "num_duplicates": len(accepted) - len(voxels),
        "reasons": reasons,
        "shards": shards,
        "salt": salt,
        "subject_digests": sorted(subject_digest(salt, config.cohort, subject) for subject in subjects),
        "voxel_digests": sorted(voxel_digest(salt, digest) for digest in voxels),
    }
    content = json_bytes(manifest)
    storage.write_bytes(f"manifests/{hashlib.sha256(content).hexdigest()}.json", content)
    storage.write_bytes("manifest.json", content)
    return manifest


def ingest_locally(
    config: IngestConfig, storage: Storage, *, allowed_subjects: Set[str] | None = None, cache: Path | None = None
) -> Iterator[IngestProgress]:
    """Make a corpus in this process, one shard after the other; the manifest is there when the iterator ends."""
    scans = find_scans(config.sources, cache=cache or cache_folder())
    plans = plan_shards(scans, config, allowed_subjects=allowed_subjects)
    entries, ledger = [], []
    for number, plan in enumerate(plans, start=1):
        entry, rows = build_shard(plan, config, storage)
        entries.append(entry)
        ledger += rows
        yield IngestProgress(plan.name, number, len(plans), tuple(rows))
    finish_corpus(storage, config, entries, ledger, allowed_subjects=allowed_subjects)


def corpus_digest(config: IngestConfig, allowed_subjects: Set[str] | None = None) -> str:
    """Digest of what a corpus is asked to be: the ingest section, with the subjects that `subjects_of` stands for."""
    asked = config.model_dump(mode="json", exclude={"subjects_of"})
    return hashlib.sha256(
        json_bytes({**asked, "allowed_subjects": None if allowed_subjects is None else sorted(allowed_subjects)})
    ).hexdigest()


def _records(plan: ShardPlan, config: IngestConfig, rows: list[LedgerRow]) -> Iterator[tuple[Volume, dict[str, Any]]]:
    """Yield the volumes that can be used, with their meta; add a ledger row for every scan."""
    # Within a subject only: a subject lies in one shard, so the outcome does not depend on how shards were cut.
    seen: dict[tuple[str, str], str] = {}  # subject, digest of the voxels -> key
    for scan, subject in plan.scans:
        try:
            volume = read_volume(scan.path, key=scan.key)
            axis = slice_axis(volume.spacing_mm, config.slice_axis)
            _check_size(volume, axis, config.min_size, scan.path)
            percentiles = percentile_table(volume.data)
            digest = voxels_sha256(volume)
            if original := seen.get((subject, digest)):
                raise RefusedScan("duplicate", f"{scan.path} has exactly the voxels of {original}")
        except RefusedScan as error:
            rows.append(_row(scan, subject, "refused", error.code, error.message))
            continue
        seen[subject, digest] = scan.key
        num_samples = volume.data.shape[axis] * volume.data.shape[3]
        rows.append(_row(scan, subject, "accepted", "accepted") | {"num_samples": num_samples, "voxels_sha256": digest})
        yield (
            volume,
            {
                "key": scan.key,
                "subject": subject,
                "cohort": config.cohort,
                "slice_axis": axis,
                "percentiles": list(percentiles),
                "source": scan.name,
                "voxels_sha256": digest,
                "licence": config.licence,
            },
        )


def _check_size(volume: Volume, axis: int, min_size: int, path: str) -> None:
    shape = tuple(volume.data.shape[other] for other in plane_axes(axis))
    if min(shape) < min_size:
        raise RefusedScan(
            "too_small", f"{path} has planes of {shape[0]} x {shape[1]} voxels; ingest.min_size is {min_size}"
        )


def _row(scan: Scan, subject: str | None, status: str, reason: str, message: str = "") -> LedgerRow:
    return {
        "key": scan.key,
        "source": scan.path,
        "subject": subject,
        "status": status,
        "reason": reason,
        "message": message,
        "num_samples": 0,
        "voxels_sha256": None,
    }


def _subject(scan: Scan, pattern: str) -> str | None:
    try:
        match = re.search(pattern, scan.name)
        return None if match is None else match[1]
    except (re.error, IndexError) as error:
        raise DataError(
            f"ingest.subject_pattern {pattern!r} must be a regular expression with one group: {error}"
        ) from None


def _selected(found: set[str], config: IngestConfig, allowed: Set[str] | None) -> set[str]:
    selected = found if allowed is None else found & allowed
    if config.subjects is None:
        return selected
    listed = set(expand_subjects(config.subjects))
    if absent := listed - found:
        raise DataError(
            f"ingest.subjects lists {_listing(absent)}, of whom there is no scan; subjects found: {_listing(found)}"
        )
    return selected & listed


def _listing(names: Set[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return f"{shown}, and {len(ordered) - 5} more" if len(ordered) > 5 else shown or "none"


def _dealt(groups: dict[str, list[Scan]], config: IngestConfig) -> Iterator[list[str]]:
    """Yield the subjects of each shard. A shard is full once the files behind it reach the size that was asked for."""
    names = sorted(groups)
    order = np.argsort(keyed_generator(config.seed, "shards").bit_generator.random_raw(len(names)), kind="stable")
    part: list[str] = []
    num_bytes = 0
    for index in order:
        part.append(names[index])
        num_bytes += sum(scan.num_bytes for scan in groups[names[index]])
        if num_bytes >= config.shard_size_mib * 2**20:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _withdraw_manifest(storage: Storage, name: str, entry: Entry) -> None:
    if not storage.exists("manifest.json"):
        return
    named = {shard["name"]: shard for shard in storage.read_json("manifest.json").get("shards", [])}
    if named.get(name) != entry:
        storage.delete("manifest.json")
