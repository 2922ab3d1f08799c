"""Servers for `gs://` and `az://`: Azurite, the vendor's emulator, as a real process; the documented protocol of Google's XML interface.

No emulator of Google Cloud Storage serves its XML interface, which obstore speaks. `GoogleProtocol` answers as its documentation states:
generations, `x-goog-if-generation-match`, ranges, ETags, multipart uploads, lists in pages. It shows that p2r sends the conditions and
handles the answers; it cannot show that Google's servers give them.

Source: https://cloud.google.com/storage/docs/xml-api/overview, /request-preconditions.
"""

import base64
import email.utils
import hashlib
import hmac
import html
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's, public
_PAGE = 2


def find_azurite() -> str | None:
    """Return the program of Azurite's blob service, from $AZURITE or PATH; None if it is not installed (npm install azurite)."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


def azure_environment(port: int) -> dict[str, str]:
    """Return the variables by which clients find Azurite through a port of loopback."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
        "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{_ACCOUNT}",
    }


@contextmanager
def running_azurite(program: str, folder: Path) -> Iterator[int]:
    """Run Azurite with a container `tests`, and yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    options = ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *options, "--skipApiVersionCheck", "--disableTelemetry"], stdout=log, stderr=log
        )
    try:
        _wait_for(port)
        _create_container(port)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def _create_container(port: int) -> None:
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = f"PUT\n{chr(10) * 11}{named}/{_ACCOUNT}/{_ACCOUNT}/tests\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(_KEY), text.encode(), hashlib.sha256)).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{_ACCOUNT}/tests?restype=container",
        method="PUT",
        headers={**headers, "Authorization": f"SharedKey {_ACCOUNT}:{signature}", "Content-Length": "0"},
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 201


class GoogleProtocol:
    """Google's XML interface on a free port of loopback, for one bucket, until it is closed."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int, dict[str, str]]] = {}
        """Content, generation and metadata by name."""
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.generation = 1_700_000_000_000_000
        handler = type("Handler", (_GoogleHandler,), {"google": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def port(self) -> int:
        """Port of the server."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


def google_environment(port: int) -> dict[str, str]:
    """Return the variable by which clients find a server that needs no signature."""
    key = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
    return {
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**key, "client_email": "", "private_key": "", "private_key_id": ""})
    }


class _GoogleHandler(BaseHTTPRequestHandler):
    google: GoogleProtocol
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path.removeprefix("/tests").removeprefix("/"))

    def _query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, keep_blank_values=True).items()}

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(
            status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        )

    def do_PUT(self) -> None:
        content, query = self.rfile.read(int(self.headers["Content-Length"] or 0)), self._query()
        with self.google.lock:
            if "uploadId" in query:
                self.google.uploads[query["uploadId"]][int(query["partNumber"])] = content
                self._answer(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
                return
            self._store(content)

    def _store(self, content: bytes) -> None:
        name, google = self._name(), self.google
        present = google.objects[name][1] if name in google.objects else 0
        wanted = self.headers.get("x-goog-if-generation-match")
        if wanted is not None and int(wanted) != present:
            self._fail(412, "PreconditionFailed")
            return
        google.generation += 1
        prefix = "x-goog-meta-"
        metadata = {key: value for key, value in self.headers.items() if key.lower().startswith(prefix)}
        google.objects[name] = (content, google.generation, metadata)
        self._answer(200, headers=self._facts(name))

    def _facts(self, name: str) -> dict[str, str]:
        content, generation, metadata = self.google.objects[name]
        facts = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "x-goog-generation": str(generation), **metadata}
        return {**facts, "Last-Modified": email.utils.formatdate(usegmt=True)}

    def do_POST(self) -> None:
        content, query = self.rfile.read(int(self.headers["Content-Length"] or 0)), self._query()
        with self.google.lock:
            if "uploads" in query:
                self.google.uploads["1"] = {}
                self._answer(
                    200,
                    b"<InitiateMultipartUploadResult><Bucket>tests</Bucket><Key>k</Key><UploadId>1</UploadId>"
                    b"</InitiateMultipartUploadResult>",
                )
                return
            parts = self.google.uploads.pop(query["uploadId"])
            assert re.findall(rb"<PartNumber>", content)
            joined = b"".join(parts[number] for number in sorted(parts))
            self.google.generation += 1
            self.google.objects[self._name()] = (joined, self.google.generation, {})
            tag = self._facts(self._name())
            body = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
            self._answer(200, body, tag)

    def do_DELETE(self) -> None:
        with self.google.lock:
            if self.google.objects.pop(self._name(), None) is None:
                self._fail(404, "NoSuchKey")
                return
            self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.google.lock:
            if not self._name():
                self._list()
                return
            if self._name() not in self.google.objects:
                self._fail(404, "NoSuchKey")
                return
            content, facts = self.google.objects[self._name()][0], self._facts(self._name())
            if self.headers.get("If-Match") not in (None, facts["ETag"]):
                self._fail(412, "PreconditionFailed")
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if span is None:
                self._answer(200, content, facts)
                return
            start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
            if start >= len(content):
                self._fail(416, "InvalidRange")
                return
            span_sent = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._answer(206, content[start:stop], {**span_sent, **facts})

    def _list(self) -> None:
        query = self._query()
        names = sorted(name for name in self.google.objects if name.startswith(query.get("prefix", "")))
        after = query.get("continuation-token", "")
        rest = [name for name in names if name > after]
        page = rest[:_PAGE]
        more = f"<NextContinuationToken>{html.escape(page[-1])}</NextContinuationToken>" if len(rest) > _PAGE else ""
        found = "".join(
            f"<Contents><Key>{html.escape(name)}</Key><Size>{len(self.google.objects[name][0])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for name in page
        )
        self._answer(200, f"<ListBucketResult>{found}{more}</ListBucketResult>".encode())
