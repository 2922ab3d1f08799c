"""Published versions below a URL: folders -> names, their versions, pointers and origins.

    <url>/<name>/@stable.json
    <url>/<name>/<version>/manifest.json ...

The URL is a job's storage, of which `backbones/` and `models/` are read, a folder of names, or the folder of one name. Documents that are
damaged are listed with their problem; none of them stops the others.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from p2r.artefact import MANIFEST, MAX_MANIFEST_BYTES, Artefact, open_artefact, removed_on
from p2r.artefact_manifest import BackboneManifest, ModelManifest
from p2r.errors import InputError, error_text
from p2r.files import is_temporary
from p2r.pointers import Pointer, pointer_in, read_pointer
from p2r.published.metrics import TrainingMetrics, metrics_of
from p2r.published.results import Result, results_of
from p2r.recent import read_bounded
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage

_ROOTS = ("backbones", "models")
_THREADS = 8


@dataclass(frozen=True)
class Version:
    """One folder with files of a published version, or of one that was never finished."""

    storage: Storage
    version: str
    files: tuple[str, ...]
    """Paths of all its files below the folder."""
    artefact: Artefact | None
    """The artefact; None if there is no valid manifest."""
    modified_s: float
    """Time of writing of the manifest, or of the newest file without one, seconds since 1970 by the storage's clock."""
    removed: str | None = None
    """Date on which `p2r gc` put it out of use; None: in use."""
    problem: str | None = None
    """Reason that the manifest cannot be used."""

    @property
    def published(self) -> str:
        """Date of publication, ISO 8601 in UTC."""
        return f"{datetime.fromtimestamp(self.modified_s, UTC):%Y-%m-%dT%H:%M:%SZ}"

    @property
    def num_bytes(self) -> int:
        """Size of all files that the manifest names."""
        if self.artefact is None:
            return 0
        return sum(entry.num_bytes for entry in self.artefact.manifest.files.entries().values())


@dataclass(frozen=True)
class Collection:
    """One name, with its versions and pointers."""

    storage: Storage
    name: str
    versions: tuple[Version, ...]
    """In the order of their publication."""
    pointers: dict[str, Pointer] = field(default_factory=dict)
    damaged_pointers: dict[str, str] = field(default_factory=dict)
    """Problem of each pointer whose document cannot be used."""

    def pointers_to(self, version: Version) -> list[str]:
        """Return the pointers that name a version."""
        return [name for name, one in self.pointers.items() if one.target.version == version.version]


def read_collections(url: str) -> list[Collection]:
    """Read everything that is published below a URL.

    Raises:
        InputError: The URL is pinned, or is one version.
        StorageError: It cannot be read.
    """
    reference = parse_reference(url)
    if reference.sha256 is not None or reference.pointer is not None:
        raise InputError(
            f"{url[:300]} is one version; give the folder of its name, or a job's storage (p2r show shows a version)"
        )
    storage = Storage(reference.url)
    if storage.exists(MANIFEST):
        raise InputError(f"{storage.url} is one version or a corpus; give the folder of its name, or a job's storage")
    roots = [root for root in _ROOTS if storage.list(root)]
    paths = [
        f"{root}/{path}" if root else path
        for root in roots or [""]
        for path in storage.child(root).list(with_temporary=True)
    ]
    folders: dict[str, dict[str, list[str]]] = {}
    pointers: dict[str, list[str]] = {}
    for path in paths:
        *above, name = path.split("/")
        if (pointer := pointer_in(name)) is not None:
            pointers.setdefault("/".join(above), []).append(pointer)
        elif (match := re.fullmatch(r"((?:.+/)?)([^/]+)/([^/]+)", path)) is not None:
            folders.setdefault(match[1].rstrip("/"), {}).setdefault(match[2], []).append(match[3])
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="p2r-list") as pool:
        found = [
            _read_collection(storage, path, folders.get(path, {}), pointers.get(path, ()), pool)
            for path in sorted(folders.keys() | pointers.keys())
        ]
    return [one for one in found if one.versions or one.pointers or one.damaged_pointers]


