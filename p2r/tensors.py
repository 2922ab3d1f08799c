"""Weights from outside: bytes of a safetensors file -> float32 tensors that fit a network, or an error by name.

A network is built without memory for its weights (`unallocated`), so that a configuration of a few bytes cannot allocate
gigabytes. Names, shapes and types come from the header of the file, and are compared before any tensor is allocated.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p2r.documents import Checked, FewKeys, checked, read_json
from p2r.errors import CheckpointError

MAX_HEADER_BYTES = 2**24
_LENGTH_BYTES = 8
_NUM_NAMED = 8
_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

Shape = tuple[int, ...]
Size = Annotated[int, Field(ge=0, lt=2**48)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[list[Size], Field(max_length=8)]
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2)]


_HEADER = TypeAdapter(Annotated[dict[str, _Entry], FewKeys])


class _Unallocated(TorchFunctionMode):
    """Mode in which new tensors, such as a network's weights, have a shape but no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def unallocated(build: Callable[[], nn.Module], *, where: str) -> nn.Module:
    """Build a network without memory for its weights and without drawing random numbers.

    Raises:
        CheckpointError: The network cannot be built.
    """
    try:
        with _Unallocated():
            return build()
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{where}: such a network cannot be built: {error}") from None


def num_bytes_of(network: nn.Module) -> int:
    """Return the size of a network's weights in float32, bytes."""
    return sum(weight.numel() * 4 for weight in network.state_dict().values())


def check_fit(
    found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, where: str, of: str, way_out: str = ""
) -> None:
    """Compare the names and shapes of weights and network.

    Args:
        found: Shapes of the weights.
        wanted: Shapes of the network.
        where: Name of the weights, for the message.
        of: Description of the network, such as `its config.json`.
        way_out: Last line of the message.

    Raises:
        CheckpointError: They differ; the message names the first differences.
    """
    problems = [
        f"{name:.120}: {_format_shape(found.get(name))} there, {_format_shape(wanted.get(name))} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        more = [f"and {len(problems) - _NUM_NAMED} more"] if len(problems) > _NUM_NAMED else []
        lines = "\n".join(f"  {line}" for line in (*problems[:_NUM_NAMED], *more))
        raise CheckpointError(f"{where}: its weights do not fit {of}:\n{lines}" + (f"\n{way_out}" if way_out else ""))


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of each tensor."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_values(weights: Mapping[str, Tensor], *, where: str) -> None:
    """Check that weights are float32 and finite.

    Raises:
        CheckpointError: A tensor is not float32 or not finite; the message names the first.
    """
    for name, value in weights.items():
        if value.dtype != torch.float32:
            raise CheckpointError(f"{where}: {name:.120} is {value.dtype}; published weights are float32")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: {name:.120} holds NaN or infinity; published weights are finite")


def read_tensors(
    content: bytes, *, where: str, check: Callable[[dict[str, Shape]], None] | None = None
) -> dict[str, Tensor]:
    """Parse the bytes of a safetensors file.

    Args:
        content: The whole file.
        where: Name of the file, for messages.
        check: Receives the shapes from the header before tensors are made, and may raise.

    Raises:
        CheckpointError: The file is not safetensors, or a tensor is not float32 or not finite.
    """
    shapes = read_shapes(content, where=where)
    if check is not None:
        check(shapes)
    try:
        weights: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} is not a safetensors file: {error}") from None
    check_values(weights, where=where)
    return weights


def read_shapes(content: bytes, *, where: str) -> dict[str, Shape]:
    """Return the shapes in the header of a safetensors file, of which `content` may be only the start.

    Raises:
        CheckpointError: The file is not safetensors, or a tensor is not float32.
    """
    header = _parse_header(content, where)
    for name, entry in header.items():
        if entry.dtype != "F32":
            raise CheckpointError(f"{where}: {name:.120} is {entry.dtype}; published weights are float32 (F32)")
    return {name: tuple(entry.shape) for name, entry in header.items()}


def read_facts(content: bytes, adapter: TypeAdapter[Checked], *, where: str) -> Checked:
    """Return the JSON under `facts` in the metadata of a safetensors file, as a pydantic model.

    Raises:
        CheckpointError: The file is not safetensors, or its facts are absent or break a rule.
    """
    value = _header_value(content, where)
    metadata = value.get("__metadata__") if isinstance(value, dict) else None
    text = metadata.get("facts") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{where} has no facts in its header")
    facts = read_json(text.encode(), where=f"the facts of {where}", max_bytes=MAX_HEADER_BYTES, error=CheckpointError)
    return checked(adapter, facts, where=f"the facts of {where}:", error=CheckpointError)


def _parse_header(content: bytes, where: str) -> dict[str, _Entry]:
    value = _header_value(content, where)
    if isinstance(value, dict):
        value.pop("__metadata__", None)
    try:
        return _HEADER.validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"])) or "it"
        raise CheckpointError(f"{where} is not a safetensors file: {key:.200}: {problem['msg']}") from None


def _header_value(content: bytes, where: str) -> Any:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    room = len(content) - _LENGTH_BYTES
    if not 0 < length <= min(room, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{where} is not a safetensors file: its header would have {length:,} bytes, there are {max(room, 0):,}, and at most "
            f"{MAX_HEADER_BYTES:,} are allowed"
        )
    return read_json(
        content[_LENGTH_BYTES : _LENGTH_BYTES + length],
        where=f"the header of {where}",
        max_bytes=MAX_HEADER_BYTES,
        max_depth=4,
        error=CheckpointError,
    )


def load_into(network: nn.Module, content: bytes, *, where: str) -> None:
    """Load the bytes of a safetensors file into an unallocated network.

    Raises:
        CheckpointError: See `read_tensors`; or the weights do not fit the network.
    """
    wanted = shapes_of(network.state_dict())
    weights = read_tensors(
        content, where=where, check=lambda found: check_fit(found, wanted, where=where, of="its config.json")
    )
    network.load_state_dict(weights, assign=True)
    empty = [name for name, value in (*network.named_parameters(), *network.named_buffers()) if value.is_meta]
    assert not empty, f"{where}: {empty} have no values"


def _format_shape(shape: Shape | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"
