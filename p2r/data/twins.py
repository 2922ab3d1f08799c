"""Subjects that have a copy of another subject's scan: one person under two names, who would leak between splits."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from p2r.data.scan import Scan
from p2r.data.volume import read_volume, voxels_sha256
from p2r.errors import RefusedScan

_PIECE_BYTES = 1 << 16
_MAX_READ = 40


def twins_of(subjects: Mapping[str, Sequence[Scan]]) -> dict[str, str]:
    """Find copies of scans under other subjects' names, without reading every scan.

    A gzip file ends with a checksum of its content; of other files a piece is compared. Candidates are read, up to 40 of
    them, and their voxels decide. Files of a bucket, and copies with another header, are not found; a run finds them.

    Args:
        subjects: Scans by subject.

    Returns:
        Later subject -> earlier subject with the same voxels.
    """
    candidates: dict[tuple[int, bytes], list[tuple[str, Scan]]] = defaultdict(list)
    for subject, scans in sorted(subjects.items()):
        for scan in scans:
            if subject and (mark := _content_mark(scan)) is not None:
                candidates[mark].append((subject, scan))
    twins: dict[str, str] = {}
    num_read = 0
    for same in candidates.values():
        if len({subject for subject, _ in same} - twins.keys()) < 2:
            continue
        first_of: dict[str, str] = {}
        for subject, scan in same[: _MAX_READ - num_read]:
            num_read += 1
            try:
                owner = first_of.setdefault(voxels_sha256(read_volume(scan.path)), subject)
            except RefusedScan:
                continue
            if owner != subject:
                twins.setdefault(subject, owner)
    return twins


def _content_mark(scan: Scan) -> tuple[int, bytes] | None:
    """Return a number and bytes that are equal for files of the same content; None if the file is not read."""
    path = Path(scan.path)
    if scan.format != "nifti" or scan.files or not path.is_file():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if path.name.lower().endswith(".gz"):
            file.seek(max(0, size - 8))
            return -1, file.read(8)  # CRC-32 and length of the content
        file.seek(size // 2)
        return size, zlib.crc32(file.read(_PIECE_BYTES)).to_bytes(4)
