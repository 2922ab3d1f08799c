"""A `.csv`, `.tsv` or `.jsonl` file -> the rows of a list of scans.

The column (key) `path` is required. `subject`, or a synonym such as `participant_id`, is optional. All other columns are
stored with the scan as its entities.

Column names are matched in any case and without surrounding spaces. The separator of a `.csv` may be a comma, a semicolon
or a tab. Empty values, and `n/a` as in BIDS, count as missing; rows without values are skipped. Errors name the line.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from p2r.console import is_plain, visible
from p2r.data.names import composed
from p2r.documents import read_lines
from p2r.errors import DataError
from p2r.masking import looks_secret

SUFFIXES = (".csv", ".tsv", ".jsonl")
"""File endings of lists."""

SUBJECT_COLUMNS = ("subject", "subject_id", "participant_id", "participant", "patient_id", "patient")
"""Columns that name the subject; the first one present is used."""

MAX_BYTES = 1 << 27
"""Largest list that is read."""
MAX_LINES = 1_000_000
"""Maximum number of lines, including empty ones; parsing them takes one CPU about ten seconds."""

_MAX_TEXT = 4096
_MAX_COLUMNS = 1000
_MAX_LINE_LENGTH = 1 << 20
_SHOWN = 100
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
"""A line with its end. `io.StringIO` would copy the text at four bytes per character."""


@dataclass(frozen=True)
class Row:
    """One scan of a list."""

    line: int
    """Line number in the list, from 1."""
    path: str
    """Path as written: relative to the list, absolute, or a URL."""
    subject: str | None
    entities: Mapping[str, str]


def parse_list(content: bytes, name: str) -> list[Row]:
    """Parse a list of scans.

    Args:
        content: Bytes of the file.
        name: Path or URL of the file; its suffix determines the format.

    Raises:
        DataError: for text that is not UTF-8, breaks its format, or has no `path`, and for values other than text and numbers.
    """
    if len(content) > MAX_BYTES:
        raise DataError(f"list {name} has more than {MAX_BYTES:,} bytes, the most that a list may have; split it")
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"list {name} is not UTF-8 text: {error}; save it as UTF-8, or: iconv -f LATIN1 -t UTF-8 {name}"
        ) from None
    if text.count("\n") + text.count("\r") - text.count("\r\n") > MAX_LINES:
        raise DataError(f"list {name} has more than {MAX_LINES:,} lines; split it into several lists")
    rows = _parse_jsonl(text.encode(), name) if name.lower().endswith(".jsonl") else _parse_csv(text, name)
    return [_make_row(line, values, f"list {name}, line {line}") for line, values in rows]


def _parse_csv(text: str, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    lines = _iterate_lines(text, name)
    reader = csv.reader(lines, delimiter=_find_delimiter(text, name), skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    try:
        for record in reader:
            if len(record) > _MAX_COLUMNS:
                raise DataError(
                    f"list {name}, line {reader.line_num}: {len(record):,} values; a row may have up to {_MAX_COLUMNS:,}"
                )
            if not any(value.strip() for value in record):
                continue
            if columns is None:
                columns = [_column_name(value) for value in record]
                if "path" not in columns or len(set(columns)) < len(columns) or not all(columns):
                    raise DataError(
                        f"list {name}, line {reader.line_num}: the first line must name each column once, including `path`; "
                        f"got {_shorten(record)}"
                    )
                continue
            if len(record) != len(columns):
                raise DataError(
                    f"list {name}, line {reader.line_num}: {len(record)} values for {len(columns)} columns; "
                    "quote values that contain a separator"
                )
            yield reader.line_num, dict(zip(columns, record, strict=True))
    except csv.Error as error:
        raise DataError(f"list {name}, line {reader.line_num}: {error}") from None


def _iterate_lines(text: str, name: str) -> Iterator[str]:
    for number, match in enumerate(_LINE.finditer(text), start=1):
        if match.end() - match.start() > _MAX_LINE_LENGTH:
            raise DataError(f"list {name}, line {number}: the line exceeds {_MAX_LINE_LENGTH:,} characters; correct it")
        yield match[0]


def _find_delimiter(text: str, name: str) -> str:
    """Return the column separator: for a `.csv`, the one with which `path` is a column."""
    if name.lower().endswith(".tsv"):
        return "\t"
    first = next((line for line in _iterate_lines(text, name) if not line.isspace()), "")
    fitting = [one for one in ",;\t" if "path" in (_column_name(value.strip(' "')) for value in first.split(one))]
    return fitting[0] if fitting else ","


def _column_name(name: str) -> str:
    """Return the name of a column without surrounding spaces; in lower case if p2r uses it."""
    name = name.strip()
    return name.lower() if name.lower() in ("path", *SUBJECT_COLUMNS) else name


def _parse_jsonl(content: bytes, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, value in read_lines(content, where=f"list {name}", max_bytes=MAX_BYTES, max_depth=4, error=DataError):
        found = {_column_name(key): item for key, item in value.items()} if isinstance(value, dict) else {}
        if len(found) > _MAX_COLUMNS:
            raise DataError(f"list {name}, line {line}: {len(found):,} keys; a row may have up to {_MAX_COLUMNS:,}")
        if "path" not in found or len(found) < len(value):
            raise DataError(
                f"list {name}, line {line}: a line must be a JSON object with the key `path`, and each key once"
            )
        yield line, found


def _make_row(line: int, values: Mapping[str, object], where: str) -> Row:
    texts = {
        _check_text(key, "a column name", where): _check_text(value, f"`{_shorten(key)}`", where)
        for key, value in values.items()
    }
    given = {key: value for key, value in texts.items() if value not in ("", "n/a")}
    if "path" not in given:
        raise DataError(f"{where}: `path` is empty; every row must name a file")
    path = given.pop("path")
    column = next((name for name in SUBJECT_COLUMNS if name in given), None)
    return Row(line, path, None if column is None else composed(given.pop(column)), given)


def _check_text(value: Any, field: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not is_plain(value):
        raise DataError(
            f"{where}: {field} must be a number, or a text of up to {_MAX_TEXT} characters without control characters, "
            f"direction marks and zero-width characters; got {_shorten(value)}"
        )
    if looks_secret(value):
        raise DataError(
            f"{where}: {field} looks like a secret, and the rows of a list are stored; pass credentials in the environment only"
        )
    return value.strip()


def _shorten(value: Any) -> str:
    if isinstance(value, str | list):
        value = value[:_SHOWN]
    if isinstance(value, list):
        value = [item[:_SHOWN] if isinstance(item, str) else item for item in value]
    text = visible(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
