"""What checkpoints cost a run that saves one every 100 steps: seconds in which training stands still, and steps that are slower.

    python tests/bench/bench_checkpoint.py                          # this machine: the GPU if there is one
    python tests/bench/bench_checkpoint.py --json checkpoint.json
    python tests/bench/bench_checkpoint.py --folder /shared/disk --steps 50

Our engine trains on batches in memory. A turn is some steps. Before every other one, a checkpoint is saved, as in a training. It is
written to a local folder, then uploaded in the background, to a folder and to object storage (SeaweedFS on loopback). Where SeaweedFS
is not installed, that row gives the reason. `save` is a clock around the call, the device waited for before and after: training stands
still. `upload` goes on beside the steps: `slower` is how much longer the steps of a turn take with it than those of the turn without
in the same round. `share` is both together in a run that saves every 100 steps; `save, %` the first alone. All are medians over the
rounds.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from charts import OURS_COLOUR, bar_picture
from rounds import cpu_name, progress, spread
from stream_data import BUCKET, bucket_on
from training import (
    add_options,
    add_variant,
    batch_of,
    engine_of,
    passes_over,
    setting_of,
    steps_over,
    voxels_in_memory,
    wait_for,
)

from p2r.engine.build import join_process_group
from p2r.engine.checkpoint import Checkpoints
from p2r.storage import Storage

INTERVAL = 100
"""Steps between two checkpoints, `pretrain.checkpoint_interval` by default."""
NUM_BATCHES = 2


def measure(setting: Any, options: argparse.Namespace, storages: dict[str, str]) -> list[dict[str, Any]]:
    """Measure saving to each storage; return rows."""
    config = setting.config(precision=options.precision, compile=options.compile, keep_checkpoints=1)
    engine = engine_of(config, setting.device)
    voxels = voxels_in_memory(setting, num_images=NUM_BATCHES * setting.batch).split(setting.batch)
    steps = steps_over(engine, passes_over([batch_of(part, config=config) for part in voxels]), config)
    clock = Clock(setting.device)
    for _ in islice(steps, 2):
        pass
    rows = []
    for name, url in storages.items():
        with Checkpoints(Storage(url), config) as checkpoints:
            saves, uploads, slower, plain, num_bytes = [], [], [], [], 0
            for number in range(options.rounds + 1):  # the first is not counted: imports, connections
                with clock:
                    checkpoints.save(engine, step=number, state={})
                saved_s = clock.seconds
                with clock:
                    for _ in islice(steps, options.steps):
                        pass
                beside_s = clock.seconds
                checkpoints.finish()
                with clock:
                    for _ in islice(steps, options.steps):
                        pass
                uploaded = checkpoints.uploaded
                assert uploaded is not None
                if number:
                    saves.append(saved_s)
                    uploads.append(uploaded.seconds - saved_s)
                    slower.append(beside_s - clock.seconds)
                    plain.append(clock.seconds / options.steps)
                    num_bytes = uploaded.num_bytes
                    progress(f"{name}, round {number}: save {1e3 * saved_s:.0f} ms")
        step_s = spread(plain)["median"]
        run_s = [INTERVAL * step_s + save_s for save_s in saves]
        rows.append(
            {
                "storage": name,
                "mib": num_bytes / 2**20,
                "step_s": spread(plain),
                "save_s": spread(saves),
                "upload_s": spread(uploads),
                "slower_s": spread(slower),
                "save_share": spread([save_s / all_s for save_s, all_s in zip(saves, run_s, strict=True)]),
                "share": spread(
                    [(save_s + more_s) / all_s for save_s, more_s, all_s in zip(saves, slower, run_s, strict=True)]
                ),
            }
        )
    return rows


class Clock:
    """Seconds between entering and leaving, the device waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0

    def __enter__(self) -> None:
        wait_for(self._device)
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        wait_for(self._device)
        self.seconds = time.perf_counter() - self._began_s


@contextlib.contextmanager
def storages_in(folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Yield the URLs of storages by name, and why others are left out."""
    found, absent = {"folder": str(folder / "checkpoints")}, {}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(bucket_on(os.sched_getaffinity(0), folder / "s3"))
            found["S3 on loopback"] = f"s3://{BUCKET}/checkpoints"
        except RuntimeError as error:
            absent["S3 on loopback"] = str(error)
        yield found, absent


def table(rows: list[dict[str, Any]]) -> Table:
    columns = ("MiB", "step, ms", "save, ms", "upload, ms", "slower, ms", "save, %", "share, %")
    result = Table("storage", *columns)
    for row in rows:
        if "skipped" in row:
            result.add_row(row["storage"], f"[dim]{row['skipped']}[/dim]")
            continue
        times = [f"{1e3 * row[key]['median']:,.0f}" for key in ("step_s", "save_s", "upload_s", "slower_s")]
        shares = [f"{100 * row[key]['median']:.2f}" for key in ("save_share", "share")]
        result.add_row(row["storage"], f"{row['mib']:.1f}", *times, *shares)
    return result


def picture(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Draw how long training stands still for a checkpoint, and the share of a run that it is."""
    measured = [row for row in rows if "skipped" not in row]
    return bar_picture(
        "What a checkpoint costs",
        subtitle,
        [f"to {row['storage']}" for row in measured],
        [{key: 1e3 * value for key, value in row["save_s"].items()} for row in measured],
        title=f"ms in which training stands still; % of {INTERVAL} steps",
        texts=[f"{1e3 * row['save_s']['median']:,.0f} ms, {row['save_share']['median']:.2%}" for row in measured],
        colours=[OURS_COLOUR] * len(measured),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=7, steps=10)
    add_variant(parser)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary one")
    options = parser.parse_args()
    setting = setting_of(options)
    join_process_group(setting.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as name, storages_in(Path(name)) as (storages, absent):
        rows = measure(setting, options, storages)
    rows += [{"storage": storage, "skipped": reason} for storage, reason in absent.items()]
    device = torch.cuda.get_device_name() if setting.device.type == "cuda" else cpu_name()
    console = Console(width=150)
    console.print(table(rows))
    about = f"{setting}; {options.precision}; {device}; torch {torch.__version__}"
    console.print(about)
    if options.picture:
        options.picture.write_bytes(picture(rows, about))
    if options.json:
        options.json.write_text(json.dumps({"device": device, "setting": str(setting), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