def _read_collection(
    storage: Storage, path: str, folders: dict[str, list[str]], pointers: Sequence[str], pool: ThreadPoolExecutor
) -> Collection:
    where = storage.child(path) if path else storage
    is_published = {
        name: MANIFEST in files or any(re.fullmatch(r"\w+-[0-9a-f]{64}\.\w+", file) for file in files)
        for name, files in folders.items()
    }
    if pointers or any(is_published.values()):
        # A publisher that was killed while it wrote its first file left nothing else.
        is_published = {name: is_published[name] or any(map(is_temporary, files)) for name, files in folders.items()}
    read = pool.map(lambda item: _read_version(where, *item), [one for one in folders.items() if is_published[one[0]]])
    found = Collection(
        where, where.url.rpartition("/")[2], tuple(sorted(read, key=lambda one: (one.modified_s, one.version)))
    )
    for pointer in sorted(pointers):
        try:
            tagged = read_pointer(where, pointer)
        except InputError as error:
            found.damaged_pointers[pointer] = error_text(error)
        else:
            if tagged is not None:
                found.pointers[pointer] = tagged[0]
    return found


def _read_version(versions: Storage, name: str, files: Sequence[str]) -> Version:
    storage = versions.child(name)
    times = [
        facts.modified_s for file in ([MANIFEST] if MANIFEST in files else files) if (facts := storage.facts(file))
    ]
    artefact, removed, problem = None, None, None
    if MANIFEST in files:
        try:
            artefact = open_artefact(Reference(storage.url), is_fresh=True)
        except InputError as error:
            content = read_bounded(storage, MANIFEST, 2 * MAX_MANIFEST_BYTES)
            removed = None if content is None else removed_on(content)
            problem = None if removed else error_text(error)
    else:
        problem = "it has files and no manifest: its publisher was interrupted, or is at work"
    return Version(storage, name, tuple(sorted(files)), artefact, max(times, default=0.0), removed, problem)


def enclosing_storage(url: str) -> str | None:
    """Return the URL of the job's storage that holds a folder of names, or the folder of one name; None if it is in none."""
    storage = Storage(url)
    if any(storage.list(root) for root in _ROOTS):
        return None  # it is a job's storage itself
    found = re.fullmatch(rf"(.+/)(?:{'|'.join(_ROOTS)})(?:/[^/]+)?", storage.url)
    return None if found is None else found[1]


def parents_named(collections: Sequence[Collection]) -> dict[str, str]:
    """Return the digests of all manifests that published artefacts name as their origin, and the URL of one that names each."""
    return {
        sha256: version.storage.url
        for collection in collections
        for version in collection.versions
        if version.artefact is not None
        for sha256 in parents_of(version.artefact)
    }


def parents_of(artefact: Artefact) -> Iterator[str]:
    """Yield the digests of the manifests behind an artefact: parents and their origins; of a model, its backbone."""
    manifest = artefact.manifest
    if isinstance(manifest, ModelManifest) and manifest.backbone_sha256 is not None:
        yield manifest.backbone_sha256
    if isinstance(manifest, BackboneManifest) and manifest.lineage is not None:
        yield from (parent.sha256 for parent in manifest.lineage.parents)
        for origin in manifest.lineage.origins:
            if (mark := origin.rpartition("@sha256:"))[1]:
                yield mark[2]


def describe(collection: Collection, version: Version) -> dict[str, Any]:
    """Return the facts about a version for `p2r list --json`."""
    facts: dict[str, Any] = {
        "name": collection.name,
        "version": version.version,
        "url": version.storage.url,
        "published": version.published,
        "pointers": collection.pointers_to(version),
    }
    if version.artefact is None:
        return {**facts, "problem": version.problem or f"removed by p2r gc on {version.removed}"}
    manifest = version.artefact.manifest
    metrics, results, problems = read_figures(version.artefact)
    return {
        **facts,
        "kind": "model" if isinstance(manifest, ModelManifest) else "backbone",
        "sha256": version.artefact.sha256,
        "pin": version.artefact.pin,
        "num_bytes": version.num_bytes,
        "licence": manifest.licence,
        "step": getattr(manifest, "step", None),
        "metrics": None if metrics is None else metrics.model_dump(exclude={"format"}),
        "validation_dice": (getattr(manifest, "validation", None) or {}).get("dice_mean"),
        "results": [one.model_dump() for one in results],
        **({"problem": "; ".join(problems)} if problems else {}),
    }


def read_figures(artefact: Artefact) -> tuple[TrainingMetrics | None, list[Result], list[str]]:
    """Return the metrics and results of an artefact, and the problems of documents that cannot be used."""
    metrics: TrainingMetrics | None = None
    results: list[Result] = []
    problems: list[str] = []
    try:
        metrics = metrics_of(artefact)
    except InputError as error:
        problems.append(error_text(error))
    try:
        results = results_of(artefact)
    except InputError as error:
        problems.append(error_text(error))
    return metrics, results, problems
