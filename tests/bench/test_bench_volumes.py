"""The benchmark runs, and its rows hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_volumes.py"
    small = ["--shape", "48", "48", "48", "--sizes", "24", "--patches", "2"]
    command = [sys.executable, str(bench), *small, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["record"] for row in rows] == ["planes", "blocks of 32", "blocks of 24", "blocks of 16"]
    assert all(row["patches"][0]["bytes_over_needed"] >= 1 and row["index_bytes"] > 0 for row in rows)
