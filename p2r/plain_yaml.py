"""YAML from outside, for jobs and tasks: one document -> plain values within stated limits, or an error by name.

Values are built from the parser's events, not by PyYAML's constructors, which recurse and share the values of aliases. Here
an alias is a copy, and counts for as many values and characters as it copies. Duplicate keys are refused; PyYAML keeps the
last. Dates stay texts, and tags that create objects are refused.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from p2r.documents import MAX_DEPTH, MAX_INTEGER, check_characters, check_size, decoded
from p2r.errors import InputError

MAX_YAML_BYTES = 1 << 20
"""Largest YAML document that is read."""

_MAX_SCALAR = 64  # characters of a number
_MAX_CHARACTERS = 4 * MAX_YAML_BYTES
_TAG = "tag:yaml.org,2002:"
_OTHER_BASE = re.compile(r"[-+]?(?:0[0-9_]+$|[0-9_]+:)")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Event = Any
_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def read_yaml(
    content: bytes | str,
    *,
    where: str,
    max_bytes: int = MAX_YAML_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = 100_000,
    error: type[InputError] = InputError,
) -> Any:
    """Parse one YAML document from outside into texts, numbers, booleans, None, lists and mappings.

    Dates stay texts. Aliases and merge keys (`<<`) are copied, within `max_values`.

    Args:
        content: The document, UTF-8.
        where: Name of the document, for messages.
        max_bytes: Largest size that is parsed.
        max_depth: Largest nesting of mappings and lists.
        max_values: Largest number of values and keys, including copies by aliases.
        error: Exception class to raise.

    Raises:
        InputError: The document is not YAML, exceeds a limit, or has values that are not plain; names the line.
    """
    check_size(content.encode(errors="replace") if isinstance(content, str) else content, where, max_bytes, error)
    text = content if isinstance(content, str) else decoded(content, "YAML", where, error)
    try:
        return _Composer(text, max_depth=max_depth, max_values=max_values).document()
    except _Refused as refused:
        raise error(f"{where}: {refused}") from None
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: libyaml cannot read a text
        raise error(f"{where} is not YAML: {str(problem).strip()}") from None


class _Refused(Exception):
    """A rule that a YAML document breaks."""


@dataclass(frozen=True)
class _Anchor:
    """A value that aliases can refer to."""

    value: Any
    num_values: int
    num_characters: int
    depth: int
    """Nesting of mappings and lists."""


class _Composer:
    """Builds the value of one YAML document from its events."""

    def __init__(self, text: str, *, max_depth: int, max_values: int) -> None:
        self._loader = _Loader(text)
        self._max_depth, self._max_values = max_depth, max_values
        self._num_values = self._num_characters = self._deepest = 0
        self._anchors: dict[str, _Anchor] = {}

    def document(self) -> Any:
        """Return the value of the only document; None if the file is empty."""
        self._expect_event(yaml.StreamStartEvent)
        if self._loader.check_event(yaml.StreamEndEvent):
            return None
        self._expect_event(yaml.DocumentStartEvent)
        value = self._read_value(self._loader.get_event(), 0)
        self._expect_event(yaml.DocumentEndEvent)
        if not self._loader.check_event(yaml.StreamEndEvent):
            _refuse(self._loader.get_event(), "a second document begins; a file holds one")
        return value

    def _expect_event(self, kind: type[_Event]) -> None:
        event = self._loader.get_event()
        assert isinstance(event, kind)

    def _read_value(self, event: _Event, depth: int) -> Any:
        """Return the value that starts with an event, nested `depth` mappings and lists deep."""
        if isinstance(event, yaml.AliasEvent):
            return self._copy_alias(event, depth)
        length = len(event.value) if isinstance(event, yaml.ScalarEvent) else 0
        self._count_values(event, 1, length)
        if isinstance(event, yaml.ScalarEvent):
            value = self._read_scalar(event)
            if event.anchor is not None:
                self._anchors[event.anchor] = _Anchor(value, 1, length, 0)
            return value
        if event.tag not in (None, "!", f"{_TAG}map", f"{_TAG}seq"):
            _refuse(event, f"the tag {event.tag[:80]} is not read; write plain values")
        self._check_depth(event, depth + 1)
        before, written = self._num_values, self._num_characters
        above, self._deepest = self._deepest, depth + 1
        of = self._read_mapping if isinstance(event, yaml.MappingStartEvent) else self._read_sequence
        value = of(depth + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchor(
                value, self._num_values - before + 1, self._num_characters - written, self._deepest - depth
            )
        self._deepest = max(self._deepest, above)
        return value

    def _read_sequence(self, depth: int) -> list[Any]:
        values = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            values.append(self._read_value(self._loader.get_event(), depth))
        self._loader.get_event()
        return values

    def _read_mapping(self, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        while not self._loader.check_event(yaml.MappingEndEvent):
            event = self._loader.get_event()
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                _refuse(event, "a key is a list or a mapping; a key is a text or a number")
            if event.start_mark.line != event.end_mark.line:
                _refuse(event, "a key spans several lines: write it on one line, in quotes if it has blanks")
            is_merge = isinstance(event, yaml.ScalarEvent) and self._resolve_tag(event) == f"{_TAG}merge"
            key = self._read_value(event, depth)
            if isinstance(key, dict | list):
                _refuse(event, "a key is a list or a mapping; a key is a text or a number")
            if key in lines:
                _refuse(event, f"key {str(key)[:80]!r} is twice in one mapping, first on line {lines[key]}")
            lines[key] = event.start_mark.line + 1
            value = self._read_value(self._loader.get_event(), depth)
            if is_merge:
                merged = self._merge_mappings(event, value)
            else:
                values[key] = value
        self._loader.get_event()
        return {**merged, **values}

    def _merge_mappings(self, event: _Event, value: Any) -> dict[Any, Any]:
        """Return the keys of a merge key; with several mappings, the first takes precedence."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            _refuse(event, "`<<` merges a mapping, or a list of mappings")
        return {key: item for mapping in reversed(mappings) for key, item in mapping.items()}

    def _copy_alias(self, event: _Event, depth: int) -> Any:
        anchored = self._anchors.get(event.anchor)
        if anchored is None:
            _refuse(event, f"the alias *{event.anchor[:80]} names nothing that is complete before it")
        self._count_values(event, anchored.num_values, anchored.num_characters)
        self._check_depth(event, depth + anchored.depth)
        self._deepest = max(self._deepest, depth + anchored.depth)
        return copy.deepcopy(anchored.value)

    def _count_values(self, event: _Event, number: int, num_characters: int) -> None:
        self._num_values += number
        self._num_characters += num_characters
        if self._num_values > self._max_values:
            _refuse(event, f"more than {self._max_values:,} values, including aliases")
        if self._num_characters > _MAX_CHARACTERS:
            _refuse(event, f"more than {_MAX_CHARACTERS:,} characters, including aliases")

    def _check_depth(self, event: _Event, depth: int) -> None:
        if depth > self._max_depth:
            _refuse(event, f"mappings and lists may be {self._max_depth} deep")

    def _resolve_tag(self, event: _Event) -> str:
        if event.tag not in (None, "!"):
            return str(event.tag)
        return str(self._loader.resolve(yaml.ScalarNode, event.value, event.implicit))

    def _read_scalar(self, event: _Event) -> Any:
        kind = self._resolve_tag(event).removeprefix(_TAG)
        if kind in ("str", "timestamp", "value", "merge"):
            try:
                check_characters(event.value)
            except ValueError as problem:
                _refuse(event, str(problem))
            return str(event.value)
        if kind == "null":
            return None
        if kind not in ("bool", "int", "float"):
            _refuse(event, f"the tag {event.tag[:80]} is not read; write plain values")
        _check_base(kind, event)
        try:
            value = _parse_number(kind, event)
        except (ValueError, KeyError, IndexError):
            _refuse(event, f"{event.value[:40]!r} is not a valid {kind}")
        if kind == "int" and not -MAX_INTEGER <= value < MAX_INTEGER:
            _refuse(event, f"{event.value[:40]} is not a whole number of 64 bits")
        if kind == "float" and not math.isfinite(value):
            _refuse(event, f"{event.value[:40]} is not a finite number")
        return value


def _check_base(kind: str, event: _Event) -> None:
    """Refuse a number that YAML 1.1 reads in another base than its reader: 0777 in base 8, 1:30:00 in base 60."""
    if kind != "bool" and _OTHER_BASE.match(event.value):
        shown = event.value[:40]
        _refuse(
            event,
            f"{shown} is another number in YAML: a leading zero means base 8, a colon base 60. Write the number in base 10, or the text in "
            f"quotes: '{shown}'",
        )


def _parse_number(kind: str, event: _Event) -> Any:
    if len(event.value) > _MAX_SCALAR:
        raise ValueError
    node = yaml.ScalarNode(f"{_TAG}{kind}", event.value)
    return getattr(_CONSTRUCTOR, f"construct_yaml_{kind}")(node)


def _refuse(event: _Event, rule: str) -> NoReturn:
    raise _Refused(f"line {event.start_mark.line + 1}: {rule}")
