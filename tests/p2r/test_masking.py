"""Text without secrets: in every form that a library may write them, and wherever an exception becomes text."""

import ast
import base64
import json
import logging
import pickle
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from p2r import errors
from p2r.data.lists import parse_list
from p2r.errors import DataError, RefusedScan, StorageError, error_text, masked_errors
from p2r.masking import is_secret_name, looks_secret, masked
from p2r.storage import Storage

ROOT = Path(__file__).parents[2]
SECRET = "pl4nted 'single' \"double\" \\ back\nslash é +/=&? ~~>>??ÿ"
URL = "https://user:pl4nted-password@host/k?X-Amz-Signature=pl4nted"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail what would not end."""

    def fail(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", SECRET)


@pytest.mark.parametrize(
    "form",
    [
        str,
        repr,
        lambda text: repr(text.encode()),
        json.dumps,
        lambda text: json.dumps(text, ensure_ascii=False),
        quote,
        quote_plus,
        lambda text: quote(text, safe=""),
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    ],
)
def test_a_secret_is_found_in_every_form_that_a_message_may_hold(form: "type[str]") -> None:
    text = masked(f"before {form(SECRET)} after")
    assert text.startswith("before ") and text.endswith(" after")
    assert "***" in text and len(text) < len("before after") + 10, text


def test_names_of_secrets() -> None:
    for name in (
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "P2R_PSEUDONYM_KEY", "HF_TOKEN"),
    ):
        assert is_secret_name(name)
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "RAY_AUTH_MODE", "P2R_STORAGE", "AWS_ENDPOINT_URL", "KEYBOARD", "PATH"):
        assert not is_secret_name(name)


PIECES = (
    *("a.", "eyJ-", "AWS4-HMAC-SHA256 Credential=", "?token", "https://", "-----BEGIN A", " password ", " "),
    *("https://a:", "--token ", "-token", "authorization:", "token=", "http://a:x/"),
)


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_longer_than_its_length(piece: str) -> None:
    """Repeated, each began a search of all that follows: a minute and more for these, of which a second is left."""
    text = piece * (200_000 // len(piece))
    with time_limit(30):
        assert len(masked(text, environment={})) <= len(text)
        looks_secret(text)


def test_the_password_of_a_proxy_and_the_lines_of_a_key_are_secret_without_a_secret_name() -> None:
    environment = {
        "https_proxy": "http://me:p%40ss-word@proxy:3128",
        "SERVICE_KEY": "-----BEGIN X-----\nfirst-line-of-the-key\nsecond-line-of-the-key\nend",
        "SHORT_TOKEN": "a",
    }
    for said in ("proxy refused p@ss-word", "p%40ss-word", "2: second-line-of-the-key", "first-line-of-the-key"):
        assert "***" in masked(said, environment=environment), said
    assert masked("a banana at the end", environment=environment) == "a banana at the end"


@pytest.mark.parametrize(
    "text",
    [
        "api_key=pl4nted-1",
        "x-api-key: pl4nted-1",
        "AZURE_CLIENT_SECRET=pl4nted-1",
        "{'AccessKeySecret': 'pl4nted-1'}",
        "HF_TOKEN=pl4nted-1",
        "p2r status --token pl4nted-1",
        "--token=pl4nted-1",
        "['ray', '--redis-password', 'pl4nted-1', 'x']",
        "-api-key pl4nted-1",
        '--client-secret "pl4nted-1"',
        "--password 'a b pl4nted-1'",
        '--password="a, pl4nted-1"',
        "Authorization: token pl4nted-1",
        "Authorization: pl4nted-1",
        "{'authorization': 'ApiKey pl4nted-1'}",
        "proxy-authorization=Digest pl4nted-1",
        "{'token': 'pl4nted-1-of-some-length'}",
        "s3://AKIA:pl4nted/1/pl4nted@bucket/x",
        "https://me:1234x/pl4nted@host/x?y",
        "no route to http://me:pl4nted?#/1@host:80/x",
    ],
)
def test_a_value_beside_the_name_of_a_secret_is_masked(text: str) -> None:
    assert "pl4nted" not in masked(text, environment={})


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:9000/bucket/x@sha256:0123456789",
        "s3://bucket/a@b",
        "http://[::1]:8080/a@b",
        "file:///data/a:b@c",
        "the option --token-file /run/token names it",
        "a token: see the page",
        "step 5 | tokens: 12345",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text, environment={}) == text and not looks_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:pl4nted/1@bucket",
        "Authorization: token pl4nted-1-of-some-length",
        "curl --token pl4nted-1-of-some-length",
    ],
)
def test_what_is_refused_as_a_secret(text: str) -> None:
    assert looks_secret(text)


def test_an_error_of_ours_never_holds_a_secret() -> None:
    """Wherever it goes from here: a log of Ray, a row of faults.jsonl, a report, a pickle."""
    for error in (StorageError(f"cannot read {URL}: {SECRET!r}"), RefusedScan("unreadable", f"{URL} {SECRET}")):
        for text in (str(error), repr(error), str(vars(error)), str(pickle.loads(pickle.dumps(error)))):
            assert ("pl4nted" not in text and "***" in text) or text == "{}", text


def test_any_other_error_becomes_text_without_secrets() -> None:
    assert error_text(OSError(f"no route to {URL}")) == "OSError: no route to https://***@host/k?X-Amz-Signature=***"
    assert error_text(ValueError()) == "ValueError"
    assert error_text(DataError("as it is")) == "as it is"


@pytest.mark.parametrize("kind", [ValueError, StorageError])
def test_what_leaves_a_worker_holds_no_secret_in_its_traceback(kind: type[Exception]) -> None:
    with pytest.raises(Exception, match="cannot open") as caught, masked_errors():
        try:
            raise OSError(SECRET)
        except OSError as error:
            raise kind(f"cannot open {URL}") from error
    text = "".join(traceback.format_exception(caught.value))
    assert "pl4nted" not in text and "***@host" in text
    assert isinstance(caught.value, StorageError if kind is StorageError else RuntimeError)
    with pytest.raises(KeyError, match="plain") as plain, masked_errors():
        raise KeyError("plain")
    assert type(plain.value) is KeyError


def test_no_url_with_credentials_is_a_storage_or_in_a_list() -> None:
    for url in ("s3://key:pl4nted@bucket/x", "s3://bucket/x?X-Amz-Signature=pl4nted"):
        with pytest.raises(StorageError, match="holds credentials") as caught:
            Storage(url)
        assert "pl4nted" not in str(caught.value)
    with pytest.raises(DataError, match=r"list a\.csv, line 2: .*path.* looks like a secret") as refused:
        parse_list(f"path\n{URL}\n".encode(), "a.csv")
    assert "pl4nted" not in str(refused.value)


def test_every_exception_that_is_caught_becomes_text_by_one_function() -> None:
    """`str(error)` of an exception that is not ours is written only into an error of ours, which masks it."""
    ours = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.P2RError)}
    found = []
    for path in (path for folder in ("p2r", "cluster") for path in (ROOT / folder).rglob("*.py")):
        for handler in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)):
            caught = {ast.unparse(one).split(".")[-1] for one in getattr(handler.type, "elts", [handler.type]) if one}
            if handler.name and not caught <= ours:
                found += [f"{path}:{line}" for line in _lines_of_text(handler, handler.name)]
    assert found == [], "write error_text(error)"


def _lines_of_text(handler: ast.ExceptHandler, name: str) -> list[int]:
    """Return the lines where the exception becomes text that nothing masks."""
    safe: set[int] = set()
    for node in ast.walk(handler):
        is_masking = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("masked", "error_text")
        is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("Error", "RefusedScan", "kind", "_refuse")
        )
        if isinstance(node, ast.Raise | ast.Compare) or is_masking or is_error:
            safe |= {id(child) for child in ast.walk(node)}
    lines = []
    for node in ast.walk(handler):
        is_str = isinstance(node, ast.Call) and ast.unparse(node.func) in ("str", "repr") and bool(node.args)
        inside = node.args[0] if is_str and isinstance(node, ast.Call) else getattr(node, "value", None)
        if (is_str or isinstance(node, ast.FormattedValue)) and isinstance(inside, ast.Name) and inside.id == name:
            lines += [inside.lineno] if id(node) not in safe else []
    return lines


def test_warnings_of_modules_are_masked_too(caplog: pytest.LogCaptureFixture) -> None:
    """An error of ours is masked in handlers of others, too."""
    logging.getLogger("p2r.x").warning("%s", StorageError(URL))
    assert "pl4nted" not in caplog.text and "***@host" in caplog.text
