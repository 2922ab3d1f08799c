"""An array with its place in the patient -> a Zarr array (format 2), without the package zarr. Any Zarr reader opens it.

    NAME.zarr/.zarray     shape, chunks, type, compression
              .zattrs     axes, affine, unit of length
              0.0.0.0 ... chunks, zlib, C order; chunks at the end are filled up

Choice: chunks of 64 x 64 x 64 voxels and 16 features, so that a region or some features are read without the rest.

Source: the Zarr storage specification, version 2.
"""

import itertools
import json
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.errors import StorageError

ENDING = ".zarr"
_CHUNK = (64, 64, 64, 16)
_LEVEL = 1


def write_zarr(path: Path, array: NDArray[Any], affine: NDArray[np.float64], *, axes: tuple[str, ...]) -> None:
    """Write an array, replacing an older one as a whole.

    Args:
        path: Folder, whose name ends in .zarr. Its parent is created.
        array: (X, Y, Z) or (X, Y, Z, N).
        affine: (4, 4) voxel -> mm in RAS.
        axes: Name of each axis.

    Raises:
        StorageError: The folder cannot be written.
    """
    chunks = [min(length, size) for length, size in zip(array.shape, _CHUNK, strict=False)]
    about = {
        "zarr_format": 2,
        "shape": list(array.shape),
        "chunks": chunks,
        "dtype": array.dtype.newbyteorder("<").str,
        "compressor": {"id": "zlib", "level": _LEVEL},
        "fill_value": 0,
        "order": "C",
        "filters": None,
    }
    attributes = {"axes": list(axes), "affine": affine.tolist(), "unit": "mm", "space": "RAS"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".tmp-"))
        try:
            for name, value in ((".zarray", about), (".zattrs", attributes)):
                (temporary / name).write_text(json.dumps(value), encoding="utf-8")
            counts = [range(-(-length // size)) for length, size in zip(array.shape, chunks, strict=True)]
            for place in itertools.product(*counts):
                content = _chunk(array, place, chunks).tobytes()
                (temporary / ".".join(map(str, place))).write_bytes(zlib.compress(content, _LEVEL))
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; check the folder, its permissions and free space") from error


def _chunk(array: NDArray[Any], place: tuple[int, ...], chunks: list[int]) -> NDArray[Any]:
    part = array[tuple(slice(index * size, (index + 1) * size) for index, size in zip(place, chunks, strict=True))]
    whole = np.zeros(chunks, array.dtype.newbyteorder("<"))
    whole[tuple(slice(length) for length in part.shape)] = part
    return whole
