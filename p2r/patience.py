"""What S3 answers, or fails to answer -> another attempt after a pause, or the end.

Repeated, with full jitter (a random pause up to a bound that doubles): answers 5xx and 429, refused and broken
connections, time-outs, bodies that end early, content that is not what its digest says. A proxy that does not answer, and a
server that has never answered and closes every connection, as one does that speaks http where https is asked for, get 20 s.
Everything else would be the same the next time, and ends at once: certificates that do not fit, http against https, a
proxy that refuses. Every repetition is counted by its cause.
"""

import email.utils
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import botocore.exceptions as failures
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from p2r.counters import Counters
from p2r.errors import DamagedError, StorageError

REQUEST_FAILURES = (failures.ClientError, failures.BotoCoreError, ResponseParserError)
BODY_FAILURES = (urllib3.exceptions.HTTPError, OSError)
HINT = (
    "check the bucket, and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION in the "
    "environment, or ~/.aws/credentials"
)

_TIMEOUTS = (failures.ConnectTimeoutError, failures.ReadTimeoutError, urllib3.exceptions.TimeoutError, TimeoutError)
_PASSING = {  # answers below 500 that may be another one the next time, and what they are counted as
    "BadDigest": "digest",
    "ConditionalRequestConflict": "409",
    "IncompleteBody": "truncated",
    "OperationAborted": "409",
    "RequestTimeout": "timeout",
    "Throttling": "429",
    "ThrottlingException": "429",
    "XAmzContentSHA256Mismatch": "digest",
}
_CLOSED = (failures.ConnectionClosedError, failures.SSLError)  # a server that was reached, and did not answer
_BROKEN_TLS = re.compile(r"EOF|timed out|reset|BAD_RECORD_MAC|DECRYPTION_FAILED", re.IGNORECASE)  # on the way: may heal
_ABSENT_PROXY = re.compile(
    r"refused|timed out|unreachable|reset|Temporary failure|Remote end closed|Tunnel connection failed: 5"
)
_STRANGER_DEADLINE_S = 20.0
_STRANGERS = ("proxy", "protocol")  # failures that rarely heal: they get less time
_MAX_CLOCK_SKEW_S = 240.0  # S3 allows 15 minutes, others 5
_SILENT_S = 5.0  # failing for longer than this is told
_JITTER = random.SystemRandom()  # forked processes must not pause in step
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class S3Settings:
    """How long S3 is waited for. `from_environment` reads `P2R_S3_DEADLINE_S` and so on: the fields' names in capitals."""

    deadline_s: float = 300.0
    """How long an operation may fail again and again, without a byte arriving, before it is given up."""
    first_backoff_s: float = 0.2
    """Upper bound of the first pause; it doubles with every failure in a row."""
    max_backoff_s: float = 20.0
    """Upper bound of every pause."""
    connect_timeout_s: float = 10.0
    """For a connection, and for sending a piece of a request."""
    read_timeout_s: float = 60.0
    """For an answer to begin, and for each next piece of it: a body that stalls ends here."""
    num_refetches: int = 2
    """How often an object is fetched again because its content is not what its digest says, or changed meanwhile."""
    num_connections: int = 32
    """Kept open per process."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise StorageError(f"{_variable(item.name)} must be above 0, got {getattr(self, item.name)!r}")

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """Return the defaults, or what the environment sets instead.

        Raises:
            StorageError: for a variable that is no number above 0.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = os.environ.get(_variable(item.name))
            if text is None:
                continue
            try:
                values[item.name] = int(text) if item.type is int else float(text)
            except ValueError:
                raise StorageError(f"{_variable(item.name)} must be a number above 0, got {text!r}") from None
        return cls(**values)


