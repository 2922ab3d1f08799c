"""A real head with Ray's token authentication on: who may hand it a job, and what the others are told."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from ray.job_submission import JobStatus

from infra.local.s3 import free_ports
from p2r.errors import JobError
from p2r.exits import exit_code_of

pytestmark = pytest.mark.ray

_START_LIMIT_S = 120.0


@dataclass(frozen=True)
class _Head:
    url: str
    token: str
    environment: dict[str, str]
    """Of a client that has no token."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[_Head]:
    """A head without CPUs, on loopback, which nobody else's Ray can meet."""
    folder = tmp_path_factory.mktemp("head")
    token, (gcs, dashboard) = secrets.token_hex(32), free_ports(2)
    client = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    client |= {"HOME": str(folder), "PYTHONPATH": str(repository), "RAY_AUTH_MODE": "disabled"}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
    command += [
        f"--port={gcs}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=true",
        f"--dashboard-port={dashboard}",
    ]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--object-store-memory=80000000"],
            env={**client, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_enable_worker_prestart": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    made = _Head(f"http://127.0.0.1:{dashboard}", token, client)
    try:
        deadline = time.monotonic() + _START_LIMIT_S
        while _status(made, token) is None:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.3)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_head_with_a_token_takes_jobs_from_nobody_else(
    head: _Head, write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    assert [_status(head, token) for token in (None, "0" * 64, head.token)] == [401, 403, 200]

    job = write_toy_job(tmp_path)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "cluster", "submit", job.name, "--address", head.url],
            env=head.environment | more,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in ({}, wrong)
    ]
    for client, seen in zip(clients, ("Missing authentication token", "Invalid authentication token"), strict=True):
        said = client.communicate(timeout=120)[1]
        assert client.returncode == 2, said
        assert seen in said and "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in said
        assert not re.search(r"[0-9a-f]{64}|Traceback", said)
    assert _status(head, head.token, "/api/jobs/") == 200
    assert _read(head, "/api/jobs/") == b"[]"


def test_where_no_job_server_is_the_message_says_which_address_to_give(
    head: _Head, write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "cluster", "submit", write_toy_job(tmp_path).name, "--address", address]
    asked = subprocess.run(command, env=head.environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 2
    assert f"no job server answers at {address}: give --address http://HOST:8265" in asked.stderr


def _status(head: _Head, token: str | None, path: str = "/api/version") -> int | None:
    """Return what the head answers; None while it does not."""
    request = urllib.request.Request(head.url + path)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


def _read(head: _Head, path: str) -> bytes:
    request = urllib.request.Request(head.url + path, headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


def test_a_folder_over_rays_limit_names_its_largest_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_toy_job: Callable[..., Path]
) -> None:
    from ray._private.runtime_env import packaging

    from cluster import submit

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def submit_job(self, **_: object) -> str:
            packaging._store_package_in_gcs("gcs://_ray_pkg_x.zip", b"x" * 2048)
            raise AssertionError("Ray refuses it")

    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 1024)
    monkeypatch.setattr(submit, "JobSubmissionClient", Client)
    job = write_toy_job(tmp_path)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "big.bin").write_bytes(bytes(3 << 20))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=r"maximum size of .*largest in it are scans \(3 MiB\).*\.rayignore"):
        submit.submit(job, (), address="http://127.0.0.1:1")


class _Followed:
    """A client whose job is submitted, and whose log ends as a test says."""

    end: BaseException | None = None
    status = JobStatus.RUNNING
    settings: ClassVar[dict[str, str]] = {}

    def __init__(self, address: str) -> None:
        pass

    def submit_job(self, *, runtime_env: dict[str, dict[str, str]], **_: object) -> str:
        _Followed.settings = runtime_env["env_vars"]
        return "raysubmit_x"

    async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
        yield "step 1\n"
        if self.end is not None:
            raise self.end

    def get_job_status(self, submission: str) -> JobStatus:
        return self.status


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("WebSocket connection closed unexpectedly with close code 1006"), "closed unexpectedly"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        (None, "the cluster closed the connection"),
    ],
)
def test_a_log_that_ends_before_its_job_says_that_the_job_runs_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_toy_job: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    end: BaseException | None,
    why: str,
) -> None:
    from cluster import submit

    monkeypatch.setattr(submit, "JobSubmissionClient", _Followed)
    monkeypatch.setattr(_Followed, "end", end)
    job = write_toy_job(tmp_path)
    monkeypatch.chdir(tmp_path)

    def command() -> int:
        submit.submit(job, (), address="http://127.0.0.1:1")
        return 0

    assert exit_code_of(command, what="p2r submit", is_debug=False) == 1
    said = capsys.readouterr().err
    assert why in said and "job raysubmit_x runs on" in said and "do not submit it again" in said
    assert "ray job stop --address http://127.0.0.1:1 raysubmit_x" in said
    assert "Traceback" not in said and "run the same command again" not in said


def test_a_submitted_job_may_ask_for_its_node_s_own_role(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_toy_job: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cluster import submit

    monkeypatch.setattr(submit, "JobSubmissionClient", _Followed)
    monkeypatch.setattr(_Followed, "status", JobStatus.SUCCEEDED)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_PROFILE", "laptop")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    job = write_toy_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    submit.submit(job, (), address=None)
    assert {name for name in _Followed.settings if name.startswith("AWS_")} == {"AWS_DEFAULT_REGION"}
    said = capsys.readouterr().err
    assert "a profile belongs to this machine: AWS_PROFILE" in said and "laptop" not in said
