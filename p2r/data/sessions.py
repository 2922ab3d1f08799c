"""Scans -> the sessions that they belong to, and their contrasts. Only names and headers are used; voxels are read elsewhere.

list              columns `group` (or a synonym, such as `session`) and `contrast`
DICOM             study, series description
dataset.json      case, channel
BIDS              sub and ses; the other entities and the suffix
other names       subject, and `ses-...` in the path; the file's name
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from p2r.config import SessionsConfig
from p2r.data import bids
from p2r.data.names import composed, scan_key
from p2r.data.scan import Scan

GROUP_COLUMNS = ("group", "session", "session_id", "visit")
"""Columns of a list that name the session; the first one present is used."""

_OWN_ENTITIES = frozenset(("sub", "ses", "run", "suffix"))
_SESSION_IN_PATH = re.compile(r"(?:^|[/_])ses-([A-Za-z0-9]+)(?=[/_.]|$)")


@dataclass(frozen=True)
class Refusal:
    """Reason why a scan is in no session."""

    code: str
    message: str


@dataclass(frozen=True)
class Place:
    """A scan's place in a session."""

    session: str
    """Key of the session's record."""
    contrast: str
    """Name of its contrast; empty for a scan whose fourth axis holds all of them."""


def place_scans(scans: Mapping[Scan, str], sessions: SessionsConfig, *, is_hidden: bool) -> dict[Scan, Place | Refusal]:
    """Return each scan's place in a session, or the reason why it has none.

    Args:
        scans: Subject of each scan.
        sessions: The job's rules.
        is_hidden: True if messages must not name files.
    """
    found: dict[Scan, Place | Refusal] = {}
    together: dict[tuple[str, str], list[Scan]] = defaultdict(list)
    keys = _session_keys({(subject, _group_of(scan)) for scan, subject in scans.items()})
    for scan, subject in scans.items():
        if sessions.fourth_axis == "contrasts":
            contrast: str | None = ""
            if (refusal := _refuse_misnamed_channel(scan, sessions)) is not None:
                found[scan] = refusal
                continue
        else:
            contrast = _find_contrast(contrast_words(scan), sessions)
        if contrast is None:
            words = "" if is_hidden or scan.format == "dicom" else f" ({contrast_words(scan)!r})"
            known = ", ".join(sessions.contrasts)
            found[scan] = Refusal(
                "no_contrast",
                f"its contrast{words} matches none of ingest.sessions.contrasts ({known}); to take it, add a pattern there",
            )
            continue
        place = Place(keys[subject, _group_of(scan)], contrast)
        found[scan] = place
        together[place.session, contrast].append(scan)
    for (_, contrast), repeats in together.items():
        if len(repeats) > 1:
            _settle_repeats(repeats, contrast, sessions, found)
    return found


def contrast_words(scan: Scan) -> str:
    """Return the words that state a scan's contrast."""
    entities = {name.lower(): value for name, value in scan.entities}
    if "contrast" in entities:
        return entities["contrast"]
    if scan.format == "dicom":
        return scan.description
    if "channel" in entities:
        return entities["channel"]
    named = _bids_entities(scan)
    if named:
        others = [f"{name}-{value}" for name, value in named.items() if name not in _OWN_ENTITIES]
        return "_".join([*others, named["suffix"]])
    return scan_key(scan.path)


def session_key(subject: str, group: str) -> str:
    """Return the key of a session's record: subject and group, with a part of their digest where that may be ambiguous."""
    group = "" if group == subject else group
    plain = f"{subject}_{group}" if group else subject
    key = re.sub(r"[^\w-]", "_", composed(plain))
    return _with_digest(key, subject, group) if key != plain or (group and "_" in subject + group) else key


def _session_keys(sessions: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the key of each session by subject and group. Subject A_x, and group x of subject A, get different ones."""
    keys = {session: session_key(*session) for session in sessions}
    counts = Counter(keys.values())
    return {session: key if counts[key] == 1 else _with_digest(key, *session) for session, key in keys.items()}


def _with_digest(key: str, subject: str, group: str) -> str:
    return f"{key}-{hashlib.sha256(f'{subject} {len(subject)} {group}'.encode()).hexdigest()[:8]}"


def _bids_entities(scan: Scan) -> dict[str, str]:
    """Return the entities of a BIDS name, also outside of a data set that declares itself; {} for another name."""
    entities = bids.entities_of(scan.path.rpartition("/")[2])
    return entities if "sub" in entities else {}


def _group_of(scan: Scan) -> str:
    """Return the name of a scan's session among the sessions of its subject; empty if nothing tells them apart."""
    entities = {name.lower(): value for name, value in scan.entities}
    for column in GROUP_COLUMNS:
        if column in entities:
            return entities[column]
    if scan.format == "dicom":
        return scan.study
    if scan.case is not None:
        return scan.case
    session = _bids_entities(scan).get("ses")
    if session is None and (match := _SESSION_IN_PATH.search(scan.below)):
        session = match[1]
    return "" if session is None else f"ses-{session}"


def _find_contrast(words: str, sessions: SessionsConfig) -> str | None:
    """Return the first contrast with a pattern that matches; None if there is none."""
    return next((name for name, patterns in sessions.contrasts.items() if _matches(words, patterns)), None)


def _matches(words: str, patterns: str | tuple[str, ...]) -> bool:
    words = composed(words).lower()
    each = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(words, composed(pattern).lower()) for pattern in each)


def _refuse_misnamed_channel(scan: Scan, sessions: SessionsConfig) -> Refusal | None:
    """Return a refusal if a channel of the fourth axis matches only another contrast than the one that the job's order gives it."""
    if len(scan.channels) != len(sessions.contrasts):
        return None
    for channel, (name, patterns) in zip(scan.channels, sessions.contrasts.items(), strict=True):
        if not _matches(channel, patterns) and (other := _find_contrast(channel, sessions)) is not None:
            return Refusal(
                "other_frames",
                f"by the order of ingest.sessions.contrasts its channel {channel} is {name}, by the patterns {other}: give the "
                "contrasts in the order of its dataset.json; reference names the one whose grid is kept",
            )
    return None


def _settle_repeats(
    repeats: Sequence[Scan], contrast: str, sessions: SessionsConfig, found: dict[Scan, Place | Refusal]
) -> None:
    """Replace the places of scans of one contrast in one session, except the one that the job takes, by a refusal.

    Numbers in names count as numbers: run-10 comes after run-2.
    """
    ordered = sorted(repeats, key=lambda scan: (_natural(scan.path), scan))
    taken = {"refuse": None, "first": ordered[0], "last": ordered[-1]}[sessions.repeats]
    what = f"scans of contrast {contrast}" if contrast else "scans"
    for scan in ordered:
        if scan is taken:
            continue
        way_out = (
            "give a list of scans with the columns group and contrast, ingest.exclude, or ingest.sessions.repeats"
            if taken is None
            else f"ingest.sessions.repeats takes the {sessions.repeats} one"
        )
        found[scan] = Refusal("contrast_twice", f"its session has {len(ordered)} {what}: {way_out}")


def _natural(path: str) -> tuple[tuple[str, int], ...]:
    """Return a sort key of a path in which numbers count as numbers."""
    return tuple((text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d{0,18})", path))
