"""A page of text -> an HTTP endpoint that Prometheus finds, and that nothing a client does can slow training with.

    bind -> serve in daemon threads -> a file in the discovery folder names the endpoint -> at the end both are gone

Choices: at most `_MAX_OPEN` connections, the oldest of which makes room for a new one, so clients that never read, or a
thousand at once, take no thread and no memory beyond that; the page is made anew at most every `_FRESH_S`, however many ask.
The discovery file is written whole and stays locked (`flock`) as long as its process lives, however that ends. One that is not
locked tells Prometheus that a process is missing; the next process of its run removes it, and after an hour any. Nothing here raises
into training: a port or a folder that cannot be had leaves one line in the log, and the folder is tried again.
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
"""Ports that are tried, from the one that was asked for: one for each process of a node."""

_MAX_OPEN = 16
_SILENT_S = 5.0  # a client that sends or takes nothing for so long is left
_GRACE_S = 1.0  # a connection that is younger makes no room for another
_FRESH_S = 0.25
_POLL_S = 0.2  # closing waits for it
_MISSED_S = 3600.0  # what a killed process of another run left
_KEEP_S = 5.0  # between two looks whether the discovery file is still there
_LOG = logging.getLogger(__name__)


def discovery_folder(folder: str | None = None) -> Path:
    """Folder of the files that name a node's endpoints: `folder`, else `$P2R_METRICS_FOLDER`, else `~/.cache/p2r/metrics`."""
    named = folder or os.environ.get("P2R_METRICS_FOLDER")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "p2r" / "metrics"


def listening_host(host: str | None = None) -> str:
    """Address to listen on: `host`, else `$P2R_METRICS_HOST`, else loopback."""
    return host or os.environ.get("P2R_METRICS_HOST") or "127.0.0.1"


def first_port(port: int | None = None) -> int:
    """First port to try: `port`, else `$P2R_METRICS_PORT`, else 0; what is no port is named in the log, and counts as 0."""
    if port is not None:
        return port
    named = os.environ.get("P2R_METRICS_PORT") or "0"
    if named.isdecimal() and int(named) <= 65535:
        return int(named)
    _LOG.warning("P2R_METRICS_PORT must be a port from 0 to 65535, got %r: a free one is taken", named)
    return 0


class Endpoint:
    """One process's page under `/metrics`, from now until `close`.

    Args:
        page: Makes the page; called from the endpoint's own threads.
        host: Address to listen on.
        port: The first of `NUM_PORTS` to try; 0: a free one.
        folder: For discovery.
        run: What this process belongs to.
        name: Of this process in it.
        labels: For its discovery file: Prometheus adds them to every series of this process.

    Attributes:
        target: `host:port` as others reach it; None if no port could be had.
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
        self._server, self._entry, self._ended = _bound(_Page(page), host, port), None, threading.Event()
        if self._server is None:
            return
        self.target = f"{_reachable(host)}:{self._server.server_address[1]}"
        content = [{"targets": [self.target], "labels": dict(labels)}]
        self._entry = _Entry(folder, f"p2r-{socket.gethostname()}-{run}-", f"{name}-{os.getpid()}.json", content)
        self._entry.keep()
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="p2r-metrics", daemon=True).start()
        threading.Thread(target=self._keep, name="p2r-metrics-file", daemon=True).start()

    def close(self) -> None:
        """Take the file away, then end the endpoint. A second time nothing happens."""
        self._ended.set()
        if self._entry is not None:
            self._entry.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _keep(self) -> None:
        while not self._ended.wait(_KEEP_S):
            if self._entry is not None:
                self._entry.keep()


class _Page:
    """The page, made anew only if the one at hand is older than `_FRESH_S`."""

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
        """Serve in a thread of its own; where all places are taken, the oldest client leaves, or else this one."""
        now_s = time.monotonic()
        with self._lock:
            if len(self._open) >= _MAX_OPEN:
                oldest, since_s = next(iter(self._open.items()))
                if now_s - since_s < _GRACE_S:
                    super().shutdown_request(request)
                    return
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and ends
            self._open[request] = now_s
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and give its place free."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that left: it concerns nobody."""
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
        """Say nothing: a scrape is no event."""


class _Entry:
    """A discovery file that is locked while its process lives."""

    def __init__(self, folder: Path, prefix: str, name: str, content: Any) -> None:
        self._path, self._prefix, self._content = folder / f"{prefix}{name}", prefix, json.dumps(content).encode()
        self._handle: int | None = None
        self._lock, self._is_closed, self._is_failing = threading.Lock(), False, False

    def keep(self) -> None:
        """Write the file if it is not there, and remove those of processes that are gone."""
        with self._lock:
            if self._is_closed:
                return
            if self._handle is not None and is_file_at(self._path, self._handle):
                with suppress(OSError):
                    os.utime(self._handle)  # its age begins when its process ends
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
                        "Prometheus will not find the metrics of this process: %s cannot be written (%s); training goes on, "
                        "P2R_METRICS_FOLDER or metrics.folder names another folder",
                        self._path,
                        error.strerror or type(error).__name__,
                    )
                self._is_failing = True

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._handle is not None:
                with suppress(OSError):
                    if is_file_at(self._path, self._handle):
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


def _bound(page: _Page, host: str, port: int) -> _Server | None:
    reason = ""
    for number in range(port, min(port + NUM_PORTS, 2**16)) if port else [0]:
        try:
            return _Server((host, number), page)
        except OSError as error:
            reason = error.strerror or error_text(error)
            if error.errno != errno.EADDRINUSE:
                break
    where = f"{host}:{port}" + (f" and the {NUM_PORTS - 1} ports above" if port else "")
    _LOG.warning(
        "no metrics endpoint at %s (%s); training goes on, metrics.host and metrics.port say where", where, reason
    )
    return None


def _reachable(host: str) -> str:
    """Return the address under which others reach what listens on `host`: of every address, the one that routes lead through."""
    if host in ("0.0.0.0", "::"):
        family = socket.AF_INET6 if host == "::" else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1" if host == "::" else "192.0.2.1", 9))  # for documentation; nothing is sent
            host = probe.getsockname()[0]
    return f"[{host}]" if ":" in host else host
