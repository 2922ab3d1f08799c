"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_loss.py"
    only = ["--only", "naive torch", "torch, checkpointed blocks", "memeff"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "loss.png")]
    command = [sys.executable, str(bench), "--num", "256", "512", "--rounds", "1", "--device", "cpu", *only, *files]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = [row for row in rows if "skipped" not in row]
    assert [row["contender"] for row in measured] == ["p2r", "naive torch", "torch, checkpointed blocks"] * 2
    assert [row["skipped"] for row in rows if row["contender"] == "memeff"] == ["RuntimeError: needs a CUDA device"] * 2
    assert all(row["gradient_error"] < 1e-5 and row["seconds"] > 0 for row in measured)
    assert all(name in done.stdout for name in ("p2r", "naive torch", "needs a CUDA device"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
