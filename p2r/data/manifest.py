"""The manifest of a corpus: its content, validation, and lookup of subjects and scans.

`manifest.json` is replaced last, so everything that it names exists. Every revision is kept as `manifests/<sha256>.json`
and names the previous one: a run that pins a revision keeps using it while the corpus grows.

A manifest is untrusted input and is validated before use: names cannot leave the folder, and counts are whole numbers that
agree with one another.

It does not name subjects. It holds digests, salted with the corpus's own content, for lookups by `contains`. Anyone who
can guess a name can test it, unless the corpus has pseudonyms (see `pseudonyms`).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, TypeAdapter

from p2r.contrasts import Contrast
from p2r.data.pseudonyms import names_for
from p2r.documents import Digests, FewKeys, Sha256, checked, read_json, way_out
from p2r.errors import DataError
from p2r.storage import Storage

FORMAT = "p2r-corpus/2"
MAX_MANIFEST_BYTES = 2**28
"""Largest manifest that is read: about 350,000 shards or three million scans. `MAX_MEMORY_BYTES` of memory suffice to parse it."""
MOST = 2**53
"""Upper bound of every count and every sum of counts: arrays and JSON represent smaller ones exactly."""

_WAY_OUT = (
    "restore the file (the folder `manifests` of a corpus has a copy of each revision), or ingest this corpus again"
)
_COUNTS = ("num_samples", "num_records", "num_volumes", "num_bytes")
_NAMES = re.compile(r"(?:shard-[0-9]{6,9}-[0-9a-f]{12}\.tar\n)*")  # of all shards, a line each
_Count = Annotated[int, Field(ge=0, lt=MOST)]
_ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6,9}-[0-9a-f]{12}\.tar$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)  # not extra="forbid": later versions may add keys


class _Shard(_Strict):
    name: _ShardName
    num_records: _Count
    num_samples: _Count
    num_volumes: _Count
    num_bytes: _Count
    sha256: Sha256
    index_sha256: Sha256


class _Preprocessing(_Strict):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    slice_axis: Literal["auto", 0, 1, 2]
    __pydantic_extra__: dict[str, JsonValue]


class _Ranges(_Strict):
    min: Annotated[list[float], Field(min_length=3, max_length=4)]
    median: Annotated[list[float], Field(min_length=3, max_length=4)]
    max: Annotated[list[float], Field(min_length=3, max_length=4)]


class _Summary(_Strict):
    dtypes: Annotated[dict[str, _Count], FewKeys]
    spacing_mm: _Ranges
    shape: _Ranges


class ManifestFacts(_Strict):
    """Content of `manifest.json`, validated."""

    revision: Annotated[int, Field(ge=1)]
    previous: Sha256 | None
    licence: str
    provenance: str
    cohort: str
    source: Annotated[list[str], FailFast()]
    asked: Digests
    preprocessing: Annotated[_Preprocessing, FewKeys]
    preprocessing_sha256: Sha256
    deidentification: Annotated[dict[str, str], FewKeys]
    num_samples: _Count
    num_records: _Count
    num_volumes: _Count
    num_bytes: _Count
    num_subjects: _Count
    num_cross_subject_copies: _Count
    contrasts: Annotated[dict[Contrast, _Count], FewKeys] | None = None
    """Number of sessions with each contrast; None: records have one volume without a name."""
    reasons: Annotated[dict[str, _Count], FewKeys]
    summary: _Summary
    shards: list[Any]
    """Checked by `_are_valid_shards`, or by `_Shards`; see `Manifest.shards`."""
    ledger_sha256: Sha256
    thumbnails_sha256: Sha256
    salt: Sha256
    subject_digests: Digests
    voxel_digests: Digests
    code: Annotated[dict[str, str], FewKeys]


class _Shards(_Strict):
    shards: Annotated[list[_Shard], FailFast()]


_FACTS, _SHARDS, _SHARD = TypeAdapter(ManifestFacts), TypeAdapter(_Shards), TypeAdapter(_Shard)


class Shard(NamedTuple):
    """Entry of a shard; a tuple, because a corpus may have 300,000."""

    name: str
    num_records: int
    num_samples: int
    num_volumes: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, eq=False)
class Manifest(Mapping[str, Any]):
    """A valid manifest: the mapping in `manifest.json`, unchanged, and its content as typed attributes."""

    values_by_key: Mapping[str, Any]
    facts: ManifestFacts

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Entries of the shards, in the order of their samples."""
        return shards_of(self.values_by_key)

    @cached_property
    def sha256(self) -> str:
        """Digest that names the revision."""
        return manifest_sha256(self)

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def shards_of(manifest: Mapping[str, Any]) -> tuple[Shard, ...]:
    """Return the entries of a manifest's shards, in the order of their samples."""
    return tuple(map(Shard._make, map(itemgetter(*Shard._fields), manifest["shards"])))


def parse_shard(entry: object, *, where: str) -> Shard:
    """Validate the entry of a shard.

    Raises:
        DataError: if it is not one; names the field and the rule.
    """
    return Shard(**checked(_SHARD, entry, where=where, error=DataError).model_dump())


