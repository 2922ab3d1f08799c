"""Published artefact: a folder of files named by their content, and a manifest that is written once.

    model-<sha256>.safetensors   weights
    config-<sha256>.json         architecture, and the preprocessing of a scan
    README-<sha256>.md           model card
    manifest.json                list of these files, with corpora, licence and origin; created once, last
    manifest.sig                 optional: a signature over manifest.json (`p2r.signature`)

File names contain digests, so racing publishers never overwrite one another's files. The conditional creation of
`manifest.json` is the only commit: one publisher succeeds, and every other compares the whole manifest with its own. The
digest of the manifest's bytes is the artefact's pin (`p2r.reference`). Every file is hashed before the same bytes are parsed.
Folders of version 1 (model.safetensors, config.json, README.md) are read and repaired in place.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from p2r.documents import Details, Digests, FewKeys, Sha256, checked, read_json, way_out
from p2r.errors import CheckpointError, DamagedError, InputError, StorageError
from p2r.reference import Reference
from p2r.signature import SIGNATURE, SIGNATURE_BYTES, check_signature, sign
from p2r.storage import Storage, file_sha256, json_bytes

Role = Literal["weights", "config", "card"]

MANIFEST = "manifest.json"
MAX_TEXT_BYTES = 2**20
_MAX_WEIGHTS_BYTES = 2**40
MAX_MANIFEST_BYTES = 2**27
"""Largest manifest of an artefact: of backbones that have seen two million scans."""
MAX_MANIFEST_MEMORY_BYTES = 2**29
"""Largest memory of a manifest while it is parsed."""
_MAX_DEPTH = 16
_WAY_OUT = "restore the file from a copy of the folder, or publish another version"
_NAMES: dict[Role, tuple[str, str, str]] = {
    "weights": ("model", ".safetensors", "model.safetensors"),
    "config": ("config", ".json", "config.json"),
    "card": ("README", ".md", "README.md"),
}
"""Stem and suffix of each file, and its name in version 1."""
_PROGRAM = ("p2r_version", "code")

Text = Annotated[str, Field(max_length=20_000)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Strict):
    """Name, digest and size of a file in the folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0, le=_MAX_WEIGHTS_BYTES)]


