"""The benchmark runs, and its files hold what was measured. What it measures is no test."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows(toy_data: Path, tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_ingest.py"
    options = ["--images", str(toy_data / "images"), "--rounds", "1", "--processes", "1", "--shard-size-mib", "0.01"]
    command = [sys.executable, str(bench), *options, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["num_files"] == 8 and found["equal_after_kill"]
    assert [row["contender"] for row in found["rows"]][:3] == ["p2r, lz4", "p2r, zstd", "loop, get_fdata"]
    assert all(row["files_per_s"]["median"] > 0 and row["bytes_over_nii_gz"] > 0 for row in found["rows"])
    assert "the same bytes" in done.stdout
