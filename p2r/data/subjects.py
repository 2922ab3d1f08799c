"""Subject names in jobs and tasks: plain, as ranges such as `patient[001-014]`, or found in file names by a pattern."""

import itertools
import math
import re
from collections.abc import Iterable

from p2r.data.names import composed, lower_suffix
from p2r.errors import DataError
from p2r.patterns import Pattern

_MAX_SUBJECTS = 1_000_000


def expand_subjects(patterns: Iterable[str]) -> list[str]:
    """Expand ranges as in Slurm's host lists: `patient[001-003,007]` -> patient001, patient002, patient003, patient007.

    Zero padding is kept, plain names stay, and a repeated name appears once, at its first position.

    Raises:
        DataError: for unclosed brackets, a range that is not increasing, or more than a million names.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        names |= dict.fromkeys(_expand_pattern(pattern))
        _check_count(len(names), pattern)
    return list(names)


def subject_by_pattern(pattern: Pattern, name: str, below: str) -> str | None:
    """Return the subject that a pattern finds in a scan's file name, else in its path below the source; None without a match.

    The suffix is in lower case first, so that `\\.nii` matches `P01.NII.GZ`.
    """
    texts = (lower_suffix(name), lower_suffix(below), name, below)
    return next((found for text in texts if (found := pattern.first_group(text))), None)


def _expand_pattern(pattern: str) -> list[str]:
    pieces = re.split(r"\[([^\[\]]*)\]", composed(pattern))  # text, ranges, text, ranges, ..., text
    if any(bracket in text for text in pieces[::2] for bracket in "[]") or not pattern:
        raise DataError(f"subjects {pattern!r}: write a name, or ranges in closed brackets as in patient[001-014,020]")
    choices = [[piece] if index % 2 == 0 else _expand_ranges(piece, pattern) for index, piece in enumerate(pieces)]
    _check_count(math.prod(map(len, choices)), pattern)
    return ["".join(choice) for choice in itertools.product(*choices)]


def _expand_ranges(ranges: str, pattern: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, flags=re.ASCII)
        if match is None:
            raise DataError(f"subjects {pattern!r}: {part!r} is neither a number nor a range such as 001-014")
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise DataError(
                f"subjects {pattern!r}: the range {part!r} is not increasing; write the smaller number first"
            )
        _check_count(len(numbers) + int(last) - int(first), pattern)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _check_count(count: int, pattern: str) -> None:
    if count > _MAX_SUBJECTS:
        raise DataError(f"subjects {pattern[:80]!r} expands to more than {_MAX_SUBJECTS:,} names; narrow its ranges")
