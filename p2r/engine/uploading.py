"""A checkpoint in a local folder of each rank -> complete on the job's storage, while training goes on.

    every rank, in a thread   its files -> <path>/...; then <path>/receipts/rank-00003.json: their digests
    rank 0, in its thread     all receipts -> <path>/manifest.json; then old checkpoints go

The threads speak through the storage alone: a collective of theirs would mix with training's. A receipt names the attempt,
a random number that the ranks agree on when they start, so that what an earlier attempt left at the same step is never
taken for this one's. One upload at a time: whoever wants the next one waits for it, and learns whether it failed.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from p2r.documents import FewKeys, FileEntry, RelativePath, checked
from p2r.engine.peers import Peers
from p2r.errors import DamagedError, P2RError, StorageError
from p2r.files import locked
from p2r.storage import Storage, file_sha256

MANIFEST = "manifest.json"
_PREFIX = "p2r-checkpoint-"
_MAX_RECEIPT_BYTES = 1 << 26
_LOG = logging.getLogger(__name__)


class _Receipt(BaseModel):
    """What a rank says of its part."""

    model_config = ConfigDict(strict=True)
    attempt: str
    files: Annotated[dict[RelativePath, FileEntry], FewKeys]
    failure: str | None = None


_RECEIPT = TypeAdapter(_Receipt)


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is complete on the storage."""

    path: str
    """Below `<storage>/pretrain`."""
    seconds: float
    """From the beginning of the save to the manifest."""
    num_bytes: int
    """Of all its files."""


def path_of(step: int) -> str:
    """Return where the checkpoint after a step lies below `<storage>/pretrain`."""
    return f"checkpoints/step-{step:08d}"


def step_of(path: str) -> int:
    """Return the step of the checkpoint that a file, or folder, below `<storage>/pretrain` belongs to; -1: of none."""
    parts = path.split("/")
    number = parts[1].removeprefix("step-") if len(parts) > 1 else ""
    return int(number) if number.isdigit() else -1


