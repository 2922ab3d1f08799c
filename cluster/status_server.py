"""`p2r status JOB-or-URL --web`: one page about one run, for a browser.

    GET /  ·  /page.css  ·  /page.js  ·  /status.json  ·  /pictures/PATH        and nothing else

Read-only, and built so that clients cannot harm the run or this process:

- Requests never touch the storage: one thread reads it, and only while a client asks. A thousand clients cost the same as one.
- Every connection serves one request and ends within `_DEADLINE_S`, read or not. If there are too many, the oldest ends.
- A token is required, even on loopback, which all users of a login node share. It is in the printed URL, then in a cookie, and is
  compared in constant time. On loopback the `Host` header must also name this machine, so that a foreign page cannot reach it
  through its own name.
- The page loads only what is served here, and its policy forbids anything else. Content of the storage enters the page only as
  `textContent`, never as markup.

It uses `http.server` of the standard library. Four paths need no framework, and a thread per connection with a socket timeout
makes a client that never reads harmless.
"""

import errno
import gzip
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from cluster.status import Status
from cluster.status_reader import Reader
from p2r.console import show
from p2r.errors import InputError, P2RError, error_text
from p2r.logs import say

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_MAX_CONNECTIONS = 256
_SOCKET_TIMEOUT_S, _DEADLINE_S = 5.0, 15.0
_LOCAL_PAUSE_S, _REMOTE_PAUSE_S = 0.3, 0.8
"""Pauses between two reads of the storage, while a client asks."""
_DEMAND_S, _FIRST_S = 5.0, 1.0
_CACHE_BYTES = 2**26
_PICTURES_AT_ONCE = 4


@dataclass(frozen=True)
class Answer:
    """Content of `/status.json`, in both encodings."""

    plain: bytes
    zipped: bytes
    tag: str


class Feed:
    """The newest status as JSON, read again by a thread while clients ask.

    Raises:
        StorageError: The storage holds no run, or cannot be read.
    """

    def __init__(self, reader: Reader, *, is_local: bool) -> None:
        self._reader, self._pause_s = reader, _LOCAL_PAUSE_S if is_local else _REMOTE_PAUSE_S
        self._status = reader.read()
        self._asked, self._asked_at, self._read_at = threading.Event(), 0.0, time.monotonic()
        self._answer = _encode_answer(self._status, None)
        self._pictures: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock, self._picture_slots = threading.Lock(), threading.Semaphore(_PICTURES_AT_ONCE)
        self._fresh = threading.Event()
        self._is_closed = False
        threading.Thread(target=self._run, name="p2r-status", daemon=True).start()

    def close(self) -> None:
        """Stop reading."""
        self._is_closed = True
        self._asked.set()

    def answer(self) -> tuple[Answer, float]:
        """Return the newest status, and its age in seconds."""
        is_first = time.monotonic() - self._asked_at > _DEMAND_S
        if is_first:  # after a pause without requests the last status may be old
            self._fresh.clear()
        self._asked_at = time.monotonic()
        self._asked.set()
        if is_first:
            self._fresh.wait(_FIRST_S)
        return self._answer, time.monotonic() - self._read_at

    def picture(self, path: str) -> tuple[bytes, str] | None:
        """Return a picture of the run and its version; None if there is none at this path."""
        version = next((one.version for one in self._status.pictures if one.path == path), None)
        if version is None:
            return None
        with self._picture_slots:
            with self._lock:
                content = self._pictures.get((path, version))
            if content is None:
                try:
                    content = self._reader.picture(path)
                except P2RError:
                    return None
                with self._lock:
                    self._pictures[path, version] = content
                    while sum(map(len, self._pictures.values())) > _CACHE_BYTES:
                        self._pictures.popitem(last=False)
        return content, version

    def _run(self) -> None:
        while True:
            self._asked.wait()
            if self._is_closed:
                return
            if time.monotonic() - self._asked_at > _DEMAND_S:
                self._asked.clear()
                continue
            trouble = None
            try:
                self._status = self._reader.read()
                self._read_at = time.monotonic()
            except P2RError as error:
                trouble = str(error)
            except Exception as error:  # a dead thread would leave a page that looks alive
                trouble = f"the status cannot be read: {error_text(error)}"
            self._answer = _encode_answer(self._status, trouble, before=self._answer)
            self._fresh.set()
            time.sleep(self._pause_s)


def _encode_answer(status: Status, trouble: str | None, *, before: Answer | None = None) -> Answer:
    plain = json.dumps(
        {"status": status.to_json(), "trouble": trouble}, allow_nan=False, separators=(",", ":")
    ).encode()
    if before is not None and before.plain == plain:
        return before
    return Answer(plain, gzip.compress(plain, 5), f'"{hashlib.sha256(plain).hexdigest()[:24]}"')


