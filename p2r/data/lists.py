"""A `.csv`, `.tsv` or `.jsonl` file -> the rows of a list of scans.

The column (key) `path` is required; `subject`, or `participant_id` and its like, is optional; all others are kept with the
scan as its entities. Names of columns are read in any case and without spaces around them, as spreadsheets write them;
columns of a `.csv` may be separated by commas, semicolons or tabs. Empty values and `n/a`, as BIDS writes it, are no values;
rows without any are skipped. Every rule that a row breaks is named with its line.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from p2r.console import is_plain, visible
from p2r.data.names import composed
from p2r.documents import read_lines
from p2r.errors import DataError
from p2r.masking import looks_secret

SUFFIXES = (".csv", ".tsv", ".jsonl")
"""File names that are taken for lists."""

SUBJECT_COLUMNS = ("subject", "subject_id", "participant_id", "participant", "patient_id", "patient")
"""Columns that name the subject; the first that a list has counts."""

MAX_BYTES = 1 << 27
"""Largest list that is read."""
MAX_LINES = 1_000_000
"""Most lines of a list, empty ones included: to parse them takes about ten seconds of one CPU."""

_MAX_TEXT = 4096
_MAX_COLUMNS = 1000
_MAX_LINE = 1 << 20
_SHOWN = 100


@dataclass(frozen=True)
class Row:
    """One scan of a list."""

    line: int
    """Where it stands, from 1."""
    path: str
    """As it is written: relative to the list, absolute, or a URL."""
    subject: str | None
    entities: Mapping[str, str]


def parse_list(content: bytes, name: str) -> list[Row]:
    """Parse a list of scans.

    Args:
        content: Of the file.
        name: Path or URL of the file; its suffix says how it is written.

    Raises:
        DataError: for text that is not UTF-8, breaks its format, has no `path`, or values that are no plain values.
    """
    if len(content) > MAX_BYTES:
        raise DataError(f"list {name} has more than the {MAX_BYTES:,} bytes that a list may have; part it")
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"list {name} is not UTF-8 text: {error}; save it as UTF-8, or: iconv -f LATIN1 -t UTF-8 {name}"
        ) from None
    if text.count("\n") + text.count("\r") - text.count("\r\n") > MAX_LINES:
        raise DataError(f"list {name} has more than the {MAX_LINES:,} lines that a list may have; part it")
    rows = _objects(text.encode(), name) if name.lower().endswith(".jsonl") else _records(text, name)
    return [_row(line, values, f"list {name}, line {line}") for line, values in rows]


def _records(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = _lines(text, name)
    reader = csv.reader(lines, delimiter=_delimiter(text, name), skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    try:
        for record in reader:
            if len(record) > _MAX_COLUMNS:
                raise DataError(
                    f"list {name}, line {reader.line_num}: {len(record):,} values; a row may have {_MAX_COLUMNS:,}"
                )
            if not any(value.strip() for value in record):
                continue
            if columns is None:
                columns = [_column(value) for value in record]
                if "path" not in columns or len(set(columns)) < len(columns) or not all(columns):
                    raise DataError(
                        f"list {name}, line {reader.line_num}: the first line names the columns, each once, "
                        f"`path` among them; it reads {_short(record)}"
                    )
                continue
            if len(record) != len(columns):
                raise DataError(
                    f"list {name}, line {reader.line_num}: {len(record)} values for {len(columns)} columns; "
                    "put values with a separator in them into quotes"
                )
            yield reader.line_num, dict(zip(columns, record, strict=True))
    except csv.Error as error:
        raise DataError(f"list {name}, line {reader.line_num}: {error}") from None


def _lines(text: str, name: str) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if len(line) > _MAX_LINE:
            raise DataError(f"list {name}, line {number}: it has more than the {_MAX_LINE:,} characters of a line")
        yield line


def _delimiter(text: str, name: str) -> str:
    """Return what separates the columns: in a `.csv`, what makes `path` one of them."""
    if name.lower().endswith(".tsv"):
        return "\t"
    first = next((line for line in _lines(text, name) if not line.isspace()), "")
    fitting = [one for one in ",;\t" if "path" in (_column(value.strip(' "')) for value in first.split(one))]
    return fitting[0] if fitting else ","


def _column(name: str) -> str:
    """Return the name of a column without spaces around it; in lower case, if p2r knows it."""
    name = name.strip()
    return name.lower() if name.lower() in ("path", *SUBJECT_COLUMNS) else name


def _objects(content: bytes, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, value in read_lines(content, where=f"list {name}", max_bytes=MAX_BYTES, max_depth=4, error=DataError):
        found = {_column(key): item for key, item in value.items()} if isinstance(value, dict) else {}
        if len(found) > _MAX_COLUMNS:
            raise DataError(f"list {name}, line {line}: {len(found):,} keys; a row may have {_MAX_COLUMNS:,}")
        if "path" not in found or len(found) < len(value):
            raise DataError(f"list {name}, line {line}: a line is a JSON object with the key `path`, each key once")
        yield line, found


def _row(line: int, values: Mapping[str, Any], where: str) -> Row:
    texts = {_text(key, "a name", where): _text(value, f"`{_short(key)}`", where) for key, value in values.items()}
    given = {key: value for key, value in texts.items() if value not in ("", "n/a")}
    if "path" not in given:
        raise DataError(f"{where}: `path` is empty; a row names a file")
    path = given.pop("path")
    column = next((name for name in SUBJECT_COLUMNS if name in given), None)
    return Row(line, path, None if column is None else composed(given.pop(column)), given)


def _text(value: Any, what: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not is_plain(value):
        raise DataError(
            f"{where}: {what} must be a text of up to {_MAX_TEXT} characters, without control characters, marks of direction or "
            f"characters of no width, or a number; it reads {_short(value)}"
        )
    if looks_secret(value):
        raise DataError(
            f"{where}: {what} looks like a secret; credentials come from the environment only, for a list's rows are stored"
        )
    return value.strip()


def _short(value: Any) -> str:
    if isinstance(value, str | list):
        value = value[:_SHOWN]
    if isinstance(value, list):
        value = [item[:_SHOWN] if isinstance(item, str) else item for item in value]
    text = visible(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
