"""The benchmark runs, and its results hold what was measured. What it measures is no test, except that a kill changes no byte."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_results(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_sessions.py"
    small = ["--simulated", "60", "--sessions", "24", "--processes", "1", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, str(bench), *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["simulated"]["sessions"] == 60 < found["simulated"]["scans"] and found["simulated"]["shards"] > 3
    assert found["ingested"]["equal_bytes"] and found["ingested"]["killed"]["shards"] > 0
    assert found["ingested"]["files_per_s"] > 0
