"""One exporter in this process, without Ray: what it shows of a real run, where it is found, and what clients cannot do to it."""

import dataclasses
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from cluster.commands.jobs import _run_on_ray
from cluster.endpoint import NUM_PORTS, discovery_folder
from cluster.executor import RayExecutor
from cluster.faults import Fault
from cluster.metrics import FAULT_CAUSES, METRICS, RETRY_CAUSES, Exporter
from p2r.data.corpus import ingest_locally
from p2r.engine.pretrain import pretrain
from p2r.engine.report import PretrainReport
from p2r.errors import TrainingError
from p2r.job import MetricsConfig, read_job
from p2r.storage import Storage

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def reports(write_toy_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[PretrainReport]:
    """Those of a real run on the toy data."""
    folder = tmp_path_factory.mktemp("run")
    job = read_job(write_toy_job(folder))
    assert job.ingest is not None and job.pretrain is not None
    corpus = Storage(str(folder / "corpus"))
    for _ in ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), corpus):
        pass
    storage = Storage(str(folder / "pretrain"))
    return list(pretrain(job.pretrain, storage=storage, corpus=corpus, device=torch.device("cpu")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "discovery"


@pytest.fixture
def exporter(folder: Path, tmp_path: Path) -> Iterator[Exporter]:
    exporter = Exporter(run="toy", storage_url=f"file://{tmp_path}", endpoint=MetricsConfig(folder=str(folder)))
    yield exporter
    exporter.close()


def scrape(exporter: Exporter, path: str = "/metrics") -> Series:
    with urllib.request.urlopen(f"http://{exporter.target}{path}", timeout=5) as answer:
        return parsed(answer.read().decode())


def parsed(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    (found,) = [x for (known, of), x in series.items() if known == name and labels.items() <= dict(of).items()]
    return found


def test_a_scrape_says_what_the_reports_say(exporter: Exporter, reports: list[PretrainReport]) -> None:
    for report in reports:
        exporter.observe(report)
    time.sleep(0.3)
    series, last = scrape(exporter), reports[-1]
    for name, expected in {
        "p2r_train_loss": last.loss,
        "p2r_train_step": 6,
        "p2r_train_steps_total": 6,
        "p2r_train_images_seen": 24,
        "p2r_train_images_per_second": last.images_per_s,
        "p2r_train_wait_ratio": last.wait_fraction,
        "p2r_embedding_equivariance_error_ratio": last.equivariance_error,
        "p2r_data_batches_total": last.data["batches"],
        "p2r_data_wait_seconds_total": last.data["wait_seconds"],
        "p2r_checkpoint_step": 6,
    }.items():
        assert value(series, name, run="toy", role="worker", rank="0") == expected, name
    assert 0 <= time.time() - value(series, "p2r_train_progress_timestamp_seconds") < 60
    assert (
        0
        < value(series, "p2r_disk_free_bytes", folder="storage")
        < value(series, "p2r_disk_size_bytes", folder="storage")
    )


def test_the_step_of_a_checkpoint_is_its_own_not_that_of_the_report_in_which_it_is_complete(
    exporter: Exporter, reports: list[PretrainReport]
) -> None:
    exporter.observe(dataclasses.replace(reports[-1], step=6, checkpoint="checkpoints/step-00000004"))
    assert value(parsed(exporter.page().decode()), "p2r_checkpoint_step") == 4


def test_every_metric_is_in_a_scrape_of_a_real_run(reports: list[PretrainReport], tmp_path: Path) -> None:
    """Those of a field that is optional in a report need one that has it; the fields of this version's reports are what counts."""
    worker, driver = (Exporter(run="toy", storage_url=f"file://{tmp_path}", role=x, endpoint=None) for x in ROLES)
    worker.observe(reports[-1])
    driver.trials({"running": 1})
    driver.fault(Fault(cause="worker", what="", decision="restart", count=1, limit=2))
    names = {name for page in (worker.page(), driver.page()) for name, _ in parsed(page.decode())}
    known = {field.name for field in dataclasses.fields(PretrainReport)}
    absent = {metric.name: metric.source.split(".")[1] for metric in METRICS if metric.name not in names}
    optional = {"probe_dice"}  # of runs with a probe
    own = {"p2r_train_memory_bytes": "memory_mib"}
    for name, field in absent.items():
        assert own.get(name, field) in optional or own.get(name, field) not in known, name
    assert names <= {metric.name for metric in METRICS}


ROLES: Any = ("worker", "driver")


def test_names_units_and_labels_follow_prometheus_rules() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    units = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio", "per second": "_per_second"}
    for metric in METRICS:
        assert re.fullmatch(r"p2r_[a-z][a-z0-9_]*[a-z0-9]", metric.name)
        assert metric.help[0].isupper() or metric.help[0].isdigit()
        assert metric.help.endswith(".") and (metric.label is None) == (not metric.values), metric.name
        stem = metric.name.removesuffix("_total")
        suffix = "_timestamp_seconds" if metric.unit == "timestamp" else units.get(metric.unit, "")
        assert stem.endswith(suffix), metric.name


def test_every_sum_of_the_data_plane_has_a_metric(repository: Path) -> None:
    sources = {metric.source.removeprefix("data.") for metric in METRICS if metric.source.startswith("data.")}
    text = "".join(path.read_text() for path in (repository / "p2r").rglob("*.py"))
    assert set(re.findall(r'counters\.add\(\s*"(\w+)"', text)) == sources
    assert set(re.findall(r'cause="(\w+)"', text)) <= {*RETRY_CAUSES, "size", "leased", "disk"}


def test_only_rank_0_shows_what_is_the_run_s(tmp_path: Path, reports: list[PretrainReport]) -> None:
    other = Exporter(run="toy", storage_url="s3://b/x", rank=3, endpoint=None)
    other.observe(reports[0])
    names = {name for name, _ in parsed(other.page().decode())}
    assert "p2r_train_wait_ratio" in names and "p2r_train_loss" not in names


def test_counters_begin_with_their_process_and_totals_with_the_run(reports: list[PretrainReport]) -> None:
    resumed = Exporter(run="toy", storage_url="s3://b/x", endpoint=None)
    assert value(parsed(resumed.page().decode()), "p2r_train_steps_total") == 0
    resumed.observe(dataclasses.replace(reports[-1], resumed_from=4))
    series = parsed(resumed.page().decode())
    assert value(series, "p2r_train_steps_total") == 2
    assert (value(series, "p2r_train_step"), value(series, "p2r_train_images_seen")) == (6, 24)


def test_what_not_every_report_states_stays(reports: list[PretrainReport]) -> None:
    exporter = Exporter(run="toy", storage_url="s3://b/x", endpoint=None)
    exporter.observe(dataclasses.replace(reports[0], equivariance_error=0.25))
    exporter.observe(dataclasses.replace(reports[1], equivariance_error=None))
    assert value(parsed(exporter.page().decode()), "p2r_embedding_equivariance_error_ratio") == 0.25


def test_labels_are_bounded_and_carry_no_secret_and_no_name(reports: list[PretrainReport], tmp_path: Path) -> None:
    secret = "hunter2 Jane Doe"
    report = dataclasses.replace(
        reports[0],
        data={f'retries{{cause="{secret}"}}': 3.0, 'retries{cause="503"}': 2.0, f"sub-{secret}": 1.0},
        checkpoint=f"checkpoints/{secret}",
        negatives=secret,
        profile=secret,
    )
    run = f"s3://key:{secret}@host/" + "x" * 500
    worker = Exporter(run=run, storage_url=f"file://{tmp_path}/{secret}", endpoint=None)
    driver = Exporter(run="toy", storage_url=f"file://{tmp_path}", role="driver", endpoint=None)
    worker.observe(report)
    driver.fault(Fault(cause=secret, what=secret, decision="end"))
    driver.trials({secret: 3})
    for page in (worker.page().decode(), driver.page().decode()):
        assert "hunter2" not in page.replace("hunter2_Jane_Doe", "") and "Jane Doe" not in page
    series = parsed(worker.page().decode())
    assert value(series, "p2r_data_retries_total", cause="other") == 3
    assert value(series, "p2r_data_retries_total", cause="503") == 2
    assert {len(dict(labels)["run"]) for _, labels in series} == {64}
    assert value(parsed(driver.page().decode()), "p2r_faults_total", cause="unknown") == 1


def test_a_driver_remembers_the_faults_of_its_run(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    rows = [
        {"cause": "worker", "what": "died", "decision": "restart", "count": 1, "limit": 3},
        {"cause": "worker", "what": "died", "decision": "restart", "count": 2, "limit": 3},
        {"cause": "stop", "what": "SIGTERM", "decision": "end", "count": 1, "limit": None},
    ]
    storage.write_bytes("pretrain/faults.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    driver = Exporter(run="toy", storage_url=storage.url, role="driver", endpoint=None)
    driver.fault(Fault(cause="worker", what="", decision="end", count=3, limit=3))
    series = parsed(driver.page().decode())
    assert [value(series, "p2r_run_faults", cause=x) for x in ("worker", "stop", "node")] == [3, 1, 0]
    assert [value(series, "p2r_faults_total", cause=x) for x in ("worker", "stop", "node")] == [1, 0, 0]
    assert value(series, "p2r_run_fault_limit", cause="worker") == 3
    storage.write_bytes("pretrain/faults.jsonl", b"{half a row")
    assert Exporter(run="toy", storage_url=storage.url, role="driver", endpoint=None).page()
    assert set(FAULT_CAUSES) == {dict(labels)["cause"] for name, labels in series if name == "p2r_faults_total"}


def test_a_report_costs_a_handful_of_operations_and_a_step_none(
    exporter: Exporter, reports: list[PretrainReport]
) -> None:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    exporter.observe(reports[0])
    sys.setprofile(count)
    exporter.observe(reports[1])
    sys.setprofile(None)
    assert calls <= 20  # none of them input or output; a scrape does the rest, in a thread of its own


def test_prometheus_finds_an_endpoint_by_a_file_that_ends_with_it(exporter: Exporter, folder: Path) -> None:
    (path,) = folder.iterdir()
    (group,) = json.loads(path.read_text())
    assert path.suffix == ".json" and group["targets"] == [exporter.target]
    assert group["labels"]["instance"].endswith("/toy/worker/0")
    exporter.close()
    assert list(folder.iterdir()) == []
    exporter.close()


def test_a_job_that_failed_leaves_a_file_that_the_next_process_of_its_run_removes(folder: Path) -> None:
    config = MetricsConfig(folder=str(folder))
    driver = Exporter(run="b", storage_url="s3://b/x", role="driver", endpoint=config)
    (path,) = folder.iterdir()
    driver.close(has_failed=True)
    driver.close()
    (group,) = json.loads(path.read_text())
    assert group["targets"] == ["127.0.0.1:0"], "a port that nobody can take"
    assert group["labels"]["instance"].endswith("/b/driver/0")
    assert (group["labels"]["run"], group["labels"]["ended"]) == ("b", "failed")
    with Running(folder):
        assert not path.exists()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("error", "num_files"), [(TrainingError("no room"), 1), (KeyboardInterrupt(), 0), (None, 0)])
def test_only_an_error_of_a_job_is_told(
    folder: Path,
    write_toy_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    num_files: int,
) -> None:
    monkeypatch.setattr("cluster.executor.refuse_unshared_folder", lambda storage: None)
    job = read_job(write_toy_job(tmp_path), (f"metrics.folder={folder}",))
    RayExecutor(job).__exit__(None if error is None else type(error), error, None)
    assert len(list(folder.glob("*.json"))) == num_files


def test_a_job_of_which_a_part_failed_is_told_too(
    folder: Path, write_toy_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toy_job(tmp_path)
    monkeypatch.setattr("cluster.executor.refuse_unshared_folder", lambda storage: None)
    monkeypatch.setattr("cluster.starting.started_session", lambda *_, **__: nullcontext())
    for failed, num_files in (([], 0), (["variant lost"], 1)):
        made: Any = SimpleNamespace(failed=failed)
        monkeypatch.setattr("p2r.pipeline.stages.run_job", lambda *_, made=made, **__: made)
        job = read_job(path, (f"metrics.folder={folder}",))
        assert _run_on_ray(job, path, None, profile_steps=0, debug=False) is made
        assert len(list(folder.glob("*.json"))) == num_files


def test_the_file_of_a_process_that_was_killed_is_removed_by_the_next_of_its_run(
    folder: Path, repository: Path, tmp_path: Path
) -> None:
    code = (
        "import os, sys; from cluster.metrics import Exporter; from p2r.job import MetricsConfig\n"
        "for run in 'ab':\n"
        "    Exporter(run=run, storage_url='s3://b/x', endpoint=MetricsConfig(folder=sys.argv[1]))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=repository, check=False, timeout=60)
    mine, other = sorted(folder.iterdir(), key=lambda path: "-b-worker" in path.name, reverse=True)
    with Running(folder) as (one, two):
        assert not mine.exists() and other.exists(), "that of another run may still have to be told"
        assert len(list(folder.iterdir())) == 3, "the living keep theirs"
        assert one.target != two.target
    long_ago = time.time() - 4000
    os.utime(other, (long_ago, long_ago))
    with Running(folder):
        assert not other.exists()


class Running:
    """Two exporters of one folder."""

    def __init__(self, folder: Path) -> None:
        config = MetricsConfig(folder=str(folder))
        self.both = [Exporter(run="b", storage_url="s3://b/x", rank=rank, endpoint=config) for rank in (0, 1)]

    def __enter__(self) -> list[Exporter]:
        return self.both

    def __exit__(self, *_: object) -> None:
        for exporter in self.both:
            exporter.close()


def test_a_discovery_folder_that_is_gone_is_made_again(exporter: Exporter, folder: Path) -> None:
    (path,) = folder.iterdir()
    path.unlink()
    folder.rmdir()
    exporter._endpoint._discovery_file.keep()  # type: ignore[union-attr]
    assert path.is_file()


def test_a_folder_that_cannot_be_written_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reports: list[PretrainReport]
) -> None:
    (tmp_path / "file").write_text("")
    config = MetricsConfig(folder=str(tmp_path / "file" / "below"))
    exporter = Exporter(run="toy", storage_url="s3://b/x", endpoint=config)
    for _ in range(3):
        exporter._endpoint._discovery_file.keep()  # type: ignore[union-attr]
    exporter.observe(reports[0])
    assert scrape(exporter)
    exporter.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Not a directory" in caplog.text and "training continues" in caplog.text


def test_a_port_in_use_is_left_to_who_has_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        exporter = Exporter(run="a", storage_url="s3://b/x", endpoint=MetricsConfig(port=port, folder=str(folder)))
        assert exporter.target is not None and port < int(exporter.target.split(":")[1]) < port + NUM_PORTS
        exporter.close()
    assert not caplog.records


def test_an_address_that_is_not_ours_is_one_line_in_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture, reports: list[PretrainReport]
) -> None:
    config = MetricsConfig(host="192.0.2.1", folder=str(folder))
    exporter = Exporter(run="a", storage_url="s3://b/x", endpoint=config)
    exporter.observe(reports[0])
    exporter.close()
    assert exporter.target is None and not folder.exists()
    assert len(caplog.records) == 1 and "no metrics endpoint at 192.0.2.1" in caplog.text


def test_clients_that_never_read_make_room_and_a_thousand_change_nothing(exporter: Exporter) -> None:
    host, port = str(exporter.target).split(":")
    silent = [socket.create_connection((host, int(port)), timeout=5) for _ in range(16)]
    time.sleep(1.2)
    assert scrape(exporter)
    silent[0].settimeout(2)
    assert silent[0].recv(1) == b"", "the oldest connection was not dropped"
    num_threads = threading.active_count()
    many = []
    for _ in range(1000):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((host, int(port)))
        with suppress(OSError):
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        many.append(client)
    assert threading.active_count() <= num_threads + 17
    for client in (*silent, *many):
        client.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert scrape(exporter)
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("it does not answer after the flood")


def test_trials_are_counted_by_state_and_tune_can_keep_who_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import cloudpickle

    from cluster.finetune import _TrialCounter

    driver = Exporter(run="toy", storage_url="s3://b/x", role="driver", endpoint=None)
    monkeypatch.setattr(_TrialCounter, "count", driver.trials)
    kept = cloudpickle.loads(cloudpickle.dumps(_TrialCounter()))  # the exporter itself has locks and sockets
    kept.on_step_end(1, [SimpleNamespace(status=status) for status in ("RUNNING", "PENDING", "TERMINATED", "ERROR")])
    kept.on_step_end(2, [])  # too soon after the last
    series = parsed(driver.page().decode())
    states = {dict(labels)["state"]: x for (name, labels), x in series.items() if name == "p2r_sweep_trials"}
    assert states == {"running": 1, "pending": 1, "done": 1, "failed": 1, "paused": 0}


def test_there_is_one_page(exporter: Exporter) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        scrape(exporter, "/etc/passwd")
    assert caught.value.code == 404
    caught.value.close()


def test_a_short_job_pushes_where_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, bytes]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("P2R_PUSHGATEWAY", f"127.0.0.1:{server.server_address[1]}")
        Exporter(run="toy", storage_url="s3://b/x", endpoint=MetricsConfig(folder=str(folder))).close()
        server.shutdown()
    ((path, content),) = seen
    assert path == "/metrics/job/p2r/pushed/1/rank/0/role/worker/run/toy" and b"p2r_train_steps_total" in content
    monkeypatch.setenv("P2R_PUSHGATEWAY", "http://me:hunter2@127.0.0.1:1")
    Exporter(run="toy", storage_url="s3://b/x", endpoint=MetricsConfig(folder=str(folder))).close()
    assert "not pushed" in caplog.text and "hunter2" not in caplog.text


def test_the_folder_is_the_job_s_or_the_node_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("P2R_METRICS_FOLDER", "/run/p2r")
    assert discovery_folder("/x") == Path("/x")
    assert discovery_folder() == Path("/run/p2r")
    monkeypatch.delenv("P2R_METRICS_FOLDER")
    assert discovery_folder() == Path.home() / ".cache/p2r/metrics"
