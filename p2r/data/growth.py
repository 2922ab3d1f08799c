"""Scans found, and the ledger of a corpus -> the new scans, assigned to shards.

Names and file sizes determine the shard of each scan before anything is read. So every shard can be built, or rebuilt after
a failure, independently of the others, always with the same bytes. Scans planned together keep a subject in one shard;
later scans of the subject go into later shards, because shards never change.

A scan is identified by its path, size and time. A refused scan is read again after it changes; an accepted scan keeps its
record.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace

import numpy as np

from p2r.config import IngestConfig
from p2r.data.label_maps import CODE as LABEL_MAP
from p2r.data.label_maps import WAY_OUT
from p2r.data.ledger import LedgerRow, is_accepted, ledger_row
from p2r.data.pseudonyms import Names
from p2r.data.scans import Scan, expand_subjects
from p2r.data.sessions import Place, Refusal, place_scans
from p2r.data.subjects import subject_by_pattern
from p2r.data.thumbnails import MOST, lowest_lots
from p2r.errors import DataError
from p2r.patterns import subject_pattern
from p2r.randomness import keyed_generator
from p2r.storage import json_bytes

_SELECTION = (
    "sources", "include", "exclude", "licence", "provenance", "cohort", "subject_pattern", "subjects", "subjects_of",
    "shard_size_mib", "seed", "pseudonyms", "max_refused_fraction", "cross_subject_copies", "dicom_subject",
    "one_subject",
)  # fmt: skip
_LIMITS = ("max_scan_mib", "dcm2niix_timeout_s", "label_maps")  # may differ from run to run
_DEFAULT_PATTERN = IngestConfig.model_fields["subject_pattern"].default
_LATE_CONTRAST = Refusal(
    "late_contrast",
    "its session is in the corpus already, and records never change: make another corpus to add a contrast",
)
MAY_PASS = frozenset(("unreadable", "too_large", "timeout"))
"""Reasons that may pass without a change of the scan: a mount comes back, permissions or limits change. Such scans are read again."""
_MIN_SUSPICIOUS_SCANS = 3  # this number of scans, all of one subject by the pattern, suggests a wrong pattern


@dataclass(frozen=True)
class PlannedScan:
    """A scan to read, and its names as published by the corpus."""

    scan: Scan
    key: str
    subject: str
    source: str
    modified: str
    num_bytes: int | None = None
    """Size of its files in the ledger; None with pseudonyms."""
    entities: tuple[tuple[str, str], ...] = ()
    is_shown: bool = False
    """True if the report needs its thumbnail."""
    session: str = ""
    """Key of its session's record; empty if each scan is a record."""
    contrast: str = ""
    """Name of its contrast in the session; empty if its fourth axis holds all contrasts."""

    def refused_row(
        self, reason: str, message: str, *, key: str | None = None, copy_of: str | None = None
    ) -> LedgerRow:
        """Return the scan's row in the ledger, or that of one of its volumes, if it is refused."""
        return ledger_row(
            key=self.key if key is None else key,
            source=self.source,
            num_bytes=self.num_bytes,
            modified=self.modified,
            subject=self.subject,
            status="refused",
            reason=reason,
            message=message,
            copy_of=copy_of,
        )


