"""Download of one S3 object piece by piece; after a broken connection only the rest is requested."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import botocore.exceptions as failures

from p2r.errors import DamagedError, StorageError
from p2r.retries import (
    BODY_FAILURES,
    HINT,
    RetryBudget,
    cause_of,
    status_of,
)

if TYPE_CHECKING:
    from p2r.s3 import S3

_CHUNK_BYTES = 2**20


class Download:
    """The bytes of an object as they arrive. A broken body is resumed where it broke, so no byte comes twice.

    Args:
        s3: The bucket.
        key: Key of the object.
        budget: Retry budget for the whole object.
        start: First byte.
        stop: End of the range, exclusive; None: the object's end.
        num_bytes: Required size of the object.
    """

    def __init__(
        self,
        s3: "S3",
        key: str,
        budget: RetryBudget,
        *,
        start: int = 0,
        stop: int | None = None,
        num_bytes: int | None = None,
    ) -> None:
        self._s3, self._key, self._budget, self._num_bytes = s3, key, budget, num_bytes
        self._position, self._stop = start, stop
        self.etag = ""  # from the first answer
        self.crc32: str | None = None  # of the whole object in base64, if the bucket has it
        self.is_whole = True  # False: the object was replaced during the download

    def __iter__(self) -> Iterator[bytes]:
        while self._stop is None or self._position < self._stop:
            try:
                answer = self._request_rest()
            except failures.ClientError as error:
                if self.etag and status_of(error) in (404, 412):
                    self.is_whole = False
                    return
                raise
            yield from self._receive(answer["Body"])

    def _request_rest(self) -> dict[str, Any]:
        """Request the remaining bytes; the first answer also gives size, ETag and checksum."""
        parameters: dict[str, str] = {"ChecksumMode": "ENABLED"}
        if self._position or self._stop is not None:
            parameters = {"Range": f"bytes={self._position}-{'' if self._stop is None else self._stop - 1}"}
        if self.etag:
            parameters["IfMatch"] = self.etag
        began_s = time.perf_counter()
        answer = self._s3.request("get_object", self._budget, Key=self._key, **parameters)
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
            raise DamagedError(
                f"{url} has {num_bytes} bytes, but bytes up to {self._stop} were requested: it is damaged"
            )
        sent = span.rpartition("/")[0] or f"bytes 0-{num_bytes - 1}"
        if "Range" in parameters and sent != f"bytes {self._position}-{self._stop - 1}":
            raise StorageError(
                f"{url}: asked for {parameters['Range']}, got {sent}: the server lacks S3's ranges; {HINT}"
            )
        if not self.etag:
            self.etag, self.crc32 = etag, answer.get("ChecksumCRC32")
        return answer

    def _receive(self, body: Any) -> Iterator[bytes]:
        """Yield pieces until the body ends or breaks."""
        with contextlib.closing(body):
            while True:
                began_s = time.perf_counter()
                try:
                    # urllib3's own `read1`, which botocore hides: `read` waits for a whole chunk, and loses the part of it
                    # that arrived before a connection broke.
                    piece = body._raw_stream.read1(_CHUNK_BYTES)
                except BODY_FAILURES as error:
                    self._budget.wait(cause_of(error) or "connection", error)
                    return
                finally:
                    self._s3.counters.add("fetch_seconds", time.perf_counter() - began_s)
                if not piece:
                    break
                self._budget.progress()
                self._position += len(piece)
                self._s3.counters.add("bytes_fetched", len(piece))
                yield piece
        if self._stop is not None and self._position < self._stop:
            self._budget.wait("truncated", EOFError(f"the body ended at byte {self._position} of {self._stop}"))


def limit_size(body: Iterable[bytes], max_bytes: int, where: str) -> Iterator[bytes]:
    """Yield the pieces of a body; refuse one that exceeds `max_bytes`."""
    num_bytes = 0
    for piece in body:
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise DamagedError(f"{where} has more than the {max_bytes:,} bytes allowed for such a file")
        yield piece
