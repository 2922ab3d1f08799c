"""Small scans with known voxels, and a small corpus made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.storage import Storage

WriteScan = Callable[..., Path]


@pytest.fixture
def write_scan(tmp_path: Path) -> WriteScan:
    """Write an array as NIfTI with nibabel, which shares no code with `p2r.data.volume.write_nifti`."""

    def write(name: str, array: NDArray[Any], affine: NDArray[np.float64] | None = None, **header: Any) -> Path:
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(
            array, np.diag([1.5, 1.5, 8.0, 1.0]) if affine is None else affine, dtype=array.dtype
        )
        for field, value in header.items():
            image.header[field] = value
        nibabel.save(image, path)
        return path

    return write


def some_voxels(seed: int, shape: tuple[int, ...] = (20, 24, 5)) -> NDArray[np.int16]:
    """A smooth blob with noise: something like a scan."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:3]), indexing="ij")
    blob = 900 * np.exp(-3 * sum(axis**2 for axis in grid))
    voxels = blob.reshape(*shape[:3], *(1 for _ in shape[3:])) + rng.normal(0, 20, shape)
    return np.rint(np.clip(voxels, 0, None)).astype(np.int16)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, dict[str, Any]]:
    """Twelve scans of six subjects, of different shapes, in three shards: 62 planes. Tests must not change it."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        shape = (20 + number % 3, 24, 4 + number % 3) if number else (20, 24, 3, 2)
        path = folder / "scans" / f"sub-{number // 2:02d}_run-{number % 2}_T1w.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(some_voxels(number, shape), np.diag([-1.5, 1.5, 8.0, 1.0])), path)
    storage = Storage(str(folder / "corpus"))
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", shard_size_mib=0.012)
    progress = list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    assert len(progress) == len(manifest["shards"]) >= 3
    return storage, manifest
