"""S3 objects of one bucket: reading, conditional writing, resumed downloads, retries.

Choices: botocore, for its signatures and its search for keys. Its own retries are off: ours (`retries`) are counted by
cause and resume a broken body where it broke. A refused request (403, 404) fails with the URL, after the keys have been
read again: they may be replaced while a job runs. A conditional write carries a token: if its answer is lost and the
repetition is refused, the token shows that the first attempt succeeded.

A client belongs to its process: after a fork the child makes its own. Threads share it.
"""

import base64
import contextlib
import hashlib
import logging
import os
import threading
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import botocore.exceptions as failures
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.session import Session

from p2r.counters import Counters
from p2r.downloads import Download, limit_size
from p2r.errors import DamagedError, StorageError, error_text
from p2r.retries import (
    HINT,
    REQUEST_FAILURES,
    RetryBudget,
    S3Settings,
    cause_of,
    code_of,
    is_about_keys,
    status_of,
    text_of,
)

_PART_BYTES = 2**24  # of a multipart upload; larger if 10,000 parts are not enough
_SINGLE_BYTES = 2**26  # largest object written in one request
_MAX_PARTS = 10_000
_UPLOAD_THREADS = 4
_ANSWERED: set[str] = set()  # servers that have answered this process
_TOKEN = "p2r-write"  # metadata key of an object: the write that made it
_LOADER = create_loader()  # caches the description of S3; parsing it is most of the cost of a client
_LOG = logging.getLogger(__name__)


class ObjectFacts(NamedTuple):
    """Size, ETag, metadata and age of an object, known without downloading it."""

    num_bytes: int
    etag: str
    metadata: dict[str, str]
    modified_s: float
    """Seconds since 1970, by the server's clock."""