@dataclass(frozen=True)
class ShardPlan:
    """The scans of one shard. Small, so that it can be sent to another machine."""

    number: int
    """Number of the shard in the corpus, for its name."""
    scans: tuple[PlannedScan, ...]
    """Scans in the order of the records."""
    known: tuple[tuple[str, str, str], ...] = ()
    """(subject, voxel digest, key) of scans of these subjects that the corpus already holds."""
    without: tuple[tuple[str, str], ...] = ()
    """(key of a copy to leave out, key of the original, a scan of another subject)."""
    max_refused_thumbnails: int = MOST
    """Maximum number of thumbnails of refused scans."""

    @property
    def num_bytes(self) -> int:
        """Size of the files to read."""
        return sum(planned.scan.num_bytes for planned in self.scans)

    def digest(self, config: IngestConfig) -> str:
        """Digest of everything that the shard depends on, except its number; the key by which a built shard is reused."""
        members = []
        for planned in self.scans:
            fields = asdict(planned)
            if not planned.session:
                del fields["session"], fields["contrast"]  # as in the digests of shards without sessions
            # With pseudonyms the size is not published, but its digest is part of `modified`.
            members.append({**fields, "scan": fields.pop("num_bytes"), "files": len(planned.scan.files)})
        return hashlib.sha256(
            json_bytes(
                {
                    "version": 1,
                    "scans": members,
                    "known": sorted(self.known),
                    "without": sorted(self.without),
                    "max_refused_thumbnails": self.max_refused_thumbnails,
                    "preprocessing": preprocessing_of(config),
                    "limits": config.model_dump(mode="json", include=set(_LIMITS)),
                    "cohort": config.cohort,
                    "licence": config.licence,
                    "pseudonyms": config.pseudonyms,
                }
            )
        ).hexdigest()


@dataclass(frozen=True)
class Growth:
    """Additions of a job to a corpus."""

    plans: tuple[ShardPlan, ...]
    """Shards to build."""
    rows: tuple[LedgerRow, ...]
    """Rows of the next ledger except for the scans in `plans`: rows that stay, and rows of scans that are not read."""
    changed: tuple[str, ...]
    """Sources that changed after they were accepted."""
    is_new: bool
    """True if anything is added."""


def preprocessing_of(config: IngestConfig) -> dict[str, object]:
    """Return the fields of an ingest section that determine the record of a scan, or its refusal."""
    found = config.model_dump(mode="json", exclude={*_SELECTION, *_LIMITS})
    if config.sessions is not None:
        found["sessions"]["by_priority"] = list(config.sessions.by_priority)  # JSON objects have no order
        if (order := list(config.sessions.contrasts)) != list(config.sessions.by_priority):
            found["sessions"]["order"] = order  # of patterns, and along the fourth axis
    return found


def plan_growth(
    scans: Sequence[Scan],
    config: IngestConfig,
    names: Names,
    *,
    ledger: Sequence[LedgerRow] = (),
    first_number: int = 0,
    allowed_subjects: Set[str] | None = None,
    passed_over: Sequence[Scan] = (),
) -> Growth:
    """Find the new scans and assign them to shards, subject by subject, in an order shuffled by `config.seed`.

    Args:
        scans: Scans from `find_scans`.
        config: The job's ingest section.
        names: Names as the corpus publishes them.
        ledger: Ledger of the current corpus.
        first_number: Number of the first new shard.
        allowed_subjects: Subjects to which `config.subjects_of` resolves; None: all.
        passed_over: Folders that are not read, from `search_scans`; each gets a row.

    Raises:
        DataError: if a listed subject has no scan, or no scan belongs to a selected subject. Also if all scans appear to
            belong to one subject, and the section does not confirm it.
    """
    subjects = {scan: subject_of(scan, config) for scan in scans}
    _check_subject_pattern(subjects, config, allowed_subjects)
    found = {subject for subject in subjects.values() if subject is not None}
    selected = _select_subjects(found, config, allowed_subjects)
    if not selected:
        raise _make_no_subject_error(len(scans), found, config, allowed_subjects)
    inputs = (*subjects.items(), *((folder, None) for folder in passed_over))
    additions = _compare_with_ledger(inputs, ledger, selected, config, names)
    rows = list(additions.rows)
    places = _place_in_sessions(additions, subjects, config, names, ledger, rows)
    kept = [row for row in ledger if row.source not in additions.replaced]
    keys = _UniqueKeys(row.key for row in kept)
    rows = [row.model_copy(update={"key": keys.reserve(row.key, row.source)}) for row in rows]
    planned = [_plan_scan(scan, subjects[scan] or "", places[scan], names, keys) for scan in sorted(places)]
    plans = tuple(_plan_shards(planned, config, kept, first_number=first_number))
    return Growth(plans, (*kept, *rows), tuple(additions.changed), is_new=bool(plans or rows))


