"""Objects of one bucket -> bytes and files, and back.

Choices: botocore, for its signatures and for where it finds keys; without its own retries, because ours (`patience`) are
counted by cause and take up a broken body where it broke. What is refused (403, 404) ends at once, with the URL; except
that keys are read anew first, so that they may be replaced while a job runs. A conditional write carries a token, so
that one whose answer got lost is recognised when its repetition is told that somebody was faster.

A client belongs to the process that made it: after a fork, the child makes its own. Threads share it.
"""

import base64
import contextlib
import hashlib
import logging
import os
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import botocore.exceptions as failures
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.session import Session

from p2r.counters import Counters
from p2r.errors import DamagedError, StorageError, error_text
from p2r.patience import (
    BODY_FAILURES,
    HINT,
    REQUEST_FAILURES,
    Patience,
    S3Settings,
    cause_of,
    code_of,
    is_about_keys,
    status_of,
    text_of,
)

_CHUNK_BYTES = 2**20
_PART_BYTES = 2**24  # of a multipart upload; larger where 10,000 parts would not do
_SINGLE_BYTES = 2**26  # up to here an object is written by one request
_MAX_PARTS = 10_000
_UPLOAD_THREADS = 4
_ANSWERED: set[str] = set()  # servers that this process has heard
_TOKEN = "p2r-write"  # metadata of an object: which write made it
_LOADER = create_loader()  # keeps the description of S3, whose parsing is most of what a client costs
_LOG = logging.getLogger(__name__)


class ObjectFacts(NamedTuple):
    """What a bucket knows of an object without sending it."""

    num_bytes: int
    etag: str
    metadata: dict[str, str]
    modified_s: float
    """Seconds since 1970, by the server's clock."""