class S3:
    """One bucket. botocore finds endpoint, keys and region in the environment, in `~/.aws` or on the node.

    Every method raises `StorageError` if a request is refused or cannot be completed within the deadline.

    Args:
        bucket: Name of the bucket.
        counters: Counters of bytes_fetched, fetch_seconds and retries{cause}.
        settings: Time limits; None: from the environment.
    """

    def __init__(self, bucket: str, *, counters: Counters, settings: S3Settings | None = None) -> None:
        self.bucket = bucket
        self.settings = settings or S3Settings.from_environment()
        self.counters = counters
        self._process = _Process()

    def url(self, key: str) -> str:
        """Return the URL of an object."""
        return f"s3://{self.bucket}/{key}"

    def head(self, key: str) -> ObjectFacts | None:
        """Return size, ETag and metadata of an object; None if it is absent."""
        with self._translate_errors("read", key):
            try:
                answer = self.request("head_object", self._new_budget("read", key), Key=key)
            except failures.ClientError as error:
                if status_of(error) == 404:  # a HEAD has no body to tell a missing bucket from a missing object
                    return None
                raise
        modified_s = answer["LastModified"].timestamp()
        return ObjectFacts(answer["ContentLength"], answer["ETag"], answer.get("Metadata", {}), modified_s)

    def read(self, key: str, *, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return an object's content and ETag; None if it is absent. Checked if the bucket has its CRC-32.

        Raises:
            DamagedError: The object is larger than `max_bytes` (raised before all of it has arrived), or damaged.
        """
        with self._translate_errors("read", key):
            try:
                return self._read_content(key, max_bytes=max_bytes)
            except failures.ClientError as error:
                if code_of(error) == "NoSuchKey":
                    return None
                raise

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`; an object that ends earlier is a `StorageError`."""
        with self._translate_errors("read", key):
            return self._read_content(key, start=start, stop=stop)[0]

    def fetch(self, key: str, file: BinaryIO, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Write an object's content into `file` from its start, and compute its digest on the way.

        The file is truncated only at the end: until then it may be larger, to reserve its space on the disk.

        Raises:
            StorageError: The object cannot be read, has another size, or repeatedly has another digest.
            OSError: `file` cannot be written.
        """
        budget = self._new_budget("read", key)
        with self._translate_errors("read", key):
            while True:
                file.seek(0)
                digest = hashlib.sha256()
                body = Download(self, key, budget, num_bytes=num_bytes)
                for chunk in body:
                    file.write(chunk)
                    if sha256 is not None:
                        digest.update(chunk)
                if body.is_whole and sha256 in (None, digest.hexdigest()):
                    file.truncate()
                    return
                budget.refetch(body.is_whole)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> bool:
        """Write `data` to an object: always, only if it is absent, or only if it has this ETag.

        Returns:
            True if the object was written.
        """
        with self._translate_errors("write", key):
            return self._send_write(
                "put_object",
                key,
                self._new_budget("write", key),
                token=uuid.uuid4().hex,
                condition=_condition_header(if_absent, if_match),
                Body=data,
                ContentMD5=_md5(data),
                ChecksumCRC32=_crc32(data),
            )

    def upload(self, local: Path, key: str, *, if_absent: bool = False) -> bool:
        """Upload a local file atomically, in parts if it is large.

        Returns:
            True if the object was written.

        Raises:
            OSError: The local file cannot be read.
        """
        num_bytes = local.stat().st_size
        if num_bytes <= _SINGLE_BYTES:
            return self.write(key, local.read_bytes(), if_absent=if_absent)
        if if_absent and self.head(key) is not None:
            return False  # saves sending gigabytes; the condition of the last request decides
        budget, token, is_written = self._new_budget("write", key), uuid.uuid4().hex, False
        with self._translate_errors("write", key):
            begun = self.request("create_multipart_upload", budget, Key=key, Metadata={_TOKEN: token})
            upload = {"Key": key, "UploadId": begun["UploadId"]}
            try:
                is_written = self._send_write(
                    "complete_multipart_upload",
                    key,
                    budget,
                    token=token,
                    condition=_condition_header(if_absent, None),
                    UploadId=upload["UploadId"],
                    MultipartUpload={"Parts": self._upload_parts(local, num_bytes, upload)},
                )
            finally:
                if not is_written:
                    self._abort(upload)
        return is_written

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with `prefix`, in order."""
        budget = self._new_budget("list", prefix)
        following: dict[str, str] = {}
        with self._translate_errors("list", prefix):
            while True:
                answer = self.request("list_objects_v2", budget, Prefix=prefix, **following)
                budget.progress()
                yield from (item["Key"] for item in answer.get("Contents", ()))
                if not answer.get("IsTruncated"):
                    return
                following = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove an object; an absent object is not an error."""
        with self._translate_errors("delete", key):
            self.request("delete_object", self._new_budget("delete", key), Key=key)

    def request(self, operation: str, budget: RetryBudget, **parameters: Any) -> dict[str, Any]:
        """Return botocore's answer to one request on the bucket, retrying while that can help.

        Raises:
            ClientError: The server refuses the request; botocore may raise its other errors.
            StorageError: The deadline for retries has passed.
        """
        refused: set[_Keys] = set()
        while True:
            client, keys = self._client()
            try:
                answer: dict[str, Any] = getattr(client, operation)(Bucket=self.bucket, **parameters)
                _ANSWERED.add(client.meta.endpoint_url)
                return answer
            except REQUEST_FAILURES as error:
                cause = cause_of(error, has_answered=client.meta.endpoint_url in _ANSWERED)
                if cause is not None:
                    budget.wait(cause, error)
                    continue
                refused.add(keys)
                if not (is_about_keys(error) and self._renew_keys(refused)):
                    raise
                self.counters.add("retries", cause="keys")

    def _read_content(
        self, key: str, *, start: int = 0, stop: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, str]:
        budget = self._new_budget("read", key)
        while True:
            body = Download(self, key, budget, start=start, stop=stop)
            content = b"".join(body if max_bytes is None else limit_size(body, max_bytes, self.url(key)))
            if body.is_whole and body.crc32 in (None, _crc32(content)):
                return content, body.etag
            budget.refetch(body.is_whole)

    def _send_write(
        self,
        operation: str,
        key: str,
        budget: RetryBudget,
        *,
        token: str,
        condition: dict[str, str],
        **parameters: Any,
    ) -> bool:
        """Send the request that creates an object; return whether its condition held."""
        if operation == "put_object" and condition:
            parameters["Metadata"] = {_TOKEN: token}
        try:
            self.request(operation, budget, Key=key, **condition, **parameters)
            return True
        except failures.ClientError as error:
            is_refused = bool(condition) and (status_of(error) == 412 or code_of(error) == "NoSuchKey")
            if budget.num_failures and (is_refused or code_of(error) == "NoSuchUpload"):
                # An earlier request may have succeeded with only its answer lost.
                facts = self.head(key)
                if facts is not None and facts.metadata.get(_TOKEN) == token:
                    return True
            if is_refused:
                return False
            raise

    def _upload_parts(self, local: Path, num_bytes: int, upload: dict[str, str]) -> list[dict[str, Any]]:
        part_bytes = max(_PART_BYTES, -(-num_bytes // _MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with local.open("rb") as file:
                file.seek(number * part_bytes)
                data = file.read(part_bytes)
            answer = self.request(
                "upload_part",
                self._new_budget("write", upload["Key"]),
                PartNumber=number + 1,
                Body=data,
                ContentMD5=_md5(data),
                **upload,
            )
            return {"PartNumber": number + 1, "ETag": answer["ETag"]}

        pool = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="p2r-s3")
        try:
            return list(pool.map(send, range(-(-num_bytes // part_bytes))))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the waiting parts are not sent

    def _abort(self, upload: dict[str, str]) -> None:
        """Delete the parts of a failed upload; tried only once, so as not to delay the error."""
        client, _ = self._client()
        try:
            client.abort_multipart_upload(Bucket=self.bucket, **upload)
        except REQUEST_FAILURES as error:
            _LOG.warning(
                "parts of %s may be left in the bucket: %s", self.url(upload["Key"]), self._mask_keys(error_text(error))
            )

    def _new_budget(self, verb: str, key: str) -> RetryBudget:
        return RetryBudget(self.settings, self.counters, f"{verb} {self.url(key)}", self._mask_keys)

    def _client(self) -> "tuple[Any, _Keys]":
        """Return this process's client, and the keys it signs with."""
        process = self._process
        if process.number != os.getpid():
            process = self._process = _Process()
        with process.lock:
            if process.client is None:
                session, keys = self._new_session(skip=None)
                if keys is None:
                    raise StorageError(f"no keys for s3://{self.bucket} were found; {HINT}")
                process.use(self._new_client(session), keys)
            assert process.keys is not None
            return process.client, process.keys

    def _renew_keys(self, refused: "set[_Keys]") -> bool:
        """Switch to keys that were not refused; return whether any were found."""
        process = self._process
        with process.lock:
            if process.keys not in refused:
                return True  # another thread already switched
            # Keys in a file can be replaced while a process runs. Keys in the environment cannot, and take precedence over the file.
            for skip in (None, "env"):
                session, keys = self._new_session(skip=skip)
                if keys is not None and keys not in refused:
                    process.use(self._new_client(session), keys)
                    return True
        return False

    def _new_session(self, *, skip: str | None) -> "tuple[Session, _Keys | None]":
        session = Session()
        session.register_component("data_loader", _LOADER)
        try:
            if skip is not None:
                session.get_component("credential_provider").remove(skip)
            credentials = session.get_credentials()
            return session, None if credentials is None else _Keys(*credentials.get_frozen_credentials()[:3])
        except failures.BotoCoreError as error:
            raise StorageError(f"the keys for s3://{self.bucket} cannot be read: {error}; {HINT}") from None

    def _new_client(self, session: Session) -> Any:
        settings = self.settings
        config = Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            max_pool_connections=settings.num_connections,
            tcp_keepalive=True,
            retries={"total_max_attempts": 1},
            # We send and check digests ourselves, in the form that every S3 server supports.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return session.create_client("s3", config=config)
        except (failures.BotoCoreError, ValueError) as error:
            raise StorageError(f"cannot use s3://{self.bucket}: {error}; {HINT}") from None

    @contextlib.contextmanager
    def _translate_errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except REQUEST_FAILURES as error:
            # No cause is chained: the server's answer could contain a key, which a traceback would show.
            is_absent = isinstance(error, failures.ClientError) and code_of(error) == "NoSuchKey"
            kind = DamagedError if verb == "read" and is_absent else StorageError
            raise kind(f"cannot {verb} {self.url(key)}: {self._mask_keys(text_of(error))}; {HINT}") from None

    def _mask_keys(self, text: str) -> str:
        """Return `text` with keys masked."""
        for secret in self._process.secrets:
            text = text.replace(secret, "***")
        return text


class _Keys(NamedTuple):
    access_key: str
    secret_key: str
    token: str | None


class _Process:
    """State of one process: sockets and locks must not be shared after a fork."""

    def __init__(self) -> None:
        self.number = os.getpid()
        self.lock = threading.Lock()
        self.client: Any = None
        self.keys: _Keys | None = None
        self.secrets: tuple[str, ...] = ()

    def use(self, client: Any, keys: _Keys) -> None:
        """Sign with these keys from now on; running requests keep their client."""
        self.client, self.keys = client, keys
        self.secrets += tuple(part for part in keys if part)


def _condition_header(if_absent: bool, if_match: str | None) -> dict[str, str]:
    if if_absent:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": if_match}


def _md5(data: bytes) -> str:
    return _base64(hashlib.md5(data, usedforsecurity=False).digest())


def _crc32(data: bytes) -> str:
    return _base64(zlib.crc32(data).to_bytes(4, "big"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
