"""Rows of `history.jsonl`: one JSON object per report of a run, written without NaN and read within limits."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter

from p2r.documents import JsonRow, checked
from p2r.errors import DamagedError
from p2r.storage import Storage

_Number = Annotated[float, Field(ge=0, le=1e12)]


class HistoryRow(JsonRow):
    """A report of a run: the keys that p2r computes with. `p2r.engine.report` has all."""

    step: Annotated[int, Field(ge=0, lt=2**53)]
    world_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    step_s: _Number | None = None
    images_per_s: _Number | None = None
    probe_dice: Annotated[float, Field(ge=0, le=1)] | None = None


_ROW = TypeAdapter(HistoryRow)


def read_history(storage: Storage, path: str) -> list[HistoryRow]:
    """Return the rows of a run's history.

    Args:
        storage: Storage of the file.
        path: Path of the file.

    Raises:
        DamagedError: A row is invalid; names the line, the key and the rule.
    """
    # Earlier versions may have written NaN, which JSON does not have: read as None.
    rows = storage.read_rows(path, nan_as_none=True)
    return [
        checked(_ROW, row, where=f"{storage.at(path)}, row {number}:", error=DamagedError)
        for number, row in enumerate(rows, start=1)
    ]


def history_bytes(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Serialise the rows of a history. NaN and infinities, which JSON does not have, become null."""
    return "".join(json.dumps(_replace_nan(row), allow_nan=False) + "\n" for row in rows).encode()


def _replace_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
