"""The pieces of the local stack that need no Ray: Prometheus finds, reads and loses a real exporter; what is missing is said."""

import json
import shutil
import time
import urllib.parse
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import Exporter
from infra.local.stack import Prometheus
from p2r.job import MetricsConfig


def ask(prometheus: Prometheus, query: str) -> Any:
    url = f"{prometheus.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def wait_for(prometheus: Prometheus, query: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := ask(prometheus, query):
            return found
        time.sleep(0.2)
    pytest.fail(f"{query}: no answer in 60 s")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt install prometheus")
def test_a_real_prometheus_finds_a_process_reads_it_and_sees_it_end(tmp_path: Path) -> None:
    discovery = tmp_path / "metrics"
    # Prometheus hands on what its discovery finds at most every five seconds, whatever the speed. Until then a process
    # that has gone stays a target that is down, so the alert's own wait (5 min / speed) must be well over those five.
    prometheus = Prometheus(tmp_path / "prometheus", discovery=discovery, ray_file=tmp_path / "none.json", speed=15)
    try:
        config = MetricsConfig(folder=str(discovery))
        with closing(Exporter(run="toy", storage_url=f"file://{tmp_path}", endpoint=config)):
            (found,) = wait_for(prometheus, 'p2r_train_steps_total{run="toy", role="worker", rank="0"}')
            assert found["metric"]["job"] == "p2r" and found["metric"]["instance"].endswith("/toy/worker/0")
            (age,) = wait_for(prometheus, "run:p2r_train_progress_age:seconds")
            assert 0 <= float(age["value"][1]) < 60
            assert [x["metric"]["run"] for x in wait_for(prometheus, "node:p2r_disk_free:ratio")] == ["toy"] * 2
        wait_for(prometheus, 'absent(p2r_train_steps_total{run="toy"})')
        # Pending it may be, from the end of the process until Prometheus reads the folder again.
        wait_for(prometheus, 'absent(ALERTS{alertname="P2RProcessUnreachable"})')
        fired = 'count_over_time(ALERTS{alertname="P2RProcessUnreachable", alertstate="firing"}[5m])'
        assert not ask(prometheus, fired), "it said that it goes"
    finally:
        prometheus.stop()


def test_a_program_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="Prometheus is not installed: apt install prometheus"):
        Prometheus(tmp_path / "p", discovery=tmp_path / "d", ray_file=tmp_path / "none.json")
