"""A weights file of another tool -> tensors by name. No code of the file runs.

Safetensors hold only numbers. PyTorch files are pickles: only `torch.load(weights_only=True)` reads them, which refuses every object
that is neither a tensor nor a plain value. nnU-Net stores numpy numbers beside its weights; inert objects replace them.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from p2r.errors import CheckpointError, error_text
from p2r.files import open_regular, translate_os_errors
from p2r.reference import Reference, names_weights_file
from p2r.storage import Storage

MAX_FILE_BYTES = 2**34
_CONTAINERS = ("network_weights", "state_dict", "model_state_dict", "model_state", "model", "net")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CONVERT = "Convert it where you trust it, by torch.load(weights_only=False) and safetensors.torch.save_file"


class WeightsFile(NamedTuple):
    """Tensors of a weights file."""

    tensors: dict[str, Tensor]
    """Tensors as stored, on the CPU, not yet checked against any network."""
    sha256: str
    """Digest of the file."""
    facts: dict[str, object]
    """Plain values stored beside the weights."""


class _Inert:
    """Replacement for numpy's numbers and types in a pickle."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _inert(*_: object) -> _Inert:
    return _Inert()


_REPLACED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_inert, "numpy.core.multiarray.scalar"),
    (_inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.dtypes.Float64DType"),
    (_Inert, "numpy.dtypes.Float32DType"),
    (_Inert, "numpy.dtypes.Int64DType"),
    (_inert, "_codecs.encode"),
]


def is_weights_file(reference: Reference) -> bool:
    """Return whether a reference names a weights file of another tool, not a folder or file of p2r."""
    folder, _, name = reference.url.rpartition("/")
    if not names_weights_file(name):
        return False
    is_named_like_ours = name.startswith("model") and name.endswith(".safetensors")
    return not (is_named_like_ours and Storage(folder or ".").exists("manifest.json"))


def read_weights_file(reference: Reference, *, where: str) -> WeightsFile:
    """Read a weights file of another tool.

    Args:
        reference: URL of the file; a pin is the SHA-256 of the file itself.
        where: Name of the file, for messages.

    Raises:
        StorageError: The file cannot be read.
        CheckpointError: It is absent, differs from its pin, is neither safetensors nor a PyTorch file of tensors, or has code in it.
    """
    folder, _, name = reference.url.rpartition("/")
    storage = Storage(folder or ".")
    facts = storage.facts(name)
    if facts is None:
        raise CheckpointError(f"{where}: {storage.at(name)} does not exist; correct the path")
    if facts.num_bytes > MAX_FILE_BYTES:
        raise CheckpointError(f"{where} has {facts.num_bytes:,} bytes; weights files have at most {MAX_FILE_BYTES:,}")
    local = storage.local(name)
    # The digest is of the bytes that are loaded: the file may be replaced at any time, and its copy in the cache evicted.
    with translate_os_errors("read", storage.at(name)), open_regular(local) as file:
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if reference.sha256 not in (None, found):
        raise CheckpointError(f"{where} is pinned to sha256 {reference.sha256}, and the file has {found}: another file")
    value = _load_safetensors(content, where) if name.endswith(".safetensors") else _load_pickle(content, where)
    tensors, beside = _find_tensors(value, where)
    return WeightsFile(tensors, found, beside)


def _load_safetensors(content: bytes, where: str) -> Any:
    try:
        return load(content)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} is not a safetensors file: {error}") from None


def _load_pickle(content: bytes, where: str) -> Any:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise CheckpointError(
            f"{where} is not a file of torch.save (a zip since PyTorch 1.6): it is damaged, or older. {_CONVERT}"
        )
    _refuse_compressed(content, where)
    try:
        with torch.serialization.safe_globals(_REPLACED):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = _blocked_name(error_text(error))
        raise CheckpointError(
            f"{where} is a pickle that holds {name or 'objects besides tensors and plain values'}: reading it could run "
            f"code of its author, so it is refused. {_CONVERT}"
        ) from None
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{where} is not a readable PyTorch file: {error_text(error).splitlines()[0]:.200}"
        ) from None


def _refuse_compressed(content: bytes, where: str) -> None:
    """Refuse an archive that would grow in memory; torch.save stores without compression."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{where} is not a readable PyTorch file: {error}") from None
    if num_bytes > len(content):
        raise CheckpointError(f"{where} is compressed, which torch.save never does: it is refused. {_CONVERT}")


def _blocked_name(message: str) -> str | None:
    """Return the name of the object that the restricted unpickler refused."""
    for mark in ("Unsupported global: GLOBAL ", "GLOBAL ", "Unsupported class ", "Unsupported operand "):
        _, found, rest = message.partition(mark)
        if found:
            return rest.split()[0].strip("`'.,")
    return None


def _find_tensors(value: Any, where: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the state dictionary in a checkpoint, and the plain values beside it."""
    for container in _CONTAINERS:
        found = value.get(container) if isinstance(value, Mapping) else None
        if isinstance(found, Mapping) and found and any(isinstance(one, Tensor) for one in found.values()):
            beside = {str(key): one for key, one in value.items() if key != container and _is_plain(one)}
            return dict(_tensors_of(found)), beside
    if isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values()):
        return dict(_tensors_of(value)), {}
    keys = ", ".join(map(str, list(value)[:6])) if isinstance(value, Mapping) else type(value).__name__
    raise CheckpointError(
        f"{where} holds no weights: expected tensors by name, at the top or under one of {', '.join(_CONTAINERS)}; got {keys:.200}"
    )


def _tensors_of(values: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, one in values.items():
        if isinstance(one, Tensor) and one.layout == torch.strided and one.device.type == "cpu":
            yield str(name), one


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | tuple | dict | type(None))


def as_float32(value: Tensor, *, name: str, where: str) -> Tensor:
    """Return a weight as a contiguous float32 tensor.

    Raises:
        CheckpointError: It is not a floating-point tensor, or not finite.
    """
    if value.dtype not in _DTYPES:
        raise CheckpointError(f"{where}: {name:.120} is {value.dtype}; weights are floating-point numbers")
    converted = value.detach().to(torch.float32).contiguous().clone()
    if not torch.isfinite(converted).all():
        raise CheckpointError(f"{where}: {name:.120} holds NaN or infinity; use a checkpoint from before it diverged")
    return converted
