"""Which failures are tried again: botocore's own errors, from sockets that misbehave."""

import email.utils
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import botocore.config
import botocore.session
import pytest

from p2r.counters import Counters
from p2r.errors import StorageError
from p2r.retries import RetryBudget, S3Settings, cause_of, text_of

CLOSED = "http://127.0.0.1:1"


def server(answer: bytes) -> str:
    """Address of a server that gives one answer to everything, or none and closes the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.recv(9999)
            connection.sendall(answer)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def failure(url: str, **proxies: str) -> Exception:
    session = botocore.session.Session()
    session.set_credentials("key", "secret")
    config = botocore.config.Config(
        retries={"total_max_attempts": 1}, connect_timeout=3, read_timeout=3, proxies=proxies
    )
    client = session.create_client("s3", region_name="us-east-1", endpoint_url=url, config=config)
    with pytest.raises(Exception) as raised:
        client.head_object(Bucket="bucket", Key="key")
    return raised.value


@pytest.mark.parametrize(
    ("make", "cause", "words"),
    [
        (lambda: failure("https://" + server(b"HTTP/1.1 400 Bad\r\n\r\n")), None, "AWS_ENDPOINT_URL"),
        (
            lambda: failure("https://s3.test", https="http://" + server(b"HTTP/1.1 407 Auth\r\n\r\n")),
            None,
            "HTTPS_PROXY",
        ),
        (lambda: failure("https://s3.test", https="http://" + server(b"HTTP/1.1 503 Busy\r\n\r\n")), "proxy", "503"),
        (lambda: failure("https://s3.test", https=CLOSED), "proxy", "NO_PROXY"),
        (lambda: failure(CLOSED), "connection", "Could not connect"),
    ],
    ids=["http behind https", "proxy asks who", "proxy is busy", "no proxy there", "no server there"],
)
def test_only_what_may_heal_is_tried_again(make: Callable[[], Exception], cause: str | None, words: str) -> None:
    error = make()
    assert cause_of(error) == cause
    assert words in text_of(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_has_never_answered_and_closes_every_connection_gets_seconds(scheme: str) -> None:
    """It speaks TLS and is asked in plain text, or the other way round; one that has answered before is down for a moment."""
    error = failure(f"{scheme}://" + server(b""))
    assert (cause_of(error), cause_of(error, has_answered=False)) == ("connection", "protocol")
    assert "AWS_ENDPOINT_URL" in text_of(error) and "http:// or https://" in text_of(error)
    assert cause_of(failure(CLOSED), has_answered=False) == "connection", "a server that is being started"


def test_an_absent_proxy_gets_seconds_and_not_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    monkeypatch.setattr("time.sleep", lambda pause_s: now_s.__setitem__(0, now_s[0] + max(1.0, pause_s)))
    monkeypatch.setattr("p2r.retries._JITTER", SimpleNamespace(uniform=lambda low, high: (low + high) / 2))
    for cause, most_s in (("proxy", 21.0), ("protocol", 21.0), ("connection", 301.0)):
        budget, start_s = RetryBudget(S3Settings(), Counters(), "read", str), now_s[0]
        with pytest.raises(StorageError, match="attempts"):
            while True:
                budget.wait(cause, OSError("no"))
        assert most_s / 2 < now_s[0] - start_s <= most_s


@pytest.mark.parametrize(("skew_s", "words"), [(1200, "behind"), (-1200, "ahead of"), (0, "")])
def test_a_clock_that_is_off_is_named_where_its_signatures_are_refused(skew_s: float, words: str) -> None:
    """A HEAD that is refused has no body: without its date nothing tells a wrong clock from a wrong key."""
    date = email.utils.formatdate(time.time() + skew_s, usegmt=True)
    error = failure("http://" + server(f"HTTP/1.1 403 No\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()))
    assert cause_of(error) is None
    assert (f"clock is 20 minutes {words} the server" in text_of(error)) == bool(words)
