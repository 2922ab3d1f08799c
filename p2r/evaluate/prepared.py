"""Cache of a task's scans on the local disk: each machine reads, checks and resamples a scan once, for all its trials.

    scan, preparation -> images and labels on the network's grid, from `<cache>/prepared/<key>.safetensors` if it exists

The key is a digest of everything that affects the result: the bytes of all files, the preparation, and the code. So entries
are never stale, and the cache never has to be cleared. Files are written atomically, and any number of processes may use the
folder. Its size is limited to `P2R_PREPARED_GIB` (8 by default); the least recently used files are evicted first. A full disk
makes trials slower, but does not fail them.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2r.data import alignment, contrasts, grids, header, index, opening, preparation, preprocess, resample, volume
from p2r.data.folders import files_of
from p2r.data.preprocess import Frames, Planes, Preparation, frames_of, planes_of
from p2r.data.volume import Volume
from p2r.documents import read_json
from p2r.errors import InputError, StorageError
from p2r.evaluate import inference, tasks
from p2r.evaluate.tasks import LabelledScan, Task, TaskImages, TaskScan, load_scan, read_images
from p2r.files import file_sha256, mark_used, replacing
from p2r.storage import cache_folder, json_bytes

Arrays = Mapping[str, NDArray[Any]]
Facts = dict[str, Any]
"""JSON values beside the arrays of an entry: keyword arguments of the restored object."""
Made = TypeVar("Made")

_VARIABLE = "P2R_PREPARED_GIB"
_DEFAULT_GIB = "8"
_MAX_FACTS_BYTES = 2**20
_UNFIT = (KeyError, TypeError, ValueError, AttributeError, IndexError)
_LOG = logging.getLogger(__name__)


def prepared_scan(scan: TaskScan, task: Task, preparation: Preparation, *, size: int | None = None) -> LabelledScan:
    """Return the result of `load_scan`, from the cache if possible.

    Raises:
        DataError: as `load_scan`; refused scans are not cached.
    """

    def make() -> tuple[Arrays, Facts]:
        loaded = load_scan(scan, task, preparation, size=size)
        parts = {"labels": loaded.labels} | (
            {f"contrast {name}": one for name, one in loaded.contrasts.items()} or {"volume": loaded.volume}
        )
        arrays = {f"{name}.{key}": getattr(part, key) for name, part in parts.items() for key in _ARRAYS_OF_A_VOLUME}
        facts: Facts = {name: _volume_facts(part) for name, part in parts.items()}
        facts["reference"] = next((name for name, one in loaded.contrasts.items() if one is loaded.volume), None)
        arrays["label_planes"] = loaded.label_planes.numpy().astype(np.uint8)
        images, facts["planes"] = _split_images(loaded.planes)
        return {**arrays, **images}, facts

    key = {
        **_image_digests(scan, task),
        "label": _digest(scan.label),
        "names": [*(image.name for image in scan.images), scan.label.name],
        "classes": {str(value): name for value, name in task.config.classes.items()},
        "preparation": preparation.model_dump(mode="json"),
        "size": size,
    }

    def use(arrays: Arrays, facts: Facts) -> LabelledScan:
        def restored(name: str) -> Volume:
            return _restore_volume({key: arrays[f"{name}.{key}"] for key in _ARRAYS_OF_A_VOLUME}, facts[name])

        label_planes = torch.from_numpy(arrays["label_planes"]).long()
        planes = _restore_images(arrays, facts["planes"])
        by_contrast = {name: restored(f"contrast {name}") for name in scan.contrasts}
        reference = by_contrast[facts["reference"]] if by_contrast else restored("volume")
        return LabelledScan(scan, reference, restored("labels"), planes, label_planes, by_contrast)

    return cached("scan", key, make, use=use)


def prepared_images(scan: TaskImages, task: Task, preparation: Preparation) -> Planes | Frames:
    """Return the images of a scan at their whole extent, without opening its label map."""

    def make() -> tuple[Arrays, Facts]:
        loaded = read_images(scan, task, preparation)
        make_images = frames_of if preparation.dimensions == 3 else planes_of
        return _split_images(make_images(loaded, preparation=preparation, size=None))

    key = {**_image_digests(scan, task), "preparation": preparation.model_dump(mode="json")}
    return cached("images", key, make, use=_restore_images)


def _image_digests(scan: TaskImages, task: Task) -> dict[str, object]:
    """Return the part of a key for the images of a case."""
    if not scan.contrasts:
        return {"image": _digest(scan.image)}
    digests = {path: _digest(path) for path in dict.fromkeys(scan.images)}
    images = [(name, digests[path]) for name, path in scan.contrasts.items()]
    return {"images": images, "min_coverage": task.config.min_coverage}


def _digest(scan: Path) -> str:
    return " ".join(map(file_sha256, files_of(scan)))


def cached(
    kind: str,
    key: Mapping[str, object],
    make: Callable[[], tuple[Arrays, Facts]],
    *,
    use: Callable[[Arrays, Facts], Made],
) -> Made:
    """Return the result of `use` for arrays and JSON facts from the cache, or make and cache them first.

    Args:
        kind: Kind of the entry.
        key: JSON values of everything that the entry depends on, except the code that prepares scans.
        make: Makes the entry.
        use: Makes the result from the entry. A cached entry that it cannot use is damaged, and is made again.
    """
    name = hashlib.sha256(json_bytes({"kind": kind, "key": dict(key), "code": _code_sha256()})).hexdigest()
    path = cache_folder() / "prepared" / f"{name}.safetensors"
    found = _read_entry(path, use)
    if found is not None:
        return found
    arrays, facts = make()
    _write_entry(path, arrays, facts)
    return use(arrays, facts)


def _read_entry(path: Path, use: Callable[[Arrays, Facts], Made]) -> Made | None:
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            text = file.metadata()["facts"].encode()
        facts = read_json(text, where=str(path), max_bytes=_MAX_FACTS_BYTES)
        used = use(arrays, facts)
    except FileNotFoundError:
        return None
    except (
        OSError,
        SafetensorError,
        InputError,
        *_UNFIT,
    ):  # truncated by a power failure, or another program's: make it again
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # another process may have evicted it
        mark_used(path)
    return used


def _write_entry(path: Path, arrays: Arrays, facts: Facts) -> None:
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
        _LOG.warning("cannot cache prepared scans in %s: %s; every trial prepares them again", path.parent, error)


def _evict(folder: Path, *, max_bytes: int) -> None:
    files = []
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # another process evicted it
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
            f"{_VARIABLE} must be a number of at least 0, the size of the cache of prepared scans in GiB, got {text!r}"
        )
    return num_bytes


_CODE = (
    opening, header, volume, resample, index, alignment, contrasts, grids, preparation, preprocess, tasks, inference,
)  # fmt: skip


@functools.cache
def _code_sha256() -> str:
    """Return the digest of the code that prepares scans: a change of the code invalidates the cache."""
    return digest_code(Path(str(module.__file__)) for module in _CODE)


def digest_code(files: Iterable[Path]) -> str:
    """Return the digest of source files, for keys of the cache."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


_ARRAYS_OF_A_VOLUME = ("data", "affine", "source_affine")


def _volume_facts(part: Volume) -> Facts:
    return {key: value for key, value in asdict(part).items() if key not in _ARRAYS_OF_A_VOLUME}


def _restore_volume(arrays: Arrays, facts: Facts) -> Volume:
    return Volume(**{**arrays, **_with_tuples(facts)})


def _split_images(planes: Planes | Frames) -> tuple[Arrays, Facts]:
    facts = {key: value for key, value in vars(planes).items() if key not in ("images", "inside")}
    return {"images": planes.images.numpy(), "inside": planes.inside.numpy()}, facts


def _restore_images(arrays: Arrays, facts: Facts) -> Planes | Frames:
    values = _with_tuples(facts)
    images, inside = (torch.from_numpy(arrays[name]) for name in ("images", "inside"))
    return Planes(images, inside, **values) if "axis" in values else Frames(images, inside, **values)


def _with_tuples(facts: Facts) -> Facts:
    """Convert lists back to tuples, which JSON does not have."""
    return {
        key: _with_tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for key, value in facts.items()
    }
