"""The page of `p2r status --web`: what it answers to whom, and what a real browser shows of it."""

import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster import status_server as module
from cluster.status_files import FAULTS, HISTORY
from cluster.status_reader import Reader
from cluster.status_server import Feed, StatusServer, is_loopback
from p2r.errors import InputError, StorageError
from p2r.storage import Storage
from tests.browser import Browser

HOSTILE = '"><script>alert(1)<X/script><img src=x onerror=alert(2)><svg onload=alert(3)>'.replace("X", "")
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)
Get = Callable[..., tuple[int, dict[str, str], bytes]]


def row(step: int, **changes: Any) -> str:
    values = {
        **{"step": step, "num_steps": 100, "loss": 8.0 - step / 50, "images_per_s": 20.0, "pixel_pairs_per_s": 5120.0},
        **{"wait_fraction": 0.012, "eta_s": (100 - step) * 0.5, "learning_rate": 1e-3, "gradient_norm": 2.0},
        **{"equivariance_error": 0.25, "probe_dice": 0.613, "skipped_steps": 0, "memory_mib": 1536.0, "step_s": 0.4},
        "health": {"alignment": 0.5, "uniformity": -2.5, "effective_rank": 17.25, "dead_dimensions_fraction": 0.125},
        **{
            "loss_parts": {"positive": 0.5, "negatives": 7.0},
            "data": {"batches": 80},
            "negatives": "of the global batch",
        },
    }
    return json.dumps({**values, **changes}) + "\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every name and text would do harm if it were more than text."""
    folder = tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", "")
    (folder / "pretrain").mkdir(parents=True)
    rows = [row(step, resumed_from={40: 30}.get(step), negatives=HOSTILE) for step in range(10, 90, 10)]
    (folder / HISTORY).write_text("".join(rows) + '{"step": 90, "lo')
    fault = {"time": HOSTILE, "attempt": 1, "cause": HOSTILE, "what": HOSTILE * 2, "decision": HOSTILE, "from_step": 30}
    (folder / FAULTS).write_text(json.dumps({**fault, "count": 1, "limit": 3}) + "\n")
    checkpoint = folder / "pretrain/checkpoints" / HOSTILE.replace("/", "") / "manifest.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"step": 60, "world_size": 2, "files": {"a": {"num_bytes": 2048}}}))
    trials = folder / "finetune/heart/trials"
    trials.mkdir(parents=True)
    for number, (mode, labelled, dice) in enumerate((("fine_tune", 1, 0.5), ("fine_tune", 5, 0.7), (HOSTILE, 1, 0.4))):
        about = {"id": HOSTILE, "task": HOSTILE, "mode": mode, "purpose": "final", "num_labelled": labelled, "draw": 0}
        result = {
            "trial": {**about, "settings": {HOSTILE: 1}},
            "row": {"split": "test", "dice_mean": dice},
            "seconds": 90,
        }
        (trials / f"{number}.json").write_text(json.dumps(result))
    (folder / "report/pictures").mkdir(parents=True)
    (folder / "report/pictures/view-pairs.png").write_bytes(PNG)
    (folder / "pretrain/hidden.png").write_bytes(PNG)  # a picture, and none of the report's
    (folder / "report/pictures/page.png").write_text(f"<html>{HOSTILE}")
    context = {"captions": {"view-pairs": HOSTILE}, "failed": [{"trial": HOSTILE, "failed": HOSTILE}]}
    (folder / "report/report.json").write_text(json.dumps({"context": context}))
    return folder


