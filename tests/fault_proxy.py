"""A proxy before an S3 server that lets happen, on demand, what networks and servers do wrong.

Requests reach the server byte for byte, the Host header included, so that their signatures stay valid. The server must
check them against the Host that it is told, as S3 servers do. What passes is noted, so that a test can count it.
"""

import math
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPMessage, parse_headers
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

ALWAYS = math.inf
_PIECE_BYTES = 2**14
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_REFUSAL = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>{}</Message></Error>"


@dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: `status`: the server is not asked, the answer is this status. `drop`: nor that, the connection closes.
            `lose`: the server does what it is asked, and its answer gets lost. `delay`: nothing happens for `seconds`.
            `truncate`: the connection closes behind so many bytes of the body. `stall`: it stays open then, and silent.
            `flip`: the byte behind so many is another one; `flip_request`: so for the request. `call`: nothing but `action`.
        on: Regular expression for method and path, such as `GET /bucket/key`, from the beginning.
        times: How often.
        action: Called where the fault happens.
        said: For `status`: what the answer says of it, in place of a busy server's words.
    """

    kind: Literal["status", "drop", "lose", "delay", "truncate", "stall", "flip", "flip_request", "call"]
    on: str = "GET "
    times: float = 1
    status: int = 503
    seconds: float = 0.0
    after_bytes: int = 0
    action: Callable[[], object] = lambda: None
    said: str = ""


@dataclass
class Exchange:
    """One request, the status of the server's answer, and how much of its body the client was sent (noted before it is)."""

    request: str
    range: str | None
    status: str = ""
    num_bytes: int = 0


class FaultProxy:
    """A proxy on a free port of loopback, in threads of this process, until it is closed.

    Args:
        upstream: URL of the server.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.exchanges: list[Exchange] = []
        self._closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._serve)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        """Endpoint for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, fault: Fault) -> None:
        """Let a fault happen to the next requests that it is meant for."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forget all faults, and what passed."""
        with self._lock:
            self._faults.clear()
            self.exchanges.clear()

    def seen(self, on: str) -> list[Exchange]:
        """Return the exchanges whose method and path begin so."""
        return [exchange for exchange in list(self.exchanges) if re.match(on, exchange.request)]

    def close(self) -> None:
        """Stop; connections that stall end."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, client.makefile("rb") as requests:
            upstream: socket.socket | None = None
            try:
                while True:
                    head, method, path, headers = _read_head(requests)
                    if not head:
                        return
                    if headers.get("Expect", "").lower() == "100-continue":
                        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    body = requests.read(int(headers.get("Content-Length", 0)))
                    fault = self._fault(f"{method} {path}")
                    exchange = Exchange(f"{method} {path}", headers.get("Range"))
                    self.exchanges.append(exchange)
                    if fault.kind == "delay":
                        time.sleep(fault.seconds)
                    if fault.kind == "status":
                        words = _REFUSAL.format(fault.said).encode() if fault.said else _BUSY
                        line = f"HTTP/1.1 {fault.status} Fault\r\nContent-Type: application/xml\r\nContent-Length: "
                        client.sendall(f"{line}{len(words)}\r\n\r\n".encode() + (b"" if method == "HEAD" else words))
                        continue
                    if fault.kind == "drop":
                        return
                    if fault.kind == "flip_request":
                        body = _flipped(body, fault.after_bytes)
                    if upstream is None:
                        upstream = socket.create_connection(self._upstream)
                        answers = upstream.makefile("rb")
                    upstream.sendall(head + body)
                    if not self._answer(client, answers, fault, exchange):
                        return
            finally:
                if upstream is not None:
                    answers.close()
                    upstream.close()

    def _answer(self, client: socket.socket, answers: BinaryIO, fault: Fault, exchange: Exchange) -> bool:
        """Pass one answer on; tell whether the connection is still good."""
        while True:
            head, _, status, headers = _read_head(answers)
            if not head:
                return False
            if not status.startswith("1"):
                break
        if fault.kind == "lose":
            return False
        exchange.status = status
        client.sendall(head)
        has_none = exchange.request.startswith("HEAD ") or status in ("204", "304")
        for piece in _body(answers, has_none=has_none, headers=headers):
            until = fault.after_bytes - exchange.num_bytes
            is_last = False
            if 0 <= until < len(piece):
                fault.action()
                if fault.kind == "flip":
                    piece = _flipped(piece, until)
                if fault.kind in ("truncate", "stall"):
                    piece, is_last = piece[:until], True
            exchange.num_bytes += len(piece)
            client.sendall(piece)
            if is_last:
                if fault.kind == "stall":
                    self._closed.wait(fault.seconds)
                return False
        return True

    def _fault(self, request: str) -> Fault:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.match(fault.on, request):
                    fault.times -= 1
                    return fault
        return Fault("call")  # none


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], serve: Callable[[socket.socket], None]) -> None:
        super().__init__(address, lambda client, *_: serve(client))  # type: ignore[arg-type]


def _flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def _read_head(stream: BinaryIO) -> tuple[bytes, str, str, HTTPMessage]:
    """Return a message's head as it came, the first two words of its first line, and its headers. Nothing at the end."""
    lines = [stream.readline()]
    while lines[-1] not in (b"\r\n", b"\n", b""):
        lines.append(stream.readline())
    if not lines[-1]:
        return b"", "", "", HTTPMessage()
    first, second = lines[0].decode("latin-1").split(" ")[:2]
    return b"".join(lines), first, second, parse_headers(_Lines(lines[1:]))


class _Lines:
    def __init__(self, lines: list[bytes]) -> None:
        self._lines = iter(lines)

    def readline(self, limit: int = -1) -> bytes:
        return next(self._lines, b"")


def _body(stream: BinaryIO, *, has_none: bool, headers: HTTPMessage) -> Iterator[bytes]:
    """Yield a body as it comes, in small pieces; of a chunked one, with its framing."""
    if has_none:
        return
    if headers.get("Transfer-Encoding", "").lower() == "chunked":
        size = -1
        while size:
            line = stream.readline()
            size = int(line.split(b";")[0], 16)
            yield line + stream.read(size + 2)
        return
    left = int(headers["Content-Length"]) if "Content-Length" in headers else math.inf
    while left > 0:
        piece = stream.read(int(min(left, _PIECE_BYTES)))
        if not piece:
            raise ConnectionError("the server broke off")
        left -= len(piece)
        yield piece
