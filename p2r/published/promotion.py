"""Promotion: checks of a version, then a compare-and-swap of a pointer.

    files     every digest is right, and the weights fit the configuration; nothing overrides this check
    health    backbones: embeddings have not collapsed
    dice      no result is below the present version's beyond noise, and there is a result that both have

A check that fails refuses the promotion by name, unless a reason is given, which the pointer's document records. A promoter that loses a
race checks again, against the version that won. A pointer that is moved while `p2r gc` removes its version is moved back.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from p2r.artefact import MANIFEST, Artefact, open_artefact
from p2r.artefact_manifest import BackboneManifest, ModelManifest
from p2r.backbone import verify_artefact
from p2r.errors import InputError, StorageError, error_text
from p2r.logs import Say
from p2r.pointers import Pointer, file_of, move, name_of, read_pointer
from p2r.published.metrics import metrics_of
from p2r.published.results import Result, results_of
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage, json_bytes

LATEST = "latest"
"""Pointer that every publication moves."""
MIN_EFFECTIVE_RANK = 2.0
MAX_DEAD_DIMENSIONS = 0.5
"""Limits of health, as in the alert on collapsed embeddings."""
_MAX_TRIES = 20


@dataclass(frozen=True)
class Check:
    """Outcome of one check."""

    name: str
    is_passed: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'passed' if self.is_passed else 'FAILED'}: {self.reason}"


def promote(reference: str, pointer: str, *, forced: str | None, say: Say) -> Pointer:
    """Move a pointer to a version, after its checks, and return the pointer's document.

    Args:
        reference: The version: `NAME/VERSION`, with or without a pin, or `NAME@latest`.
        pointer: Pointer to move.
        forced: Reason for moving it although a check fails; None: a failed check refuses.
        say: Receives the outcome of every check.

    Raises:
        InputError: A check failed, the version is damaged, or is not below the folder of a name.
        StorageError: The storage cannot be written, or ignores conditions.
    """
    file_of(pointer)
    artefact = open_artefact(parse_reference(reference), is_fresh=True)
    versions, version = split_version(artefact.storage)
    versions.check_conditional()
    verify_artefact(artefact)
    for _ in range(_MAX_TRIES):
        since = read_pointer(versions, pointer)
        if since is not None and (since[0].target.version, since[0].target.sha256) == (version, artefact.sha256):
            say(f"promote | {versions.url}@{pointer} names {version} already")
            return since[0]
        checks = [Check("files", True, "every digest is right"), *_checks(artefact, versions, since)]
        for check in checks:
            say(f"promote | {check}")
        failed = [check for check in checks if not check.is_passed]
        if failed and forced is None:
            raise InputError(_refusal(artefact, versions, pointer, failed))
        moved = move(
            versions,
            pointer,
            version=version,
            sha256=artefact.sha256,
            checks=[str(check)[:2000] for check in checks],
            forced=forced if failed else None,
            since=since,
        )
        if moved is not None:
            _check_in_use(artefact, versions, pointer, since)
            return moved
        say(f"promote | {pointer} was moved by another promotion meanwhile: checking again, against its version")
    raise StorageError(f"{versions.at(file_of(pointer))} was moved by others {_MAX_TRIES} times in a row: try again")


def move_latest(artefact: Storage, sha256: str, *, is_new: bool) -> None:
    """Move the pointer `latest` to a version that was just published, unless it names a newer one.

    Args:
        artefact: Folder of the version.
        sha256: Digest of its manifest.
        is_new: True if it was published now, not found published.
    """
    versions, version = split_version(artefact)
    for _ in range(_MAX_TRIES):
        since = read_pointer(versions, LATEST)
        if since is not None:
            target = since[0].target
            if (target.version, target.sha256) == (version, sha256):
                return
            newest, mine = versions.facts(f"{target.version}/{MANIFEST}"), artefact.facts(MANIFEST)
            if newest is not None and mine is not None and (newest.modified_s, not is_new) > (mine.modified_s, False):
                return
        if move(versions, LATEST, version=version, sha256=sha256, checks=[], forced=None, since=since) is not None:
            return
    raise StorageError(f"{versions.at(file_of(LATEST))} was moved by others {_MAX_TRIES} times in a row: try again")


def split_version(storage: Storage) -> tuple[Storage, str]:
    """Return the folder that holds the versions of an artefact's name, and its version.

    Raises:
        InputError: The folder cannot have pointers.
    """
    url, _, version = storage.url.rpartition("/")
    if storage.url.startswith("hf://"):
        raise InputError(f"{storage.url} is on a hub, which has tags of its own: p2r push --tag NAME")
    if url.endswith(":/") or "/" not in url.partition("://")[2] or not version:
        raise InputError(f"{storage.url} is not below the folder of a name: pointers need NAME/VERSION")
    return Storage(url), version


def _checks(artefact: Artefact, versions: Storage, since: tuple[Pointer, str] | None) -> Iterator[Check]:
    if isinstance(artefact.manifest, BackboneManifest):
        yield _check_health(artefact)
    yield _check_dice(artefact, versions, None if since is None else since[0])


def _check_health(artefact: Artefact) -> Check:
    try:
        metrics = metrics_of(artefact)
    except InputError as error:
        return Check("health", False, error_text(error))
    health = None if metrics is None else metrics.health
    if not health:
        return Check("health", False, "the backbone was published without metrics of its embeddings")
    rank, dead = health.get("effective_rank"), health.get("dead_dimensions_fraction")
    if rank is None or dead is None:
        return Check("health", False, "its metrics lack effective_rank or dead_dimensions_fraction")
    if rank < MIN_EFFECTIVE_RANK or dead > MAX_DEAD_DIMENSIONS:
        return Check(
            "health",
            False,
            f"embeddings have collapsed: effective rank {rank:.3g} (at least {MIN_EFFECTIVE_RANK:g}), dead dimensions "
            f"{dead:.0%} (at most {MAX_DEAD_DIMENSIONS:.0%})",
        )
    return Check("health", True, f"effective rank {rank:.3g}, dead dimensions {dead:.0%}")


def _check_dice(artefact: Artefact, versions: Storage, pointer: Pointer | None) -> Check:
    if pointer is None:
        return Check("dice", True, "the pointer is new, so there is nothing to compare with")
    target = pointer.target
    try:
        present = open_artefact(Reference(versions.at(target.version), target.sha256), is_fresh=True)
        theirs, mine = ({one.key: one for one in _results(of)} for of in (present, artefact))
    except InputError as error:
        return Check("dice", False, f"the results cannot be compared: {error_text(error)}")
    shared = sorted(theirs.keys() & mine.keys())
    if not theirs:
        return Check("dice", True, f"version {target.version}, which the pointer names, has no results to compare with")
    if not shared:
        named = "; ".join(one.setting() for one in list(theirs.values())[:3])
        return Check("dice", False, f"it has no result in common with version {target.version}, which has: {named}")
    worse = [text for key in shared if (text := _decline(theirs[key], mine[key])) is not None]
    if worse:
        return Check("dice", False, f"below version {target.version}: {'; '.join(worse)}")
    return Check("dice", True, f"{len(shared)} results are not below those of version {target.version} beyond noise")


def _results(artefact: Artefact) -> list[Result]:
    if not isinstance(artefact.manifest, ModelManifest):
        return results_of(artefact)
    found = _validation_of(artefact.manifest)
    return [] if found is None else [found]


def _validation_of(manifest: ModelManifest) -> Result | None:
    """Return the validation Dice of a model as a result, with the interval of a mean over its patients."""
    validation = manifest.validation or {}
    by_subject = validation.get("dice_by_subject")
    values = [one for one in by_subject.values() if isinstance(one, float)] if isinstance(by_subject, dict) else []
    mean = validation.get("dice_mean")
    if not isinstance(mean, int | float) or not 0 <= mean <= 1:
        return None
    half = 0.0
    if len(values) > 1:
        centre = math.fsum(values) / len(values)
        variance = math.fsum((one - centre) ** 2 for one in values) / (len(values) - 1)
        half = 1.96 * math.sqrt(variance / len(values))
    return Result(
        task=manifest.task or "",
        protocol="validation",
        split="validation",
        transductive=bool(manifest.transductive),
        mode="published",
        num_labelled=1,
        draws=1,
        patients=max(1, len(values)),
        mean=float(mean),
        lower=max(0.0, mean - half),
        upper=min(1.0, mean + half),
    )


def _decline(theirs: Result, mine: Result) -> str | None:
    """Return how far a result is below another if that exceeds the noise of both; None if it does not.

    The noise is the root of the sum of the squared half-widths that face each other: an interval of the difference of two independent
    means. Both have the same test patients, so the true noise is smaller, and a small decline passes.
    """
    noise = math.hypot(max(0.0, mine.upper - mine.mean), max(0.0, theirs.mean - theirs.lower))
    if mine.mean + noise >= theirs.mean:
        return None
    return f"{mine.setting()}: {mine.mean:.3f} against {theirs.mean:.3f}, and the noise is {noise:.3f}"


def _refusal(artefact: Artefact, versions: Storage, pointer: str, failed: list[Check]) -> str:
    reasons = "\n".join(f"  {check}" for check in failed)
    return (
        f"{artefact.storage.url} is not promoted to {name_of(versions)}@{pointer}:\n{reasons}\nPublish a better version, or add what is "
        "missing; or repeat the command with --force REASON, and the pointer records the reason"
    )


def _check_in_use(artefact: Artefact, versions: Storage, pointer: str, since: tuple[Pointer, str] | None) -> None:
    """Move a pointer back if its new version was removed while it was moved.

    Raises:
        StorageError: It was.
    """
    try:
        open_artefact(Reference(artefact.storage.url, artefact.sha256), is_fresh=True)
        return
    except StorageError as error:
        problem = error_text(error)
    found = read_pointer(versions, pointer)
    if found is not None and found[0].target.sha256 == artefact.sha256:
        if since is None:
            versions.delete(file_of(pointer))
        else:
            versions.replace(file_of(pointer), json_bytes(since[0].model_dump(mode="json")), tag=found[1])
    raise StorageError(
        f"{artefact.storage.url} was removed while it was promoted, and {pointer} was moved back: {problem}"
    )
