"""Corpora of many sessions: plan and order of 10,000 by simulation; a BIDS tree of 2,000 that is ingested, killed and resumed.

    python tests/bench/bench_sessions.py
    python tests/bench/bench_sessions.py --simulated 200 --sessions 30 --json rows.json

Sessions have one to four contrasts. The simulation plans shards from names only and draws batches of 768 planes. The tree has tiny
scans, so that the cost per file counts, not the cost per voxel. It is ingested undisturbed, and again by a run that is killed with
`kill -9` at half of its shards, and by the run after it. Memory is the resident set: of the process that plans, and of the largest
process that reads scans, over the first quarter of the reading, and over all of it. Times of the
simulation are CPU time. Both corpora must have the same bytes.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from rounds import cpu_name, progress, resident_mib

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.build import Built, build_shard
from p2r.data.corpus import ingest
from p2r.data.growth import ShardPlan, plan_growth
from p2r.data.manifest import load_manifest
from p2r.data.order import Order
from p2r.data.pseudonyms import names_of
from p2r.data.scan import Scan
from p2r.data.volume import write_nifti
from p2r.storage import Storage

SUFFIXES = {"FLAIR": 1.0, "T1w": 0.9, "ce-GD_T1w": 0.6, "T2w": 0.4}
"""Contrasts in BIDS names, and the fraction of sessions that have each."""
SESSIONS = SessionsConfig(contrasts={"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*", "t2": "T2w"})
PLANES, BATCH, STEPS = 150, 768, 50


def list_names(sessions: int) -> Iterator[tuple[str, str]]:
    """Yield subject and path below the tree of each scan, two sessions per subject."""
    rng = np.random.default_rng(0)
    for number in range(sessions):
        subject, session = f"sub-{number // 2:05d}", f"ses-{number % 2 + 1}"
        for suffix, share in SUFFIXES.items():
            if rng.random() < share:
                yield subject, f"{subject}/{session}/anat/{subject}_{session}_{suffix}.nii"


def simulate(sessions: int) -> dict[str, float]:
    """Plan the shards of sessions that exist by name only, and draw batches; return seconds, counts and memory."""
    before = resident_mib()
    scans = [
        Scan(f"/data/{path}", Path(path).stem, 8 << 20, modified="1", subject=subject)
        for subject, path in list_names(sessions)
    ]
    config = IngestConfig(sources=("/data",), licence="none", sessions=SESSIONS, shard_size_mib=256)
    began = time.process_time()
    growth = plan_growth(scans, config, names_of("default", pseudonyms=False))
    planned_s = time.process_time() - began
    planes = [PLANES * len({planned.session for planned in plan.scans}) for plan in growth.plans]
    assert sum(planes) == PLANES * sessions
    began = time.process_time()
    order = Order([planes], seed=0, global_batch=min(BATCH, sum(planes)))
    order.samples(0)
    order_s = time.process_time() - began
    began = time.process_time()
    for step in range(STEPS):
        order.samples(step)
    return {
        "sessions": sessions,
        "scans": len(scans),
        "shards": len(growth.plans),
        "plan_s": planned_s,
        "order_s": order_s,
        "batch_ms": 1e3 * (time.process_time() - began) / STEPS,
        "memory_mib": resident_mib("VmHWM") - before,
    }


def write_tree(folder: Path, sessions: int) -> int:
    """Write a BIDS data set of scans of 16 x 16 x 4 voxels; return their number."""
    rng = np.random.default_rng(1)
    num_scans = 0
    for _, path in list_names(sessions):
        voxels = rng.normal(500, 100, (16, 16, 4)).clip(1).astype(np.int16)
        write_nifti(folder / path, voxels, np.diag([1.0, 1.0, 4.0, 1.0]))
        num_scans += 1
    (folder / "dataset_description.json").write_text('{"Name": "tiny", "BIDSVersion": "1.8.0"}')
    return num_scans


def build(job: tuple[ShardPlan, IngestConfig, str]) -> tuple[ShardPlan, Built]:
    """Build a shard in a process of the pool."""
    plan, config, url = job
    return plan, build_shard(plan, config, Storage(url))


def make(config: IngestConfig, url: str, processes: int) -> None:
    """Ingest with a pool of processes, in a process group of its own."""
    os.setsid()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:

        def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
            yield from pool.imap_unordered(build, [(plan, config, url) for plan in plans])

        for _ in ingest(config, Storage(url), build_all=build_all):
            pass


def memory_of(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process, and that of its largest child, MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    sizes = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096 / 2**20 for one in (str(pid), *children)]
    return sizes[0], max(sizes[1:], default=0.0)


def watch(
    config: IngestConfig, folder: Path, processes: int, *, is_over: Callable[[int], bool] = lambda shards: False
) -> dict[str, Any]:
    """Run an ingest, and kill it when `is_over` is true of its number of shards; return seconds and memory."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=(config, str(folder), processes))
    began, cpu_before, shards_before = time.perf_counter(), cpu_of_children(), count_shards(folder)
    process.start()
    assert process.pid is not None
    samples: list[tuple[float, float]] = []
    while process.is_alive():
        shards = count_shards(folder)
        if shards > shards_before:
            with contextlib.suppress(OSError):  # a process of the pool has ended
                samples.append(memory_of(process.pid))
        if is_over(shards):
            os.killpg(process.pid, signal.SIGKILL)
        process.join(0.1)
    assert process.exitcode in (0, -signal.SIGKILL)
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "cpu_s": cpu_of_children() - cpu_before,
        "shards": count_shards(folder),
    }
    for name, values in zip(("planner_mib", "reader_mib"), zip(*samples, strict=True), strict=False):
        found[name] = {"quarter": max(values[: -(-len(values) // 4)]), "end": max(values)}
    return found


def count_shards(folder: Path) -> int:
    """Return the number of tars."""
    return len(list(folder.glob("shard-*.tar")))


def cpu_of_children() -> float:
    """Return the CPU seconds of all processes that have ended; those of a killed pool are not known."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ingest_and_kill(folder: Path, sessions: int, processes: int) -> dict[str, Any]:
    """Ingest a tree undisturbed, and again with a kill at half of its shards."""
    num_scans = write_tree(folder / "bids", sessions)
    progress(f"{num_scans} scans are written")
    config = IngestConfig(
        sources=(str(folder / "bids"),), licence="none", sessions=SESSIONS, shard_size_mib=num_scans * 2400 / 2**20 / 40
    )
    whole = watch(config, folder / "whole", processes)
    progress(f"undisturbed: {whole}")
    broken = watch(config, folder / "broken", processes, is_over=lambda shards: shards >= whole["shards"] // 2)
    progress(f"killed: {broken}")
    assert broken["shards"] < whole["shards"], "it was killed too late"
    resumed = watch(config, folder / "broken", processes)
    shards = [load_manifest(Storage(str(folder / name))).shards for name in ("whole", "broken")]
    return {
        "sessions": sessions,
        "scans": num_scans,
        "processes": processes,
        "files_per_s": num_scans / whole["seconds"],
        "files_per_cpu_s": num_scans / whole["cpu_s"],
        "undisturbed": whole,
        "killed": broken,
        "resumed": resumed,
        "equal_bytes": shards[0] == shards[1],
    }


def main() -> None:
    """Measure, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    simulated = simulate(given.simulated)
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as folder:
        real = ingest_and_kill(Path(folder), given.sessions, given.processes)
    console = Console(width=140)
    table = Table("simulated", *map(str, simulated))
    table.add_row("", *(f"{value:.4g}" for value in simulated.values()))
    console.print(table)
    table = Table(
        "ingest", "s", "CPU s", "shards", "planner, MiB at a quarter, largest", "reader, MiB at a quarter, largest"
    )
    for name in ("undisturbed", "killed", "resumed"):
        one = real[name]
        memory = (f"{one[of]['quarter']:.0f}, {one[of]['end']:.0f}" for of in ("planner_mib", "reader_mib"))
        cpu = f"{one['cpu_s']:.1f}" if name != "killed" else ""
        table.add_row(name, f"{one['seconds']:.1f}", cpu, str(one["shards"]), *memory)
    console.print(table)
    console.print(
        f"{real['scans']} scans of {real['sessions']} sessions, {given.processes} processes, {real['files_per_s']:.0f} files/s, "
        f"{real['files_per_cpu_s']:.0f} per second of CPU time; killed and "
        f"resumed: {'the same' if real['equal_bytes'] else 'OTHER'} bytes"
    )
    if given.json:
        given.json.write_text(
            json.dumps({"cpu": cpu_name(), "simulated": simulated, "ingested": real}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