@dataclass(frozen=True)
class _Additions:
    """Inputs of a job that the corpus does not hold yet, or holds differently."""

    to_read: list[Scan]
    waiting: dict[Scan, str]
    """Unchanged scans to read again, with the reason why they were refused: others of their session may have come or gone, or the
    reason may have passed."""
    rows: list[LedgerRow]
    """Rows of inputs that are not read."""
    replaced: set[str]
    """Sources whose rows in the ledger are outdated."""
    changed: list[str]
    """Sources that changed after they were accepted."""


def _compare_with_ledger(
    inputs: Iterable[tuple[Scan, str | None]],
    ledger: Sequence[LedgerRow],
    selected: Set[str],
    config: IngestConfig,
    names: Names,
) -> _Additions:
    known, additions = _group_by_source(ledger), _Additions([], {}, [], set(), [])
    for scan, subject in inputs:
        source = names.source(scan.path)
        old = known.get(source, [])
        is_same = all(names.is_state((row.num_bytes, row.modified), scan.num_bytes, scan.modified) for row in old)
        if any(is_accepted(row) for row in old):
            if not is_same:
                additions.changed.append(source)
            continue
        row = _make_unread_row(scan, subject, selected, config, names)
        if old and is_same and _keeps_outcome(old[0], row, config):
            if row is None and (_depends_on_session(old[0], config) or old[0].reason in MAY_PASS):
                additions.waiting[scan] = old[0].reason
            continue
        additions.replaced.add(source)
        if row is None:
            additions.to_read.append(scan)
        else:
            additions.rows.append(row)
    return additions


def _place_in_sessions(
    additions: _Additions,
    subjects: Mapping[Scan, str | None],
    config: IngestConfig,
    names: Names,
    ledger: Sequence[LedgerRow],
    rows: list[LedgerRow],
) -> dict[Scan, Place | None]:
    """Return the scans to read with their places in sessions, None without sessions; append a row for each of the others.

    A waiting scan keeps its row while nothing has changed for its session. Otherwise it is read, and its row replaced.
    """
    if config.sessions is None:
        additions.replaced.update(names.source(scan.path) for scan in additions.waiting)
        return dict.fromkeys((*additions.to_read, *additions.waiting))
    held = {row.record for row in ledger if is_accepted(row) and row.record is not None}
    scans = {scan: subjects[scan] or "" for scan in (*additions.to_read, *additions.waiting)}
    found = place_scans(scans, config.sessions, is_hidden=config.pseudonyms)
    changed = {
        place.session
        for scan, place in found.items()
        if isinstance(place, Place) and additions.waiting.get(scan) != "no_reference"
    }
    places: dict[Scan, Place | None] = {}
    for scan, outcome in found.items():
        is_held = isinstance(outcome, Place) and names.key(outcome.session) in held
        if scan in additions.waiting:
            if isinstance(outcome, Refusal) or not (is_held or outcome.session in changed):
                continue
            if is_held and additions.waiting[scan] in MAY_PASS:
                continue  # its session's record does not change
            additions.replaced.add(names.source(scan.path))
        if isinstance(outcome, Place) and not is_held:
            places[scan] = outcome
            continue
        refusal = outcome if isinstance(outcome, Refusal) else _LATE_CONTRAST
        status = "not_selected" if refusal.code == "no_contrast" else "refused"
        message = names.message(f"{scan.name}: {refusal.message}")
        rows.append(_unread_row(scan, scans[scan], names, status=status, reason=refusal.code, message=message))
    return places


