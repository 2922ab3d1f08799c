"""Objects of a bucket of Google Cloud Storage, or of a container of Azure Blob Storage, with the interface of `p2r.s3.S3`.

Choices: the library is obstore, an optional package, with its own retries off. Ours (`retries`) are counted by cause, resume a broken
body where it broke, and read the keys again when they are refused. A conditional write carries a token, as for S3: if its answer is lost
and the repetition is refused, the token shows that the first attempt succeeded. Digests are checked here: the library checks none.

S3 keeps its own client. Measured on one core against SeaweedFS, obstore reads large objects with 15 % more CPU time, and small ones with an
eighth of it. It reports a conditional write whose answer is lost as refused, does not notice a flipped byte, and keeps refused keys.

The library starts threads that do not survive a fork, so a process must not fork after its first request; p2r does not fork.
"""

import contextlib
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from p2r.counters import Counters
from p2r.downloads import limit_size
from p2r.errors import DamagedError, InputError, StorageError, how_to_install
from p2r.retries import RetryBudget, S3Settings
from p2r.s3 import ObjectFacts

HINTS = {
    "gs": "check the bucket, and GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT in the environment",
    "az": "check the container, and AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY or the variables of "
    "an identity in the environment",
}
_PART_BYTES = 2**24
_SINGLE_BYTES = 2**26  # largest object written in one request
_PIECE_BYTES = 2**18  # least piece of a body; a connection that breaks loses less than this
_UPLOAD_THREADS = 4
_LONGEST_REQUEST_S = 86_400
_TOKEN = "p2rwrite"  # metadata key of an object: the write that made it; Azure allows letters and digits only
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_TRANSIENT = (408, 429)
_MAX_MESSAGE = 400

T = TypeVar("T")


