"""Samples of the data plane's benchmarks: planes of virtual subjects, our corpora of them, and a bucket."""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from rounds import progress

from infra.local.s3 import S3Server, make_bucket
from p2r.config import ImageConfig
from p2r.data.manifest import Manifest, ManifestFacts
from p2r.data.phantom import virtual_subjects
from p2r.data.preprocess import percentile_table
from p2r.data.shards import write_shard
from p2r.data.stream import Corpus, order_of
from p2r.data.volume import Volume, read_volume
from p2r.storage import Storage

Planes = NDArray[np.int16]  # (N, H, W)
Batches = Generator[Any, None, None]  # of (B, H, W)
FORMS: dict[str, dict[str, Any]] = {"lz4": {"codec": "lz4"}, "zstd": {"codec": "zstd"}, "npy": {"record": "npy"}}
IMAGE = ImageConfig(spacing_mm=1.0, size=256)
VOLUMES_PER_SHARD = 4
SNR = 25
SEED = 0
BUCKET = "bench"


@dataclass(frozen=True)
class Data:
    """What is streamed: a folder, which holds every contender's form of it, and the truth."""

    folder: Path
    planes: Planes
    batch: int

    def corpus(self, name: str, storage: Storage | None = None) -> Corpus:
        """Return one of our own forms."""
        return Corpus(storage or Storage(str(self.folder / name)), read_shards(self.folder / name))

    @cached_property
    def steps(self) -> list[NDArray[np.int64]]:
        """The batches of one epoch in our order, as numbers of planes."""
        order = order_of([self.corpus("lz4")], image=IMAGE, seed=SEED, global_batch=self.batch)
        return [order.samples(step).positions for step in range(order.steps_per_epoch[0])]

    @cached_property
    def truth(self) -> set[int]:
        """What tells planes apart."""
        return {crc32(plane.data) for plane in self.planes}


def read_shards(folder: Path) -> Manifest:
    """Read a manifest that has nothing but shards."""
    lacking: dict[str, Any] = {}
    return Manifest(json.loads((folder / "manifest.json").read_bytes()), ManifestFacts.model_construct(**lacking))


def make_planes(folder: Path, *, num_volumes: int, size: int) -> list[tuple[Volume, dict[str, Any]]]:
    """Virtual subjects as volumes of (size, size) planes: magnified in the plane, with noise in the brain and around it."""
    subjects = virtual_subjects(folder / "subjects", num_subjects=num_volumes, seed=SEED)
    made = []
    for number, path in enumerate(sorted((subjects / "images").iterdir())):
        rng = np.random.default_rng([SEED, number])
        small = torch.from_numpy(read_volume(path).data[..., 0].astype(np.float32)).permute(2, 0, 1)[:, None]
        edge = max(small.shape[2:])
        padded = torch.nn.functional.pad(
            small, [side for n in (small.shape[3], small.shape[2]) for side in ((edge - n) // 2, (edge - n + 1) // 2)]
        )
        large = torch.nn.functional.interpolate(padded, (size, size), mode="bicubic")[:, 0].numpy()
        signal = 1000 * large.clip(0) / np.percentile(large, 99.5)
        real, imaginary = (rng.standard_normal(signal.shape, dtype=np.float32) * 700 / SNR for _ in range(2))
        planes = np.rint(np.hypot(signal + real, imaginary)).astype(np.int16)
        data = np.ascontiguousarray(np.moveaxis(planes, 0, 2))[..., None]  # (X, Y, Z, 1)
        affine, key = np.diag([1.0, 1.0, 2.0, 1.0]), path.name.partition(".")[0]
        volume = Volume(
            data=data,
            affine=affine,
            source_affine=affine,
            source_shape=data.shape[:3],
            spacing_mm=(1.0, 1.0, 2.0),
            key=key,
        )
        meta = {"key": key, "subject": key, "cohort": "bench", "slice_axis": 2}
        made.append((volume, meta | {"percentiles": list(percentile_table(data))}))
        progress(f"made volume {number + 1} of {num_volumes}")
    return made


def prepare(folder: Path, *, num_volumes: int, size: int, batch: int) -> Data:
    """Make the planes and our own corpora of them in a folder, unless they are there."""
    recipe = {"num_volumes": num_volumes, "size": size, "snr": SNR, "per_shard": VOLUMES_PER_SHARD}
    marker = folder / "complete.json"
    if not marker.is_file() or json.loads(marker.read_text()) != recipe:
        if folder.exists() and any(folder.iterdir()) and not marker.is_file():
            raise SystemExit(f"{folder} holds other things: name an empty or a new --folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        records = make_planes(folder, num_volumes=num_volumes, size=size)
        np.save(folder / "planes.npy", np.concatenate([np.moveaxis(v.data[..., 0], 2, 0) for v, _ in records]))
        for name, options in FORMS.items():
            (folder / name).mkdir()
            entries = [
                write_shard(folder / name / f"shard-{start:06d}.tar", records[start:][:VOLUMES_PER_SHARD], **options)
                for start in range(0, len(records), VOLUMES_PER_SHARD)
            ]
            (folder / name / "manifest.json").write_text(json.dumps({"shards": [entry._asdict() for entry in entries]}))
        shutil.rmtree(folder / "subjects")
        marker.write_text(json.dumps(recipe))
    return Data(folder, np.load(folder / "planes.npy"), batch)


@contextlib.contextmanager
def bucket_on(cores: set[int], folder: Path) -> Iterator[Mapping[str, str]]:
    """Run an S3 server on these cores with a bucket; yield what clients find it by, which this process does already.

    Raises:
        RuntimeError: No server is installed.
    """
    mine, server = os.sched_getaffinity(0), S3Server(folder)
    os.sched_setaffinity(0, cores)
    try:
        server.start()
    finally:
        os.sched_setaffinity(0, mine)
    try:
        os.environ.update(server.environment)
        make_bucket(server.environment, BUCKET)
        yield server.environment
    finally:
        server.kill()


def uploaded(folder: Path) -> str:
    """Put a folder's files into the bucket, and return their prefix."""
    storage = Storage(f"s3://{BUCKET}/{folder.name}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        storage.upload(path, str(path.relative_to(folder)), if_absent=True)
    return folder.name
