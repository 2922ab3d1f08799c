"""A hub on this machine that speaks the HTTP of huggingface_hub: repositories, commits, LFS uploads, resolved files.

    with fake_hub() as hub:
        os.environ["HF_ENDPOINT"] = hub.url

It holds everything in memory. Each commit keeps its files; branches and tags name commits. A write needs the token; a private
repository also to read. `is_down` answers 503.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "t" * 34  # not a secret: no other hub knows it


@dataclass
class Repository:
    """A repository: files by commit, and names of commits."""

    is_private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """State of the hub, and the requests that it got."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    is_down: bool = False

    def resolve(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit that a branch, tag or commit names, and its files."""
        found = self.repositories[repository]
        commit = found.names.get(revision, revision)
        return (commit, found.commits[commit]) if commit in found.commits else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.is_down:
            self._send(503, b"down")
            return
        if self.command == "PUT":
            self.hub.objects[hashlib.sha256(body).hexdigest()] = body
            self._send(200, b"")
        elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path)) is not None:
            self._resolve(match[1], match[2], match[3])
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path)) is not None:
            self._api(match[1], match[2], match[3], body)
        elif (match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)) is not None:
            self._batch(json.loads(body))
        elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) is not None and self._may_read(match[1]):
            self._json({"id": match[1], "sha": self.hub.repositories[match[1]].names["main"], "siblings": []})
        else:
            self._error(404, "RepoNotFound")

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_read(self, repository: str) -> bool:
        found = self.hub.repositories.get(repository)
        return found is not None and (self._has_token or not found.is_private)

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        if not self._may_read(repository):
            # The hub does not tell whether a private repository exists.
            self._error(401, "RepoNotFound")
            return
        found = self.hub.resolve(repository, revision)
        if found is None:
            self._error(404, "RevisionNotFound")
            return
        commit, files = found
        if name not in files:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        content = files[name]
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    def _validate(self, asked: dict[str, Any]) -> None:
        import yaml

        match = re.match(r"---\n(.*?\n)---\n", asked["content"], re.DOTALL)
        value = yaml.safe_load(match[1]) if match else {}
        rules = {
            "license": str,
            "datasets": list,
            "tags": list,
            "metrics": list,
            "pipeline_tag": str,
            "library_name": str,
        }
        wrong = [key for key, kind in rules.items() if key in value and not isinstance(value[key], kind)]
        problems = [{"message": f'"{key}" is not valid', "line": 1} for key in wrong]
        self._json({"errors": problems, "warnings": []}, status=400 if problems else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._has_token:
            self._error(401, None)
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, status=409)
            return
        first = hashlib.sha1(name.encode()).hexdigest()
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(is_private, {first: {}}, {"main": first})
        self._json({"url": f"{self.hub.url}/{name}"})

    def _api(self, repository: str, verb: str, revision: str, body: bytes) -> None:
        if not self._may_read(repository):
            self._error(401, "RepoNotFound")
            return
        found = self.hub.resolve(repository, revision)
        if found is None and verb != "tag":
            self._error(404, "RevisionNotFound")
        elif verb == "revision":
            assert found is not None
            siblings = [{"rfilename": name} for name in found[1]]
            self._json({"id": repository, "sha": found[0], "siblings": siblings})
        elif verb == "tree":
            assert found is not None
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in found[1].items()
            ]
            self._json(rows)
        elif not self._has_token:
            self._error(401, None)
        elif verb == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif verb == "commit":
            assert found is not None
            self._commit(repository, revision, dict(found[1]), body)
        elif verb == "tag":
            commit = self.hub.resolve(repository, revision)
            assert commit is not None
            names, tag = self.hub.repositories[repository].names, json.loads(body)["tag"]
            if tag in names:
                self._error(409, "TagExists")
                return
            names[tag] = commit[0]
            self._json({})

    def _commit(self, repository: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
        names = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
        commit = hashlib.sha1(json.dumps([branch, names]).encode()).hexdigest()
        found = self.hub.repositories[repository]
        found.commits[commit], found.names[branch] = files, commit
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _batch(self, asked: dict[str, Any]) -> None:
        if not self._has_token:
            self._error(401, None)
            return
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}}
            if one["oid"] not in self.hub.objects
            else one
            for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _json(self, value: Any, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Code": code} if code else {}
        self._send(status, b"{}", {**told, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
