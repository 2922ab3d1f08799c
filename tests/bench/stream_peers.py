"""Other loaders of the same planes, each with its own format, shuffling and batches."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from stream_data import BUCKET, SEED, Batches, Data, Planes, uploaded
from torch.utils.data import DataLoader


def webdataset(data: Data) -> Batches:
    """Stock webdataset, as its users have it: one member per slice and its JSON, decoded by its own decoders."""
    import webdataset as wds

    folder = data.folder / "webdataset"
    if not folder.exists():
        work = Path(tempfile.mkdtemp(dir=data.folder))
        per_shard = len(data.planes) // len(data.corpus("lz4").manifest["shards"])
        with wds.ShardWriter(f"{work}/shard-%06d.tar", maxcount=per_shard, verbose=0) as writer:
            for number, plane in enumerate(data.planes):
                described = {"number": number, "spacing_mm": [1.0, 1.0]}
                writer.write({"__key__": f"{number:08d}", "npy": plane, "json": described})
        work.rename(folder)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    shards = wds.WebDataset(urls, shardshuffle=len(urls)).repeat()
    for planes, _ in shards.shuffle(1000).decode().to_tuple("npy", "json").batched(data.batch, partial=False):
        yield planes


def mosaicml(data: Data, compression: str | None, bucket: Mapping[str, str] | None = None) -> Batches:
    """mosaicml-streaming: MDS of arrays of known shape, its own shuffling, torch's loader without processes."""
    streaming = _base_of("streaming")
    folder = data.folder / f"mds-{compression or 'raw'}"
    if not folder.exists():
        work = Path(tempfile.mkdtemp(dir=data.folder))
        columns = {"plane": "ndarray:int16:{},{}".format(*data.planes.shape[1:]), "number": "int"}
        with streaming.MDSWriter(out=str(work), columns=columns, compression=compression) as writer:
            for number, plane in enumerate(data.planes):
                writer.write({"plane": plane, "number": number})
        work.rename(folder)
    with tempfile.TemporaryDirectory(dir=data.folder) as cold:
        where = {"local": str(folder)}
        if bucket is not None:
            os.environ["S3_ENDPOINT_URL"] = bucket["AWS_ENDPOINT_URL"]
            where = {"local": cold, "remote": f"s3://{BUCKET}/{uploaded(folder)}"}
        dataset = streaming.StreamingDataset(**where, shuffle=True, shuffle_seed=SEED, batch_size=data.batch)
        loader = DataLoader(dataset, batch_size=data.batch, drop_last=True)
        while True:
            yield from (batch["plane"].numpy() for batch in loader)


def litdata(data: Data, bucket: Mapping[str, str] | None = None) -> Batches:
    """litdata: its own chunks, its own shuffling, its own loader without processes.

    Decoded sample by sample: with its default it decodes whole windows of planes and, shuffled, throws most of them away.
    Not compressed: with `compression="zstd"` version 0.2.76 wrote arrays that it could not read back, or raw ones.
    """
    import litdata as peer

    folder = data.folder / "litdata"
    if not folder.exists():
        work = Path(tempfile.mkdtemp(dir=data.folder))
        one = partial(_plane, str(data.folder / "planes.npy"))
        numbers = list(range(len(data.planes)))
        peer.optimize(one, numbers, output_dir=str(work), chunk_bytes="64MB", num_workers=1, verbose=False)
        work.rename(folder)
    options: dict[str, Any] = {"shuffle": True, "seed": SEED, "batch_decode": 0}
    with tempfile.TemporaryDirectory(dir=data.folder) as cold:
        if bucket is None:
            dataset = peer.StreamingDataset(str(folder), **options)
        else:
            downloader = importlib.import_module("litdata.streaming.downloader")
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = (
                True  # it can be told no other way, and loopback has no https
            )
            options |= {"cache_dir": cold, "storage_options": {"endpoint_url": bucket["AWS_ENDPOINT_URL"]}}
            dataset = peer.StreamingDataset(f"s3://{BUCKET}/{uploaded(folder)}", **options)
        loader = peer.StreamingDataLoader(dataset, batch_size=data.batch, drop_last=True)
        while True:
            yield from (batch.numpy() for batch in loader)


def _plane(path: str, number: int) -> Planes:
    return np.load(path, mmap_mode="r")[number].copy()


def _base_of(package: str) -> ModuleType:
    """Import `<package>.base` without what the whole package would import: mosaicml-streaming's needs torchvision."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    if package not in sys.modules:
        module = ModuleType(package)
        module.__path__, module.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[package] = module
    return importlib.import_module(f"{package}.base")
