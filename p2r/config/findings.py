"""Findings of pydantic about a section -> messages that name the key, the rule and the nearest known key."""

import difflib
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
)
from pydantic_core import ErrorDetails

from p2r.console import visible

_MAX_SHOWN = 300  # characters of a value in a message


def explain_finding(model: type[BaseModel], finding: ErrorDetails) -> str:
    """Return a line with the full key, the rule, the value, and the nearest known key or value."""
    location = [visible(str(part)) for part in finding["loc"]]
    key = ".".join(location) or "the job"
    if finding["type"] == "extra_forbidden":
        names = _field_names_at(model, location[:-1])
        nearest = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (
            f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(names)}"
        )
    if finding["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = finding["msg"].removeprefix("Value error, ")
    shown = finding.get("input")
    explained = f"{key}: {message}" + ("" if isinstance(shown, dict | list) else f", got {_shorten(shown)}")
    if finding["type"] == "literal_error" and isinstance(shown, str):
        names = re.findall(r"'([^']+)'", finding["ctx"]["expected"])
        nearest = difflib.get_close_matches(shown, names, n=1, cutoff=0.5)
        explained += f"; did you mean {nearest[0]}?" if nearest else ""
    return explained


def child_annotations(annotation: Any, name: str | None) -> Iterator[Any]:
    """Yield the annotations of a field of a model, or of the elements of a collection."""
    for part in flatten_annotation(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            field = part.model_fields.get(name or "")
            if field is not None:
                yield Annotated[field.annotation, *(field.metadata or [None])]
        elif get_origin(part) is dict:
            yield get_args(part)[1]
        elif get_origin(part) in (tuple, list):
            yield from (one for one in get_args(part) if one is not ...)


def flatten_annotation(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union and the metadata of an annotation."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from flatten_annotation(part)
    else:
        yield annotation


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _field_names_at(model: type[BaseModel], location: list[str]) -> list[str]:
    found: list[Any] = [model]
    for part in location:
        found = [annotation for one in found for annotation in child_annotations(one, part)]
    parts = [part for annotation in found for part in flatten_annotation(annotation)]
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return sorted(models[0].model_fields) if models else []
