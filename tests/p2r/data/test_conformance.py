"""Readers independent of p2r read its shards: they yield members as bytes, which p2r's decode function converts to arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from p2r.data.manifest import Manifest
from p2r.data.shards import decode_record, open_shard
from p2r.storage import Storage

# Both readers leave closing the tar to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture
def shard(small_corpus: tuple[Storage, Manifest]) -> Path:
    storage, manifest = small_corpus
    return storage.local(manifest["shards"][0]["name"])


def assert_whole(found: dict[str, Any], shard: Path) -> None:
    """Check the voxels (X, Y, Z, T) by key that another reader returned."""
    reader = open_shard(shard)
    sample = 0
    for key in found:
        row, _ = reader.locate(sample)
        assert row.key == key and row.shape == found[key].shape
        planes = np.stack([reader.read_plane(sample + number) for number in range(row.num_planes)])
        expected = np.moveaxis(planes.reshape(row.stored_shape), (0, 1), (3, row.slice_axis))
        np.testing.assert_array_equal(found[key], expected)
        sample += row.num_planes
    assert sample == reader.num_samples


def test_stock_webdataset_reads_every_record(shard: Path) -> None:
    samples = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert_whole({x["__key__"]: decode_record(x["planes"], json.loads(x["json"])) for x in samples}, shard)


def test_hugging_face_datasets_streams_every_record(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    samples = datasets.load_dataset(
        "webdataset", data_files={"train": [str(shard)]}, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert_whole({x["__key__"]: decode_record(x["planes"], x["json"]) for x in samples}, shard)
