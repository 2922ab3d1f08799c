"""A real Ray head of a test's own, the `p2r` command in processes of their own, and marked secrets to search for afterwards."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

from infra.local.s3 import free_ports

ATTEMPTS = 4
"""Ray has little patience: on a busy machine its processes do not find one another in time."""
MARK = "P1antedSecret"
MARKED = {
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK.upper()}000",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/key+of==storage",
    "AWS_SESSION_TOKEN": f"{MARK}-session",
    "P2R_PSEUDONYM_KEY": f"{MARK} key of 'pseudonyms', long enough",
    "P2R_SOURCE": f"https://bucket.example/scan.nii?X-Amz-Signature={MARK}",
    "HF_TOKEN": f"hf_{MARK}0123456789",
    "AWS_ENDPOINT_URL": f"http://user:{MARK}@127.0.0.1:9",
}


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
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "HF_TOKEN", "RAY_ADDRESS", "RAY_AUTH"))
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
