"""Scans -> a corpus. Concurrent, killed and repeated runs converge to one complete corpus with the scans of all runs.

    find_scans -> plan_growth -> build_shard (any number at once, on any machine) -> publish

A run is a loop. It reads the current revision, lists the scans that it lacks, builds shards from them, and publishes the
next revision unless another run has published one meanwhile. In that case it starts again from the new revision and
reuses the shards that are built. Shards never change and a revision never loses anything, so readers need no lock.

Every scan found has a row in the ledger, whatever its outcome: nothing is dropped silently.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from p2r.config import IngestConfig
from p2r.data.build import Built as Built
from p2r.data.build import build_shard as build_shard
from p2r.data.growth import Growth, plan_growth, preprocessing_of, subject_of
from p2r.data.growth import ShardPlan as ShardPlan
from p2r.data.label_maps import CODE as LABEL_MAP
from p2r.data.label_maps import WAY_OUT
from p2r.data.ledger import LedgerRow, count_reasons, is_accepted, is_failure
from p2r.data.manifest import Manifest
from p2r.data.manifest import contains as contains
from p2r.data.manifest import load_manifest as load_manifest
from p2r.data.manifest import manifest_sha256 as manifest_sha256
from p2r.data.pseudonyms import Names, names_if_known, names_of
from p2r.data.revision import (
    Revision,
    choose_thumbnails,
    current_revision,
    next_manifest,
    publish_revision,
    settle_ledger,
    write_refused_ledger,
)
from p2r.data.scans import Found, search_scans
from p2r.data.scans import Scan as Scan
from p2r.data.scans import expand_subjects as expand_subjects
from p2r.data.scans import find_scans as find_scans
from p2r.data.verify import verify_corpus as verify_corpus
from p2r.errors import DataError
from p2r.logs import Say, duration
from p2r.storage import Storage, cache_folder, json_bytes

BuildAll = Callable[[Sequence[ShardPlan]], Generator[tuple[ShardPlan, Built], None, None]]

_MIN_ROWS_TO_STOP = 20
_NEWER_FIELDS = ("label_maps", "one_subject")
_MAX_SHOWN = 5


@dataclass(frozen=True)
class IngestProgress:
    """Progress of an ingest after one more shard."""

    shard: str | None
    """Name of the tar; None if all its scans were refused."""
    done: int
    """Shards done, including this one."""
    num_shards: int
    """Shards to build."""
    rows: tuple[LedgerRow, ...]
    """Ledger rows of the shard's scans."""
    scans_read: int
    """Scans read so far."""
    num_scans: int
    """Scans to read."""
    refused: dict[str, int]
    """Number of scans refused so far, by reason."""
    mb_per_s: float
    """Read throughput, in file size; shards built by earlier runs do not count."""
    remaining_s: float | None
    """Estimated time left at this throughput; None until a shard is built."""

    def line(self) -> str:
        """Return a line for the terminal."""
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items())
        left = (
            "" if self.remaining_s is None or self.done == self.num_shards else f" | {duration(self.remaining_s)} left"
        )
        digits = 0 if self.mb_per_s >= 10 else 1
        rate = f"{self.mb_per_s:.{digits}f} MB/s" if self.mb_per_s >= 0.1 else f"{self.mb_per_s * 1000:.0f} kB/s"
        return f"scans {self.scans_read}/{self.num_scans} | shards {self.done}/{self.num_shards} | {rate}{left}" + (
            f" | refused: {refused}" if refused else ""
        )


