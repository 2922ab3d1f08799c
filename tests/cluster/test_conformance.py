"""Ray Data reads our shards with its own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.data.shards import decode_record, open_shard
from p2r.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


def test_ray_data_reads_every_record(ray_cluster: None, published: dict[str, str]) -> None:
    import ray.data

    storage = Storage(published["corpus"])
    shards = [storage.local(entry["name"]) for entry in storage.read_json("manifest.json")["shards"]]
    samples = ray.data.read_webdataset([str(path) for path in shards], decoder=None).take_all()
    found = {sample["__key__"]: decode_record(sample["planes"], json.loads(sample["json"])) for sample in samples}
    expected = dict(_volumes(shards))
    assert found.keys() == expected.keys()
    for key, volume in expected.items():
        np.testing.assert_array_equal(found[key], volume)


def _volumes(shards: list[Path]) -> Any:
    for path in shards:
        reader = open_shard(path)
        sample = 0
        while sample < reader.num_samples:
            row, _ = reader.locate(sample)
            planes = np.stack([reader.read_plane(sample + number) for number in range(row.num_planes)])
            yield row.key, np.moveaxis(planes.reshape(row.stored_shape), (0, 1), (3, row.slice_axis))
            sample += row.num_planes
