"""Bytes from outside -> a JSON value, within stated bounds, or a refusal by name.

Python's reader takes any depth, any integer, NaN, and the last of two equal keys. A document from a stranger is read here
instead: its size, depth and numbers are bounded, and each key stands once.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from p2r.errors import InputError

_MAX_INTEGER = 2**63
_MAX_DIGITS = 24


def read_json(
    content: bytes, *, where: str, max_bytes: int, max_depth: int = 32, error: type[InputError] = InputError
) -> Any:
    """Parse JSON from outside.

    Args:
        content: The document, UTF-8.
        where: Its name, for messages.
        max_bytes: Largest size that is parsed.
        max_depth: Most objects and lists within one another.
        error: Class of the refusal.

    Raises:
        InputError: `error`, for anything that is not JSON (RFC 8259) or leaves a bound.
    """
    if len(content) > max_bytes:
        raise error(f"{where} has {len(content):,} bytes, more than the {max_bytes:,} that such a document may have")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except RecursionError:
        raise error(f"{where} is not valid: {_depth_rule(max_depth)}") from None
    except ValueError as problem:  # also of UTF-8 and of JSON
        raise error(f"{where} is not JSON: {problem}") from None
    if _is_deeper(value, max_depth):
        raise error(f"{where} is not valid: {_depth_rule(max_depth)}")
    return value


def _depth_rule(max_depth: int) -> str:
    return f"objects and lists may be {max_depth} deep"


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth):
        level = [child for parent in level for child in _children(parent)]
    return any(isinstance(value, dict | list) for value in level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:80]!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS or not -_MAX_INTEGER <= (value := int(text)) < _MAX_INTEGER:
        raise ValueError(f"{text[:40]} is not a whole number of 64 bits")
    return value
