"""First weights from elsewhere -> the corpora and licences that they bring along.

A run that starts from another's weights has seen that run's patients, too. A checkpoint keeps where its first weights came
from, as pins of corpora and backbones (`origins`); publishing reads them again, so that the backbone names every corpus.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from p2r.artefact import Artefact, CorpusFacts, open_artefact
from p2r.data.manifest import load_manifest, revision_path
from p2r.errors import InputError
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage

_OF_CORPUS = ("licence", "provenance", "cohort", "num_samples", "num_subjects")
# What fine-tuning needs to refuse a task whose validation or test patients are in the corpus.
_OF_LEAKS = ("salt", "subject_digests", "voxel_digests", "deidentification")


class Ancestry(NamedTuple):
    """What first weights were pretrained on."""

    corpora: list[CorpusFacts] | None
    """None: unknown, in part or whole."""
    licences: list[str]


def corpus_facts(manifest: Mapping[str, Any], *, url: str, sha256: str, weight: float | None) -> CorpusFacts:
    """Return what a backbone keeps of a corpus revision."""
    facts = {key: manifest[key] for key in (*_OF_CORPUS, *_OF_LEAKS)}
    return CorpusFacts(url=url, sha256=sha256, weight=weight, **facts)


def origins_of_checkpoint(manifest: Mapping[str, Any], url: str) -> list[str] | None:
    """Return pins of all that a checkpoint's weights were pretrained on; None: unknown.

    Args:
        manifest: Of the checkpoint.
        url: Its folder.
    """
    try:
        return _origins(manifest, url)
    except (KeyError, TypeError, AttributeError, ValueError, InputError):  # of another version, or rubbish
        return None


def _origins(manifest: Mapping[str, Any], url: str) -> list[str] | None:
    before = manifest.get("init_from")
    origins = [] if before is None else before.get("origins")
    own = re.fullmatch(r"(.+)/pretrain/checkpoints/[^/]+", url)
    corpus = manifest["config"].get("corpus") or (f"{own[1]}/corpus" if own else None)
    streamed = manifest["state"].get("stream", {}).get("corpora", [])
    urls = [corpus] if isinstance(corpus, str) else [share["url"] for share in corpus or []]
    if origins is None or not streamed or len(urls) != len(streamed):
        return None
    pins = [str(Reference(Storage(one).url, part["manifest_sha256"])) for one, part in zip(urls, streamed, strict=True)]
    return [*origins, *(pin for pin in pins if pin not in origins)]


def origins_of_backbone(artefact: Artefact) -> list[str]:
    """Return pins of all that a backbone's weights were pretrained on: its manifest says the rest."""
    return [artefact.pin]


def ancestry(init_from: Mapping[str, Any] | None) -> Ancestry:
    """Return the corpora and licences of a run's first weights.

    Args:
        init_from: What its checkpoint keeps of them; None: they were drawn.
    """
    if init_from is None:
        return Ancestry([], [])
    if init_from.get("origins") is None:
        return Ancestry(None, ["unknown"])
    corpora: list[CorpusFacts] | None = []
    licences: list[str] = []
    for origin in init_from["origins"]:
        found = _read(origin)
        licences += found.licences
        corpora = None if corpora is None or found.corpora is None else corpora + found.corpora
    return Ancestry(corpora, licences)


def _read(origin: str) -> Ancestry:
    try:
        reference = parse_reference(origin)
        if reference.sha256 is None:
            return Ancestry(None, ["unknown"])
        storage = Storage(reference.url)
        if not storage.exists(revision_path(reference.sha256)):
            manifest = open_artefact(reference, format="p2r-backbone").manifest
            return Ancestry(manifest.corpora, [manifest.licence])
        corpus = load_manifest(storage, revision=reference.sha256)
        return Ancestry(
            [corpus_facts(corpus, url=storage.url, sha256=reference.sha256, weight=None)], [corpus["licence"]]
        )
    except InputError:  # it is gone, or was exchanged
        return Ancestry(None, ["unknown"])


def added(own: Sequence[CorpusFacts], inherited: Sequence[CorpusFacts]) -> list[CorpusFacts]:
    """Return own corpora, and inherited ones in which somebody is who is in none of these; revisions of one corpus share a salt."""
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
