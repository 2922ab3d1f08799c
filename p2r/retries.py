"""Retries of S3 requests: which failures are retried, how long to pause, and when to give up.

Retries pause with full jitter: a random time up to a bound that doubles. They cover answers 5xx and 429, refused and broken
connections, time-outs, truncated bodies, and content that does not match its digest. A proxy that does not answer gets
20 s. So does a server that has never answered and closes every connection, as an https server does when asked for http. All
other failures are final, such as invalid certificates, http against https, or a proxy that refuses. Every retry
is counted by cause.
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
_TRANSIENT_CODES = {  # answers below 500 that are worth a retry, and the cause under which they are counted
    "BadDigest": "digest",
    "ConditionalRequestConflict": "409",
    "IncompleteBody": "truncated",
    "OperationAborted": "409",
    "RequestTimeout": "timeout",
    "Throttling": "429",
    "ThrottlingException": "429",
    "XAmzContentSHA256Mismatch": "digest",
}
_CLOSED = (failures.ConnectionClosedError, failures.SSLError)  # the server was reached, and did not answer
_BROKEN_TLS = re.compile(r"EOF|timed out|reset|BAD_RECORD_MAC|DECRYPTION_FAILED", re.IGNORECASE)  # transient
_ABSENT_PROXY = re.compile(
    r"refused|timed out|unreachable|reset|Temporary failure|Remote end closed|Tunnel connection failed: 5"
)
_STRANGER_DEADLINE_S = 20.0
_STRANGERS = ("proxy", "protocol")  # failures that rarely recover: they are retried for less time
_MAX_CLOCK_SKEW_S = 240.0  # S3 allows 15 minutes, others 5
_LOG_AFTER_S = 5.0  # failures are logged after this time
_JITTER = random.SystemRandom()  # forked processes must not pause in step
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class S3Settings:
    """Time limits and retries for S3. `from_environment` reads `P2R_S3_DEADLINE_S` and so on: the field names in capitals."""

    deadline_s: float = 300.0
    """Time for which an operation may fail repeatedly, without a byte arriving, before it is given up, s."""
    first_backoff_s: float = 0.2
    """Upper bound of the first pause, s; it doubles with every failure in a row."""
    max_backoff_s: float = 20.0
    """Upper bound of every pause, s."""
    connect_timeout_s: float = 10.0
    """Time limit for connecting, and for sending a piece of a request, s."""
    read_timeout_s: float = 60.0
    """Time limit for an answer to start, and for each next piece of it, s; a stalled body fails here."""
    num_refetches: int = 2
    """Number of times an object is fetched again because its content changed or does not match its digest."""
    num_connections: int = 32
    """Connections kept open per process."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise StorageError(f"{_variable_name(item.name)} must be above 0, got {getattr(self, item.name)!r}")

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """Return the settings from the environment, with defaults for the rest.

        Raises:
            StorageError: A variable is not a number above 0.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = os.environ.get(_variable_name(item.name))
            if text is None:
                continue
            try:
                values[item.name] = int(text) if item.type is int else float(text)
            except ValueError:
                raise StorageError(f"{_variable_name(item.name)} must be a number above 0, got {text!r}") from None
        return cls(**values)


class RetryBudget:
    """Retry budget of one operation.

    Args:
        settings: Time limits.
        counters: Counter of retries{cause}.
        what: The operation: verb and URL.
        clean: Masks secrets in a text.
        hint: Advice at the end of the error.
    """

    def __init__(
        self, settings: S3Settings, counters: Counters, what: str, clean: Callable[[str], str], *, hint: str = HINT
    ) -> None:
        self._settings, self._counters, self._what, self._clean, self._hint = settings, counters, what, clean, hint
        self._num_refetches = 0
        self._num_consecutive = 0
        self._failing_since_s = 0.0
        self.num_failures = 0  # in total

    def progress(self) -> None:
        """Reset the failures in a row, because data arrived."""
        self._num_consecutive = 0

    def wait(self, cause: str, error: Exception) -> None:
        """Pause before the next attempt, or raise `StorageError` if the deadline would pass."""
        now_s = time.monotonic()
        if not self._num_consecutive:
            self._failing_since_s = now_s
        bound_s = min(
            self._settings.max_backoff_s, self._settings.first_backoff_s * 2 ** min(self._num_consecutive, 30)
        )
        pause_s = _JITTER.uniform(0, bound_s)
        self._num_consecutive += 1
        self.num_failures += 1
        failing_s = now_s - self._failing_since_s
        text = self._clean(text_of(error))
        deadline_s = self._settings.deadline_s
        if cause in _STRANGERS:
            deadline_s = min(_STRANGER_DEADLINE_S, deadline_s)
        if failing_s + pause_s > deadline_s:
            raise StorageError(
                f"cannot {self._what}: {self._num_consecutive} attempts in {failing_s:.1f} s failed, the last with {text}; "
                f"{self._hint}"
                + f". {_variable_name('deadline_s')} ({self._settings.deadline_s:g}) sets the time limit"
                * (cause not in _STRANGERS)
            )
        self._counters.add("retries", cause=cause)
        if failing_s > _LOG_AFTER_S:
            _LOG.warning("cannot %s for %.0f s now, retrying: %s", self._what, failing_s, text)
        time.sleep(pause_s)

    def refetch(self, is_whole: bool) -> None:
        """Allow another fetch of content that was wrong or changed on the way; raise `DamagedError` after the last."""
        if self._num_refetches >= self._settings.num_refetches:
            what = "does not have the digest that is stated for it" if is_whole else "changed while it was read"
            raise DamagedError(
                f"cannot {self._what}: it {what}, {self._num_refetches + 1} times in a row: it is damaged, or its "
                "replacement was interrupted; write it again, or restore it"
            )
        self._num_refetches += 1
        self._counters.add("retries", cause="digest" if is_whole else "changed")


def cause_of(error: Exception, *, has_answered: bool = True) -> str | None:
    """Return the cause under which a failure is counted; None if a retry would fail as well.

    Args:
        error: A failure of botocore, or of reading a body.
        has_answered: The server has answered this process before.
    """
    if not has_answered and isinstance(error, _CLOSED) and not isinstance(error, failures.ProxyConnectionError):
        return "protocol" if cause_of(error) is not None else None
    if isinstance(error, failures.ClientError):
        status = status_of(error)
        is_passing = status == 429 or (status >= 500 and status not in (501, 505))
        return _TRANSIENT_CODES.get(code_of(error), str(status) if is_passing else None)
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
    """Return whether other keys could help: a refused HEAD does not say why."""
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
    """Return the text of a failure for messages, with a hint where one helps."""
    if isinstance(error, failures.ProxyConnectionError):
        reason = error.kwargs.get("error")
        return (
            f"{type(error).__name__}: {error} ({reason}); check HTTPS_PROXY, HTTP_PROXY and NO_PROXY in the environment"
        )
    if isinstance(error, failures.SSLError):
        return (
            f"{type(error).__name__}: {error}; AWS_CA_BUNDLE names the file of a private certificate authority, and AWS_ENDPOINT_URL "
            "must begin with the server's scheme, http:// or https://"
        )
    if isinstance(error, failures.ConnectionClosedError):
        return f"{type(error).__name__}: {error}; AWS_ENDPOINT_URL must begin with the server's scheme, http:// or https:// and its port"
    if not isinstance(error, failures.ClientError):
        return f"{type(error).__name__}: {error}"
    message = error.response.get("Error", {}).get("Message", "")
    return f"{code_of(error)} (HTTP {status_of(error)}): {message}{_clock_hint(error)}"


def _clock_hint(error: failures.ClientError) -> str:
    """Return a hint if the clock is wrong: its signatures are refused like those made with a wrong key."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return ""
    if status_of(error) not in (400, 401, 403) or abs(ahead_s) < _MAX_CLOCK_SKEW_S:
        return ""
    return (
        f" (this machine's clock is {abs(ahead_s) / 60:.0f} minutes {'ahead of' if ahead_s > 0 else 'behind'} the server's, which refuses "
        "such requests: set it by NTP)"
    )


def _variable_name(name: str) -> str:
    return f"P2R_S3_{name.upper()}"
