"""The benchmark runs, and its rows hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_contrasts.py"
    small = ["--sessions", "2", "--planes", "4", "--batch", "4", "--steps", "1", "--rounds", "1"]
    command = [sys.executable, str(bench), *small, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["one contrast", "three, same", "three, cross"]
    assert all(row["total"]["median"] > 0 for row in rows) and rows[0]["speed"]["median"] == 1
    assert "speed per voxel" in done.stdout