class Cloud:
    """One bucket or container. The library finds endpoint and keys in the environment or on the node.

    Every method raises `StorageError` if a request is refused or cannot be completed within the deadline.

    Args:
        scheme: `gs` or `az`.
        bucket: Name of the bucket or container.
        counters: Counters of bytes_fetched and retries{cause}.
        settings: Time limits; None: from the environment, as for S3.

    Raises:
        InputError: obstore is not installed.
    """

    def __init__(self, scheme: str, bucket: str, *, counters: Counters, settings: S3Settings | None = None) -> None:
        self.scheme, self.bucket, self.counters = scheme, bucket, counters
        self.settings = settings or S3Settings.from_environment()
        self._client = _import_client()
        self._lock = threading.Lock()
        self._store: Any = None

    def url(self, key: str) -> str:
        """Return the URL of an object."""
        return f"{self.scheme}://{self.bucket}/{key}"

    def head(self, key: str) -> ObjectFacts | None:
        """Return size, tag and age of an object; None if it is absent."""
        try:
            meta = self._request("read", key, lambda store: self._client.head(store, key))
        except FileNotFoundError:
            return None
        return ObjectFacts(meta["size"], _tag_of(meta), {}, meta["last_modified"].timestamp())

    def read(self, key: str, *, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return an object's content and tag; None if it is absent.

        Raises:
            DamagedError: The object is larger than `max_bytes`; raised before all of it has arrived.
        """
        body = _Body(self, key)
        try:
            content = b"".join(body if max_bytes is None else limit_size(body, max_bytes, self.url(key)))
        except FileNotFoundError:
            return None
        return content, body.tag

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`; an object that ends earlier is a `StorageError`."""
        try:
            return b"".join(_Body(self, key, start=start, stop=stop))
        except FileNotFoundError:
            raise DamagedError(f"{self.url(key)} does not exist") from None

    def fetch(self, key: str, file: BinaryIO, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Write an object's content into `file` from its start, and check size and digest.

        Raises:
            StorageError: The object cannot be read, has another size, or repeatedly has another digest.
            OSError: `file` cannot be written.
        """
        budget = self._new_budget("read", key)
        while True:
            file.seek(0)
            digest = hashlib.sha256()
            body = _Body(self, key, num_bytes=num_bytes)
            try:
                for piece in body:
                    file.write(piece)
                    if sha256 is not None:
                        digest.update(piece)
            except FileNotFoundError:
                raise DamagedError(f"{self.url(key)} does not exist") from None
            if sha256 in (None, digest.hexdigest()):
                file.truncate()
                return
            budget.refetch(is_whole=True)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> bool:
        """Write `data` to an object: always, only if it is absent, or only if it has this tag.

        Returns:
            True if the object was written.
        """
        mode: Any = "create" if if_absent else "overwrite" if if_match is None else _mode_of(if_match)
        token = uuid.uuid4().hex
        attributes = {_TOKEN: token} if mode != "overwrite" else None
        budget = self._new_budget("write", key)

        def put(store: Any) -> None:
            self._client.put(store, key, data, mode=mode, attributes=attributes, use_multipart=False)

        errors = self._client.exceptions
        try:
            self._request("write", key, put, budget=budget)
            return True
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
            if mode == "overwrite":
                raise StorageError(
                    f"cannot write {self.url(key)}: its bucket is absent; {HINTS[self.scheme]}"
                ) from None
        # An earlier request may have succeeded with only its answer lost.
        return bool(budget.num_failures) and self._token_of(key) == token

    def upload(self, local: Path, key: str, *, if_absent: bool = False) -> bool:
        """Upload a local file atomically, in parts if it is large and need not be absent.

        Returns:
            True if the object was written.

        Raises:
            OSError: The local file cannot be read.
        """
        if if_absent or local.stat().st_size <= _SINGLE_BYTES:
            if if_absent and self.head(key) is not None:
                return False
            return self.write(key, local.read_bytes(), if_absent=if_absent)

        def put(store: Any) -> None:
            options = {"chunk_size": _PART_BYTES, "max_concurrency": _UPLOAD_THREADS, "use_multipart": True}
            self._client.put(store, key, local, **options)

        self._request("write", key, put)
        return True

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with `prefix`, which is a folder with its slash, or empty."""

        def names(store: Any) -> list[str]:
            return [meta["path"] for page in self._client.list(store, prefix or None) for meta in page]

        yield from sorted(name for name in self._request("list", prefix, names) if name.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; an absent object is not an error."""
        with contextlib.suppress(FileNotFoundError):
            self._request("delete", key, lambda store: self._client.delete(store, key))

    def _token_of(self, key: str) -> str | None:
        try:
            found = self._request("read", key, lambda store: self._client.get(store, key).attributes)
        except FileNotFoundError:
            return None
        value = found.get(_TOKEN)
        return None if value is None else str(value)

    def _request(self, verb: str, key: str, send: Callable[[Any], T], *, budget: RetryBudget | None = None) -> T:
        """Return the result of a request, retrying while that can help.

        Raises:
            FileNotFoundError: The object is absent.
            StorageError: The request is refused, or the deadline for retries has passed.
        """
        errors = self._client.exceptions
        budget = budget or self._new_budget(verb, key)
        is_renewed = False
        while True:
            try:
                return send(self._open())
            except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
                raise
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                if is_renewed:  # keys in a file may have been replaced, but only once
                    raise self._refusal(verb, key, error) from None
                is_renewed = True
                self._close()
                self.counters.add("retries", cause="keys")
            except errors.BaseError as error:
                if (cause := cause_of(error)) is None:
                    raise self._refusal(verb, key, error) from None
                budget.wait(cause, _Shortened(_message_of(error)))

    def _refusal(self, verb: str, key: str, error: Exception) -> StorageError:
        return StorageError(f"cannot {verb} {self.url(key)}: {_message_of(error)}; {HINTS[self.scheme]}")

    def _new_budget(self, verb: str, key: str) -> RetryBudget:
        return RetryBudget(self.settings, self.counters, f"{verb} {self.url(key)}", str, hint=HINTS[self.scheme])

    def _open(self) -> Any:
        with self._lock:
            if self._store is None:
                self._store = self._new_store()
            return self._store

    def _close(self) -> None:
        with self._lock:
            self._store = None

    def _new_store(self) -> Any:
        endpoint = os.environ.get("AZURE_ENDPOINT", "") if self.scheme == "az" else _google_endpoint()
        make = self._client.store.AzureStore if self.scheme == "az" else self._client.store.GCSStore
        options = {
            "connect_timeout": f"{self.settings.connect_timeout_s:g}s",
            "read_timeout": f"{self.settings.read_timeout_s:g}s",
            "timeout": f"{_LONGEST_REQUEST_S}s",  # of a whole request; the library's default is 30 s
            "pool_max_idle_per_host": str(self.settings.num_connections),
            **({"allow_http": True} if endpoint.startswith("http://") else {}),
        }
        try:
            return make(self.bucket, client_options=options, retry_config={"max_retries": 0})
        except (self._client.exceptions.BaseError, ValueError) as error:
            raise StorageError(
                f"cannot use {self.scheme}://{self.bucket}: {_message_of(error)}; {HINTS[self.scheme]}"
            ) from None


class _Body:
    """The bytes of an object as they arrive. A broken body is resumed where it broke.

    Args:
        cloud: The bucket.
        key: Key of the object.
        start: First byte.
        stop: End of the range, exclusive; None: the object's end.
        num_bytes: Required size of the object.
    """

    def __init__(
        self, cloud: Cloud, key: str, *, start: int = 0, stop: int | None = None, num_bytes: int | None = None
    ) -> None:
        self._cloud, self._key, self._num_bytes = cloud, key, num_bytes
        self._position, self._stop = start, stop
        self._etag: str | None = None
        self.tag = ""

    def __iter__(self) -> Iterator[bytes]:
        cloud, client = self._cloud, self._cloud._client
        budget = cloud._new_budget("read", self._key)
        while self._stop is None or self._position < self._stop:
            try:
                answer = cloud._request("read", self._key, self._get, budget=budget)
            except (client.exceptions.PreconditionError, client.exceptions.AlreadyExistsError):
                raise DamagedError(f"{cloud.url(self._key)} changed while it was read: try again") from None
            self._check(answer.meta)
            try:
                for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                    content = bytes(piece)
                    self._position += len(content)
                    budget.progress()
                    cloud.counters.add("bytes_fetched", len(content))
                    yield content
            except client.exceptions.BaseError as error:
                budget.wait("connection", _Shortened(_message_of(error)))
                continue
            if self._stop is not None and self._position < self._stop:
                budget.wait("truncated", EOFError(f"the body ended at byte {self._position} of {self._stop}"))

    def _get(self, store: Any) -> Any:
        options: dict[str, Any] = {}
        if self._stop is not None:
            options["range"] = (self._position, self._stop)
        if self._etag is not None:
            options["if_match"] = self._etag
        return self._cloud._client.get(store, self._key, options=options)

    def _check(self, meta: Any) -> None:
        url, size = self._cloud.url(self._key), meta["size"]
        if self._num_bytes not in (None, size):
            raise DamagedError(f"{url} has {size} bytes, its manifest says {self._num_bytes}: it is damaged")
        if self._stop is not None and self._stop > size:
            raise DamagedError(f"{url} has {size} bytes, but bytes up to {self._stop} were requested: it is damaged")
        self._stop = size if self._stop is None else self._stop
        self._etag, self.tag = meta.get("e_tag"), _tag_of(meta)


class _Shortened(Exception):
    """A failure of the library, with a message of one line."""


class _Tag(NamedTuple):
    """Version of an object: Azure compares ETags, Google compares generations."""

    e_tag: str
    version: str


def cause_of(error: Exception) -> str | None:
    """Return the cause under which a failure is counted; None if a retry would fail as well."""
    match = _STATUS.search(str(error))
    if match is None:
        return "timeout" if "timed out" in str(error) else "connection"
    status = int(match[1])
    return str(status) if (status >= 500 and status not in (501, 505)) or status in _TRANSIENT else None


def _message_of(error: Exception) -> str:
    """Return the first line of a failure, without the library's debug output, which repeats the request."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:_MAX_MESSAGE]}"


def _tag_of(meta: Any) -> str:
    return "\n".join(_Tag(meta.get("e_tag") or "", meta.get("version") or ""))


def _mode_of(tag: str) -> dict[str, str]:
    e_tag, _, version = tag.partition("\n")
    return {name: value for name, value in _Tag(e_tag, version)._asdict().items() if value}


def _google_endpoint() -> str:
    """Return the endpoint that a service account's key names, as keys of emulators do."""
    match = re.search(r'"gcs_base_url"\s*:\s*"([^"]+)"', os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", ""))
    return match[1] if match else ""


def _import_client() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "obstore":
            raise
        raise InputError(
            f"gs:// and az:// need the package obstore, which is not installed here: {how_to_install('clouds')}"
        ) from None
    return obstore
