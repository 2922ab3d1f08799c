"""Published artefact: a folder of files named by their content, and a manifest that is written once.

    model-<sha256>.safetensors   weights
    config-<sha256>.json         architecture, and the preprocessing of a scan
    README-<sha256>.md           model card
    head-<sha256>.safetensors    optional: projection head of pretraining
    unaveraged-<sha256>...       optional: the last step's weights, if the moving average is published
    metrics-<sha256>.json        optional: health and losses at the published step
    training-<sha256>.png        optional: their curves; no picture of a scan is published with weights
    manifest.json                list of these files, with corpora, licence and origin; created once, last
    manifest.sig                 optional: a signature over manifest.json (`p2r.signature`)
    results.json                 optional: test results, added by later jobs (`p2r.published.results`); not part of the pin

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
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from p2r.artefact_manifest import BackboneManifest as BackboneManifest
from p2r.artefact_manifest import CorpusFacts as CorpusFacts
from p2r.artefact_manifest import FileEntry, Role
from p2r.artefact_manifest import Manifest as Manifest
from p2r.artefact_manifest import ModelManifest as ModelManifest
from p2r.artefact_manifest import Provenance as Provenance
from p2r.documents import checked, read_json, way_out
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.pointers import resolve
from p2r.recent import find, read_bounded, read_current
from p2r.reference import Reference
from p2r.signature import SIGNATURE, SIGNATURE_BYTES, check_signature, sign
from p2r.storage import Storage, json_bytes

MANIFEST = "manifest.json"
RESULTS = "results.json"
REMOVED = "p2r-removed/1"
"""Format of the document that `p2r gc` puts in the place of a manifest before it removes the files."""
MAX_MANIFEST_BYTES = 2**27
"""Largest manifest of an artefact: of backbones that have seen two million scans."""
MAX_MANIFEST_MEMORY_BYTES = 2**29
"""Largest memory of a manifest while it is parsed."""
_MAX_DEPTH = 16
_WAY_OUT = "restore the file from a copy of the folder, or publish another version"
_VERSION_1: dict[Role, str] = {"weights": "model.safetensors", "config": "config.json", "card": "README.md"}
_GENERATED = ("metrics", "picture")
"""Files that are computed from the training's history: another publisher of the same weights may write them differently."""
_PROGRAM = ("p2r_version", "code")

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
        """Return the content of a file, as `Storage.read_hashed`.

        Raises:
            DamagedError: The file is absent, or is not the one that the manifest names.
            StorageError: It cannot be read.
        """
        entry = self.manifest.files.entries()[role]
        return self.storage.read_hashed(entry.name, sha256=entry.sha256, num_bytes=entry.num_bytes)

    def problems(self) -> list[str]:
        """Read all named files, and return one line per problem found."""
        return [
            f"{entry.name}: absent, or without the sha256 of its manifest: it is damaged; publish it again"
            for entry in self.manifest.files.entries().values()
            if not _is_sound(self.storage, entry)
        ]

    def unnamed_files(self) -> list[str]:
        """List files in the folder that are not part of the artefact: leftovers of publishers that lost a race, or foreign files."""
        known = {MANIFEST, SIGNATURE, RESULTS, *(entry.name for entry in self.manifest.files.entries().values())}
        return [name for name in self.storage.list() if name not in known]

    def check_signature(self, key: str) -> str:
        """Check that the owner of a public key signed this manifest, and return the key as text.

        Raises:
            InputError: See `p2r.signature.check_signature`.
        """
        signature = read_current(self.storage, SIGNATURE, max_bytes=SIGNATURE_BYTES)
        return check_signature(self.content, signature, key=key, where=self.storage.url)

    def sign(self, key: Path) -> str:
        """Sign the manifest with a private key, write the signature beside it, and return the public key as text.

        Raises:
            InputError: The key cannot be used, or another key has signed.
        """
        signature, name = sign(self.content, key=key)
        if not self.storage.create(SIGNATURE, signature):
            found = read_bounded(self.storage, SIGNATURE, SIGNATURE_BYTES)
            if found is not None and len(found) != SIGNATURE_BYTES:
                self.storage.write_bytes(SIGNATURE, signature)  # the existing file is not a signature
            elif found != signature:
                raise CheckpointError(
                    f"{self.storage.url} has a signature that is not by {name}: another key's, or a damaged one; delete "
                    f"{SIGNATURE} to replace it"
                )
        return name


