"""Real jobs with marked secrets: whatever Ray, the storage, the reports and the terminal keep of them is searched for the marks."""

import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.session import forwarded_secrets, forwarded_settings
from infra.local.s3 import free_ports
from p2r.errors import masked_errors
from p2r.storage import Storage

pytestmark = pytest.mark.ray

ATTEMPTS = 4
"""Ray has little patience: on a busy machine its processes do not find one another in time."""
MARK = "P1antedSecret"
MARKED = {
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK.upper()}000",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/key+of==storage",
    "AWS_SESSION_TOKEN": f"{MARK}-session",
    "P2R_PSEUDONYM_KEY": f"{MARK} key of 'pseudonyms', long enough",
    "P2R_SOURCE": f"https://bucket.example/scan.nii?X-Amz-Signature={MARK}",
    "AWS_ENDPOINT_URL": f"http://user:{MARK}@127.0.0.1:9",
}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="p2r-", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def watched_commands() -> Iterator[set[bytes]]:
    """Give the set of command lines of all processes that run during the block."""
    seen: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:
                    continue  # it has ended

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def environment(**changes: str) -> dict[str, str]:
    """Return the variables of a shell that has no credentials, and these."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_ADDRESS", "RAY_AUTH"))
    }
    return {**plain, "PYTHONPATH": str(Path.cwd()), "RAY_AUTH_MODE": "disabled", **changes}


def leaks(folder: Path, *marks: str) -> list[str]:
    """Return the files below a folder that hold a mark, in their content or their name."""
    wanted = [mark.encode() for mark in (*marks, MARK, MARK.upper())]
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and any(mark in path.read_bytes() or mark in bytes(path) for mark in wanted)
    ]


def p2r(*arguments: str, env: Mapping[str, str], cwd: Path) -> str:
    """Run the command and return what it wrote to stdout and stderr."""
    said = ""
    for _ in range(ATTEMPTS):
        command = [sys.executable, "-m", "cluster", *arguments]
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=400)
        said += done.stdout + done.stderr
        if done.returncode == 0 or "timed out during startup" not in done.stderr:
            break
    assert done.returncode == 0, said
    return said


def test_a_job_on_this_machine_leaves_no_secret_anywhere(
    write_toy_job: Callable[..., Path], tmp_path: Path, short: Path
) -> None:
    job = write_toy_job(tmp_path)
    with watched_commands() as commands:
        said = p2r(
            *(
                "run",
                str(job),
                "--set",
                "kind=pretrain",
                "--set",
                "pretrain.steps=2",
                "--set",
                "ingest.pseudonyms=true",
            ),
            env=environment(**MARKED, RAY_TMPDIR=str(short)),
            cwd=tmp_path,
        )
    assert Storage(f"{tmp_path}/storage/corpus").read_json("manifest.json")["num_records"] > 0
    assert list(short.rglob("runtime_env_agent.log")) and list(short.rglob("raylet.out"))
    assert [*leaks(short), *leaks(tmp_path / "storage")] == []
    assert MARK not in said and not any(MARK.encode() in command for command in commands)


def test_a_cluster_s_workers_get_the_driver_s_keys_in_memory_and_a_submitted_job_gets_none(
    write_toy_job: Callable[..., Path], tmp_path: Path, short: Path, s3_server: dict[str, str], s3_url: str
) -> None:
    job = write_toy_job(tmp_path)
    keys = {name: value for name, value in s3_server.items() if name.startswith("AWS_")}
    secret = keys["AWS_SECRET_ACCESS_KEY"]
    others = {name: value for name, value in MARKED.items() if name != "AWS_SESSION_TOKEN"}
    with watched_commands() as commands, head(short) as (address, dashboard):
        # The nodes have no identity: the corpus in the bucket was written with keys that the driver has handed over.
        said = p2r(
            *("run", str(job), "--address", address, "--set", "kind=ingest", "--set", f"storage={s3_url}"),
            *("--set", "ingest.pseudonyms=true"),
            env=environment(**{**others, **keys}),
            cwd=tmp_path,
        )
        assert Storage(f"{s3_url}/corpus").read_json("manifest.json")["num_records"] > 0
        said += p2r(
            *("submit", job.name, "--address", f"http://127.0.0.1:{dashboard}", "--set", "kind=ingest"),
            env=environment(**MARKED),
            cwd=tmp_path,
        )
        jobs = jobs_of(dashboard)
    assert "not passed on, because Ray stores them with the job: " + ", ".join(sorted(MARKED)) in said
    assert jobs.count('"entrypoint"') == 2
    assert [*leaks(short, secret), *leaks(tmp_path / "storage")] == []
    for text in (said, jobs, *(command.decode(errors="replace") for command in commands)):
        assert MARK not in text and secret not in text


@contextmanager
def head(folder: Path) -> Iterator[tuple[str, int]]:
    """Give the address and the dashboard's port of a Ray head with two CPUs, whose logs are below a folder."""
    for attempt in range(ATTEMPTS):
        gcs, dashboard, *of_agents = free_ports(6)
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}"]
        # Chosen here: a raylet waits but 15 s for its agents to tell theirs, which a busy machine exceeds.
        names = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
        command += [f"--{name}-port={port}" for name, port in zip(names, of_agents, strict=True)]
        command += ["--include-dashboard=true", "--object-store-memory=80000000", f"--temp-dir={folder}"]
        with (folder / "head.log").open("wb") as log:
            # Jobs that are submitted call `python`: the head's own.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            process = subprocess.Popen(command, env=environment(PATH=path), stdout=log, stderr=log)
        while not (is_up := "Ray runtime started" in (folder / "head.log").read_text()) and process.poll() is None:
            time.sleep(0.3)
        if is_up:
            break
        assert attempt < ATTEMPTS - 1, (folder / "head.log").read_text()
    try:
        # Ray takes 127.0.0.1 for this address, where the head listens.
        yield f"{ray.util.get_node_ip_address()}:{gcs}", dashboard
    finally:
        process.terminate()
        process.wait(60)


