"""Bytes of a JSON document from outside -> plain values, within stated bounds, or a refusal by name.

    read_json     one value             manifests, reports, sidecars
    read_lines    one value a line      ledgers, indexes, histories
    checked       a value, by a strict pydantic model

Python's reader takes any depth and any integer, NaN, and the last of two equal keys. Here size, depth, memory and every
number are bounded, a text can be written as UTF-8, and each key is there once. Models check the meaning. Their long lists
have `FailFast` and their mappings `FewKeys`: pydantic would describe each of a million wrong members.

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
"""Most objects and lists within one another, unless a reader states another bound."""
MAX_MEMORY_BYTES = 2**30
"""Most memory that a JSON document may take, as `memory_of` estimates it, unless a reader states another bound."""
MAX_INTEGER = 2**63
"""Bound of whole numbers."""
_MAX_DIGITS = 24
_MANY_BYTES = 1 << 20  # of JSON that is worth a faster reader
_BYTES_PER = {b"{": 200, b"[": 112, b",": 48, b":": 88, b'"': 32}
"""Memory of CPython for an object, a list, a place in a list with its number, a place in an object, and half a text's header."""
_MAX_KEYS = 100_000
_MAX_DETAILS, _MAX_DETAIL_LETTERS = 20_000, 1 << 20
_SHOWN = 3  # findings of a model
_MAX_SHOWN = 80  # characters of a key or a value
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_MAX_PATH = 1024
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,\n]')


def checked(
    adapter: TypeAdapter[Checked], value: object, *, where: str, error: type[InputError] = InputError
) -> Checked:
    """Return what a strict model makes of a value.

    Args:
        adapter: Of the model.
        value: From a reader of this module.
        where: Name of the document, for messages.
        error: Class of the refusal.

    Raises:
        InputError: `error`, with the first findings: key, rule and value.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as problem:
        findings = problem.errors(include_url=False, include_context=False)
        lines = [_finding(finding) for finding in findings[:_SHOWN]]
        more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise error(f"{where} {'; '.join(lines)}{more}") from None


def _finding(finding: ErrorDetails) -> str:
    key = ".".join(map(str, finding["loc"]))
    value = finding["input"]
    if isinstance(value, str):
        value = value[:_MAX_SHOWN]
    got = f", got {_printable(repr(value))}" if not isinstance(value, dict | list) else ""
    return f"{_printable(key)}: {finding['msg']}{got}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_SHOWN])


def _at_most(count: int) -> BeforeValidator:
    """Return a rule that is checked before any member of a mapping: pydantic would keep a finding of each."""

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
"""A part of a document that is kept as it is, such as the section of a job: JSON of a bounded size."""
FewKeys = _at_most(_MAX_KEYS)
"""A rule for mappings whose keys come from outside."""


def as_utf8(name: str) -> str:
    r"""Return a file name as UTF-8 can hold it: bytes that are no UTF-8 appear as `\xHH`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_relative_path(path: str) -> bool:
    """Tell whether a path names something below the folder that it is joined to, on any system.

    It has `/` between names only: no `..`, no `.`, no empty name, no backslash, no control character, no mark of direction.
    """
    is_name = len(path) <= _MAX_PATH and "\\" not in path and is_plain(path)
    return is_name and not {".", "..", ""} & set(path.split("/"))


def _relative(path: str) -> str:
    if not is_relative_path(path):
        raise ValueError(
            "must be a path below the folder: no `..`, no leading slash, no backslash, no control character"
        )
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]
"""Name of a file in a manifest: it can lead nowhere else than below the manifest's folder."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Digest, as hexadecimal digits."""
Digests = Annotated[list[Sha256], FailFast()]
"""Any number of digests; the first that is none ends the check, for pydantic takes a kilobyte for each finding."""


class FileEntry(BaseModel):
    """What a manifest says of a file."""

    model_config = ConfigDict(strict=True)
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0, lt=2**53)]


