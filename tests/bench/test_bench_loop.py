"""The benchmark runs on a real Ray worker, both contenders train alike, table and files hold what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import ray.cloudpickle


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_small_run_trains_twice_alike_and_writes_its_rows_and_its_picture(
    tmp_path: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    bench = importlib.import_module("bench_loop")
    ray.cloudpickle.register_pickle_by_value(bench)  # Ray's workers do not know the folder of benchmarks
    small = ["--size", "32", "--batch", "4", "--pairs", "8", "--width", "4", "--rounds", "2", "--steps", "2"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "loop.png")]
    where = ["--device", "cpu", "--threads", "1", "--scans", str(toy_data / "images")]
    monkeypatch.setattr(sys, "argv", ["bench_loop.py", *small, *where, *files])
    try:
        bench.main()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(bench)
    ours, bare = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (ours["contender"], bare["contender"]) == ("p2r run, one worker", "bare torch loop")
    assert ours["images"] == bare["images"] == 2 * 2 * 4
    assert ours["num_threads"] == bare["num_threads"] == 1
    for of_turn in ("first_loss", "last_loss"):
        assert ours[of_turn] == pytest.approx(bare[of_turn], rel=1e-4)
    assert ours["first_loss"] != ours["last_loss"]
    assert ours["of_bare"]["median"] > 0 and bare["of_bare"]["median"] == 1
    assert ours["cpu_s_per_image"]["median"] > 0 and bare["cpu_s_per_image"]["median"] > 0
    assert len(ours["of_rounds"]) == len(bare["of_rounds"]) == 2
    assert "% of bare" in capsys.readouterr().out
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
