"""The benchmark runs, its table and file hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.s3
def test_a_small_run_writes_its_rows(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_pull.py"
    command = [sys.executable, str(bench), "--width", "4", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["plain GET", "p2r pull"]
    assert all(row["mib"] > 0.1 and row["of_plain"]["median"] > 0 for row in found["rows"])
    assert (
        all(load["cpu"] > 0 for load in found["later_loads_offline_s"])
        and "second load, without the server" in done.stdout
    )
