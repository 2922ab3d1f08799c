"""HTTP endpoint for one page of text, which Prometheus discovers, and whose clients cannot slow training.

    bind -> serve in daemon threads -> a file in the discovery folder names the endpoint -> both are removed at the end
                                                                   -> the job failed: the file stays, labelled `ended`

Choices: at most `_MAX_OPEN` connections. The oldest makes room for a new one, so clients that never read, or a thousand at
once, cannot take more threads or memory. The page is rendered at most every `_FRESH_S`, for any number of clients.
The discovery file is written atomically and locked (`flock`) while its process lives. An unlocked file tells Prometheus that
a process is missing; the next process of the same run removes it, or any process after an hour. Errors never reach training:
an unusable port or folder is logged once, and the folder is retried.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import socketserver
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from p2r.errors import error_text
from p2r.files import is_file_at, temporary_beside

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NUM_PORTS = 64
"""Ports tried, starting at the configured one: one for each process of a node."""

_MAX_OPEN = 16
_SILENT_S = 5.0  # a client that sends or reads nothing for this time is disconnected
_GRACE_S = 1.0  # a younger connection is not closed to make room
_FRESH_S = 0.25
_POLL_S = 0.2  # closing waits up to this time
_MISSED_S = 3600.0  # age at which any process removes the file of a killed process
_KEEP_S = 5.0  # interval of checks that the discovery file still exists
_LOG = logging.getLogger(__name__)


def discovery_folder(folder: str | None = None) -> Path:
    """Return the folder for a node's discovery files: `folder`, `$P2R_METRICS_FOLDER`, or `~/.cache/p2r/metrics`."""
    named = folder or os.environ.get("P2R_METRICS_FOLDER")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "p2r" / "metrics"


def listening_host(host: str | None = None) -> str:
    """Return the address to listen on: `host`, `$P2R_METRICS_HOST`, or loopback."""
    return host or os.environ.get("P2R_METRICS_HOST") or "127.0.0.1"


def first_port(port: int | None = None) -> int:
    """Return the first port to try: `port`, `$P2R_METRICS_PORT`, or 0. An invalid variable is logged and counts as 0."""
    if port is not None:
        return port
    named = os.environ.get("P2R_METRICS_PORT") or "0"
    if named.isdecimal() and int(named) <= 65535:
        return int(named)
    _LOG.warning("P2R_METRICS_PORT must be a port from 0 to 65535, got %r: using a free one", named)
    return 0