def _plan_scan(scan: Scan, subject: str, place: Place | None, names: Names, keys: "_UniqueKeys") -> PlannedScan:
    num_bytes, modified = names.state(scan.num_bytes, scan.modified)
    return PlannedScan(
        scan=scan,
        key=keys.reserve(names.key(scan.key), names.source(scan.path)),
        subject=names.subject(subject),
        source=names.source(scan.path),
        modified=modified,
        num_bytes=num_bytes,
        entities=tuple(names.entities(dict(scan.entities)).items()),
        session="" if place is None else names.key(place.session),
        contrast="" if place is None else place.contrast,
    )


def _plan_shards(
    planned: Sequence[PlannedScan], config: IngestConfig, kept: Sequence[LedgerRow], *, first_number: int
) -> Iterator[ShardPlan]:
    shown = set(lowest_lots((it.key for it in planned), 2 * MOST))  # twice the needed number: some will be refused
    groups: dict[str, list[PlannedScan]] = defaultdict(list)
    for it in planned:
        groups[it.subject].append(replace(it, is_shown=it.key in shown))
    held: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for row in kept:
        if is_accepted(row) and row.subject in groups:
            held[row.subject].append((row.subject, row.voxels_sha256, row.key))
    parts = list(_assign_subjects(groups, config))
    for number, part in enumerate(parts):
        yield ShardPlan(
            number=first_number + number,
            scans=tuple(it for subject in part for it in groups[subject]),
            known=tuple(entry for subject in part for entry in held[subject]),
            # Shards are shuffled, so the first ones are representative; this bounds the number of thumbnails sent.
            max_refused_thumbnails=-(-2 * MOST // len(parts)) if number < 2 * MOST else 0,
        )


def _assign_subjects(groups: Mapping[str, Sequence[PlannedScan]], config: IngestConfig) -> Iterator[list[str]]:
    """Yield the subjects of each shard. A shard is full when its source files reach `shard_size_mib`."""
    names = sorted(groups)
    order = np.argsort(keyed_generator(config.seed, "shards").bit_generator.random_raw(len(names)), kind="stable")
    part: list[str] = []
    num_bytes = 0
    for index in order:
        part.append(names[index])
        num_bytes += sum(it.scan.num_bytes for it in groups[names[index]])
        if num_bytes >= config.shard_size_mib * 2**20:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _make_no_subject_error(
    num_scans: int, found: Set[str], config: IngestConfig, allowed_subjects: Set[str] | None
) -> DataError:
    way_out = (
        f"selected: {_list_names(allowed_subjects)} (ingest.subjects_of); correct ingest.subject_pattern, or ingest.sources"
        if allowed_subjects is not None
        else "correct ingest.subjects or ingest.subject_pattern"
    )
    return DataError(
        f"none of the {num_scans} scans found belongs to a selected subject; subjects found by ingest.subject_pattern "
        f"{config.subject_pattern!r}: {_list_names(found)}; {way_out}"
    )


def _keeps_outcome(old: LedgerRow, row: LedgerRow | None, config: IngestConfig) -> bool:
    """Return whether an unchanged scan keeps its row: it was read and refused, or is left out for the same reason.

    Args:
        old: Its row in the ledger.
        row: Its row if it is not read now; None: it is to be read.
        config: The job's ingest section.
    """
    was_read = old.reason not in ("not_selected", "no_subject") and not _is_accepted_now(old, config)
    return was_read or (row is not None and row.reason == old.reason)


def _depends_on_session(row: LedgerRow, config: IngestConfig) -> bool:
    """Return whether a scan was refused because of the other scans of its session."""
    if config.sessions is None:
        return False
    return row.reason == "no_reference" or (row.reason == "contrast_twice" and config.sessions.repeats == "refuse")


def _is_accepted_now(row: LedgerRow, config: IngestConfig) -> bool:
    """Return whether a scan was left out as a label map, and the job now takes label maps."""
    return row.reason == LABEL_MAP and config.label_maps == "take"


def _make_unread_row(
    scan: Scan, subject: str | None, selected: Set[str], config: IngestConfig, names: Names
) -> LedgerRow | None:
    """Return the row of a scan that is not read; None if the scan is to be read."""
    status = "not_selected"
    if scan.passed_over:
        reason, message = "not_raw", f"{scan.path}: {scan.passed_over}"
    elif scan.label_map and config.label_maps == "leave_out":
        reason, message = LABEL_MAP, f"{scan.name} {scan.label_map}, so it is taken for a label map; {WAY_OUT}"
    elif subject is None:
        status, reason = "refused", "no_subject"
        message = f"{scan.name} does not match subject_pattern {config.subject_pattern!r}"
    elif subject in selected:
        return None
    else:
        reason, message = "not_selected", ""
    return _unread_row(scan, subject, names, status=status, reason=reason, message=names.message(message))


def _unread_row(scan: Scan, subject: str | None, names: Names, *, status: str, reason: str, message: str) -> LedgerRow:
    num_bytes, modified = names.state(scan.num_bytes, scan.modified)
    return ledger_row(
        key=names.key(scan.key),
        source=names.source(scan.path),
        num_bytes=num_bytes,
        modified=modified,
        subject=None if subject is None else names.subject(subject),
        status=status,
        reason=reason,
        message=message,
    )


class _UniqueKeys:
    """Record keys in use. A second file of the same name gets part of the digest of its source as a suffix."""

    def __init__(self, used: Iterable[str]) -> None:
        self._used = set(used)

    def reserve(self, key: str, source: str) -> str:
        if key in self._used:
            key = f"{key}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        self._used.add(key)
        return key


def _group_by_source(ledger: Iterable[LedgerRow]) -> dict[str, list[LedgerRow]]:
    found: dict[str, list[LedgerRow]] = defaultdict(list)
    for row in ledger:
        found[row.source].append(row)
    return found


def subject_of(scan: Scan, config: IngestConfig) -> str | None:
    """Return the subject of a scan: from BIDS or a list, else the job's pattern, else `dataset.json`, else the default pattern."""
    if scan.subject is not None:
        return scan.subject
    text = config.subject_pattern
    if scan.case is not None and text == _DEFAULT_PATTERN:
        return scan.case
    pattern = subject_pattern(text)
    return subject_by_pattern(pattern, scan.name, scan.below)


def _check_subject_pattern(subjects: Mapping[Scan, str | None], config: IngestConfig, allowed: Set[str] | None) -> None:
    """Refuse a pattern that assigns all scans to one subject; subjects from BIDS names or lists are not questioned."""
    if config.one_subject or config.subjects is not None or allowed is not None:
        return
    is_left_out = config.label_maps == "leave_out"
    scans = [scan for scan in subjects if not (is_left_out and scan.label_map)]
    found = {subjects[scan] for scan in scans}
    if len(scans) < _MIN_SUSPICIOUS_SCANS or len(found) > 1 or None in found or any(scan.subject for scan in scans):
        return
    shown = "" if config.pseudonyms else f", {found.pop()}, such as {scans[0].name} and {scans[-1].name}"
    raise DataError(
        f"all {len(scans)} scans found are of one subject by ingest.subject_pattern {config.subject_pattern!r}{shown}. Write a "
        "pattern whose first group is the subject's name, such as ^(.+?)\\.nii if every file is a subject. If they do show one "
        "person, set ingest.one_subject: true"
    )


def _select_subjects(found: set[str], config: IngestConfig, allowed: Set[str] | None) -> set[str]:
    selected = found if allowed is None else found & allowed
    if config.subjects is None:
        return selected
    listed = set(expand_subjects(config.subjects))
    if absent := listed - found:
        raise DataError(
            f"ingest.subjects lists {_list_names(absent)} without any scan; subjects found: {_list_names(found)}"
        )
    return selected & listed


def _list_names(names: Set[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return f"{shown}, and {len(ordered) - 5} more" if len(ordered) > 5 else shown or "none"