def open_artefact(
    reference: Reference, *, format: str | None = None, key: str | None = None, is_fresh: bool = False
) -> Artefact:
    """Read the manifest of a published folder.

    A pinned manifest that this machine has read before needs no request.

    Args:
        reference: Location of the folder, with an optional pin of its manifest; or of the versions, with a pointer.
        format: Required format, `p2r-backbone` or `p2r-model`; None: either.
        key: Public key that must have signed the manifest; None: no signature required.
        is_fresh: Read pointer and manifest from the storage, whatever this machine has read before.

    Raises:
        DamagedError: The manifest is absent, was put out of use, differs from the pin, or is not signed by this key.
        StorageError: It cannot be read.
        CheckpointError: The manifest is not one of the required format.
    """
    reference = resolve(reference, is_fresh=is_fresh)
    storage = Storage(reference.url)
    content = _read_manifest(storage, reference, is_fresh=is_fresh)
    if content is None:
        raise DamagedError(
            f"{storage.url} holds no manifest.json: give the folder of one published version, such as backbones/NAME/1"
        )
    manifest = _parse(content, reference, where=storage.at(MANIFEST), needed=format)
    artefact = Artefact(storage, manifest, content)
    if key is not None:
        artefact.check_signature(key)
    return artefact


def _read_manifest(storage: Storage, reference: Reference, *, is_fresh: bool) -> bytes | None:
    if is_fresh:
        return read_bounded(storage, MANIFEST, MAX_MANIFEST_BYTES)
    if reference.sha256 is not None and not storage.is_local and (content := find(reference.sha256)) is not None:
        return content
    return read_current(storage, MANIFEST, max_bytes=MAX_MANIFEST_BYTES)


def _parse(content: bytes, reference: Reference, *, where: str, needed: str | None) -> Manifest:
    if (removed := removed_on(content)) is not None:
        raise DamagedError(f"{where} was put out of use by p2r gc on {removed}: choose another version")
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
        return str((files.get("weights") or files.get(_VERSION_1["weights"]))["sha256"])
    except (InputError, TypeError, KeyError, AttributeError):
        return None


def removed_on(content: bytes) -> str | None:
    """Return the date on which `p2r gc` put an artefact out of use, given the content of its manifest; None: it is in use."""
    if REMOVED.encode() not in content[:200]:
        return None
    try:
        value = _value_of(content, "")
    except InputError:
        return None
    is_removed = isinstance(value, dict) and value.get("format") == REMOVED
    return str(value.get("removed"))[:40] if is_removed else None


def _upgrade_version_1(value: dict[str, object], model: type[Manifest]) -> dict[str, object]:
    """Convert a manifest of version 1 to version 2, dropping unused entries."""
    files = value.get("files")
    named = {
        role: {"name": name, **files[name]}
        for role, name in _VERSION_1.items()
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
            for role, entry in manifest.files.entries().items():
                if not storage.exists(entry.name):  # an earlier publisher's file, which `p2r gc` removed in between
                    storage.upload(files[role], entry.name)
            return Artefact(storage, manifest, content), True
    published = open_artefact(Reference(storage.url), is_fresh=True)
    differ = _list_differences(manifest, published, is_same)
    if differ:
        raise _conflict_error(published, differ)
    mine = manifest.files.entries()
    for role, entry in published.manifest.files.entries().items():
        if role in mine and entry.sha256 == mine[role].sha256:
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
        if other is None or other.sha256 == entry.sha256 or role in _GENERATED:
            continue
        if role == "card" and not is_same_program:
            continue
        if role in is_same and _has_same(published, role, is_same[role]):
            continue
        differ.append(role)
    if type(mine) is not type(theirs):
        return [*differ, "format"]
    for name in type(mine).model_fields:
        found, wanted = getattr(theirs, name), getattr(mine, name)
        if name in ("files", "format", "lineage", *_PROGRAM) or found == wanted:
            continue  # equal weights may come from a checkpoint that was saved again
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