@contextmanager
def serving(folder: Path, host: str = "127.0.0.1") -> Iterator[StatusServer]:
    storage = Storage(str(folder))
    server = StatusServer(Feed(Reader(folder.name, storage), is_local=True), host=host, port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[StatusServer]:
    with serving(run) as started:
        yield started


@pytest.fixture
def get(server: StatusServer) -> Get:
    return lambda path, **options: request(server, path, **options)


def request(
    server: StatusServer, path: str, *, method: str = "GET", is_known: bool = True, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Ask the server, as one who is known by its token unless said otherwise."""
    headers |= {"Authorization": f"Bearer {server.token}"} if is_known else {}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_the_page_may_load_nothing_but_itself(get: Get) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = get(path)
        assert status == 200 and body and headers["content-type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body
        assert b"innerHTML" not in body and b"outerHTML" not in body and b"insertAdjacent" not in body


def test_only_what_is_listed_is_served(get: Get, server: StatusServer) -> None:
    for path in (
        *("/pretrain/history.jsonl", "/page.html", "/../pyproject.toml", "/pictures/", "/pictures/report/report.json"),
        *("/pictures/../pretrain/history.jsonl", "/pictures/%2e%2e/%2e%2e/etc/passwd", "/pictures//etc/passwd"),
        *("/pictures/report/pictures/page.png", "/status.json/", "/%00", "/pictures/report/pictures/absent.png"),
        "/pictures/pretrain/hidden.png",
    ):
        status, headers, body = get(path)
        assert (status, body) == (404, b"404 Not Found\n"), path
        assert headers["content-type"].startswith("text/plain")
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"):
        status, headers, _ = get("/", method=method)
        assert status == 405 and headers["allow"] == "GET"
    status, headers, body = get("/pictures/report/pictures/view-pairs.png?v=1")
    assert (status, body, headers["content-type"]) == (200, PNG, "image/png")


def test_the_status_is_sent_again_only_when_it_has_changed(get: Get) -> None:
    status, headers, body = get("/status.json")
    found = json.loads(body)
    assert status == 200 and found["trouble"] is None and found["status"]["training"]["step"] == 80
    assert headers["cache-control"] == "no-store" and float(headers["x-read-age"]) >= 0
    again, headers, body = get("/status.json", If_None_Match=headers["etag"])
    assert (again, body) == (304, b"")
    _, headers, body = get("/status.json", Accept_Encoding="gzip, br")
    assert headers["content-encoding"] == "gzip" and json.loads(gzip.decompress(body)) == found


def test_a_foreign_name_of_this_machine_is_not_answered(get: Get) -> None:
    """A page of somebody else's, whose name leads to 127.0.0.1, would have its own name as `Host`."""
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and is_loopback("::1") and is_loopback("127.9.9.9")
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""):
        status, _, body = get("/status.json", Host=host)
        assert status == 421 and b"training" not in body
    assert get("/status.json", Host="[")[0] == 400
    for host in ("localhost:1", "127.0.0.1", "[::1]:8321"):
        assert get("/status.json", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_token_is_asked_for_on_loopback_too(run: Path, host: str) -> None:
    """All users of a login node share its loopback."""
    with serving(run, host) as server:
        token = server.page_url.partition("?token=")[2]
        assert len(token) >= 32 and server.token == token
        for path in (
            "/",
            "/page.js",
            "/status.json",
            "/pictures/report/pictures/view-pairs.png",
            "/?token=x",
            "/?token=é",
        ):
            path = path.encode("ascii", "xmlcharrefreplace").decode()
            status, _, body = request(server, path, is_known=False)
            assert status == 401 and b"training" not in body and token.encode() not in body
        for cookie in (f"{server.cookie}=x", f"other={token}", "\x7f=;;=", f"{server.cookie}={token[:-1]}"):
            assert request(server, "/status.json", is_known=False, Cookie=cookie)[0] == 401
        status, headers, body = request(
            server, f"/?token={token}", is_known=False, **({} if server.is_loopback else {"Host": "cluster.example"})
        )
        assert (status, body, headers["location"]) == (303, b"", "/")  # the address bar forgets the token
        cookie, *attributes = headers["set-cookie"].split("; ")
        assert attributes == ["HttpOnly", "SameSite=Strict", "Path=/"]
        for given in ({"Cookie": cookie}, {"Authorization": f"Bearer {token}"}):
            status, _, body = request(server, "/status.json", is_known=False, **given)
            assert status == 200 and token.encode() not in body
        # a token counts in the page's own URL only, where it is taken out at once
        assert request(server, f"/status.json?token={token}", is_known=False)[0] == 401


def test_a_port_in_use_and_a_host_that_is_none_are_named(
    run: Path, server: StatusServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", str(run), "--web", "--port", str(server.server_port)]) == 2
    said = capsys.readouterr().err
    assert f"port {server.server_port} of 127.0.0.1 is in use: give another with --port, or --port 0" in said
    feed = server.feed
    for host, port in (("203.0.113.7", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(InputError, match=r"cannot listen at|--port must be between"):
            StatusServer(feed, host=host, port=port)


def test_clients_that_never_read_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEADLINE_S", 6.0)
    (tmp_path / "report/pictures").mkdir(parents=True)
    (tmp_path / "report/pictures/embedding-large.png").write_bytes(PNG + bytes(6 * 2**20))
    (tmp_path / "report/report.md").touch()
    with serving(tmp_path) as server, ExitStack() as opened:
        threads = threading.active_count()
        for number in range(300):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            if number % 3 == 0:
                client.sendall(
                    b"GET /pictures/report/pictures/embedding-large.png HTTP/1.1\r\nHost: localhost\r\n"
                    + f"Authorization: Bearer {server.token}\r\n\r\n".encode()
                )
            elif number % 3 == 1:
                client.sendall(b"GET /status.json HTTP/1.1\r\nHost: loc")  # and never the rest
        began = time.monotonic()
        assert request(server, "/status.json")[0] == 200
        assert time.monotonic() - began < 5  # they would hold it for longer
        assert threading.active_count() - threads <= module._MAX_CONNECTIONS + 2
        deadline = time.monotonic() + 30
        while (left := threading.active_count() - threads) > 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left <= 0, f"{left} threads still serve clients that never read"
        assert request(server, "/status.json")[0] == 200


def test_a_thousand_clients_cost_the_storage_what_one_does(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self: reads.append(time.monotonic()) or read(self))
    with serving(run) as server:
        began = time.monotonic()
        with ThreadPoolExecutor(50) as pool:
            statuses = list(pool.map(lambda _: request(server, "/status.json")[0], range(1000)))
        took_s = time.monotonic() - began
        assert statuses == [200] * 1000
        assert len(reads) <= 3 + took_s / module._LOCAL_PAUSE_S
        monkeypatch.setattr(module, "_DEMAND_S", 0.0)  # when nobody looks, nothing is read
        time.sleep(2 * module._LOCAL_PAUSE_S)
        num_reads = len(reads)
        time.sleep(2 * module._LOCAL_PAUSE_S)
        assert len(reads) == num_reads


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_request_is_refused(server: StatusServer, content: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        answer = client.makefile("rb").read()
    assert b"200" not in answer[:20] and HOSTILE.encode() not in answer
    assert request(server, "/status.json")[0] == 200


def test_a_storage_that_fails_leaves_the_last_status_and_the_reason(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(run) as server:
        for error, words in (
            (StorageError("cannot read s3://b/k?X-Amz-Signature=planted"), "cannot read s3://b/k?X-Amz-Signature=***"),
            (RuntimeError("unforeseen"), "the status cannot be read: RuntimeError: unforeseen"),
        ):

            def fail(self: Reader, error: Exception = error) -> None:
                raise error

            monkeypatch.setattr(Reader, "read", fail)
            found = _status_when(server, lambda found, words=words: found["trouble"] == words)  # type: ignore[misc]
            assert found["status"]["training"]["step"] == 80
        monkeypatch.undo()
        _status_when(server, lambda found: found["trouble"] is None)


def _status_when(server: StatusServer, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while True:
        found: dict[str, Any] = json.loads(request(server, "/status.json")[2])
        if holds(found):
            return found
        assert time.monotonic() < deadline, found["trouble"]
        time.sleep(0.1)


def test_ctrl_c_ends_the_page_and_nothing_else(run: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "cluster", "status", str(run), "--web", "--port", "0"]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("page: http://127.0.0.1:")
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in said


# --- in a browser


_SAID = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
_SHOWN = "document.body.innerText"


def _wait(tab: Browser, expression: str, *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not tab.value_of(expression):
        assert time.monotonic() < deadline, f"{expression} did not come true: {tab.value_of(_SHOWN)}"
        time.sleep(0.05)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_a_run_whole_and_runs_none_of_its_text(
    tab: Browser, server: StatusServer, run: Path, width: int, scheme: str
) -> None:
    tab.open(server.page_url, width=width, scheme=scheme)
    _wait(tab, f"{_SHOWN}.includes('6.4')")
    text = tab.value_of(_SHOWN)
    for value in (
        *(
            "step 80 of 100",
            "20 /s",
            "5,120 /s",
            "1.2 %",
            "0.25",
            "0.613",
            "17.3",
            "12.5 % dead",
            "1.5 GiB",
            "resumed once",
        ),
        *("Faults", "30", "1 of 3", "2 KiB", "Few labelled patients", "0.700", "90 s", "last row is half-written"),
        *("1 trial failed", run.name, HOSTILE),
    ):
        assert value in text, value
    assert tab.value_of("document.title") == f"{run.name} · p2r"
    assert (
        tab.value_of("document.querySelectorAll('#loss .resumed, #loss .fault, #loss .saved').length") == 6
    )  # and the legend
    assert tab.value_of("document.querySelectorAll('svg[role=img]').length") >= 12
    assert tab.value_of("[...document.querySelectorAll('svg[role=img]')].every(one => one.getAttribute('aria-label'))")
    assert tab.value_of("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.value_of("[...document.querySelectorAll('th')].every(one => ['row', 'col'].includes(one.scope))")
    # The only script is ours, nothing of the run's text has become an element, and no dialog was opened.
    origin = server.page_url.partition("?")[0]
    assert tab.value_of("[...document.scripts].map(one => one.src)") == [f"{origin}page.js"]
    assert (
        tab.value_of("[...document.images].map(one => new URL(one.src).pathname)")
        == [
            "/pictures/report/pictures/page.png",
            "/pictures/report/pictures/view-pairs.png",
        ][::-1]
    )
    assert tab.value_of("document.querySelectorAll('[onerror], [onload], main script').length") == 0
    assert not [event for event in tab.events if event["method"] == "Page.javascriptDialogOpening"]
    # What is no PNG is not served: of the run's own doing, and the only thing that may be said.
    said = [event for event in tab.events if event["method"] in _SAID and "page.png" not in json.dumps(event)]
    assert not said, said
    asked = {e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith((origin, "data:")) for url in asked), asked
    ground = tab.value_of("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")


def test_the_page_reacts_to_a_report_within_two_seconds(tab: Browser, run: Path) -> None:
    history = run / HISTORY
    before = history.read_text()
    with serving(run) as server:
        tab.open(server.page_url, width=1400, scheme="light")
        _wait(tab, f"{_SHOWN}.includes('step 80 of 100')")
        took = []
        whole = before[: before.rindex("\n") + 1]
        try:
            for step in (85, 90, 95):
                whole += row(step)
                temporary = history.with_name("new")
                temporary.write_text(whole)
                temporary.replace(history)
                began = time.monotonic()
                _wait(tab, f"{_SHOWN}.includes('step {step} of 100') && {_SHOWN}.includes('{8 - step / 50:.3g}')")
                took.append(time.monotonic() - began)
        finally:
            history.write_text(before)
    assert sorted(took)[1] < 2, took  # the middle one: tests share their machine
    # Then nobody answers any more, and the page says so.
    _wait(tab, "document.getElementById('state').textContent.startsWith('p2r status has ended')")


def test_the_page_comes_in_with_its_token_and_goes_on_without_it_in_the_address(tab: Browser, run: Path) -> None:
    with serving(run, "0.0.0.0") as server:
        url = server.page_url.replace(server.page_url.split("/")[2].rpartition(":")[0], "127.0.0.1")
        tab.open(url, width=1400, scheme="dark")
        _wait(tab, f"{_SHOWN}.includes('step 80 of 100')")
        assert tab.value_of("location.href") == f"http://127.0.0.1:{server.server_port}/"
        assert tab.value_of("document.cookie") == ""  # no script can read it


def test_watching_costs_the_run_nothing(run: Path) -> None:
    """The run's process is asked for nothing; what is read of its files in a second of watching is next to nothing."""
    with serving(run) as server:
        request(server, "/status.json")
        time.sleep(0.5)
        cpu, began = time.process_time(), time.monotonic()
        while time.monotonic() - began < 3:
            request(server, "/status.json")
            time.sleep(0.9)
        assert (time.process_time() - cpu) / (time.monotonic() - began) < 0.1
    assert not [path for path in run.rglob("*") if path.name.startswith(".tmp")] and os.access(run, os.W_OK)
