"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path


def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_views.py"
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "views.png")]
    small = ["--size", "24", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(bench), *small, *files], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["p2r", "TorchIO", "MONAI", "kornia"] * 2
    for row in rows:
        package = row["contender"].lower()
        if importlib.util.find_spec(package) is None:
            assert row["skipped"] == f"ModuleNotFoundError: No module named '{package}'"
        else:
            assert row["seconds"] > 0, row
    assert "MONAI" in done.stdout
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
