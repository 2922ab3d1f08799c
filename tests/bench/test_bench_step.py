"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_step.py"
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "step.png")]
    small = ["--size", "32", "--batch", "4", "--pairs", "8", "--width", "4", "--rounds", "1", "--steps", "2"]
    peers = ["published manner", "published manner, without TorchIO"]
    only = ["--only", "p2r, fp32, channels last", *peers, "--loss-pairs", "64", "--workers", "1"]
    command = [sys.executable, str(bench), "--device", "cpu", *small, *only, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == ["p2r, fp32", "p2r, fp32, channels last", *peers]
    if importlib.util.find_spec("torchio") is None:
        assert rows.pop(peers[0])["skipped"] == "ModuleNotFoundError: No module named 'torchio'"
    for row in rows.values():
        assert row["images_per_s"]["median"] > 0 and row["of_matmul"] > 0, row
        # 32 pairs, of which none is known yet: about the logarithm of 63 candidates.
        assert row["last_loss"] == pytest.approx(math.log(63), rel=0.25)
    for name in ("p2r, fp32", "p2r, fp32, channels last"):
        parts = rows[name]["parts"]
        assert all(parts.pop(name) > 0 for name in ("views", "points", "forward", "loss", "backward", "optimizer"))
        assert 0 <= parts["other"] < 0.5
    assert found["many_pairs"]["num_pairs"] == 64 and 0 < found["many_pairs"]["parts"]["loss"] < 1
    assert all(name in done.stdout for name in ("p2r, fp32, channels last", "x published", "64 pixel pairs: the loss"))
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