def ingest(
    config: IngestConfig,
    storage: Storage,
    *,
    build_all: BuildAll,
    allowed_subjects: Set[str] | None = None,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Iterator[IngestProgress]:
    """Create the corpus at `storage`, or add new scans to it; it is complete when the iterator ends.

    Args:
        config: The job's ingest section.
        storage: Storage of the corpus.
        build_all: Calls `build_shard` for every plan, in any order, and yields each plan with its result.
        allowed_subjects: Subjects to which `config.subjects_of` resolves; None: all.
        cache: Folder for `template://` sources.
        say: Receives lines for the user.

    Raises:
        DataError: if the corpus was made with other settings, or holds scans that this job does not select. Also if no scan
            is usable, or more are refused than `config.max_refused_fraction` allows; the ledger is then written first.
    """
    names = names_of(config.cohort, pseudonyms=config.pseudonyms)
    found = _find_scans(config, cache)
    asked = names.asked(corpus_digest(config, allowed_subjects))
    storage.check_conditional()
    is_published = False
    while not is_published:
        base = current_revision(storage)
        _check_only_grows(base, config, names, found.scans, allowed_subjects, cache, storage)
        growth = plan_growth(
            found.scans,
            config,
            names,
            ledger=base.rows,
            first_number=len(base.shards),
            allowed_subjects=allowed_subjects,
            passed_over=found.passed_over,
        )
        _report_oddities(growth, say)
        if not growth.is_new:
            say(f"{storage.url} is complete")
            settle_ledger(storage)
            return
        built = yield from _build(growth, config, storage, build_all, say)
        built, ledger = _mark_copies(growth, built, config, build_all)
        _check_refused(ledger, ledger, config, storage)
        entries = [result.entry for result in built if result.entry is not None]
        if not entries and base.manifest is not None and _same_rows(ledger, base.rows):
            say(f"{storage.url} is complete; scans that could not be read before were tried again, in vain")
            settle_ledger(storage)
            return
        if not entries and base.manifest is None:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in count_reasons(ledger).items()) or "no scan at all"
            )
            raise DataError(
                f"no scan is usable ({reasons}); {write_refused_ledger(storage, ledger)} lists the reason for each scan"
            )
        candidates = dict(base.thumbnails)
        for result in built:
            candidates |= result.thumbnails
        thumbnails = choose_thumbnails(candidates, ledger)
        manifest = next_manifest(
            base, config, names, asked=asked, entries=entries, ledger=ledger, thumbnails=thumbnails
        )
        is_published = publish_revision(storage, base, manifest, ledger, thumbnails)
        if is_published:
            _report_absent_contrasts(manifest, ledger, config, say)
        else:
            say("another run published a revision meanwhile: continuing from it")


def _same_rows(ledger: Iterable[LedgerRow], other: Iterable[LedgerRow]) -> bool:
    return {row.key: row for row in ledger} == {row.key: row for row in other}


def check_selection(
    config: IngestConfig, *, allowed_subjects: Set[str] | None = None, cache: Path | None = None
) -> None:
    """List the scans of a job's sources and check that some are selected, without reading any scan.

    Raises:
        DataError: as `find_scans` and `plan_growth`.
    """
    plan_growth(
        _find_scans(config, cache).scans, config, names_of(config.cohort, pseudonyms=config.pseudonyms), allowed_subjects=allowed_subjects
    )  # fmt: skip


def subjects_found(config: IngestConfig, *, cache: Path | None = None) -> frozenset[str]:
    """Return the subjects of all scans in a job's sources, before any selection.

    Raises:
        DataError: as `find_scans`; also for a pattern without a group.
    """
    subjects = (subject_of(scan, config) for scan in _find_scans(config, cache).scans)
    return frozenset(subject for subject in subjects if subject is not None)


def _find_scans(config: IngestConfig, cache: Path | None) -> Found:
    return search_scans(
        config.sources,
        cache=cache or cache_folder(),
        include=config.include,
        exclude=config.exclude,
        dicom_subject=config.dicom_subject,
    )