class Files(_Strict):
    """Files of an artefact, by role."""

    weights: FileEntry
    config: FileEntry
    card: FileEntry | None = None
    """Model card; None only in version 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for role in ("config", "card"):
            entry: FileEntry | None = getattr(self, role)
            if entry is not None and entry.num_bytes > MAX_TEXT_BYTES:
                raise ValueError(f"{role} may have {MAX_TEXT_BYTES:,} bytes, got {entry.num_bytes:,}")
        return self

    def entries(self) -> dict[Role, FileEntry]:
        """Return the files that exist."""
        found: dict[Role, FileEntry | None] = {"weights": self.weights, "config": self.config, "card": self.card}
        return {role: entry for role, entry in found.items() if entry is not None}


class CorpusFacts(_Strict):
    """Facts about a corpus, kept with a backbone: enough to tell whether it contains a patient or scan."""

    url: Text
    sha256: Sha256
    weight: Annotated[float, Field(gt=0)] | None
    licence: Text
    provenance: Text
    cohort: Text
    num_samples: Count
    num_subjects: Count
    salt: Sha256
    subject_digests: Digests
    voxel_digests: Digests
    deidentification: Annotated[dict[Text, Text], FewKeys]


class Provenance(_Strict):
    """Origin of weights, and the terms of their use."""

    p2r_version: Annotated[str, Field(max_length=100)] = ""
    code: Annotated[str, Field(max_length=100)] = ""
    """Commit of the program that published the artefact."""
    licence: Text = "unknown"
    corpora: Annotated[list[CorpusFacts], Field(max_length=1000)] | None = None
    """Corpora on which the weights were pretrained; None: unknown. Of a backbone, an empty list counts as unknown, too."""


class Manifest(Provenance):
    """`manifest.json` of a backbone or a model."""

    format: Annotated[str, Field(pattern=r"^p2r-(backbone|model)/[12]$")]
    files: Files

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format.endswith("/1"):
            return self
        if self.files.card is None:
            raise ValueError("files.card: missing")
        for role, entry in self.files.entries().items():
            if entry.name != file_name(role, entry.sha256):
                raise ValueError(f"files.{role}: its name must be {file_name(role, entry.sha256)}, got {entry.name}")
        return self


class BackboneManifest(Manifest):
    """`manifest.json` of a backbone."""

    job: Text | None = None
    description: Text | None = None
    step: Count | None = None
    samples_seen: Count | None = None
    pretrain: Details | None = None
    negatives: Text | None = None
    initial_weights: Details | None = Field(default=None, exclude_if=lambda value: value is None)
    """Origin of initial weights from another tool, with the table of what was matched; None: none were used."""


class ModelManifest(Manifest):
    """`manifest.json` of a segmentation model."""

    task: Text | None = None
    trial: Details | None = None
    validation: Details | None = None
    transductive: bool | None = None
    backbone_sha256: Sha256 | None = None


Facts = TypeVar("Facts", bound=Provenance, covariant=True)


@dataclass(frozen=True, eq=False)
class Published(Mapping[str, Any], Generic[Facts]):
    """A manifest for its users: typed attributes, and the same content by key, with `sha256`, `url` and `pin`."""

    url: str
    """Folder of the artefact."""
    sha256: str
    """Digest of `manifest.json`."""
    facts: Facts
    """Content of `manifest.json`."""
    is_new: bool = False
    """True if this process published it."""

    @property
    def pin(self) -> str:
        """Reference pinned to this artefact: `URL@sha256:HEX`."""
        return str(Reference(self.url, self.sha256))

    @cached_property
    def _by_key(self) -> dict[str, object]:
        return {**self.facts.model_dump(), "sha256": self.sha256, "url": self.url, "pin": self.pin}

    def __getitem__(self, key: str) -> Any:
        return self._by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)


_MANIFESTS: dict[str, type[Manifest]] = {"p2r-backbone": BackboneManifest, "p2r-model": ModelManifest}
_CHECKS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(model) for kind, model in _MANIFESTS.items()}


@dataclass(frozen=True)
class Artefact:
    """A published folder with a manifest that has been read and checked."""

    storage: Storage
    manifest: Manifest
    content: bytes
    """Content of `manifest.json`."""

    @property
    def sha256(self) -> str:
        """Digest of `manifest.json`."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pin(self) -> str:
        """Reference pinned to this artefact: `URL@sha256:HEX`."""
        return str(Reference(self.storage.url, self.sha256))

    def read(self, role: Role) -> bytes:
        """Return the content of a file, hashed after reading, so that it cannot be exchanged between check and use.

        Raises:
            DamagedError: The file is absent, or is not the one that the manifest names.
        """
        entry = self.manifest.files.entries()[role]
        path = self.storage.local(entry.name, sha256=entry.sha256, num_bytes=entry.num_bytes)
        try:
            with path.open("rb") as file:
                content = file.read(entry.num_bytes + 1)
        except OSError as error:
            raise StorageError(f"cannot read {self.storage.at(entry.name)}: {error}") from error
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DamagedError(
                f"{self.storage.at(entry.name)} does not have the sha256 of its manifest: it is damaged; publish it again"
            )
        return content

    def problems(self) -> list[str]:
        """Read all named files, and return one line per problem found."""
        return [
            f"{entry.name}: absent, or without the sha256 of its manifest: it is damaged; publish it again"
            for entry in self.manifest.files.entries().values()
            if not _is_sound(self.storage, entry)
        ]

    def unnamed_files(self) -> list[str]:
        """List files in the folder that are not part of the artefact: leftovers of publishers that lost a race, or foreign files."""
        known = {MANIFEST, SIGNATURE, *(entry.name for entry in self.manifest.files.entries().values())}
        return [name for name in self.storage.list() if name not in known]

    def check_signature(self, key: str) -> str:
        """Check that the owner of a public key signed this manifest, and return the key as text.

        Raises:
            InputError: See `p2r.signature.check_signature`.
        """
        signature = _read_bounded(self.storage, SIGNATURE, SIGNATURE_BYTES)
        return check_signature(self.content, signature, key=key, where=self.storage.url)

    def sign(self, key: Path) -> str:
        """Sign the manifest with a private key, write the signature beside it, and return the public key as text.

        Raises:
            InputError: The key cannot be used, or another key has signed.
        """
        signature, name = sign(self.content, key=key)
        if not self.storage.create(SIGNATURE, signature):
            found = _read_bounded(self.storage, SIGNATURE, SIGNATURE_BYTES)
            if found is not None and len(found) != SIGNATURE_BYTES:
                self.storage.write_bytes(SIGNATURE, signature)  # the existing file is not a signature
            elif found != signature:
                raise CheckpointError(
                    f"{self.storage.url} has a signature that is not by {name}: another key's, or a damaged one; delete "
                    f"{SIGNATURE} to replace it"
                )
        return name