class Endpoint:
    """Page of one process under `/metrics`, served until `close`.

    Args:
        page: Renders the page; called from the endpoint's own threads.
        host: Address to listen on.
        port: First of `NUM_PORTS` ports to try; 0: any free one.
        folder: Discovery folder.
        run: Name of the run.
        name: Name of this process in the run.
        labels: Labels in the discovery file; Prometheus adds them to every series of this process.

    Attributes:
        target: `host:port` as others reach it; None if no port was available.
    """

    def __init__(
        self,
        page: Callable[[], bytes],
        *,
        host: str,
        port: int,
        folder: Path,
        run: str,
        name: str,
        labels: Mapping[str, str],
    ) -> None:
        self.target: str | None = None
        self._server, self._discovery_file, self._ended = _bind_server(_Page(page), host, port), None, threading.Event()
        if self._server is None:
            return
        self.target = f"{_reachable_host(host)}:{self._server.server_address[1]}"
        content = [{"targets": [self.target], "labels": dict(labels)}]
        # Port 0 never answers, also when another process has taken this one's port.
        self._last_content = [
            {"targets": [f"{_reachable_host(host)}:0"], "labels": {**labels, "run": run, "ended": "failed"}}
        ]
        self._discovery_file = _DiscoveryFile(
            folder, f"p2r-{socket.gethostname()}-{run}-", f"{name}-{os.getpid()}.json", content
        )
        self._discovery_file.keep()
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="p2r-metrics", daemon=True).start()
        threading.Thread(target=self._keep_discovery_file, name="p2r-metrics-file", daemon=True).start()

    def close(self, *, has_failed: bool = False) -> None:
        """Remove the discovery file, then end the endpoint. A second call has no effect.

        Args:
            has_failed: Leave a discovery file with the labels `run` and `ended`, because Prometheus may not see this process again.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        if self._discovery_file is not None:
            self._discovery_file.close(self._last_content if has_failed else None)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _keep_discovery_file(self) -> None:
        while not self._ended.wait(_KEEP_S):
            if self._discovery_file is not None:
                self._discovery_file.keep()


class _Page:
    """The page, rendered again only if the last one is older than `_FRESH_S`."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._content, self._made_at_s = b"", -1.0

    def __call__(self) -> bytes:
        with self._lock:
            if not self._content or time.monotonic() - self._made_at_s > _FRESH_S:
                self._content, self._made_at_s = self._make(), time.monotonic()
            return self._content


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], page: _Page) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.page = page
        self._open: OrderedDict[socket.socket, float] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a new thread. At the limit, disconnect the oldest client, or this one if the oldest is very young."""
        now_s = time.monotonic()
        with self._lock:
            if len(self._open) >= _MAX_OPEN:
                oldest, since_s = next(iter(self._open.items()))
                if now_s - since_s < _GRACE_S:
                    super().shutdown_request(request)
                    return
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread, which then ends
            self._open[request] = now_s
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and free its place."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that disconnected."""
        _LOG.debug("a client of the metrics endpoint left", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "p2r", ""
    timeout = _SILENT_S

    def do_GET(self) -> None:
        found = self.path.partition("?")[0] == "/metrics"
        content = self.server.page() if found else b"metrics of p2r are at /metrics\n"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log scrapes."""


class _DiscoveryFile:
    """Discovery file, locked while its process lives."""

    def __init__(self, folder: Path, prefix: str, name: str, content: Any) -> None:
        self._path, self._prefix, self._content = folder / f"{prefix}{name}", prefix, json.dumps(content).encode()
        self._handle: int | None = None
        self._lock, self._is_closed, self._is_failing = threading.Lock(), False, False

    def keep(self) -> None:
        """Write the file if it is absent, and remove the files of dead processes."""
        with self._lock:
            if self._is_closed:
                return
            if self._handle is not None and is_file_at(self._path, self._handle):
                with suppress(OSError):
                    os.utime(self._handle)  # its age counts from the end of its process
                return
            self._release()
            try:
                with temporary_beside(self._path) as temporary:
                    handle = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        os.write(handle, self._content)
                        fcntl.flock(handle, fcntl.LOCK_EX)
                        temporary.rename(self._path)
                    except BaseException:
                        os.close(handle)
                        raise
                self._handle = handle
                _remove_abandoned(self._path.parent, self._prefix)
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    _LOG.warning(
                        "Prometheus will not find the metrics of this process: %s cannot be written (%s); training continues; "
                        "set P2R_METRICS_FOLDER or metrics.folder to another folder",
                        self._path,
                        error.strerror or type(error).__name__,
                    )
                self._is_failing = True

    def close(self, last_content: Any = None) -> None:
        with self._lock:
            self._is_closed = True
            with suppress(OSError):
                if last_content is not None:
                    with temporary_beside(self._path) as temporary:
                        temporary.write_text(json.dumps(last_content))
                        temporary.rename(self._path)
                elif self._handle is not None and is_file_at(self._path, self._handle):
                    self._path.unlink()
            self._release()

    def _release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _remove_abandoned(folder: Path, prefix: str) -> None:
    for path in folder.glob("p2r-*.json"):
        with suppress(FileNotFoundError, PermissionError):
            if not path.name.startswith(prefix) and time.time() - path.stat().st_mtime < _MISSED_S:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_file_at(path, handle):
                        path.unlink()
            finally:
                os.close(handle)


def _bind_server(page: _Page, host: str, port: int) -> _Server | None:
    reason = ""
    for number in range(port, min(port + NUM_PORTS, 2**16)) if port else [0]:
        try:
            return _Server((host, number), page)
        except OSError as error:
            reason = error.strerror or error_text(error)
            if error.errno != errno.EADDRINUSE:
                break
    where = f"{host}:{port}" + (f" and the {NUM_PORTS - 1} ports above" if port else "")
    _LOG.warning("no metrics endpoint at %s (%s); training continues; set metrics.host and metrics.port", where, reason)
    return None


def _reachable_host(host: str) -> str:
    """Return the address at which others reach `host`; for a wildcard, the one that outgoing routes use."""
    if host in ("0.0.0.0", "::"):
        family = socket.AF_INET6 if host == "::" else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1" if host == "::" else "192.0.2.1", 9))  # for documentation; nothing is sent
            host = probe.getsockname()[0]
    return f"[{host}]" if ":" in host else host
