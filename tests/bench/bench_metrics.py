#!/usr/bin/env python3
"""What metrics cost a training, by timers around everything that they do in its process.

    python tests/bench/bench_metrics.py --steps 60

A small real run is observed at every report while somebody scrapes it once a second, thirty times as often as Prometheus does by
default. Time of the page counts as if it were taken from training as a whole, which is the worst that sharing an interpreter can do.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from cluster.metrics import Exporter
from p2r.data.corpus import ingest_locally
from p2r.engine.pretrain import pretrain
from p2r.job import MetricsConfig, read_job
from p2r.storage import Storage
from tests.conftest import TOY_JOB
from tests.toy import write_toy_data


def main() -> None:
    """Run and print a line."""
    parser = argparse.ArgumentParser(description="What metrics cost a training.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as name:
        row = measure(Path(name), num_steps=options.steps)
    print(
        f"{row['num_steps']} steps of {row['step_ms']:.1f} ms, a report every {row['report_interval']} | "
        f"observing a report {row['observe_us']:.0f} us | a scrape {row['page_ms']:.1f} ms | "
        f"of the run's time {row['fraction']:.4%} at a scrape in 30 s, {row['observe_fraction']:.5%} without any"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(row))


def measure(folder: Path, *, num_steps: int) -> dict[str, float]:
    """Train on the toy data and add up what metrics take."""
    data = write_toy_data(folder / "data")
    (folder / "toy.yaml").write_text(TOY_JOB.format(data=data, num_workers=1) + f"storage: {folder}/storage\n")
    sets = (f"pretrain.steps={num_steps}", "pretrain.report_interval=5", "pretrain.checkpoint_interval=1000000")
    job = read_job(folder / "toy.yaml", sets)
    assert job.ingest is not None and job.pretrain is not None
    corpus = Storage(str(folder / "corpus"))
    for _ in ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), corpus):
        pass
    observing: list[float] = []
    pages: list[float] = []
    config = MetricsConfig(folder=str(folder / "metrics"))
    ended = threading.Event()
    with closing(Exporter(run="bench", storage_url=f"file://{folder}", endpoint=config)) as exporter:
        threading.Thread(target=_scrape, args=(exporter.target, ended), daemon=True).start()
        steps = pretrain(job.pretrain, storage=Storage(str(folder / "run")), corpus=corpus, device=torch.device("cpu"))
        began = time.perf_counter()
        for number, report in enumerate(steps):
            if number == 0:
                began = time.perf_counter()  # without starting up
            observing.append(_timed(lambda report=report: exporter.observe(report)))  # type: ignore[misc]
            if number % 4 == 0:
                pages.append(_timed(exporter.page))
        seconds = time.perf_counter() - began - sum(pages)
        ended.set()
    observe_s, page_s = sorted(observing)[len(observing) // 2], sorted(pages)[len(pages) // 2]
    interval = job.pretrain.report_interval
    step_s = seconds / (num_steps - interval)
    observe_fraction = observe_s / (interval * step_s)
    return {
        "num_steps": num_steps,
        "report_interval": interval,
        "step_ms": 1e3 * step_s,
        "observe_us": 1e6 * observe_s,
        "page_ms": 1e3 * page_s,
        "observe_fraction": observe_fraction,
        "fraction": observe_fraction + page_s / 30.0,
    }


def _scrape(target: str | None, ended: threading.Event) -> None:
    while not ended.wait(1.0):
        urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read()


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
