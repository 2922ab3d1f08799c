"""Small folders of scans, and corpora of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally
from p2r.storage import Storage

WriteScan = Callable[..., Path]


def voxels(seed: int, shape: tuple[int, ...] = (18, 20, 4)) -> Any:
    return np.random.default_rng(seed).integers(1, 500, shape).astype(np.int16)


def config_of(*folders: Path, **changes: Any) -> IngestConfig:
    return IngestConfig(
        **{"sources": tuple(map(str, folders)), "licence": "CC0-1.0", "shard_size_mib": 0.01, **changes}
    )


def bytes_below(storage: Storage) -> dict[str, str]:
    return {path: hashlib.sha256(storage.read_bytes(path)).hexdigest() for path in storage.list()}


def ledger_of(storage: Storage) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def make(storage: Storage, config: IngestConfig, **more: Any) -> list[str]:
    """Run ingestion to its end; return the progress lines."""
    said: list[str] = []
    for _ in ingest_locally(config, storage, say=said.append, **more):
        pass
    return said


@pytest.fixture
def folder(write_scan: WriteScan) -> Path:
    """Eight scans of four subjects."""
    for number in range(8):
        path = write_scan(f"sub-{number // 2}_run-{number % 2}.nii.gz", voxels(number))
    return path.parent


@pytest.fixture
def more(write_scan: WriteScan, folder: Path) -> Path:
    """Three more scans: one of a known subject, two of a new one."""
    for number, name in enumerate(["sub-3_run-2", "sub-4_run-0", "sub-4_run-1"]):
        path = write_scan(f"../more/{name}.nii.gz", voxels(100 + number))
    return path.parent.resolve()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "corpus"))
