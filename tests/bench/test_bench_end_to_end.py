"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.s3
def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path, bench_folder: Path) -> None:
    bench = Path(__file__).parent / "bench_end_to_end.py"
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "end.png")]
    small = ["--size", "32", "--batch", "4", "--pairs", "8", "--width", "4", "--rounds", "1", "--steps", "1"]
    data = ["--folder", str(bench_folder), "--volumes", "2", "--plane", "64", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(bench), *small, *data, *files], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [
        "step only, batches in memory",
        "from disk",
        "from S3, cached",
        "from S3, empty cache",
    ]
    measured = [row for row in rows if "skipped" not in row]
    assert len(measured) == 4 or "SeaweedFS is not installed" in rows[-1]["skipped"]
    for row in measured:
        assert row["images_per_s"]["median"] > 0 and row["of_yardstick"]["median"] > 0, row
        assert 0 <= row["wait_fraction"]["median"] < 1 and row["last_loss"] > 0, row
    assert all(name in done.stdout for name in ("from disk", "% of step only"))
    assert (tmp_path / "end.png").read_bytes().startswith(b"\x89PNG")