def load_manifest(storage: Storage, *, revision: str | None = None) -> Manifest:
    """Read a manifest of the corpus at `storage`.

    Args:
        storage: Storage of the corpus.
        revision: SHA-256 of a manifest; None: the current one.

    Raises:
        DataError: if it is absent, not a manifest that this version reads, or breaks a rule.
    """
    path = "manifest.json" if revision is None else revision_path(revision)
    found = storage.read_tagged(path, max_bytes=MAX_MANIFEST_BYTES)
    if found is None and revision is None:
        raise DataError(f"no corpus at {storage.url}: it has no manifest.json; make one with a job of kind ingest")
    if found is None:
        raise DataError(f"{storage.url} has no revision {revision}: it is another corpus, or was made again")
    content, _ = found
    if revision is not None and hashlib.sha256(content).hexdigest() != revision:
        raise DataError(f"{storage.at(path)} is damaged: its SHA-256 differs from the one in its name")
    return parse_manifest(content, name=storage.at(path))


def parse_manifest(content: bytes, *, name: str) -> Manifest:
    """Parse and validate the bytes of a manifest.

    Raises:
        DataError: if this version cannot read the manifest, or it breaks a rule; names the key and the rule.
    """
    with way_out(_WAY_OUT):
        return _parsed(content, name)


def _parsed(content: bytes, name: str) -> Manifest:
    manifest = read_json(content, where=name, max_bytes=MAX_MANIFEST_BYTES, error=DataError)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(f"{name}: format is {str(found)[:80]!r}, this version reads {FORMAT!r}")
    assert isinstance(manifest, dict)
    return make_manifest(manifest, name=name)