class Uploader:
    """Brings checkpoints to the storage, one at a time. Every rank has one; making it is collective.

    Args:
        storage: `<storage>/pretrain`.
        peers: The ranks.
        keep: How many of the newest complete checkpoints stay.
        keep_every: Those whose step it divides stay, too; 0: none.
        timeout_s: How long rank 0 waits for the receipts of the others once its own files are there.
    """

    def __init__(
        self, storage: Storage, peers: Peers, *, keep: int, keep_every: int = 0, timeout_s: float = 1800.0
    ) -> None:
        self.storage, self.peers = storage, peers
        self._keep, self._keep_every, self._timeout_s = keep, keep_every, timeout_s
        self._attempt = peers.first(lambda: uuid.uuid4().hex)
        self._thread: threading.Thread | None = None
        self._gives_up = threading.Event()
        self._failure: P2RError | None = None
        self._newest: Uploaded | None = None

    @property
    def newest(self) -> Uploaded | None:
        """The newest checkpoint that this uploader has completed; known to rank 0 alone."""
        return self._newest

    def start(self, folder: Path, step: int, *, facts: Mapping[str, Any], began_s: float) -> None:
        """Begin to upload all files of a folder, which then goes; to be called when `finish` has returned.

        Args:
            folder: This rank's part of the checkpoint.
            step: Which one.
            facts: Entries of its manifest beside the digests.
            began_s: Monotonic time at which saving began.
        """
        assert self._thread is None

        def upload() -> None:
            try:
                self._upload(folder, path_of(step), facts, began_s)
            except P2RError as error:
                self._failure = StorageError(
                    f"the checkpoint of step {step} could not be uploaded: {error}; "
                    "the newest complete checkpoint stays, and the same command goes on from it"
                )
            except Exception as error:  # told by `finish`, to whoever waits
                self._failure = StorageError(
                    f"the checkpoint of step {step} could not be uploaded: {type(error).__name__}: {error}"
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        self._thread = threading.Thread(target=upload, name="p2r-checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the upload that is on its way, if any, is complete. Collective.

        Raises:
            StorageError: On every rank, if it failed on any.
        """
        self.peers.together(self._joined)

    def _joined(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def close(self, *, timeout_s: float = 60.0) -> None:
        """Let the upload that is on its way come to its end, but do not wait for ever; what failed is logged. Not collective."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._gives_up.set()
            self._thread.join(1.0)
        if self._failure is not None:
            _LOG.warning("%s", self._failure)

    def _upload(self, folder: Path, path: str, facts: Mapping[str, Any], began_s: float) -> None:
        """Upload this rank's files; on rank 0, wait for the others and complete the checkpoint."""
        receipt: dict[str, Any] = {"attempt": self._attempt, "files": {}}
        try:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    name = file.relative_to(folder).as_posix()
                    receipt["files"][name] = {"sha256": file_sha256(file), "num_bytes": file.stat().st_size}
                    self.storage.upload(file, f"{path}/{name}")
        except P2RError as error:
            if self.peers.rank > 0:
                with suppress(StorageError):  # rank 0 need not wait until its patience ends
                    self._write_receipt(path, {**receipt, "failure": str(error)})
            raise
        if self.peers.rank > 0:
            self._write_receipt(path, receipt)
            return
        files = dict(receipt["files"])
        for other in self._receipts(path):
            files.update(other)
        self.storage.write_json(f"{path}/{MANIFEST}", {**facts, "files": files})
        num_bytes = sum(entry["num_bytes"] for entry in files.values())
        self._newest = Uploaded(path, time.monotonic() - began_s, num_bytes)
        try:
            self.storage.delete(f"{path}/receipts")
            remove_old(self.storage, step_of(path), keep=self._keep, keep_every=self._keep_every)
        except StorageError as error:
            _LOG.warning("checkpoint %s is complete, but what it makes superfluous stays: %s", path, error)

    def _write_receipt(self, path: str, receipt: Mapping[str, Any]) -> None:
        self.storage.write_json(_receipt_at(path, self.peers.rank), receipt)

    def _receipts(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the files of all other ranks, as soon as they are there."""
        deadline_s, pause_s = time.monotonic() + self._timeout_s, 0.02
        for rank in range(1, self.peers.world_size):
            while True:
                receipt = self._receipt(path, rank)
                if receipt is not None:
                    break
                if time.monotonic() > deadline_s or self._gives_up.wait(pause_s):
                    raise StorageError(f"rank {rank} has not uploaded its part")
                pause_s = min(2 * pause_s, 1.0)
            if "failure" in receipt:
                raise StorageError(f"rank {rank}: {receipt['failure']}")
            yield receipt["files"]

    def _receipt(self, path: str, rank: int) -> dict[str, Any] | None:
        where = _receipt_at(path, rank)
        if not self.storage.exists(where):
            return None
        receipt: dict[str, Any] = self.storage.read_json(where, max_bytes=_MAX_RECEIPT_BYTES)
        checked(_RECEIPT, receipt, where=f"{self.storage.at(where)} is damaged:", error=DamagedError)
        return receipt if receipt["attempt"] == self._attempt else None


def remove_old(storage: Storage, newest: int, *, keep: int, keep_every: int) -> None:
    """Remove checkpoints that are no longer wanted, and what never became one, below the newest complete one.

    Args:
        storage: `<storage>/pretrain`.
        newest: Step of the newest complete checkpoint; whatever is newer is left alone.
        keep: How many of the newest complete ones stay.
        keep_every: Those whose step it divides stay, too; 0: none.
    """
    paths = storage.list("checkpoints")
    for step in outdated(paths, newest, keep=keep, keep_every=keep_every):
        path = path_of(step)
        if f"{path}/{MANIFEST}" in paths:
            storage.delete(f"{path}/{MANIFEST}")  # first: from here on the checkpoint does not exist
        storage.delete(path)


def outdated(paths: Sequence[str], newest: int, *, keep: int, keep_every: int) -> list[int]:
    """Return the steps of checkpoints that `remove_old` removes, given all files below `checkpoints`."""
    found = sorted({step for path in paths if 0 <= (step := step_of(path)) <= newest})
    complete = [step for step in found if f"{path_of(step)}/{MANIFEST}" in paths]
    kept = {newest, *complete[-keep:], *(step for step in complete if keep_every and step % keep_every == 0)}
    return [step for step in found if step not in kept]


def _receipt_at(path: str, rank: int) -> str:
    return f"{path}/receipts/rank-{rank:05d}.json"


@contextmanager
def own_folder() -> Iterator[Path]:
    """Give an empty folder for checkpoints that come or go; it is removed at the end, also if this process is killed: by the next."""
    parent = Path(tempfile.gettempdir())
    for lock in parent.glob(f"{_PREFIX}*.lock"):
        _remove_if_abandoned(lock)
    folder = parent / f"{_PREFIX}{uuid.uuid4().hex}"
    with locked(folder.with_suffix(".lock")):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(lock: Path) -> None:
    """Remove the folder of a process that no longer holds its lock."""
    with suppress(OSError):
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else: its holder lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
        finally:
            os.close(handle)