def ingest_locally(
    config: IngestConfig,
    storage: Storage,
    *,
    allowed_subjects: Set[str] | None = None,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Iterator[IngestProgress]:
    """Create or grow a corpus in this process, one shard after another: `ingest` with a sequential `build_all`."""

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        return ((plan, build_shard(plan, config, storage)) for plan in plans)

    return ingest(config, storage, build_all=build_all, allowed_subjects=allowed_subjects, cache=cache, say=say)


def report_progress(progress: Iterable[IngestProgress], say: Say, *, interval_s: float = 2.0) -> None:
    """Run an ingest to its end and log its first, last and periodic progress reports."""
    last: IngestProgress | None = None
    said_at = 0.0
    for report in progress:
        last = report
        if report.done == 1 or time.monotonic() - said_at >= interval_s:
            say(report.line())
            said_at, last = time.monotonic(), None
    if last is not None:
        say(last.line())


def corpus_digest(config: IngestConfig, allowed_subjects: Set[str] | None = None) -> str:
    """Digest of a requested corpus: of the ingest section, with `subjects_of` resolved to subjects."""
    # Newer fields are left out at their defaults, so that corpora made before them keep their digests.
    newer = {name for name in _NEWER_FIELDS if getattr(config, name) == IngestConfig.model_fields[name].default}
    asked = config.model_dump(mode="json", exclude={"subjects_of", *newer})
    if config.sessions is not None and (order := list(config.sessions.contrasts)) != sorted(order):
        asked["order_of_contrasts"] = order  # JSON objects have none
    return hashlib.sha256(
        json_bytes({**asked, "allowed_subjects": None if allowed_subjects is None else sorted(allowed_subjects)})
    ).hexdigest()


def was_asked(manifest: Manifest, config: IngestConfig, allowed_subjects: Set[str] | None = None) -> bool:
    """Return whether this section requested the corpus; False if that depends on a pseudonym secret that is not set."""
    digest = corpus_digest(config, allowed_subjects)
    names = names_if_known(config.cohort, pseudonyms=config.pseudonyms)
    known = {digest} if names is None else {digest, names.asked(digest)}  # earlier versions wrote the digest unkeyed
    return not known.isdisjoint(manifest.facts.asked)


def _build(
    growth: Growth, config: IngestConfig, storage: Storage, build_all: BuildAll, say: Say
) -> Generator[IngestProgress, None, list[Built]]:
    """Build all plans, yielding progress; return the results in the plans' order."""
    plans = growth.plans
    num_bytes = sum(plan.num_bytes for plan in plans)
    num_scans = sum(len(plan.scans) for plan in plans)
    if plans:
        say(f"{num_scans} scans to read, {num_bytes / 1e6:.0f} MB, for {len(plans)} shards")
    most_inputs = len(growth.rows) + num_scans
    if sum(map(is_failure, growth.rows)) > config.max_refused_fraction * most_inputs:
        _check_refused(growth.rows, growth.rows, config, storage)
    done: dict[int, Built] = {}
    refused: Counter[str] = Counter()
    scans_read = bytes_done = bytes_read = num_failed = num_rows = 0
    began = time.monotonic()
    with closing(build_all(plans)) as results:
        for plan, result in results:
            done[plan.number] = result
            scans_read += len(plan.scans)
            bytes_done += plan.num_bytes
            bytes_read += 0 if result.is_found else plan.num_bytes
            refused.update(row.reason for row in result.rows if not is_accepted(row))
            elapsed_s = max(time.monotonic() - began, 1e-6)
            yield IngestProgress(
                shard=None if result.entry is None else result.entry.name,
                done=len(done),
                num_shards=len(plans),
                rows=result.rows,
                scans_read=scans_read,
                num_scans=num_scans,
                refused=dict(sorted(refused.items())),
                mb_per_s=bytes_read / elapsed_s / 1e6,
                remaining_s=(num_bytes - bytes_done) * elapsed_s / bytes_read if bytes_read else None,
            )
            num_failed += sum(map(is_failure, result.rows))
            num_rows += len(result.rows)
            if num_rows >= _MIN_ROWS_TO_STOP and num_failed > config.max_refused_fraction * num_rows:
                read = [row for plan in plans if plan.number in done for row in done[plan.number].rows]
                _check_refused([*growth.rows, *read], read, config, storage)
    return [done[plan.number] for plan in plans]


def _mark_copies(
    growth: Growth, built: Sequence[Built], config: IngestConfig, build_all: BuildAll
) -> tuple[list[Built], list[LedgerRow]]:
    """Mark scans that are copies of another subject's scan; the first in the order of the plans is the original.

    If copies are refused, the shards that hold them are built again without them.

    Returns:
        The results, and the whole ledger.
    """
    first = {row.voxels_sha256: row.key for row in growth.rows if is_accepted(row) and row.copy_of is None}
    again: dict[int, ShardPlan] = {}
    marked: dict[int, Built] = {}
    for plan, result in zip(growth.plans, built, strict=True):
        copies, rows = [], list(result.rows)
        for number, row in enumerate(rows):
            if is_accepted(row) and (original := first.setdefault(row.voxels_sha256, row.key)) != row.key:
                copies.append((row.key, original))
                rows[number] = row.model_copy(update={"copy_of": original})
        marked[plan.number] = replace(result, rows=tuple(rows))
        if copies and config.cross_subject_copies == "refuse":
            again[plan.number] = replace(plan, without=tuple(copies))
    if again:
        marked |= {plan.number: result for plan, result in build_all(tuple(again.values()))}
    final = [marked[plan.number] for plan in growth.plans]
    return final, [*growth.rows, *(row for result in final for row in result.rows)]


def _check_refused(
    ledger: Sequence[LedgerRow], inputs: Sequence[LedgerRow], config: IngestConfig, storage: Storage
) -> None:
    """Stop the job if too many inputs were refused, after writing the ledger."""
    read = [row for row in inputs if row.status != "not_selected"]
    failed = [row for row in read if is_failure(row)]
    if len(failed) <= config.max_refused_fraction * len(read):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(failed).items())
    where = write_refused_ledger(storage, ledger)
    raise DataError(
        f"{len(failed)} of {len(read)} scans read were refused ({reasons}), ingest.max_refused_fraction is "
        f"{config.max_refused_fraction:g}: {where} lists the reason for each scan; correct the sources, or raise the limit. The next "
        "run reuses the shards that were built"
    )


