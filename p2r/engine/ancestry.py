"""Corpora and licences that a run inherits through its initial weights.

A run that starts from another run's weights has seen that run's patients, too. A checkpoint records the origin of its initial
weights as pins of corpora and backbones (`origins`). Publishing reads them, so that the backbone names every corpus.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from p2r.artefact import Artefact, CorpusFacts, open_artefact
from p2r.data.manifest import ManifestFacts, load_manifest, revision_path
from p2r.engine.checkpoint_manifest import CheckpointManifest, InitialWeights
from p2r.errors import CheckpointError, DamagedError, DataError, InputError
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage


class Ancestry(NamedTuple):
    """Pretraining data of initial weights."""

    corpora: list[CorpusFacts] | None
    """Corpora; None: unknown, at least in part."""
    licences: list[str]


def corpus_facts(facts: ManifestFacts, *, url: str, sha256: str, weight: float | None) -> CorpusFacts:
    """Return the facts about a corpus revision that a backbone keeps.

    Fine-tuning needs the digests, to refuse a task whose validation or test patients are in the corpus.
    """
    return CorpusFacts(
        url=url,
        sha256=sha256,
        weight=weight,
        licence=facts.licence,
        provenance=facts.provenance,
        cohort=facts.cohort,
        num_samples=facts.num_samples,
        num_subjects=facts.num_subjects,
        salt=facts.salt,
        subject_digests=facts.subject_digests,
        voxel_digests=facts.voxel_digests,
        deidentification=facts.deidentification,
    )


def origins_of_checkpoint(manifest: CheckpointManifest, url: str) -> list[str] | None:
    """Return pins of all pretraining data of a checkpoint's weights; None: unknown.

    Args:
        manifest: Manifest of the checkpoint.
        url: URL of its folder.
    """
    try:
        return _list_origins(manifest, url)
    except (ValidationError, ValueError, InputError):  # of another version, or invalid
        return None


class _Streamed(BaseModel):
    """A corpus in the stream state of a checkpoint."""

    manifest_sha256: str


class _Share(BaseModel):
    """A corpus in the section pretrain of a checkpoint."""

    url: str


class _Stream(BaseModel):
    """The stream state of a checkpoint."""

    corpora: list[_Streamed] = []


class _Data(BaseModel):
    """Pretraining data of a checkpoint."""

    corpus: str | list[_Share] | None = None
    stream: _Stream = _Stream()


def _list_origins(manifest: CheckpointManifest, url: str) -> list[str] | None:
    before = manifest.init_from
    origins = [] if before is None else before.origins
    stream, corpus = manifest.state.stream, manifest.config.to_json().get("corpus")
    data = _Data.model_validate({"corpus": corpus} | ({} if stream is None else {"stream": stream}))
    streamed = data.stream.corpora
    own = re.fullmatch(r"(.+)/pretrain/checkpoints/[^/]+", url)
    of_job = data.corpus or (f"{own[1]}/corpus" if own else [])
    urls = [of_job] if isinstance(of_job, str) else [share.url for share in of_job]
    if origins is None or not streamed or len(urls) != len(streamed):
        return None
    pins = [str(Reference(Storage(one).url, part.manifest_sha256)) for one, part in zip(urls, streamed, strict=True)]
    return [*origins, *(pin for pin in pins if pin not in origins)]


def origins_of_backbone(artefact: Artefact) -> list[str]:
    """Return pins of all pretraining data of a backbone's weights: the backbone itself, whose manifest names its corpora."""
    return [artefact.pin]


def ancestry(init_from: InitialWeights | None) -> Ancestry:
    """Return the corpora and licences of a run's initial weights.

    Args:
        init_from: Record of the initial weights in the checkpoint; None: random weights.

    Raises:
        InputError: An origin may be there, and cannot be read now: its storage cannot be reached, or a package is missing.
    """
    if init_from is None:
        return Ancestry([], [])
    if init_from.origins is None:
        return Ancestry(None, ["unknown"])
    corpora: list[CorpusFacts] | None = []
    licences: list[str] = []
    for origin in init_from.origins:
        found = _read_origin(origin)
        licences += found.licences
        corpora = None if corpora is None or found.corpora is None else corpora + found.corpora
    return Ancestry(corpora, licences)


def _read_origin(origin: str) -> Ancestry:
    unknown = Ancestry(None, ["unknown"])
    try:
        reference = parse_reference(origin)
    except InputError:
        return unknown
    if reference.sha256 is None:
        return unknown
    try:
        storage = Storage(reference.url)
        if not storage.exists(revision_path(reference.sha256)):
            manifest = open_artefact(reference, format="p2r-backbone").manifest
            return Ancestry(manifest.corpora or None, [manifest.licence])
        corpus = load_manifest(storage, revision=reference.sha256)
        return Ancestry(
            [corpus_facts(corpus.facts, url=storage.url, sha256=reference.sha256, weight=None)], [corpus.facts.licence]
        )
    except (DamagedError, CheckpointError, DataError):  # deleted, or replaced; what cannot be reached is not unknown
        return unknown


def added(own: Sequence[CorpusFacts], inherited: Sequence[CorpusFacts]) -> list[CorpusFacts]:
    """Return own corpora, plus inherited ones with subjects or scans not in them. Revisions of one corpus share a salt."""
    found = list(own)
    for corpus in inherited:
        is_known = any(
            one.salt == corpus.salt
            and set(corpus.subject_digests) <= set(one.subject_digests)
            and set(corpus.voxel_digests) <= set(one.voxel_digests)
            for one in found
        )
        if not is_known:
            found.append(corpus)
    return found
