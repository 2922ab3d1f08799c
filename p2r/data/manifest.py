"""The manifest of a corpus: what lies there, read, checked, and asked whether a subject or scan is in it.

`manifest.json` is written last, so a corpus that has one is whole. Every revision also stays, as
`manifests/<sha256>.json`. It does not name subjects: it holds digests, salted with the corpus's own content, which
answer `contains`. They are no secret to someone who can guess the names.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from p2r.data.shards import index_shard, read_index
from p2r.errors import DataError, StorageError
from p2r.storage import Storage, file_sha256, json_bytes

FORMAT = "p2r-corpus/1"

Manifest = Mapping[str, Any]

_NEEDED = ("num_samples", "licence", "shards", "source", "preprocessing", "salt", "subject_digests", "voxel_digests")


def load_manifest(storage: Storage, *, revision: str | None = None) -> dict[str, Any]:
    """Read the current manifest of the corpus at `storage`.

    Raises:
        DataError: There is none, or it is not a manifest that this version reads.
    """
    name = "manifest.json" if revision is None else f"manifests/{revision}.json"
    if not storage.exists(name):
        raise DataError(f"no corpus at {storage.url}: it has no manifest.json; make one with a job of kind ingest")
    manifest = storage.read_json(name)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(f"{storage.at('manifest.json')}: format is {found!r}, this version reads {FORMAT!r}")
    missing = [name for name in _NEEDED if name not in manifest]
    if missing:
        raise DataError(f"{storage.at('manifest.json')}: lacks {', '.join(missing)}; ingest this corpus again")
    return dict(manifest)


def manifest_sha256(manifest: Manifest) -> str:
    """Digest that names a revision: of the bytes of its `manifest.json`."""
    return hashlib.sha256(json_bytes(dict(manifest))).hexdigest()


def subject_digest(salt: str, cohort: str, subject: str) -> str:
    """Name of a subject in the manifest."""
    return hashlib.sha256(f"{salt}{cohort}/{subject}".encode()).hexdigest()


def voxel_digest(salt: str, sha256: str) -> str:
    """Name of a scan's voxels in the manifest."""
    return hashlib.sha256(f"{salt}{sha256}".encode()).hexdigest()


def contains(
    manifest: Manifest, *, cohort: str | None = None, subject: str | None = None, voxels_sha256: str | None = None
) -> bool:
    """Tell whether a subject, or a scan of exactly these voxels, is in the corpus: the question that rules out leaks.

    Args:
        manifest: Of the corpus.
        cohort: Name space of `subject`; None: the corpus's own.
        subject: A subject's name.
        voxels_sha256: From `p2r.data.shards.voxels_sha256`.
    """
    if subject is None and voxels_sha256 is None:
        raise ValueError("contains needs a subject, voxels_sha256, or both")
    salt = manifest["salt"]
    by_subject = subject is not None and (
        subject_digest(salt, manifest.get("cohort", "default") if cohort is None else cohort, subject)
        in manifest["subject_digests"]
    )
    by_voxels = voxels_sha256 is not None and voxel_digest(salt, voxels_sha256) in manifest["voxel_digests"]
    return by_subject or by_voxels


def verify_corpus(storage: Storage) -> list[str]:
    """Read every byte of a corpus and compare it with the manifest.

    Returns:
        The problems found, one sentence each; empty for a sound corpus.

    Raises:
        DataError: There is no manifest to compare with.
    """
    manifest = load_manifest(storage)
    problems = [problem for entry in manifest["shards"] for problem in _problems_of_shard(storage, entry)]
    for name in ("num_samples", "num_records"):
        total = sum(entry[name] for entry in manifest["shards"])
        if total != manifest[name]:
            problems.append(f"manifest.json: {name} is {manifest[name]}, its shards add up to {total}")
    revision = f"manifests/{manifest_sha256(manifest)}.json"
    if not storage.exists(revision):
        problems.append(f"{revision}: absent, though manifest.json is that revision")
    return problems + _problems_of_ledger(storage, manifest)


def _problems_of_shard(storage: Storage, entry: Mapping[str, Any]) -> list[str]:
    name = entry["name"]
    try:
        tar = storage.local(name, sha256=entry["sha256"], num_bytes=entry["num_bytes"])
        index = storage.local(_index_name(name), sha256=entry["index_sha256"])
        rows = read_index(index, sha256=entry["index_sha256"])
    except (StorageError, DataError) as error:
        return [str(error)]
    if file_sha256(tar) != entry["sha256"]:
        return [f"{storage.at(name)}: damaged, its SHA-256 is not the manifest's"]
    counts = (len(rows), sum(row.num_planes for row in rows))
    problems = []
    if counts != (entry["num_records"], entry["num_samples"]):
        expected = (entry["num_records"], entry["num_samples"])
        problems.append(f"{name}: the index has (records, samples) {counts}, the manifest {expected}")
    if index_shard(tar) != rows:
        problems.append(f"{name}: the index does not describe this tar")
    return problems


def _problems_of_ledger(storage: Storage, manifest: Manifest) -> list[str]:
    try:
        rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
        counts = dict(Counter(row["reason"] for row in rows))
    except (StorageError, ValueError, KeyError, TypeError) as error:
        return [f"ledger.jsonl: cannot be read: {error}"]
    if counts != manifest["reasons"]:
        return [f"ledger.jsonl: counts by reason are {counts}, the manifest has {manifest['reasons']}"]
    return []


def _index_name(tar_name: str) -> str:
    return str(tar_name).removesuffix(".tar") + ".idx"
