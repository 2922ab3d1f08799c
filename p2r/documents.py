"""JSON from outside: bytes of a document -> plain values within stated limits, or an error by name.

    read_json     one value             manifests, reports, sidecars
    read_lines    one value per line    ledgers, indexes, histories
    checked       a value, validated by a strict pydantic model

Python's reader accepts any depth, any integer, NaN, and duplicate keys, of which it keeps the last. Here size, depth, memory
and every number are limited, texts must be valid UTF-8, and keys must be unique. Models check the meaning. Their long lists
have `FailFast` and their mappings `FewKeys`: pydantic would describe each of a million invalid members.

`p2r.plain_yaml` does the same for YAML. File names in manifests have the type `RelativePath`.
"""

import contextlib
import gc
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails, from_json

from p2r.console import is_plain
from p2r.errors import InputError

Checked = TypeVar("Checked")

MAX_DEPTH = 32
"""Largest nesting of objects and lists, unless a reader sets another limit."""
MAX_MEMORY_BYTES = 2**30
"""Largest memory of a JSON document, as `memory_of` estimates it, unless a reader sets another limit."""
MAX_INTEGER = 2**63
"""Limit of integers."""
_MAX_DIGITS = 24
_MANY_BYTES = 1 << 20  # size of JSON at which the faster reader pays off
_BYTES_PER = {b"{": 200, b"[": 112, b",": 48, b":": 88, b'"': 32}
"""Memory of CPython for an object, a list, a place in a list with its number, a place in an object, and half a text's header."""
_MAX_KEYS = 100_000
_MAX_DETAILS, _MAX_DETAIL_LETTERS = 20_000, 1 << 20
_SHOWN = 3  # findings of a model in a message
_MAX_SHOWN = 80  # characters of a key or value in a message
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_MAX_PATH = 1024
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,\n]')


def checked(
    adapter: TypeAdapter[Checked], value: object, *, where: str, error: type[InputError] = InputError
) -> Checked:
    """Validate a value with a strict model, and return the result.

    Args:
        adapter: The model.
        value: Value from a reader of this module.
        where: Name of the document, for messages.
        error: Exception class to raise.

    Raises:
        InputError: The value is invalid; `error` with the first findings: key, rule and value.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as problem:
        findings = problem.errors(include_url=False, include_context=False)
        lines = [_format_finding(finding) for finding in findings[:_SHOWN]]
        more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise error(f"{where} {'; '.join(lines)}{more}") from None


def _format_finding(finding: ErrorDetails) -> str:
    key = ".".join(map(str, finding["loc"]))
    value = finding["input"]
    if isinstance(value, str):
        value = value[:_MAX_SHOWN]
    got = f", got {_printable(repr(value))}" if not isinstance(value, dict | list) else ""
    return f"{_printable(key)}: {finding['msg']}{got}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_SHOWN])


def _at_most(count: int) -> BeforeValidator:
    """Limit the keys of a mapping before its members are validated; pydantic would keep a finding for each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"may have {count:,} keys, got {len(value):,}")
        return value

    return BeforeValidator(check)


def _bounded_details(value: Any) -> Any:
    waiting, num_values, num_letters = [value], 0, 0
    while waiting:
        item: Any = waiting.pop()
        num_values += 1
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            num_letters += len(item)
        if num_values + len(waiting) > _MAX_DETAILS or num_letters > _MAX_DETAIL_LETTERS:
            raise ValueError(f"may have {_MAX_DETAILS:,} keys and values, and {_MAX_DETAIL_LETTERS:,} letters in them")
    return value


Details = Annotated[dict[str, JsonValue], BeforeValidator(_bounded_details)]
"""JSON of limited size that is kept unchanged, such as a section of a job."""
FewKeys = _at_most(_MAX_KEYS)
"""Limit on the keys of a mapping from outside."""


def as_utf8(name: str) -> str:
    r"""Return a file name as valid UTF-8; other bytes appear as `\xHH`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_relative_path(path: str) -> bool:
    """Return whether a path names something below the folder that it is joined to, on any system.

    Only `/` may separate names: no `..`, no `.`, no empty name, no backslash, no control character, no bidirectional mark.
    """
    is_name = len(path) <= _MAX_PATH and "\\" not in path and is_plain(path)
    return is_name and not {".", "..", ""} & set(path.split("/"))


def _check_relative(path: str) -> str:
    if not is_relative_path(path):
        raise ValueError(
            "must be a path below the folder: no `..`, no leading slash, no backslash, no control character, no "
            "bidirectional mark"
        )
    return path


RelativePath = Annotated[str, AfterValidator(_check_relative)]
"""File name in a manifest; it cannot lead outside the manifest's folder."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal digits."""
Digests = Annotated[list[Sha256], FailFast()]
"""List of digests. The check ends at the first invalid one, because pydantic takes a kilobyte per finding."""


