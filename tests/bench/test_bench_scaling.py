"""The benchmark runs, its table and files hold what was measured. What it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path

from p2r.config import ModelConfig
from p2r.model.pix2rep import Pix2Rep


def test_a_small_run_writes_its_rows_and_its_picture(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench_scaling.py"
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "scaling.png")]
    small = ["--size", "32", "--batch", "4", "--pairs", "8", "--width", "4", "--rounds", "1", "--steps", "1"]
    command = [sys.executable, str(bench), *small, "--ranks", "2", "--device", "cpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["kind"], row["ranks"], row["global_batch"]) for row in rows] == [
        ("strong", 2, 4),
        ("weak", 2, 4),
    ]
    assert all(row["images_per_s"]["median"] > 0 and row["efficiency"]["median"] > 0 for row in rows)
    model = Pix2Rep(ModelConfig(channels=(4, 8, 16, 32, 64)))
    num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    for row in rows:
        sent = row["bytes_per_step"]
        assert sent["gradients"] >= num_bytes and sent["weights"] >= num_bytes / 2
        assert sent["gradients"] + sent["weights"] < 1.6 * num_bytes
        towers = 2 * 4 * 16 * 128  # float32 of 16 pairs of this rank, 128 channels
        assert towers <= sent["embeddings"] < 1.2 * towers
    assert all(name in done.stdout for name in ("strong", "weak", "embeddings, KiB"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
