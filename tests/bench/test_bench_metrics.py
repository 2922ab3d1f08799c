"""The benchmark runs and says what it measured. What it measures is no test, for a machine may be busy; the order of magnitude is."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_says_what_metrics_cost(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_metrics.py"
    command = [sys.executable, str(bench), "--steps", "10", "--json", str(tmp_path / "row.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "row.json").read_text())
    assert 0 < row["observe_fraction"] < 0.01 and row["page_ms"] > 0
    assert "observing a report" in done.stdout