class JsonRow(BaseModel):
    """An immutable JSON object from a file. Keys of other versions are kept, and keys that it lacks are not written."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were set, as JSON values."""
        return self.model_dump(exclude_unset=True)


class FileEntry(BaseModel):
    """Digest and size of a file in a manifest."""

    model_config = ConfigDict(strict=True, frozen=True)
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0, lt=2**53)]


def read_start(path: Path, *, max_bytes: int) -> bytes:
    """Return the first bytes of a local file, at most `max_bytes` + 1, so that a reader can refuse a larger file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def read_json(
    content: bytes,
    *,
    where: str,
    max_bytes: int,
    max_depth: int = MAX_DEPTH,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
    nan_as_none: bool = False,
    error: type[InputError] = InputError,
) -> Any:
    """Parse JSON from outside.

    Args:
        content: The document, UTF-8.
        where: Name of the document, for messages.
        max_bytes: Largest size that is parsed.
        max_depth: Largest nesting of objects and lists.
        max_memory_bytes: Largest memory for the text and its values, which `memory_of` estimates before parsing.
        nan_as_none: Read NaN and infinities, which other programs write, as None instead of raising an error.
        error: Exception class to raise.

    Raises:
        InputError: The document is not JSON (RFC 8259) or exceeds a limit; an instance of `error`.
    """
    check_size(content, where, max_bytes, error)
    _check_memory(memory_of(content), where, max_memory_bytes, error)
    if len(content) >= _MANY_BYTES:
        with contextlib.suppress(_Unsure):
            return _parse_fast(content, max_depth)
    text = decoded(content, "JSON", where, error)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_check_unique_keys,
            parse_constant=_replace_by_none if nan_as_none else _refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
        if _ODD_ESCAPE.search(text):
            _check_texts(value)
    except RecursionError:
        raise error(f"{where} is not valid: {_depth_message(max_depth)}") from None
    except _DuplicateKey as twice:
        raise error(f"{where} is not JSON: {_duplicate_key_message(text, str(twice))}") from None
    except ValueError as problem:  # also of JSON
        raise error(f"{where} is not JSON: {problem}") from None
    if text.count("{") + text.count("[") > max_depth and _is_deeper(value, max_depth):
        raise error(f"{where} is not valid: {_depth_message(max_depth)}")
    return value


def memory_of(content: bytes) -> int:
    """Estimate from above how many bytes of memory a JSON document takes while it is parsed.

    The sum of its bytes, its text, and its values by the number of their brackets, commas, colons and quotes; those within texts are
    counted as well. Plain numbers and lists may cost 30 times their bytes, digests twice.
    """
    width = 1 if content.isascii() else 4  # of a letter in memory, if one letter of a text needs that much
    of_values = sum(content.count(mark) * num_bytes for mark, num_bytes in _BYTES_PER.items())
    return (1 + 2 * width) * len(content) + of_values


def _check_memory(num_bytes: int, where: str, max_bytes: int, error: type[InputError]) -> None:
    if num_bytes > max_bytes:
        raise error(
            f"{where} would take about {num_bytes / 2**20:,.0f} MiB of memory, more than the {max_bytes / 2**20:,.0f} MiB that such a "
            "document may take"
        )


def read_lines(
    content: bytes,
    *,
    where: str,
    max_bytes: int,
    max_line_bytes: int = 1 << 20,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
    max_depth: int = MAX_DEPTH,
    nan_as_none: bool = False,
    error: type[InputError] = InputError,
) -> Iterator[tuple[int, Any]]:
    """Parse JSON lines from outside, one value per line; blank lines are skipped.

    Args:
        content: The document, UTF-8.
        where: Name of the document, for messages.
        max_bytes: Largest size that is parsed.
        max_line_bytes: Largest size of a line.
        max_memory_bytes: Largest memory of all lines together, as `memory_of` estimates it.
        max_depth: Largest nesting of objects and lists in a line.
        nan_as_none: See `read_json`.
        error: Exception class to raise.

    Yields:
        Line number, starting at 1, and value.

    Raises:
        InputError: A line is invalid; an instance of `error` that names the line.
    """
    check_size(content, where, max_bytes, error)
    num_bytes = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        if line.strip():
            num_bytes += memory_of(line)
            _check_memory(num_bytes, f"{where}, up to line {number}", max_memory_bytes, error)
            value = read_json(
                line,
                where=f"{where}, line {number}",
                max_bytes=max_line_bytes,
                max_depth=max_depth,
                nan_as_none=nan_as_none,
                error=error,
            )
            yield number, value


class _DuplicateKey(Exception):
    """An object has the same key twice."""


class _Unsure(Exception):
    """The fast reader cannot tell whether a document is valid; the other reader decides and names the problem."""


def _parse_fast(content: bytes, max_depth: int) -> Any:
    """Parse a large document with pydantic's reader: three times faster, and without a copy of its text.

    The reader keeps the last of duplicate keys. None was lost if the number of keys equals the number of quotes followed by
    a colon. It holds if no escaped quote and no blank precedes a colon: then every key has such a quote, and other texts
    can only add to the count.

    Raises:
        _Unsure: The document may break a rule.
    """
    if b"\\u0000" in content or (num_quoted := _num_quotes_before_colons(content)) is None:
        raise _Unsure
    try:
        with _garbage_collection_off():
            value = from_json(content, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        raise _Unsure from None
    num_keys, level = 0, [value]
    for _ in range(max_depth + 1):
        num_here, level = _next_level(level)
        num_keys += num_here
    if level or num_keys != num_quoted:
        raise _Unsure
    return value


def _next_level(level: list[Any]) -> tuple[int, list[Any]]:
    """Check the numbers of one level of a document; return the number of its keys, and the values one level deeper.

    Raises:
        _Unsure: A number may break a rule.
    """
    kinds = set(map(type, level))
    if int in kinds and not _are_bounded([item for item in level if type(item) is int]):
        raise _Unsure
    if float in kinds and not all(math.isfinite(item) for item in level if type(item) is float):
        raise _Unsure
    lists = [item for item in level if type(item) is list] if list in kinds else []
    objects = [item for item in level if type(item) is dict] if dict in kinds else []
    deeper = [*chain.from_iterable(lists), *chain.from_iterable(item.values() for item in objects)]
    return sum(map(len, objects)), deeper


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Disable the garbage collector while values are built: it takes a third of the time and finds no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _are_bounded(integers: list[int]) -> bool:
    return min(integers) >= -MAX_INTEGER and max(integers) < MAX_INTEGER


def _num_quotes_before_colons(content: bytes) -> int | None:
    """Count the colons preceded by a quote; None if a blank or an escaped quote precedes a colon."""
    letters = np.frombuffer(content, np.uint8)
    places = np.flatnonzero(letters == ord(":"))
    places = places[places > 1]  # the key of an object is at least `""`
    before = letters[places - 1]
    is_quoted = before == ord('"')
    is_odd = np.isin(before, np.frombuffer(b" \t\n\r", np.uint8)) | is_quoted & (letters[places - 2] == ord("\\"))
    return None if is_odd.any() else int(is_quoted.sum())


def decoded(content: bytes, kind: str, where: str, error: type[InputError]) -> str:
    """Decode a document of the given kind."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not {kind}: it is not UTF-8: {problem}") from None