def file_name(role: Role, sha256: str) -> str:
    """Return the name of a file with this content."""
    stem, suffix, _ = _NAMES[role]
    return f"{stem}-{sha256}{suffix}"


def open_artefact(reference: Reference, *, format: str | None = None, key: str | None = None) -> Artefact:
    """Read the manifest of a published folder.

    Args:
        reference: Location of the folder, with an optional pin of its manifest.
        format: Required format, `p2r-backbone` or `p2r-model`; None: either.
        key: Public key that must have signed the manifest; None: no signature required.

    Raises:
        StorageError: The manifest is absent, differs from the pin, or is not signed by this key.
        CheckpointError: The manifest is not one of the required format.
    """
    storage = Storage(reference.url)
    content = _read_bounded(storage, MANIFEST, MAX_MANIFEST_BYTES)
    if content is None:
        raise StorageError(
            f"{storage.url} holds no manifest.json: give the folder of one published version, such as backbones/NAME/1"
        )
    manifest = _parse(content, reference, where=storage.at(MANIFEST), needed=format)
    artefact = Artefact(storage, manifest, content)
    if key is not None:
        artefact.check_signature(key)
    return artefact


def _parse(content: bytes, reference: Reference, *, where: str, needed: str | None) -> Manifest:
    try:
        reference.check(content)
    except DamagedError as error:
        weights = _weights_sha256(content)
        if weights is not None and weights == reference.sha256:
            raise DamagedError(
                f"{reference} has the digest of the weights; a pin is the digest of manifest.json, which also covers the weights: "
                f"{Reference(reference.url, hashlib.sha256(content).hexdigest())}"
            ) from None
        raise error
    value = _value_of(content, where)
    found = str(value.get("format"))[:80] if isinstance(value, dict) else None
    kind, _, version = (found or "").partition("/")
    if kind not in _MANIFESTS or needed not in (None, kind) or version not in ("1", "2"):
        wanted = " or ".join(f"{one}/1 or {one}/2" for one in ([needed] if needed else _MANIFESTS))
        raise CheckpointError(f"{where} has format {found!r}, expected {wanted}")
    model = _MANIFESTS[kind]
    with way_out(_WAY_OUT):
        manifest: Manifest = checked(
            _CHECKS[kind],
            _upgrade_version_1(value, model) if version == "1" else value,
            where=f"{where} is not a valid manifest:",
            error=CheckpointError,
        )
    return manifest


def _value_of(content: bytes, where: str) -> Any:
    with way_out(_WAY_OUT):
        return read_json(
            content,
            where=where,
            max_bytes=MAX_MANIFEST_BYTES,
            max_memory_bytes=MAX_MANIFEST_MEMORY_BYTES,
            max_depth=_MAX_DEPTH,
            error=CheckpointError,
        )


def _weights_sha256(content: bytes) -> str | None:
    """Return the digest of the weights from an unchecked manifest; None if it has none."""
    try:
        value = _value_of(content, "")
        files = value["files"]
        return str((files.get("weights") or files.get(_NAMES["weights"][2]))["sha256"])
    except (InputError, TypeError, KeyError, AttributeError):
        return None


def _upgrade_version_1(value: dict[str, object], model: type[Manifest]) -> dict[str, object]:
    """Convert a manifest of version 1 to version 2, dropping unused entries."""
    files = value.get("files")
    named = {
        role: {"name": name, **files[name]}
        for role, (_, _, name) in _NAMES.items()
        if isinstance(files, dict) and isinstance(files.get(name), dict)
    }
    corpora = value.get("corpora")
    try:
        if isinstance(corpora, list):
            [CorpusFacts.model_validate(one) for one in corpora]
    except ValidationError:
        corpora = None  # written by an older version with fewer facts: its subjects are unknown
    known = {key: found for key, found in value.items() if key in model.model_fields}
    return {**known, "files": named, "corpora": corpora}


