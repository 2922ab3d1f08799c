"""The benchmark runs, its table and file hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_checkpoint.py"
    small = ["--size", "32", "--batch", "2", "--pairs", "8", "--width", "4", "--rounds", "1", "--steps", "1"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "checkpoint.png")]
    command = [sys.executable, str(bench), "--device", "cpu", *small, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["storage"] for row in rows] == ["folder", "S3 on loopback"]
    for row in rows:
        if "skipped" not in row:
            assert row["mib"] > 0.1 and 0 < row["save_share"]["median"] < 1, row
            assert row["upload_s"]["median"] > 0
    assert "save, %" in done.stdout
    assert (tmp_path / "checkpoint.png").read_bytes().startswith(b"\x89PNG")
