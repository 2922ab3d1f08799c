"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.s3
def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path, bench_folder: Path) -> None:
    bench = Path(__file__).parent / "bench_stream.py"
    few = ["--volumes", "2", "--size", "64", "--batch", "16", "--rounds", "2", "--s3-rounds", "1", "--range-steps", "2"]
    small = ["--epochs", "2", "--shards", "1000", "--samples", "100000", "--folder", str(bench_folder)]
    only = ["--only", "p2r, zstd", "p2r, npy", "webdataset, a slice per member"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "stream.png")]
    command = [sys.executable, str(bench), *few, *small, *only, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    local = {row["contender"]: row for row in found["local"]}
    assert list(local) == ["numpy.take from memory", "numpy.take from memory, mode clip", "p2r, lz4", *only[1:]]
    measured = [row for row in [*found["local"], *found["object_storage"]] if "skipped" not in row]
    assert all(row["slices_per_s"]["median"] > 0 and row["of_yardstick"]["median"] > 0 for row in measured)
    if "skipped" not in found["object_storage"][0]:  # no server is installed
        assert [row["contender"] for row in found["object_storage"]] == [
            "GET to file, check, decode",
            "GET to file and check alone",
            "p2r, lz4, cold cache",
            "p2r, lz4, by ranges",
        ]
    assert len(found["memory"]["mib_after_epoch"]) == 2 and found["order"]["batch_median_ms"] > 0
    assert all(name in done.stdout for name in ("p2r, zstd", "memory of a stream", "order of 100,000 samples"))
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
