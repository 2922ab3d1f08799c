"""Bytes that patches read from whole volumes, beside the bytes of the patches themselves, for each layout of a record.

    python tests/bench/bench_volumes.py                                  # a head of 192 x 224 x 192 voxels of 1 mm
    python tests/bench/bench_volumes.py --shape 64 64 64 --sizes 32 --patches 2 --json rows.json

The scan is synthetic: smooth anatomy in an ellipsoid, and Rician noise everywhere. It is written as NIfTI, ingested, and read patch by
patch at the places that a stream draws. The bytes of a patch are its voxels times the mean compressed size of a voxel of its scan. Requests
are the ranges that a stream without a cache asks a bucket for. CPU time of the process is measured, not the clock.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from rounds import cpu_name

from p2r.config import ImageConfig, IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.patches import choose_patch
from p2r.data.shards import ShardReader, local_ranges, read_index
from p2r.storage import Storage

LAYOUTS: dict[str, dict[str, Any]] = {
    "planes": {"record": "planes"},
    "blocks of 32": {"record": "blocks"},
    "blocks of 24": {"record": "blocks", "block_size": 24},
    "blocks of 16": {"record": "blocks", "block_size": 16},
}


def write_head(path: Path, shape: tuple[int, int, int]) -> None:
    """Write a synthetic head with voxels of 1 mm."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, length, dtype=np.float32) for length in shape), indexing="ij", sparse=True)
    inside = sum((axis / 0.85) ** 2 for axis in axes) < 1
    waves = sum(np.sin(5 * (number + 1) * axis) for number, axis in enumerate(axes))
    values = np.where(inside, 600 + 150 * waves, 0.0)
    noisy = np.hypot(values + rng.normal(0, 12, shape), rng.normal(0, 12, shape))
    nibabel.save(nibabel.Nifti1Image(noisy.astype(np.int16), np.eye(4)), path)


def ingest(folder: Path, name: str) -> Path:
    """Ingest the scan in `folder` in a layout, and return the shard."""
    storage = Storage(str(folder / name.replace(" ", "-")))
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", one_subject=True, **LAYOUTS[name])
    list(ingest_locally(config, storage))
    (shard,) = load_manifest(storage).shards
    return folder / name.replace(" ", "-") / shard.name


def measure(shard: Path, size: int, *, patches: int) -> dict[str, float]:
    """Return the means over patches: bytes over those of the patch, requests, and CPU milliseconds."""
    read, sizes = local_ranges(shard), list[int]()

    def counted(start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return read(start, stop)

    reader = ShardReader(shard.name, read_index(shard.with_suffix(".idx")), counted)
    row, image = reader.records[0], ImageConfig(dimensions=3, spacing_mm=1.0, size=size)
    needed = row.size / np.prod(row.shape) * np.prod([min(size, length) for length in row.shape[:3]])
    boxes = [choose_patch(row, image, np.random.default_rng(seed))[0] for seed in range(patches)]
    began = time.process_time()
    for box in boxes:
        reader.read_box(row, 0, box)
    spent = time.process_time() - began
    return {
        "size": size,
        "bytes_over_needed": float(sum(sizes) / patches / needed),
        "requests": len(sizes) / patches,
        "cpu_ms": 1e3 * spent / patches,
    }


def main() -> None:
    """Measure, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[192, 224, 192])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 192])
    parser.add_argument("--patches", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table = Table(
        "record", "record, MB", "index, kB", *(f"{size}: read / needed, requests, CPU ms" for size in given.sizes)
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scans").mkdir()
        write_head(folder / "scans/sub-01.nii", tuple(given.shape))
        for layout in LAYOUTS:
            shard = ingest(folder, layout)
            found = [measure(shard, size, patches=given.patches) for size in given.sizes]
            sizes = {"record_bytes": shard.stat().st_size, "index_bytes": shard.with_suffix(".idx").stat().st_size}
            rows.append({"record": layout, **sizes, "patches": found})
            shown = (f"{one['bytes_over_needed']:.2f}, {one['requests']:.0f}, {one['cpu_ms']:.0f}" for one in found)
            table.add_row(layout, f"{sizes['record_bytes'] / 1e6:.1f}", f"{sizes['index_bytes'] / 1e3:.0f}", *shown)
    Console(width=140).print(table)
    if given.json:
        given.json.write_text(json.dumps({"cpu": cpu_name(), "shape": given.shape, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