class StatusServer(ThreadingHTTPServer):
    """HTTP server of the page, until `shutdown`.

    Args:
        feed: Status to show.
        host: Address to listen on.
        port: Port; 0: any free one.

    Raises:
        InputError: The port is in use, or the host is not an address of this machine.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, feed: Feed, *, host: str, port: int) -> None:
        self.feed = feed
        self.token, self.is_loopback = secrets.token_urlsafe(24), is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[socket.socket, float] = {}
        self._open_lock = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {port} of {host} is in use: give another with --port, or --port 0 for any free one"
                ) from None
            raise InputError(
                f"cannot listen at {host} port {port}: {error.strerror or error}; give --host and --port"
            ) from None
        except OverflowError:
            raise InputError(f"--port must be between 0 and 65535, got {port}") from None
        self.cookie = f"p2r-{self.server_port}"

    def server_close(self) -> None:
        """Stop listening and reading."""
        super().server_close()
        self.feed.close()

    @property
    def page_url(self) -> str:
        """URL of the page, with its token."""
        host = cast(str, self.server_address[0])
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/?token={self.token}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a new thread; at the limit, end the oldest connection."""
        with self._open_lock:
            crowded = len(self._open) >= _MAX_CONNECTIONS
            oldest = min(self._open, key=self._open.__getitem__) if crowded else None
            if oldest is not None:
                self._open.pop(oldest)
            self._open[request] = time.monotonic()
        if oldest is not None:
            _end_connection(oldest)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End connections that have exceeded the deadline."""
        now = time.monotonic()
        with self._open_lock:
            late = [one for one, since in self._open.items() if now - since > _DEADLINE_S]
            for one in late:
                self._open.pop(one)
        for one in late:
            _end_connection(one)

    def shutdown_request(self, request: Any) -> None:
        """Forget a closed connection."""
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnected or were late."""


def serve(reader: Reader, *, host: str, port: int, is_local: bool) -> None:
    """Serve the page until Ctrl-C, and print its URL.

    Raises:
        InputError: The storage holds no run, the port is in use, or the host is not an address of this machine.
    """
    server = StatusServer(Feed(reader, is_local=is_local), host=host, port=port)
    try:
        show(f"page: {server.page_url}", flush=True)
        say("everyone with this URL can read the page")
        if not server.is_loopback:
            say("the page is not encrypted: on an untrusted network, leave out --host and use ssh -L")
        say("Ctrl-C ends the page; the run is not affected")
        server.serve_forever()
    except KeyboardInterrupt:
        say("the page has ended")
    finally:
        server.server_close()


def _end_connection(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        connection.close()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    timeout = _SOCKET_TIMEOUT_S
    server: StatusServer

    def do_GET(self) -> None:
        """Answer with a file of the page, the status, or a picture."""
        try:
            self._answer()
        except ValueError:  # invalid address or host
            self.send_error(HTTPStatus.BAD_REQUEST)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        if not self._is_authorised(url.query, is_page=url.path == "/"):
            return
        if url.path in _FILES:
            name, kind = _FILES[url.path]
            self._send(_read_file(name), kind)
        elif url.path == "/status.json":
            self._send_status()
        elif url.path.startswith("/pictures/"):
            self._send_picture(unquote(url.path.removeprefix("/pictures/")))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _is_authorised(self, query: str, *, is_page: bool) -> bool:
        token = self.server.token
        if self.server.is_loopback and not _is_name_of_this_machine(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "open the page as localhost or 127.0.0.1")
            return False
        given = parse_qs(query).get("token", [""])[0]
        if is_page and _matches_token(given, token):
            # Redirect, so that the token leaves the address bar, the history and copied URLs.
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Set-Cookie", f"{self.server.cookie}={token}; HttpOnly; SameSite=Strict; Path=/")
            self.send_header("Location", "/")
            self._end_headers(0)
            return False
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            cookie = None
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if _matches_token(cookie.value if cookie else "", token) or _matches_token(bearer, token):
            return True
        self.send_error(HTTPStatus.UNAUTHORIZED, "open the URL with the token that p2r status printed")
        return False

    def _send_status(self) -> None:
        answer, age_s = self.server.feed.answer()
        headers = {"ETag": answer.tag, "X-Read-Age": f"{age_s:.1f}", "Cache-Control": "no-store"}
        if self.headers.get("If-None-Match") == answer.tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            for name, value in headers.items():
                self.send_header(name, value)
            self._end_headers(None)
        elif "gzip" in self.headers.get("Accept-Encoding", ""):
            self._send(answer.zipped, "application/json", {**headers, "Content-Encoding": "gzip"})
        else:
            self._send(answer.plain, "application/json", headers)

    def _send_picture(self, path: str) -> None:
        found = self.server.feed.picture(path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            # The page requests a picture with its version, so its content never changes.
            self._send(found[0], "image/png", {"Cache-Control": "private, max-age=3600"})

    def _send(self, content: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind if kind.startswith("image/") else f"{kind}; charset=utf-8")
        for name, value in {"Cache-Control": "no-store", **(headers or {})}.items():
            self.send_header(name, value)
        self._end_headers(len(content))
        self.wfile.write(content)

    def _end_headers(self, num_bytes: int | None) -> None:
        if num_bytes is not None:
            self.send_header("Content-Length", str(num_bytes))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with one line of text; an unsupported method is 405."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        # The messages of http.server repeat the bad request, so they are left out.
        said = message if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.MISDIRECTED_REQUEST) else None
        text = f"{int(status)} {status.phrase}{f': {said}' if said else ''}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self._end_headers(len(text))
        self.wfile.write(text)

    def version_string(self) -> str:
        """Return a name without versions."""
        return "p2r"

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests: they are not events of the run, and the first contains the token."""


def _matches_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _is_name_of_this_machine(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname if host else None
    return name is not None and is_loopback(name)


def _read_file(name: str) -> bytes:
    return (resources.files("cluster") / "page" / name).read_bytes()