def make_manifest(values: Mapping[str, Any], *, name: str) -> Manifest:
    """Validate the content of a manifest.

    Raises:
        DataError: if it breaks a rule; names the key and the rule.
    """
    where = f"{name} is not a valid manifest:"
    facts = checked(_FACTS, values, where=where, error=DataError)
    if not _are_valid_shards(facts.shards):
        checked(_SHARDS, values, where=where, error=DataError)
    manifest = Manifest(values, facts)
    _check_sums(manifest, where)
    return manifest


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Return the digest that names a revision: the SHA-256 of its `manifest.json`."""
    return hashlib.sha256(manifest_bytes(manifest)).hexdigest()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Serialise a manifest: equal manifests give equal bytes. One line per key, because indenting all takes ten times as long."""
    lines = (
        f"{json.dumps(key)}: {json.dumps(manifest[key], sort_keys=True, allow_nan=False)}" for key in sorted(manifest)
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def revision_path(sha256: str) -> str:
    """Return the path of a revision.

    Raises:
        DataError: if `sha256` is not a digest.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(
            f"revision {sha256[:80]!r} is not a SHA-256: give its 64 digits from 0 to f, as `p2r inspect` shows them"
        )
    return f"manifests/{sha256}.json"


def ledger_path(manifest: Manifest) -> str:
    """Return the path of the ledger of a revision."""
    return f"ledgers/{manifest.facts.ledger_sha256}.jsonl"


def thumbnails_path(manifest: Manifest) -> str:
    """Return the path of the thumbnails of a revision."""
    return f"thumbnails/{manifest.facts.thumbnails_sha256}.jsonl"


def facts_of(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the facts about a revision that users see, as names and texts."""
    facts = manifest.facts
    texts = {
        "revision": f"{facts.revision}, sha256 {manifest.sha256}",
        "licence": facts.licence,
        "provenance": facts.provenance,
        "cohort": facts.cohort,
        "sources": ", ".join(facts.source),
        "subjects": f"{facts.num_subjects:,}",
        "sessions" if facts.contrasts else "scans": f"{facts.num_records:,}",
        "contrasts, by number of sessions": describe_contrasts(facts),
        f"{'scans' if facts.contrasts else 'of these'}, copies of another subject's": f"{facts.num_cross_subject_copies:,}",
        "volumes": f"{facts.num_volumes:,}",
        "planes": f"{facts.num_samples:,}",
        "size": f"{facts.num_bytes / 1e6:,.1f} MB in {len(facts.shards):,} shards",
        "preprocessing": ", ".join(_list_settings(manifest["preprocessing"])),
        "names": "as they are" if facts.deidentification.get("names") == "plain" else "keyed hashes",
        "code": " ".join(facts.code.values()),
    }
    return [(name, text) for name, text in texts.items() if text]


def describe_contrasts(facts: ManifestFacts) -> str:
    """Return the contrasts of a corpus with their numbers of sessions; empty if its records have no named contrasts."""
    return ", ".join(f"{name} {count:,}" for name, count in (facts.contrasts or {}).items())


def describe_records(facts: ManifestFacts) -> str:
    """Return the number of records: `83 sessions (flair 83, t1 80)`, or `200 scans`."""
    contrasts = describe_contrasts(facts)
    return f"{facts.num_records} " + (f"sessions ({contrasts})" if contrasts else "scans")


def _list_settings(section: Mapping[str, object]) -> Iterator[str]:
    """Yield the settings that are set, as texts: `record planes`, `quality.preset openmind`."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{setting}" for setting in _list_settings(value))
        elif isinstance(value, list):
            yield f"{name} {' '.join(map(str, value))}"
        elif value not in (None, "none"):
            yield f"{name} {value}"


def ranges_of(manifest: Manifest) -> list[tuple[str, ...]]:
    """Return rows of (quantity, axis, smallest, median, largest) over the accepted scans."""
    rows = []
    summary = manifest.facts.summary
    for of, title, axes in ((summary.spacing_mm, "spacing, mm", "RAS"), (summary.shape, "extent, voxels", "RAST")):
        for axis, *numbers in zip(axes, of.min, of.median, of.max, strict=False):
            rows.append((title, "frames" if axis == "T" else axis, *(f"{number:.4g}" for number in numbers)))
    return rows


def subject_digest(salt: str, cohort: str, subject: str) -> str:
    """Return the digest of a subject in the manifest."""
    return hashlib.sha256(f"{salt}{cohort}/{subject}".encode()).hexdigest()


def voxel_digest(salt: str, sha256: str) -> str:
    """Return the digest of a scan's voxels in the manifest."""
    return hashlib.sha256(f"{salt}{sha256}".encode()).hexdigest()


class SubjectDigests(Protocol):
    """Part of a corpus's manifest that tells whether a subject or scan is in it; backbones keep it, too."""

    @property
    def cohort(self) -> str: ...  # noqa: D102
    @property
    def salt(self) -> str: ...  # noqa: D102
    @property
    def subject_digests(self) -> list[str]: ...  # noqa: D102
    @property
    def voxel_digests(self) -> list[str]: ...  # noqa: D102
    @property
    def deidentification(self) -> dict[str, str]: ...  # noqa: D102


def contains(
    corpus: SubjectDigests,
    *,
    cohort: str | None = None,
    subject: str | None = None,
    voxels_sha256: str | None = None,
) -> bool:
    """Return whether a subject, or a scan with exactly these voxels, is in the corpus. Used to rule out leaks.

    Args:
        corpus: Facts of a corpus's manifest, or the part of them stored with a published backbone.
        cohort: Namespace of `subject`; None: the corpus's own.
        subject: A subject's name: the plain name, also if the corpus has pseudonyms.
        voxels_sha256: Digest from `p2r.data.shards.voxels_sha256`.

    Raises:
        DataError: if the corpus has pseudonyms and their secret is not in the environment.
    """
    if subject is None and voxels_sha256 is None:
        raise ValueError("contains needs a subject, voxels_sha256, or both")
    by_subject = False
    if subject is not None:
        where = corpus.cohort if cohort is None else cohort
        name = names_for(corpus.deidentification, where).subject(subject)
        by_subject = subject_digest(corpus.salt, where, name) in corpus.subject_digests
    by_voxels = voxels_sha256 is not None and voxel_digest(corpus.salt, voxels_sha256) in corpus.voxel_digests
    return by_subject or by_voxels


def _are_valid_shards(entries: list[Any]) -> bool:
    """Return whether entries are valid by the rules of `_Shard`, checking all values of a field at once.

    For 300,000 shards this takes a third of the time of as many models, and negligible memory. If it returns False, `_Shards`
    finds the error.
    """
    if not all(type(entry) is dict for entry in entries):
        return False
    try:
        for field in _COUNTS:
            column = list(map(itemgetter(field), entries))
            if column and (set(map(type, column)) != {int} or min(column) < 0 or max(column) >= MOST):
                return False
        for field in ("sha256", "index_sha256"):
            column = list(map(itemgetter(field), entries))
            if column and (set(map(type, column)) != {str} or set(map(len, column)) != {64}):
                return False
            if "".join(column).encode("ascii").translate(None, b"0123456789abcdef"):
                return False
        names = list(map(itemgetter("name"), entries))
        if names and set(map(type, names)) != {str}:
            return False
        lines = "\n".join([*names, ""])
        return lines.count("\n") == len(names) and _NAMES.fullmatch(lines) is not None
    except (KeyError, UnicodeEncodeError):
        return False


def _check_sums(manifest: Manifest, where: str) -> None:
    shards, facts = manifest.shards, manifest.facts
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where} a shard is listed twice")
    for field in _COUNTS:
        total, stated = sum(getattr(shard, field) for shard in shards), getattr(facts, field)
        if total != stated:
            raise DataError(f"{where} {field} is {stated}, its shards add up to {total}")
    for name, count in (facts.contrasts or {}).items():
        if count > facts.num_records:
            raise DataError(f"{where} contrasts gives {name} to {count} sessions, num_records is {facts.num_records}")
    if facts.num_samples == 0:
        raise DataError(f"{where} the corpus has no samples")