class S3:
    """One bucket. Endpoint, keys and region come from where botocore finds them: the environment, `~/.aws`, the node.

    Every method raises `StorageError` for what is refused, or cannot be had within the deadline.

    Args:
        bucket: Its name.
        counters: For bytes_fetched, fetch_seconds and retries{cause}.
        settings: None: from the environment.
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
        with self._explained("read", key):
            try:
                answer = self.request("head_object", self._patience("read", key), Key=key)
            except failures.ClientError as error:
                if status_of(error) == 404:  # a HEAD has no body that could tell a missing bucket from a missing object
                    return None
                raise
        modified_s = answer["LastModified"].timestamp()
        return ObjectFacts(answer["ContentLength"], answer["ETag"], answer.get("Metadata", {}), modified_s)

    def read(self, key: str, *, max_bytes: int | None = None) -> tuple[bytes, str] | None:
        """Return an object's content and ETag; None if it is absent. Checked, if the bucket knows its CRC-32.

        Raises:
            DamagedError: also for an object of more than `max_bytes`, before all of it has come.
        """
        with self._explained("read", key):
            try:
                return self._content(key, max_bytes=max_bytes)
            except failures.ClientError as error:
                if code_of(error) == "NoSuchKey":
                    return None
                raise

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`; an object that ends before `stop` is a `StorageError`."""
        with self._explained("read", key):
            return self._content(key, start=start, stop=stop)[0]

    def fetch(self, key: str, file: BinaryIO, *, sha256: str | None = None, num_bytes: int | None = None) -> None:
        """Write an object's content into `file`, from its beginning; its digest is taken as it comes.

        The file is cut where the content ends, and not before: it may be larger meanwhile, to hold its place on a disk.

        Raises:
            StorageError: also if its size is another, or its digest, time and again.
            OSError: from `file`.
        """
        patience = self._patience("read", key)
        with self._explained("read", key):
            while True:
                file.seek(0)
                digest = hashlib.sha256()
                body = _Body(self, key, patience, num_bytes=num_bytes)
                for chunk in body:
                    file.write(chunk)
                    if sha256 is not None:
                        digest.update(chunk)
                if body.is_whole and sha256 in (None, digest.hexdigest()):
                    file.truncate()
                    return
                patience.refetch(body.is_whole)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> bool:
        """Make an object of `data`: always, only if there is none, or only in the place of the one with this ETag.

        Returns:
            Whether it was written.
        """
        with self._explained("write", key):
            return self._write(
                "put_object",
                key,
                self._patience("write", key),
                token=uuid.uuid4().hex,
                condition=_condition(if_absent, if_match),
                Body=data,
                ContentMD5=_md5(data),
                ChecksumCRC32=_crc32(data),
            )

    def upload(self, local: Path, key: str, *, if_absent: bool = False) -> bool:
        """Make an object of a local file, in parts if it is large: whole or not at all.

        Returns:
            Whether it was written.

        Raises:
            OSError: the local file cannot be read.
        """
        num_bytes = local.stat().st_size
        if num_bytes <= _SINGLE_BYTES:
            return self.write(key, local.read_bytes(), if_absent=if_absent)
        if if_absent and self.head(key) is not None:
            return False  # known before gigabytes are sent; the condition of the last request decides
        patience, token, is_written = self._patience("write", key), uuid.uuid4().hex, False
        with self._explained("write", key):
            begun = self.request("create_multipart_upload", patience, Key=key, Metadata={_TOKEN: token})
            upload = {"Key": key, "UploadId": begun["UploadId"]}
            try:
                is_written = self._write(
                    "complete_multipart_upload",
                    key,
                    patience,
                    token=token,
                    condition=_condition(if_absent, None),
                    UploadId=upload["UploadId"],
                    MultipartUpload={"Parts": self._upload_parts(local, num_bytes, upload)},
                )
            finally:
                if not is_written:
                    self._abort(upload)
        return is_written

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in order."""
        patience = self._patience("list", prefix)
        following: dict[str, str] = {}
        with self._explained("list", prefix):
            while True:
                answer = self.request("list_objects_v2", patience, Prefix=prefix, **following)
                patience.progress()
                yield from (item["Key"] for item in answer.get("Contents", ()))
                if not answer.get("IsTruncated"):
                    return
                following = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is absent."""
        with self._explained("delete", key):
            self.request("delete_object", self._patience("delete", key), Key=key)

    def request(self, operation: str, patience: Patience, **parameters: Any) -> dict[str, Any]:
        """Return botocore's answer to one request on the bucket, repeated as long as that can help.

        Raises:
            ClientError: The server's refusal; other errors of botocore for what it refuses itself.
            StorageError: Patience is at its end.
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
                    patience.wait(cause, error)
                    continue
                refused.add(keys)
                if not (is_about_keys(error) and self._renew(refused)):
                    raise
                self.counters.add("retries", cause="keys")

    def _content(
        self, key: str, *, start: int = 0, stop: int | None = None, max_bytes: int | None = None
    ) -> tuple[bytes, str]:
        patience = self._patience("read", key)
        while True:
            body = _Body(self, key, patience, start=start, stop=stop)
            content = b"".join(body if max_bytes is None else _bounded(body, max_bytes, self.url(key)))
            if body.is_whole and body.crc32 in (None, _crc32(content)):
                return content, body.etag
            patience.refetch(body.is_whole)

    def _write(
        self,
        operation: str,
        key: str,
        patience: Patience,
        *,
        token: str,
        condition: dict[str, str],
        **parameters: Any,
    ) -> bool:
        """Send the request that makes an object; tell whether its condition held."""
        if operation == "put_object" and condition:
            parameters["Metadata"] = {_TOKEN: token}
        try:
            self.request(operation, patience, Key=key, **condition, **parameters)
            return True
        except failures.ClientError as error:
            is_refused = bool(condition) and (status_of(error) == 412 or code_of(error) == "NoSuchKey")
            if patience.num_failures and (is_refused or code_of(error) == "NoSuchUpload"):
                # One of the requests before may have arrived and only its answer been lost.
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
                self._patience("write", upload["Key"]),
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
            pool.shutdown(cancel_futures=True)  # after a failure the parts that wait are not sent

    def _abort(self, upload: dict[str, str]) -> None:
        """Free the parts of an upload that came to nothing; once, because the reason is on its way to the caller."""
        client, _ = self._client()
        try:
            client.abort_multipart_upload(Bucket=self.bucket, **upload)
        except REQUEST_FAILURES as error:
            _LOG.warning(
                "parts of %s may be left in the bucket: %s", self.url(upload["Key"]), self._clean(error_text(error))
            )

    def _patience(self, verb: str, key: str) -> Patience:
        return Patience(self.settings, self.counters, f"{verb} {self.url(key)}", self._clean)

    def _client(self) -> "tuple[Any, _Keys]":
        """Return this process's client, and the keys that it signs with."""
        process = self._process
        if process.number != os.getpid():
            process = self._process = _Process()
        with process.lock:
            if process.client is None:
                session, keys = self._session(skip=None)
                if keys is None:
                    raise StorageError(f"no keys for s3://{self.bucket} were found; {HINT}")
                process.use(self._connect(session), keys)
            assert process.keys is not None
            return process.client, process.keys

    def _renew(self, refused: "set[_Keys]") -> bool:
        """Change to keys that were not refused; tell whether there are any."""
        process = self._process
        with process.lock:
            if process.keys not in refused:
                return True  # another thread was faster
            # Keys in a file can be replaced while a process runs; its environment cannot, and hides the file.
            for skip in (None, "env"):
                session, keys = self._session(skip=skip)
                if keys is not None and keys not in refused:
                    process.use(self._connect(session), keys)
                    return True
        return False

    def _session(self, *, skip: str | None) -> "tuple[Session, _Keys | None]":
        session = Session()
        session.register_component("data_loader", _LOADER)
        try:
            if skip is not None:
                session.get_component("credential_provider").remove(skip)
            credentials = session.get_credentials()
            return session, None if credentials is None else _Keys(*credentials.get_frozen_credentials()[:3])
        except failures.BotoCoreError as error:
            raise StorageError(f"the keys for s3://{self.bucket} cannot be read: {error}; {HINT}") from None

    def _connect(self, session: Session) -> Any:
        settings = self.settings
        config = Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            max_pool_connections=settings.num_connections,
            tcp_keepalive=True,
            retries={"total_max_attempts": 1},
            # We send and check digests ourselves, in the form that every S3 server knows.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return session.create_client("s3", config=config)
        except (failures.BotoCoreError, ValueError) as error:
            raise StorageError(f"cannot use s3://{self.bucket}: {error}; {HINT}") from None

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except REQUEST_FAILURES as error:
            # No cause is chained: what a server answers could repeat a key, and a traceback would show it.
            is_absent = isinstance(error, failures.ClientError) and code_of(error) == "NoSuchKey"
            kind = DamagedError if verb == "read" and is_absent else StorageError
            raise kind(f"cannot {verb} {self.url(key)}: {self._clean(text_of(error))}; {HINT}") from None

    def _clean(self, text: str) -> str:
        """Return `text` without the keys, should anything have put them there."""
        for secret in self._process.secrets:
            text = text.replace(secret, "***")
        return text