def read_start(path: Path, *, max_bytes: int) -> bytes:
    """Return the first bytes of a local file: one more than `max_bytes` if there are more, for a reader to refuse.

    Raises:
        OSError: from the file.
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
        where: Its name, for messages.
        max_bytes: Largest size that is parsed.
        max_depth: Most objects and lists within one another.
        max_memory_bytes: Most memory for the text and its values, estimated by `memory_of` before anything is parsed.
        nan_as_none: Read NaN and infinities, which other programs write, as None instead of refusing the document.
        error: Class of the refusal.

    Raises:
        InputError: `error`, for anything that is not JSON (RFC 8259) or leaves a bound.
    """
    check_size(content, where, max_bytes, error)
    _check_memory(memory_of(content), where, max_memory_bytes, error)
    if len(content) >= _MANY_BYTES:
        with contextlib.suppress(_Unsure):
            return _parsed_at_once(content, max_depth)
    text = decoded(content, "JSON", where, error)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_number if nan_as_none else _refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        if _ODD_ESCAPE.search(text):
            _check_texts(value)
    except RecursionError:
        raise error(f"{where} is not valid: {_depth_rule(max_depth)}") from None
    except _KeyTwice as twice:
        raise error(f"{where} is not JSON: {_key_twice(text, str(twice))}") from None
    except ValueError as problem:  # also of JSON
        raise error(f"{where} is not JSON: {problem}") from None
    if text.count("{") + text.count("[") > max_depth and _is_deeper(value, max_depth):
        raise error(f"{where} is not valid: {_depth_rule(max_depth)}")
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
    """Parse JSON from outside, one value a line; lines without a character are passed over.

    Args:
        content: The document, UTF-8.
        where: Its name, for messages.
        max_bytes: Largest size that is parsed.
        max_line_bytes: Largest size of a line.
        max_memory_bytes: Most memory for all lines together, as `memory_of` estimates it.
        max_depth: Most objects and lists within one another, in a line.
        nan_as_none: As in `read_json`.
        error: Class of the refusal.

    Yields:
        The number of a line, from 1, and its value.

    Raises:
        InputError: `error`, naming the line.
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


class _KeyTwice(Exception):
    """A key that an object has twice."""


class _Unsure(Exception):
    """The fast reader cannot say that a document keeps all rules; the other one says which it breaks, if any."""


def _parsed_at_once(content: bytes, max_depth: int) -> Any:
    """Parse a large document by pydantic's reader, in a third of the time and without a copy of its text.

    It keeps the last of two equal keys. None was lost if as many keys are left as there are quotes followed by a colon,
    provided that no quote in a text and no blank comes before a colon: then every key has such a quote, and other texts
    can only add to their number.

    Raises:
        _Unsure: Something is not plainly as it should be.
    """
    if b"\\u0000" in content or (num_quoted := _num_quotes_before_colons(content)) is None:
        raise _Unsure
    try:
        with _without_collector():
            value = from_json(content, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        raise _Unsure from None
    num_keys, level = 0, [value]
    for _ in range(max_depth + 1):
        kinds = set(map(type, level))
        if int in kinds and not _are_bounded([item for item in level if type(item) is int]):
            raise _Unsure
        if float in kinds and not all(math.isfinite(item) for item in level if type(item) is float):
            raise _Unsure
        lists = [item for item in level if type(item) is list] if list in kinds else []
        objects = [item for item in level if type(item) is dict] if dict in kinds else []
        num_keys += sum(map(len, objects))
        level = [*chain.from_iterable(lists), *chain.from_iterable(item.values() for item in objects)]
    if level or num_keys != num_quoted:
        raise _Unsure
    return value


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python from looking for cycles among values that are being made: a third of the time, and there are none."""
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
    """Count the colons behind a quote; None if a blank, or a quote with a backslash, comes before a colon."""
    letters = np.frombuffer(content, np.uint8)
    places = np.flatnonzero(letters == ord(":"))
    places = places[places > 1]  # the key of an object is at least `""`
    before = letters[places - 1]
    is_quoted = before == ord('"')
    is_odd = np.isin(before, np.frombuffer(b" \t\n\r", np.uint8)) | is_quoted & (letters[places - 2] == ord("\\"))
    return None if is_odd.any() else int(is_quoted.sum())


def decoded(content: bytes, kind: str, where: str, error: type[InputError]) -> str:
    """Return the text of a document of some kind."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not {kind}: it is not UTF-8: {problem}") from None


def check_size(content: bytes, where: str, max_bytes: int, error: type[InputError]) -> None:
    """Refuse a document of more bytes."""
    if len(content) > max_bytes:
        raise error(f"{where} has more than the {max_bytes:,} bytes that such a document may have")


def _depth_rule(max_depth: int) -> str:
    return f"objects and lists may be {max_depth} deep"


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        children = (parent.values() if type(parent) is dict else parent for parent in level)
        level = [child for group in children for child in group if type(child) is dict or type(child) is list]
    return bool(level)


def _check_texts(value: Any) -> None:
    """Refuse texts that no file name and no UTF-8 can hold."""
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
    """Raise `ValueError` for a text that UTF-8, or a file name, cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair") from None
    if "\0" in text:
        raise ValueError("a text has the character 0")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _KeyTwice(twice)
    return found


def _key_twice(text: str, key: str) -> str:
    """Return the message for a key that an object has twice, with both lines."""
    first, second = _lines_of_twin(text)
    lines = f"on line {first}" if first == second else f"on lines {first} and {second}"
    return f"key {key[:80]!r} is twice in one object, {lines}"


def _lines_of_twin(text: str) -> tuple[int, int]:
    """Return the lines of the first key that an object has twice, in a text that is JSON up to there."""
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
    raise ValueError(f"{name} is not a number of JSON")


def _no_number(name: str) -> None:
    """Stand for a constant that is not a number of JSON."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS or not -MAX_INTEGER <= (value := int(text)) < MAX_INTEGER:
        raise ValueError(f"{text[:40]} is not a whole number of 64 bits")
    return value