def _check_only_grows(
    base: Revision,
    config: IngestConfig,
    names: Names,
    found: Sequence[Scan],
    allowed_subjects: Set[str] | None,
    cache: Path | None,
    storage: Storage,
) -> None:
    """Refuse a job whose settings or selection contradict the existing corpus.

    Raises:
        DataError: naming the settings that differ, or the subjects and scans that the job leaves out.
    """
    if base.manifest is None:
        return
    way_out = "a corpus only grows: give the job another storage URL, or the section that made the corpus"
    _refuse_other_settings(base.manifest, config, names, way_out, storage)
    accepted = [row for row in base.rows if is_accepted(row)]
    selected = allowed_subjects
    if config.subjects is not None:
        listed = frozenset(expand_subjects(config.subjects))
        selected = listed if selected is None else selected & listed
    if selected is not None:
        published = {names.subject(name) for name in selected}
        _refuse_left_out("subjects", {row.subject for row in accepted} - published, way_out, storage)
    missing = {row.source for row in accepted} - {names.source(scan.path) for scan in found}
    if missing and (config.include or config.exclude):
        everything = find_scans(config.sources, cache=cache or cache_folder(), dicom_subject=config.dicom_subject)
        _refuse_left_out("scans", missing & {names.source(scan.path) for scan in everything}, way_out, storage)


def _refuse_other_settings(
    manifest: Manifest, config: IngestConfig, names: Names, way_out: str, storage: Storage
) -> None:
    """Refuse a job whose settings differ from those of the corpus; names each of them."""
    # Fields newer than the corpus had their defaults when it was made.
    defaults = preprocessing_of(IngestConfig(sources=config.sources, licence=config.licence))
    statement = manifest.facts.deidentification
    theirs = {**defaults, **manifest["preprocessing"], "names": (statement.get("names"), statement.get("key_id"))}
    ours = {**preprocessing_of(config), "names": (names.statement()["names"], names.statement().get("key_id"))}
    for name in ("licence", "cohort"):
        theirs[name], ours[name] = manifest[name], getattr(config, name)
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differing:
        differences = "; ".join(
            f"{name}: {theirs.get(name)!r} in the corpus, {ours.get(name)!r} in the job" for name in differing
        )
        raise DataError(f"{storage.url} holds a corpus made with other settings ({differences}); {way_out}")


def _refuse_left_out(kind: str, left_out: Set[str], way_out: str, storage: Storage) -> None:
    if left_out:
        shown = ", ".join(sorted(left_out)[:_MAX_SHOWN]) + (", ..." if len(left_out) > _MAX_SHOWN else "")
        raise DataError(
            f"{storage.url} holds {len(left_out)} {kind} that this job does not select ({shown}); {way_out}"
        )


def _report_absent_contrasts(manifest: Manifest, ledger: Sequence[LedgerRow], config: IngestConfig, say: Say) -> None:
    absent = [name for name, count in (manifest.facts.contrasts or {}).items() if not count]
    if not absent or config.sessions is None:
        return
    line = f"no session has a usable scan of {', '.join(absent)}: see the ledger, and the patterns in ingest.sessions.contrasts"
    if config.sessions.fourth_axis == "time" and any(is_accepted(row) and row.shape[3] > 1 for row in ledger):
        line += (
            "; if the fourth axis of the scans holds contrasts, not time, set ingest.sessions.fourth_axis: contrasts"
        )
    say(line)


def _report_oddities(growth: Growth, say: Say) -> None:
    label_maps = [row for row in growth.rows if row.reason == LABEL_MAP]
    if label_maps:
        say(
            f"{len(label_maps)} label map{'s' * (len(label_maps) > 1)} left out, such as {label_maps[0].source} (see the ledger); "
            f"{WAY_OUT}"
        )
    for row in growth.rows:
        if row.reason == "not_raw":
            say(row.message)
    if growth.changed:
        shown = ", ".join(growth.changed[:_MAX_SHOWN]) + (", ..." if len(growth.changed) > _MAX_SHOWN else "")
        say(
            f"{len(growth.changed)} scans changed after they were accepted; their records stay as they are ({shown}). To read them "
            "again, make another corpus"
        )