class _Keys(NamedTuple):
    access_key: str
    secret_key: str
    token: str | None


class _Process:
    """What one process has: sockets and locks must not be shared with a fork."""

    def __init__(self) -> None:
        self.number = os.getpid()
        self.lock = threading.Lock()
        self.client: Any = None
        self.keys: _Keys | None = None
        self.secrets: tuple[str, ...] = ()

    def use(self, client: Any, keys: _Keys) -> None:
        """Sign with these keys from now on; requests that are under way keep their client."""
        self.client, self.keys = client, keys
        self.secrets += tuple(part for part in keys if part)


class _Body:
    """The bytes of an object as they arrive. A body that breaks is taken up where it broke, so no byte comes twice.

    Args:
        s3: The bucket.
        key: Of the object.
        patience: For all of it.
        start: First byte.
        stop: Behind the last; None: the object's end.
        num_bytes: Size that the object must have.
    """

    def __init__(
        self,
        s3: S3,
        key: str,
        patience: Patience,
        *,
        start: int = 0,
        stop: int | None = None,
        num_bytes: int | None = None,
    ) -> None:
        self._s3, self._key, self._patience, self._num_bytes = s3, key, patience, num_bytes
        self._position, self._stop = start, stop
        self.etag = ""  # of the first answer
        self.crc32: str | None = None  # of the whole object in base64, if the bucket knows it
        self.is_whole = True  # False: the object was replaced before all had arrived

    def __iter__(self) -> Iterator[bytes]:
        while self._stop is None or self._position < self._stop:
            try:
                answer = self._open()
            except failures.ClientError as error:
                if self.etag and status_of(error) in (404, 412):
                    self.is_whole = False
                    return
                raise
            yield from self._arriving(answer["Body"])

    def _open(self) -> dict[str, Any]:
        """Ask for what has not arrived yet, and learn from the first answer what the object is."""
        parameters: dict[str, str] = {"ChecksumMode": "ENABLED"}
        if self._position or self._stop is not None:
            parameters = {"Range": f"bytes={self._position}-{'' if self._stop is None else self._stop - 1}"}
        if self.etag:
            parameters["IfMatch"] = self.etag
        began_s = time.perf_counter()
        answer = self._s3.request("get_object", self._patience, Key=self._key, **parameters)
        self._s3.counters.add("fetch_seconds", time.perf_counter() - began_s)
        url, span = self._s3.url(self._key), answer.get("ContentRange", "")
        num_bytes, etag = answer.get("ContentLength"), answer.get("ETag")
        if span.startswith("bytes ") and span.rpartition("/")[2].isdigit():
            num_bytes = int(span.rpartition("/")[2])
        if num_bytes is None or etag is None:
            raise StorageError(f"{url}: the server states no size or no ETag, as S3 does; {HINT}")
        if self._num_bytes not in (None, num_bytes):
            raise DamagedError(f"{url} has {num_bytes} bytes, its manifest says {self._num_bytes}: it is damaged")
        if self._stop is None:
            self._stop = num_bytes
        if self._stop > num_bytes:
            raise DamagedError(f"{url} has {num_bytes} bytes, asked for those before {self._stop}: it is damaged")
        sent = span.rpartition("/")[0] or f"bytes 0-{num_bytes - 1}"
        if "Range" in parameters and sent != f"bytes {self._position}-{self._stop - 1}":
            raise StorageError(
                f"{url}: asked for {parameters['Range']}, got {sent}: the server lacks S3's ranges; {HINT}"
            )
        if not self.etag:
            self.etag, self.crc32 = etag, answer.get("ChecksumCRC32")
        return answer

    def _arriving(self, body: Any) -> Iterator[bytes]:
        """Yield pieces until the body ends or breaks."""
        with contextlib.closing(body):
            while True:
                began_s = time.perf_counter()
                try:
                    # urllib3's own `read1`, which botocore hides: `read` waits for a whole chunk, and loses what it has
                    # of it when the connection breaks.
                    piece = body._raw_stream.read1(_CHUNK_BYTES)
                except BODY_FAILURES as error:
                    self._patience.wait(cause_of(error) or "connection", error)
                    return
                finally:
                    self._s3.counters.add("fetch_seconds", time.perf_counter() - began_s)
                if not piece:
                    break
                self._patience.progress()
                self._position += len(piece)
                self._s3.counters.add("bytes_fetched", len(piece))
                yield piece
        if self._stop is not None and self._position < self._stop:
            self._patience.wait("truncated", EOFError(f"the body ended at byte {self._position} of {self._stop}"))


def _bounded(body: Iterable[bytes], max_bytes: int, where: str) -> Iterator[bytes]:
    num_bytes = 0
    for piece in body:
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise DamagedError(f"{where} has more than the {max_bytes:,} bytes that such a file may have")
        yield piece


def _condition(if_absent: bool, if_match: str | None) -> dict[str, str]:
    if if_absent:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": if_match}


def _md5(data: bytes) -> str:
    return _base64(hashlib.md5(data, usedforsecurity=False).digest())


def _crc32(data: bytes) -> str:
    return _base64(zlib.crc32(data).to_bytes(4, "big"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
