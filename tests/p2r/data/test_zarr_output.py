"""Chunks of a Zarr array, assembled by the format's rules, are the array."""

import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from p2r.data.zarr_output import write_zarr
from p2r.errors import StorageError


@pytest.mark.parametrize("shape", [(70, 65, 3), (3, 130, 64, 17)])
def test_an_array_of_several_chunks_can_be_put_together_again(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).random(shape).astype(np.float32)
    for _ in range(2):  # the second replaces the first
        write_zarr(tmp_path / "new/a.zarr", array, np.eye(4), axes=("i", "j", "k", "n")[: array.ndim])
    about = json.loads((tmp_path / "new/a.zarr/.zarray").read_text())
    assert about["shape"] == list(shape) and about["zarr_format"] == 2
    whole = np.zeros([-(-n // size) * size for n, size in zip(shape, about["chunks"], strict=True)], about["dtype"])
    for place in itertools.product(*(range(n // size) for n, size in zip(whole.shape, about["chunks"], strict=True))):
        content = zlib.decompress((tmp_path / "new/a.zarr" / ".".join(map(str, place))).read_bytes())
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, about["chunks"], strict=True))
        whole[part] = np.frombuffer(content, about["dtype"]).reshape(about["chunks"])
    assert np.array_equal(whole[tuple(map(slice, shape))], array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.zarr"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_zarr(tmp_path / "file/a.zarr", array, np.eye(4), axes=("i", "j", "k"))
