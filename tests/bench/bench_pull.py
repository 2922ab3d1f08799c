"""Speed of `p2r pull` from a real S3 server beside a plain GET of the same files, and of a second load without the server.

    python tests/bench/bench_pull.py                       # 120 MB of weights, 7 rounds
    python tests/bench/bench_pull.py --width 32 --rounds 3 --json pull.json

A backbone with random weights is published to SeaweedFS on loopback. In each round, both contenders copy it to a new folder in turn: a
plain GET (botocore, one object after another, chunks of 1 MiB written to files, nothing checked) and `p2r pull`, with an empty cache. The
ratio compares them round by round. Then the server is killed, and the pinned backbone, loaded once before, is loaded again: five times
in this process, and in a new process, where Python imports torch first.

Expected result: `p2r pull` has at least 0.7 of the throughput of a plain GET. The second load takes less than a second by the clock of
an idle core, without the imports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from rounds import cpu_name, progress, ratios, spread, take_turns

from infra.local.s3 import S3Server, make_bucket
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, load_backbone, publish
from p2r.config import ModelConfig
from p2r.data.preprocess import Preparation
from p2r.export.transfer import pull
from p2r.model.backbones import build_backbone
from p2r.storage import Storage

BUCKET, NAME = "bench", "backbones/pulled/1"
PLAIN, OURS = "plain GET", "p2r pull"
_CHUNK_BYTES = 2**20
_NUM_LOADS = 5


def publish_random(width: int) -> str:
    """Publish a 2D U-Net with random weights, and return its pin."""
    channels = tuple(width * 2**level for level in range(5))
    config = ModelConfig(name="basic_unet", channels=channels, feature_channels=width)
    made = publish(
        Storage(f"s3://{BUCKET}/{NAME}"),
        format=BACKBONE_FORMAT,
        weights=build_backbone(config, dimensions=2).state_dict(),
        config=ArtefactConfig(
            model=config, preparation=Preparation(spacing_mm=1.0, image_size=64, intensity_percentiles=(0.5, 99.5))
        ),
        card="# Random weights\n",
        facts={"licence": "CC0-1.0"},
    )
    return made.pin


def get_plainly(folder: Path) -> float:
    """Copy every object to a file without any check; return seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    client = botocore.session.get_session().create_client("s3")
    began = time.perf_counter()
    folder.mkdir()
    for item in client.list_objects_v2(Bucket=BUCKET, Prefix=NAME)["Contents"]:
        body = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"]
        with (folder / item["Key"].rpartition("/")[2]).open("wb") as file:
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                file.write(chunk)
    return time.perf_counter() - began


def pull_checked(pin: str, folder: Path, cache: Path) -> float:
    """Pull the backbone with an empty cache; return seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    pull(pin, folder=folder)
    return time.perf_counter() - began


def _seconds_of(call: Callable[[], object]) -> dict[str, float]:
    """Return seconds by the clock, and of CPU time of this process and its children: they differ on a busy machine."""
    began, cpu_began = time.perf_counter(), sum(os.times()[:4])
    call()
    return {"clock": time.perf_counter() - began, "cpu": sum(os.times()[:4]) - cpu_began}


def _load_in_new_process(pin: str) -> None:
    code = "import sys, p2r; p2r.load_backbone(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, pin], check=True)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run server and contenders; return the rows and the times of both loads."""
    server = S3Server(folder / "server")
    server.start()
    try:
        os.environ.update(server.environment)
        os.environ["P2R_CACHE"] = str(folder / "cache")
        make_bucket(server.environment, BUCKET)
        pin = publish_random(options.width)
        contenders = {
            PLAIN: partial(get_plainly, folder / "plain"),
            OURS: partial(pull_checked, pin, folder / "pulled", folder / "cache"),
        }
        seconds = take_turns(contenders, rounds=options.rounds)
        num_bytes = sum(path.stat().st_size for path in (folder / "plain").iterdir())
        assert num_bytes == sum(path.stat().st_size for path in (folder / "pulled").iterdir()), "another copy"
        shutil.rmtree(folder / "cache", ignore_errors=True)
        first = _seconds_of(lambda: load_backbone(pin))
    finally:
        server.kill()
    progress("the server is killed")
    rows = [
        {
            "name": name,
            "mib": num_bytes / 2**20,
            "seconds": spread(found),
            "mib_per_s": num_bytes / 2**20 / spread(found)["median"],
            "of_plain": ratios(seconds[PLAIN], found),
        }
        for name, found in seconds.items()
    ]
    return {
        "rows": rows,
        "first_load_s": first,
        "later_loads_offline_s": [_seconds_of(lambda: load_backbone(pin)) for _ in range(_NUM_LOADS)],
        "new_process_offline_s": _seconds_of(lambda: _load_in_new_process(pin)),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the finest level; 64: about 120 MB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="p2r-bench-pull-") as name:
        found = measure(options, Path(name))
    cores = len(os.sched_getaffinity(0))
    table = Table("", "MiB", "s", "MiB/s", "of a plain GET", title=f"{cpu_name()}, {cores} core{'s' * (cores > 1)}")
    for row in found["rows"]:
        of_plain = row["of_plain"]
        table.add_row(
            row["name"],
            f"{row['mib']:.1f}",
            f"{row['seconds']['median']:.3f}",
            f"{row['mib_per_s']:.0f}",
            f"{of_plain['median']:.2f} ({of_plain['low']:.2f} to {of_plain['high']:.2f})",
        )
    Console(width=100).print(table)
    loads = {
        "first load": found["first_load_s"],
        "second load, without the server": found["later_loads_offline_s"][0],
        f"fastest of {_NUM_LOADS} such loads": min(found["later_loads_offline_s"], key=lambda load: load["clock"]),
        "the same in a new process, imports included": found["new_process_offline_s"],
    }
    for name, load in loads.items():
        print(f"{name}: {load['clock']:.3f} s, {load['cpu']:.3f} s of CPU time")
    if options.json is not None:
        options.json.write_text(json.dumps({"cpu": cpu_name(), "cores": cores, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