@contextlib.contextmanager
def way_out(text: str) -> Iterator[None]:
    """Append the way out to each refusal raised in the block."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{error}; {text}") from None


def check_size(content: bytes, where: str, max_bytes: int, error: type[InputError]) -> None:
    """Raise an error if a document exceeds `max_bytes`."""
    if len(content) > max_bytes:
        raise error(f"{where} has more than the {max_bytes:,} bytes allowed for such a document")


def _depth_message(max_depth: int) -> str:
    return f"objects and lists may be {max_depth} deep"


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        children = (parent.values() if type(parent) is dict else parent for parent in level)
        level = [child for group in children for child in group if type(child) is dict or type(child) is list]
    return bool(level)


def _check_texts(value: Any) -> None:
    """Raise an error for texts that neither a file name nor UTF-8 can hold."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            check_characters(item)


def check_characters(text: str) -> None:
    """Raise `ValueError` for a text that neither UTF-8 nor a file name can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair") from None
    if "\0" in text:
        raise ValueError("a text has the character 0")


def _check_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _DuplicateKey(twice)
    return found


def _duplicate_key_message(text: str, key: str) -> str:
    """Return the message for a key that occurs twice in an object, with both line numbers."""
    first, second = _find_duplicate_lines(text)
    lines = f"on line {first}" if first == second else f"on lines {first} and {second}"
    return f"key {key[:80]!r} is twice in one object, {lines}"


def _find_duplicate_lines(text: str) -> tuple[int, int]:
    """Return both lines of the first key that occurs twice in an object; the text up to there is valid JSON."""
    line, token = 1, ""
    objects: list[dict[str, int]] = []
    for match in _TOKEN.finditer(text):
        before, token = token, match.group()
        if token == "\n":
            line, token = line + 1, before
        elif token in ("{", "["):
            objects.append({})
        elif token in ("}", "]"):
            objects.pop()
        elif token == ":" and before.startswith('"'):
            key = json.loads(before)
            if key in objects[-1]:
                return objects[-1][key], line
            objects[-1][key] = line
    return line, line


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _replace_by_none(name: str) -> None:
    """Replace NaN or an infinity by None."""


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS or not -MAX_INTEGER <= (value := int(text)) < MAX_INTEGER:
        raise ValueError(f"{text[:40]} is not a whole number of 64 bits")
    return value
