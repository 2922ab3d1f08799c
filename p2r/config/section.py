"""The base of every section of a job file, and the types of fields that several sections share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from p2r.errors import InputError
from p2r.reference import parse_reference


def is_none(value: object) -> bool:
    """Return whether a field is None: it is then left out of files, which keeps the bytes and digests of older ones."""
    return value is None


def is_zero(value: object) -> bool:
    """Return whether a number is 0; then its field is left out, as in configurations before it."""
    return value == 0


class FilledIn:
    """Marker of job fields in which `${NAME}` and `${NAME:-default}` are replaced by environment variables."""


Location = Annotated[str, FilledIn()]
"""A path or URL. Only these and a corpus's own statements (licence, provenance) expand variables: other fields are published."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
NumLabelled = PositiveInt | Literal["all"]


def Within(low: float, high: float) -> AfterValidator:  # noqa: N802 (used in place of a type)
    """Return a validator that requires an increasing range inside [low, high]."""

    def check(value: Range) -> Range:
        if not low <= value[0] <= value[1] <= high:
            raise ValueError(f"must increase and be within [{low:g}, {high:g}], got {list(value)}")
        return value

    return AfterValidator(check)


def in_order(names: dict[int, str]) -> dict[int, str]:
    """Return names of label values in the order of the values: JSON sorts keys as text (1, 10, 2), YAML keeps any order."""
    return dict(sorted(names.items()))


def _check_reference(text: str) -> str:
    try:
        parse_reference(text)
    except InputError as error:
        raise ValueError(str(error)) from None
    return text


Artefact = Annotated[Location, AfterValidator(_check_reference)]
"""Reference to a published backbone: a URL; `URL@sha256:HEX`, which pins its manifest; or `NAME@stable`, a pointer."""


class Section(BaseModel):
    """A section of a job file. Immutable; unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
