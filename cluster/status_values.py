"""Conversion of untrusted values to the expected type, or None."""

from collections.abc import Mapping
from typing import Any

from p2r.masking import masked

MAX_FAULTS, MAX_TRIALS, MAX_CHECKPOINTS, MAX_PICTURES, MAX_VARIANTS, MAX_COUNTERS = 200, 400, 50, 16, 50, 40
_MAX_STEP = 2**53
MAX_FILE_BYTES = 2**25
_MAX_TEXT = 400


def whole_number(value: Any) -> int | None:
    """Return a whole number of at least 0, or None."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP
    return value if is_whole else None


def finite_number(value: Any) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def mapping_or_empty(value: Any) -> Mapping[str, object]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_or_empty(value: Any) -> list[Any]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def masked_text(value: Any) -> str:
    """Return the value as a short text without secrets."""
    return "" if value is None else _shortened(masked(str(value)))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
