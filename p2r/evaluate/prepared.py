"""Scans of a task, read, checked and resampled once per machine; every trial after the first finds them on the local disk.

    scan, preparation -> images and labels on the network's grid, from `<cache>/prepared/<key>.safetensors` if they are there

The key is a digest of all that the result depends on: the bytes of both files, the preparation, and the code that
prepares. So nothing is ever out of date, and nothing has to be cleared. Files are written whole or not at all; any
number of processes may share the folder. It is kept below `P2R_PREPARED_GIB` (8 by default): what was not used for the
longest goes first. A disk that is full costs time, not the trial.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2r.data import header, opening, preprocess, volume
from p2r.data.preprocess import Frames, Planes, Preparation, frames_of, planes_of
from p2r.data.volume import Volume, read_volume
from p2r.documents import read_json
from p2r.errors import InputError, StorageError
from p2r.evaluate import inference, tasks
from p2r.evaluate.tasks import LabelledScan, Task, TaskScan, load_scan
from p2r.files import file_sha256, mark_used, replacing
from p2r.storage import cache_folder, json_bytes

Arrays = Mapping[str, NDArray[Any]]
Made = TypeVar("Made")

_VARIABLE = "P2R_PREPARED_GIB"
_DEFAULT_GIB = "8"
_MAX_FACTS_BYTES = 2**20
_UNFIT = (KeyError, TypeError, ValueError, AttributeError, IndexError)
_LOG = logging.getLogger(__name__)


def prepared_scan(scan: TaskScan, task: Task, preparation: Preparation, *, size: int | None = None) -> LabelledScan:
    """Return what `load_scan` returns, from this machine's disk if it was asked for before.

    Raises:
        DataError: as `load_scan`; a scan that it refuses is never kept.
    """

    def make() -> tuple[Arrays, dict[str, Any]]:
        loaded = load_scan(scan, task, preparation, size=size)
        parts = {"volume": loaded.volume, "labels": loaded.labels}
        arrays = {f"{name}.{key}": getattr(part, key) for name, part in parts.items() for key in _ARRAYS_OF_A_VOLUME}
        facts: dict[str, Any] = {name: _facts_of(part) for name, part in parts.items()}
        arrays["label_planes"] = loaded.label_planes.numpy().astype(np.uint8)
        images, facts["planes"] = _split(loaded.planes)
        return {**arrays, **images}, facts

    key = {
        "image": file_sha256(scan.image),
        "label": file_sha256(scan.label),
        "names": [scan.image.name, scan.label.name],
        "classes": {str(value): name for value, name in task.config.classes.items()},
        "preparation": preparation.model_dump(mode="json"),
        "size": size,
    }

    def use(arrays: Arrays, facts: dict[str, Any]) -> LabelledScan:
        volumes = {
            name: _volume({key: arrays[f"{name}.{key}"] for key in _ARRAYS_OF_A_VOLUME}, facts[name])
            for name in ("volume", "labels")
        }
        label_planes = torch.from_numpy(arrays["label_planes"]).long()
        planes = _joined(arrays, facts["planes"])
        return LabelledScan(scan, volumes["volume"], volumes["labels"], planes, label_planes)

    return kept("scan", key, make, use=use)


def prepared_images(scan: TaskScan, preparation: Preparation) -> Planes | Frames:
    """Return the images of a scan at their whole extent. The file of its label is not opened."""

    def make() -> tuple[Arrays, dict[str, Any]]:
        loaded = read_volume(scan.image)
        of = frames_of if preparation.dimensions == 3 else planes_of
        return _split(of(loaded, preparation=preparation, size=None))

    key = {"image": file_sha256(scan.image), "preparation": preparation.model_dump(mode="json")}
    return kept("images", key, make, use=_joined)


def kept(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], tuple[Arrays, dict[str, Any]]],
    *,
    use: Callable[[Arrays, dict[str, Any]], Made],
) -> Made:
    """Return the use of arrays and JSON facts that were made before for this key; or make them, and keep them.

    Args:
        kind: Of what is kept.
        key: JSON values: all that it depends on, beside the code that prepares scans.
        make: Makes it.
        use: Makes the result of them. Kept ones that it cannot use are damaged: they are made again.
    """
    name = hashlib.sha256(json_bytes({"kind": kind, "key": dict(key), "code": _code_sha256()})).hexdigest()
    path = cache_folder() / "prepared" / f"{name}.safetensors"
    found = _read(path, use)
    if found is not None:
        return found
    arrays, facts = make()
    _write(path, arrays, facts)
    return use(arrays, facts)


def _read(path: Path, use: Callable[[Arrays, dict[str, Any]], Made]) -> Made | None:
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            text = file.metadata()["facts"].encode()
        facts = read_json(text, where=str(path), max_bytes=_MAX_FACTS_BYTES)
        used = use(arrays, facts)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, InputError, *_UNFIT):  # cut by a power failure, or another's: made again
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # evicted meanwhile
        mark_used(path)
    return used


def _write(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    max_bytes = _max_bytes()
    num_bytes = sum(array.nbytes for array in arrays.values())
    if num_bytes > max_bytes:
        return
    try:
        with replacing(path) as temporary:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(contiguous, temporary, metadata={"facts": json.dumps(facts)})
            mark_used(temporary)
        _evict(path.parent, max_bytes=max_bytes)
    except (OSError, SafetensorError) as error:
        _LOG.warning("cannot keep prepared scans in %s: %s; they are prepared again each time", path.parent, error)


def _evict(folder: Path, *, max_bytes: int) -> None:
    files = []
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # evicted by somebody else
            facts = file.stat()
            files.append((facts.st_mtime_ns, file, facts.st_size))
    used = sum(size for _, _, size in files)
    for _, file, size in sorted(files):
        if used <= max_bytes:
            return
        file.unlink(missing_ok=True)
        used -= size


def _max_bytes() -> int:
    text = os.environ.get(_VARIABLE) or _DEFAULT_GIB
    try:
        num_bytes = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        num_bytes = -1
    if num_bytes < 0:
        raise StorageError(
            f"{_VARIABLE} must be a number of at least 0, the room for prepared scans in GiB, got {text!r}"
        )
    return num_bytes


@functools.cache
def _code_sha256() -> str:
    """Digest of the code that makes prepared scans: after a change of it, what was kept before is never read."""
    digest = hashlib.sha256()
    for module in (opening, header, volume, preprocess, tasks, inference):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


_ARRAYS_OF_A_VOLUME = ("data", "affine", "source_affine")


def _facts_of(part: Volume) -> dict[str, Any]:
    return {key: value for key, value in asdict(part).items() if key not in _ARRAYS_OF_A_VOLUME}


def _volume(arrays: Arrays, facts: Mapping[str, Any]) -> Volume:
    return Volume(**{**arrays, **_with_tuples(facts)})


def _split(planes: Planes | Frames) -> tuple[Arrays, dict[str, Any]]:
    facts = {key: value for key, value in vars(planes).items() if key not in ("images", "inside")}
    return {"images": planes.images.numpy(), "inside": planes.inside.numpy()}, facts


def _joined(arrays: Arrays, facts: Mapping[str, Any]) -> Planes | Frames:
    values = _with_tuples(facts)
    images, inside = (torch.from_numpy(arrays[name]) for name in ("images", "inside"))
    return Planes(images, inside, **values) if "axis" in values else Frames(images, inside, **values)


def _with_tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON made lists of as the tuples that they were."""
    return {
        key: _with_tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for key, value in facts.items()
    }