class Patience:
    """How long one operation may go on failing.

    Args:
        settings: Its bounds.
        counters: For retries{cause}.
        what: The operation: verb and URL.
        clean: Takes secrets out of a text.
    """

    def __init__(self, settings: S3Settings, counters: Counters, what: str, clean: Callable[[str], str]) -> None:
        self._settings, self._counters, self._what, self._clean = settings, counters, what, clean
        self._num_refetches = 0
        self._num_in_a_row = 0
        self._failing_since_s = 0.0
        self.num_failures = 0  # in all

    def progress(self) -> None:
        """Something arrived: what fails next is the first failure."""
        self._num_in_a_row = 0

    def wait(self, cause: str, error: Exception) -> None:
        """Pause before the next attempt, or raise `StorageError` if that would be too late."""
        now_s = time.monotonic()
        if not self._num_in_a_row:
            self._failing_since_s = now_s
        bound_s = min(self._settings.max_backoff_s, self._settings.first_backoff_s * 2 ** min(self._num_in_a_row, 30))
        pause_s = _JITTER.uniform(0, bound_s)
        self._num_in_a_row += 1
        self.num_failures += 1
        failing_s = now_s - self._failing_since_s
        text = self._clean(text_of(error))
        deadline_s = self._settings.deadline_s
        if cause in _STRANGERS:
            deadline_s = min(_STRANGER_DEADLINE_S, deadline_s)
        if failing_s + pause_s > deadline_s:
            raise StorageError(
                f"cannot {self._what}: {self._num_in_a_row} attempts in {failing_s:.1f} s failed, the last with {text}; "
                f"{HINT}"
                + f". {_variable('deadline_s')} ({self._settings.deadline_s:g}) says how long to go on"
                * (cause not in _STRANGERS)
            )
        self._counters.add("retries", cause=cause)
        if failing_s > _SILENT_S:
            _LOG.warning("cannot %s for %.0f s now, trying again: %s", self._what, failing_s, text)
        time.sleep(pause_s)

    def refetch(self, is_whole: bool) -> None:
        """Allow another fetch of content that was wrong, or changed on the way; raise `StorageError` after the last."""
        if self._num_refetches >= self._settings.num_refetches:
            what = "does not have the digest that is stated for it" if is_whole else "changed while it was read"
            raise DamagedError(
                f"cannot {self._what}: it {what}, {self._num_refetches + 1} times in a row: it is damaged, or whoever "
                "replaced it did not finish; write it again, or restore it"
            )
        self._num_refetches += 1
        self._counters.add("retries", cause="digest" if is_whole else "changed")


def cause_of(error: Exception, *, has_answered: bool = True) -> str | None:
    """Return under which name a failure is counted; None if the next attempt would fail as well.

    Args:
        error: Of botocore, or of reading a body.
        has_answered: The server has answered this process before.
    """
    if not has_answered and isinstance(error, _CLOSED) and not isinstance(error, failures.ProxyConnectionError):
        return "protocol" if cause_of(error) is not None else None
    if isinstance(error, failures.ClientError):
        status = status_of(error)
        is_passing = status == 429 or (status >= 500 and status not in (501, 505))
        return _PASSING.get(code_of(error), str(status) if is_passing else None)
    if isinstance(error, failures.ProxyConnectionError):
        return "proxy" if _ABSENT_PROXY.search(str(error.kwargs.get("error"))) else None
    if isinstance(error, failures.SSLError):
        return "connection" if _BROKEN_TLS.search(str(error)) else None
    if "IncompleteRead" in str(error):
        return "truncated"
    if isinstance(error, _TIMEOUTS):
        return "timeout"
    if isinstance(error, (failures.ConnectionError, failures.HTTPClientError, *BODY_FAILURES)):
        return "connection"
    return "answer" if isinstance(error, ResponseParserError) else None


def is_about_keys(error: Exception) -> bool:
    """Tell whether other keys could help: a HEAD that is refused does not say why."""
    return isinstance(error, failures.ClientError) and (
        status_of(error) in (401, 403) or code_of(error) in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
    )


def status_of(error: failures.ClientError) -> int:
    """Return the HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: failures.ClientError) -> str:
    """Return S3's code of an answer, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def text_of(error: Exception) -> str:
    """Return what a message says of a failure."""
    if isinstance(error, failures.ProxyConnectionError):
        reason = error.kwargs.get("error")
        return (
            f"{type(error).__name__}: {error} ({reason}); check HTTPS_PROXY, HTTP_PROXY and NO_PROXY in the environment"
        )
    if isinstance(error, failures.SSLError):
        return (
            f"{type(error).__name__}: {error}; AWS_CA_BUNDLE names the file of a private certificate authority, and AWS_ENDPOINT_URL "
            "begins with http:// or https:// as the server speaks"
        )
    if isinstance(error, failures.ConnectionClosedError):
        return f"{type(error).__name__}: {error}; AWS_ENDPOINT_URL begins with http:// or https:// as the server speaks, and names its port"
    if not isinstance(error, failures.ClientError):
        return f"{type(error).__name__}: {error}"
    message = error.response.get("Error", {}).get("Message", "")
    return f"{code_of(error)} (HTTP {status_of(error)}): {message}{_clock_hint(error)}"


def _clock_hint(error: failures.ClientError) -> str:
    """Return a hint if a refused request was signed by a clock that is off: its signature is then refused like a wrong key."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return ""
    if status_of(error) not in (400, 401, 403) or abs(ahead_s) < _MAX_CLOCK_SKEW_S:
        return ""
    return (
        f" (this machine's clock is {abs(ahead_s) / 60:.0f} minutes {'ahead of' if ahead_s > 0 else 'behind'} the server's, which refuses "
        "requests for that: set it by NTP)"
    )


def _variable(name: str) -> str:
    return f"P2R_S3_{name.upper()}"