def jobs_of(dashboard: int) -> str:
    """Return a head's list of jobs as JSON; nothing while it is not up."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=20) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_ray_s_logs_hold_no_secret_of_an_error(ray_cluster: None) -> None:
    """Ray Train writes the traceback of a worker that fails into its own log."""
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError

    from cluster.group import TorchGroup, Trainer

    with tempfile.TemporaryDirectory() as folder, pytest.raises(TrainingFailedError) as raised:
        Trainer(
            fails,
            backend_config=TorchGroup(backend="gloo", timeout_s=30),
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=folder),
        ).fit()
    assert "***@127.0.0.1" in str(raised.value) and MARK not in str(raised.value)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert any(b"***@127.0.0.1" in path.read_bytes() for path in logs), "Ray has logged nothing: the test shows nothing"
    assert leaks(session / "logs") == []


def fails() -> None:
    with masked_errors():
        try:
            raise OSError(MARKED["AWS_ENDPOINT_URL"])
        except OSError as error:
            raise ValueError(f"cannot open {MARKED['P2R_SOURCE']}, {MARKED['AWS_ENDPOINT_URL']}") from error


def test_what_is_secret_and_what_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "P2R_"))]:
        monkeypatch.delenv(name)
    settings = {"P2R_STORAGE": "s3://bucket/runs", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_ROLE_ARN": "arn:x"}
    for name, value in {**MARKED, **settings}.items():
        monkeypatch.setenv(name, value)
    found: dict[str, Any] = forwarded_settings()
    assert {name: value for name, value in found.items() if name.startswith(("AWS_", "P2R_"))} == {
        **settings,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    assert forwarded_secrets() == {name: value for name, value in MARKED.items() if name != "P2R_PSEUDONYM_KEY"}
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_EC2_METADATA_DISABLED" not in forwarded_settings(), "a machine's role could not be asked for"