def commit(
    storage: Storage, manifest: Manifest, files: Mapping[Role, Path], *, is_same: Mapping[Role, Callable[[bytes], bool]]
) -> tuple[Artefact, bool]:
    """Publish files under a manifest, unless an equal artefact is already published.

    Args:
        storage: The artefact's folder.
        manifest: Manifest of version 2.
        files: Local files that the manifest names.
        is_same: By role, compares the content of another file of the same meaning; versions of p2r may write it differently.

    Returns:
        The published artefact, and whether this call published it. Damaged and missing files of an artefact that was
        published before are written again.

    Raises:
        CheckpointError: A different artefact is published there; the message says what, when, and what differs.
    """
    content = json_bytes(manifest.model_dump(mode="json"))
    if len(content) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"the manifest of {storage.url} has {len(content):,} bytes, more than {MAX_MANIFEST_BYTES:,}"
        )
    if not storage.exists(MANIFEST):
        for role, entry in manifest.files.entries().items():
            _upload_if_damaged(storage, entry, files[role])
        if storage.create(MANIFEST, content):
            return Artefact(storage, manifest, content), True
    published = open_artefact(Reference(storage.url))
    differ = _list_differences(manifest, published, is_same)
    if differ:
        raise _conflict_error(published, differ)
    for role, entry in published.manifest.files.entries().items():
        if entry.sha256 == manifest.files.entries()[role].sha256:
            _upload_if_damaged(storage, entry, files[role])
        elif not _is_sound(storage, entry):
            raise DamagedError(
                f"{storage.at(entry.name)} is absent or damaged, and this version of p2r writes it differently: restore the file"
            )
    return published, False


def _upload_if_damaged(storage: Storage, entry: FileEntry, local: Path) -> None:
    """Upload a file unless the storage has it with the digest of its entry."""
    if not _is_sound(storage, entry):
        storage.upload(local, entry.name)


def _is_sound(storage: Storage, entry: FileEntry) -> bool:
    facts = storage.facts(entry.name)
    if facts is None or facts.num_bytes != entry.num_bytes:
        return False
    try:
        with tempfile.TemporaryFile() as file:
            storage.fetch(entry.name, file, sha256=entry.sha256, num_bytes=entry.num_bytes)
    except DamagedError:
        return False
    return True


def _list_differences(
    mine: Manifest, published: Artefact, is_same: Mapping[Role, Callable[[bytes], bool]]
) -> list[str]:
    """Return one phrase per difference between two manifests, ignoring the program that wrote them.

    The card is generated by p2r, so it may differ if the program differs.
    """
    theirs = published.manifest
    is_same_program = all(getattr(mine, name) == getattr(theirs, name) for name in _PROGRAM)
    differ: list[str] = []
    for role, entry in mine.files.entries().items():
        other = theirs.files.entries().get(role)
        if other is None or other.sha256 == entry.sha256 or (role == "card" and not is_same_program):
            continue
        if role in is_same and _has_same(published, role, is_same[role]):
            continue
        differ.append(role)
    if type(mine) is not type(theirs):
        return [*differ, "format"]
    for name in type(mine).model_fields:
        found, wanted = getattr(theirs, name), getattr(mine, name)
        if name in ("files", "format", *_PROGRAM) or found == wanted:
            continue
        if theirs.format.endswith("/1") and name not in theirs.model_fields_set:
            continue  # version 1 did not record this yet
        differ.append(f"{name} ({found!r:.60} there, {wanted!r:.60} here)" if isinstance(wanted, str | int) else name)
    return differ


def _has_same(published: Artefact, role: Role, is_same: Callable[[bytes], bool]) -> bool:
    try:
        return is_same(published.read(role))
    except (DamagedError, CheckpointError):
        return False


def _conflict_error(published: Artefact, differ: list[str]) -> CheckpointError:
    facts = published.storage.facts(MANIFEST)
    when = "" if facts is None else f" at {datetime.fromtimestamp(facts.modified_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    manifest = published.manifest
    return CheckpointError(
        f"{published.storage.url} is already published with other {', '.join(differ)}, and published artefacts never change: "
        f"choose another publish.version. Found {published.pin}, published{when} by p2r {manifest.p2r_version}, code "
        f"{manifest.code}"
    )


def _read_bounded(storage: Storage, path: str, max_bytes: int) -> bytes | None:
    """Return at most `max_bytes` + 1 bytes of a file; None if it is absent."""
    facts = storage.facts(path)
    if facts is None:
        return None
    return storage.read_range(path, 0, min(facts.num_bytes, max_bytes + 1))


def entry_of(role: Role, local: Path) -> FileEntry:
    """Return the entry for a local file that is to be published."""
    sha256 = file_sha256(local)
    return FileEntry(name=file_name(role, sha256), sha256=sha256, num_bytes=local.stat().st_size)
