"""What making a corpus costs: files a second and bytes, beside a plain loop with nibabel and webdataset's own writer.

    P2R_DATA=... python tests/bench/bench_ingest.py --images $P2R_DATA/acdc/images --json ingest.json
    python tests/bench/bench_ingest.py                                          # virtual subjects

The loop is what users write: `nibabel.load`, canonical orientation, `get_fdata` as float32 (or, kinder, the stored integers),
one `.npy` and `.json` a slice into shards by `TarWriter`. It neither checks nor compresses. Ours reads, checks, digests,
compresses, indexes, and writes ledger, manifest and thumbnails, with as many processes as there are cores, as Ray's tasks
would be. Contenders take turns; ratios are of the same round. At last two corpora are compared byte by byte: one made
undisturbed, one by a process that was killed with `kill -9` on the way, and by the run after it.
"""

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"  # before the libraries that read them

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from rich.console import Console
from rich.table import Table
from webdataset import TarWriter

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from rounds import ratios, spread, take_turns

from p2r.config import IngestConfig
from p2r.data.corpus import Built, ShardPlan, build_shard, ingest
from p2r.data.manifest import load_manifest
from p2r.data.phantom import resolve_source
from p2r.storage import Storage, cache_folder

OURS, ZSTD = "p2r, lz4", "p2r, zstd"
LOOP = "loop, get_fdata"
Voxels = Literal["get_fdata", "dataobj"]


def config_of(images: Path, codec: Literal["lz4", "zstd"], shard_size_mib: float) -> IngestConfig:
    return IngestConfig(sources=(str(images),), licence="none", shard_size_mib=shard_size_mib, codec=codec)


def build(job: tuple[ShardPlan, IngestConfig, str]) -> tuple[ShardPlan, Built]:
    plan, config, url = job
    return plan, build_shard(plan, config, Storage(url))


def ours(pool: Pool, config: IngestConfig, folder: Path) -> None:
    """Make a corpus, one shard a task."""
    shutil.rmtree(folder, ignore_errors=True)

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        yield from pool.imap_unordered(build, [(plan, config, str(folder)) for plan in plans])

    for _ in ingest(config, Storage(str(folder)), build_all=build_all):
        pass


def plain_shard(job: tuple[Path, Sequence[Path], Voxels]) -> None:
    """What users write."""
    shard, files, voxels = job
    with shard.open("wb") as file, TarWriter(file) as writer:
        for path in files:
            image = nibabel.as_closest_canonical(nibabel.load(path))
            data = image.get_fdata(dtype=np.float32) if voxels == "get_fdata" else np.asarray(image.dataobj)
            spacing_mm = [float(size) for size in image.header.get_zooms()[:3]]
            for number in range(data.shape[2]):
                sample = {"npy": np.ascontiguousarray(data[:, :, number]), "json": {"spacing_mm": spacing_mm}}
                writer.write({"__key__": f"{path.name.partition('.')[0]}_{number:03d}", **sample})


def plain(files: Sequence[Path], folder: Path, voxels: Voxels, num_shards: int, pool: Pool | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    jobs = [(folder / f"shard-{n:06d}.tar", files[n::num_shards], voxels) for n in range(num_shards)]
    list((map if pool is None else pool.imap_unordered)(plain_shard, jobs))


def rate(run: Callable[[], None], num_files: int) -> float:
    """Files a second."""
    began = time.perf_counter()
    run()
    return num_files / (time.perf_counter() - began)


def _make(config: IngestConfig, url: str) -> None:
    from p2r.data.corpus import ingest_locally

    for _ in ingest_locally(config, Storage(url)):
        pass


def killed_and_repeated(config: IngestConfig, folder: Path) -> None:
    """Make a corpus by a process that is killed once shards lie there, and by the next."""
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(config, str(folder)))
    process.start()
    while process.is_alive() and not list(folder.glob("shard-*.tar")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "manifest.json").exists(), "it was killed too late"
    _make(config, str(folder))


def digests(folder: Path) -> list[tuple[str, str, str]]:
    entries = load_manifest(Storage(str(folder)))["shards"]
    return [(entry["name"], entry["sha256"], entry["index_sha256"]) for entry in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of .nii.gz; virtual subjects without it")
    parser.add_argument("--subjects", type=int, default=32, help="virtual ones")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shard-size-mib", type=float, default=8.0, help="small, so that all processes have work")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images = (
        options.images or resolve_source(f"template://icbm152?subjects={options.subjects}", cache_folder()) / "images"
    )
    files = sorted(images.rglob("*.nii.gz"))
    configs = {codec: config_of(images, codec, options.shard_size_mib) for codec in ("lz4", "zstd")}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as temporary, spawn.Pool(options.processes) as pool:
        folder = Path(temporary)
        ours(pool, configs["lz4"], folder / OURS)  # imports, and the page cache
        num_shards = len(digests(folder / OURS))
        in_pool = f"loop, get_fdata, {options.processes} processes"
        runs: dict[str, Callable[[], None]] = {
            OURS: partial(ours, pool, configs["lz4"], folder / OURS),
            ZSTD: partial(ours, pool, configs["zstd"], folder / ZSTD),
            LOOP: partial(plain, files, folder / "loop", "get_fdata", num_shards),
            "loop, stored integers": partial(plain, files, folder / "integers", "dataobj", num_shards),
            in_pool: partial(plain, files, folder / "pool", "get_fdata", num_shards, pool),
        }
        rates = take_turns({name: partial(rate, run, len(files)) for name, run in runs.items()}, rounds=options.rounds)
        folders = dict(zip(runs, (OURS, ZSTD, "loop", "integers", "pool"), strict=True))
        num_bytes = sum(path.stat().st_size for path in files)
        rows: list[dict[str, Any]] = [
            {
                "contender": name,
                "files_per_s": spread(rates[name]),
                "ours_over_it": ratios(rates[OURS], rates[name]),
                "bytes_over_nii_gz": sum(path.stat().st_size for path in (folder / folders[name]).glob("*.tar"))
                / num_bytes,
            }
            for name in runs
        ]
        killed_and_repeated(configs["lz4"], folder / "killed")
        is_equal = digests(folder / "killed") == digests(folder / OURS)
    table = Table("contender", "files/s", "quartiles", "p2r is x times", "quartiles", "bytes over .nii.gz")
    for row in rows:
        of, over = row["files_per_s"], row["ours_over_it"]
        table.add_row(
            row["contender"],
            f"{of['median']:.0f}",
            f"{of['low']:.0f} to {of['high']:.0f}",
            f"{over['median']:.2f}",
            f"{over['low']:.2f} to {over['high']:.2f}",
            f"{row['bytes_over_nii_gz']:.3f}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{len(files)} files, {num_bytes / 1e6:.1f} MB, {num_shards} shards, {options.processes} processes for p2r; a run that was "
        f"killed and repeated gives {'the same' if is_equal else 'OTHER'} bytes"
    )
    if options.json:
        found = {"num_files": len(files), "num_bytes": num_bytes, "rows": rows, "equal_after_kill": is_equal}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
