"""The benchmark runs, and its rows hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc on Linux has the setting")
def test_a_small_run_writes_its_rows(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_allocator.py"
    small = ["--width", "4", "--size", "32", "--batch", "2", "--steps", "1", "--rounds", "1"]
    command = [sys.executable, str(bench), *small, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["returned to the system", "kept"]
    assert all(row["peak_mib"]["median"] > 0 for row in rows) and rows[0]["ratio"]["median"] == 1
    assert "CPU time, ratio" in done.stdout
