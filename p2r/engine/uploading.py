"""Upload of checkpoints from each rank's local folder to the job's storage, while training continues.

    every rank, in a thread   its files -> <path>/...; then <path>/receipts/rank-00003.json: their digests
    rank 0, in its thread     all receipts -> <path>/manifest.json; then old checkpoints are removed

The threads communicate only through the storage, because their collectives would mix with training's. A receipt names the
attempt, a random number that the ranks agree on at the start. Files of an earlier attempt at the same step are therefore
never mistaken for this one's. Only one upload runs at a time: the next waits for it, and learns whether it failed.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, TypeAdapter

from p2r.documents import FewKeys, FileEntry, RelativePath, checked
from p2r.engine.checkpoint_manifest import MANIFEST, CheckpointManifest
from p2r.engine.peers import Peers
from p2r.errors import DamagedError, P2RError, StorageError
from p2r.files import locked
from p2r.storage import Storage, file_sha256

_PREFIX = "p2r-checkpoint-"
_MAX_RECEIPT_BYTES = 1 << 26
_LOG = logging.getLogger(__name__)


class _Receipt(BaseModel):
    """Files that a rank uploaded, or its failure."""

    model_config = ConfigDict(strict=True, frozen=True)
    attempt: str
    files: Annotated[dict[RelativePath, FileEntry], FewKeys]
    failure: str | None = None


_RECEIPT = TypeAdapter(_Receipt)


@dataclass(frozen=True)
class Uploaded:
    """A complete checkpoint on the storage."""

    path: str
    """Path below `<storage>/pretrain`."""
    seconds: float
    """Time from the start of the save to the manifest."""
    num_bytes: int
    """Size of all its files."""


def path_of(step: int) -> str:
    """Return the path below `<storage>/pretrain` of the checkpoint after a step."""
    return f"checkpoints/step-{step:08d}"


def step_of(path: str) -> int:
    """Return the step of the checkpoint that a path below `<storage>/pretrain` belongs to; -1 if none."""
    parts = path.split("/")
    number = parts[1].removeprefix("step-") if len(parts) > 1 else ""
    return int(number) if number.isdigit() else -1


class Uploader:
    """Uploads checkpoints, one at a time. Every rank has an instance; creating it is collective.

    Args:
        storage: `<storage>/pretrain`.
        peers: The ranks.
        keep: Number of newest complete checkpoints to keep.
        keep_every: Also keep checkpoints whose step is a multiple of this; 0: none.
        timeout_s: Time that rank 0 waits for the other receipts after its own upload.
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
        """The newest checkpoint that this uploader completed; only known on rank 0."""
        return self._newest

    def start(self, folder: Path, step: int, *, manifest: CheckpointManifest, began_s: float) -> None:
        """Start to upload all files of a folder, which is removed afterwards. `finish` must have returned before.

        Args:
            folder: This rank's part of the checkpoint.
            step: Step of the checkpoint.
            manifest: Manifest of the checkpoint, still without files.
            began_s: Monotonic time at which saving started.
        """
        assert self._thread is None

        def upload() -> None:
            try:
                self._upload(folder, path_of(step), manifest, began_s)
            except P2RError as error:
                self._failure = StorageError(
                    f"the checkpoint of step {step} could not be uploaded: {error}; "
                    "the newest complete checkpoint stays, and the same command resumes from it"
                )
            except Exception as error:  # raised by `finish`
                self._failure = StorageError(
                    f"the checkpoint of step {step} could not be uploaded: {type(error).__name__}: {error}"
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        self._thread = threading.Thread(target=upload, name="p2r-checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until a running upload is complete. Collective.

        Raises:
            StorageError: The upload failed on some rank; raised on every rank.
        """
        self.peers.together(self._join_thread)

    def _join_thread(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def close(self, *, timeout_s: float = 60.0) -> None:
        """Wait for a running upload up to a time limit; failures are logged. Not collective."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._gives_up.set()
            self._thread.join(1.0)
        if self._failure is not None:
            _LOG.warning("%s", self._failure)

    def _upload(self, folder: Path, path: str, manifest: CheckpointManifest, began_s: float) -> None:
        """Upload this rank's files; on rank 0, also wait for the others and complete the checkpoint."""
        files: dict[str, FileEntry] = {}
        try:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    name = file.relative_to(folder).as_posix()
                    files[name] = FileEntry(sha256=file_sha256(file), num_bytes=file.stat().st_size)
                    self.storage.upload(file, f"{path}/{name}")
        except P2RError as error:
            if self.peers.rank > 0:
                with suppress(StorageError):  # so that rank 0 need not wait for its timeout
                    self._write_receipt(path, _Receipt(attempt=self._attempt, files=files, failure=str(error)))
            raise
        if self.peers.rank > 0:
            self._write_receipt(path, _Receipt(attempt=self._attempt, files=files))
            return
        for other in self._wait_for_receipts(path):
            files.update(other)
        self.storage.write_json(f"{path}/{MANIFEST}", manifest.model_copy(update={"files": files}).to_json())
        num_bytes = sum(entry.num_bytes for entry in files.values())
        self._newest = Uploaded(path, time.monotonic() - began_s, num_bytes)
        try:
            self.storage.delete(f"{path}/receipts")
            remove_old(self.storage, step_of(path), keep=self._keep, keep_every=self._keep_every)
        except StorageError as error:
            _LOG.warning("checkpoint %s is complete, but outdated files could not be removed: %s", path, error)

    def _write_receipt(self, path: str, receipt: _Receipt) -> None:
        self.storage.write_json(_receipt_path(path, self.peers.rank), receipt.model_dump(exclude_unset=True))

    def _wait_for_receipts(self, path: str) -> Iterator[dict[str, FileEntry]]:
        """Yield the files of all other ranks as their receipts arrive."""
        deadline_s, pause_s = time.monotonic() + self._timeout_s, 0.02
        for rank in range(1, self.peers.world_size):
            while True:
                receipt = self._read_receipt(path, rank)
                if receipt is not None:
                    break
                if time.monotonic() > deadline_s or self._gives_up.wait(pause_s):
                    raise StorageError(f"rank {rank} has not uploaded its part")
                pause_s = min(2 * pause_s, 1.0)
            if receipt.failure is not None:
                raise StorageError(f"rank {rank}: {receipt.failure}")
            yield receipt.files

    def _read_receipt(self, path: str, rank: int) -> _Receipt | None:
        where = _receipt_path(path, rank)
        if not self.storage.exists(where):
            return None
        value = self.storage.read_json(where, max_bytes=_MAX_RECEIPT_BYTES)
        receipt = checked(_RECEIPT, value, where=f"{self.storage.at(where)} is damaged:", error=DamagedError)
        return receipt if receipt.attempt == self._attempt else None


def remove_old(storage: Storage, newest: int, *, keep: int, keep_every: int) -> None:
    """Remove outdated checkpoints and incomplete leftovers older than the newest complete one.

    Args:
        storage: `<storage>/pretrain`.
        newest: Step of the newest complete checkpoint; newer files are kept.
        keep: Number of newest complete checkpoints to keep.
        keep_every: Also keep checkpoints whose step is a multiple of this; 0: none.
    """
    paths = storage.list("checkpoints")
    for step in outdated(paths, newest, keep=keep, keep_every=keep_every):
        path = path_of(step)
        if f"{path}/{MANIFEST}" in paths:
            storage.delete(f"{path}/{MANIFEST}")  # first: without it the checkpoint no longer counts
        storage.delete(path)


def outdated(paths: Sequence[str], newest: int, *, keep: int, keep_every: int) -> list[int]:
    """Return the steps of the checkpoints that `remove_old` removes, given all paths below `checkpoints`."""
    found = sorted({step for path in paths if 0 <= (step := step_of(path)) <= newest})
    complete = [step for step in found if f"{path_of(step)}/{MANIFEST}" in paths]
    kept = {newest, *complete[-keep:], *(step for step in complete if keep_every and step % keep_every == 0)}
    return [step for step in found if step not in kept]


def _receipt_path(path: str, rank: int) -> str:
    return f"{path}/receipts/rank-{rank:05d}.json"


@contextmanager
def own_folder() -> Iterator[Path]:
    """Yield an empty folder for checkpoints, removed at the end; if this process is killed, the next one removes it."""
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
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the holder lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
        finally:
            os.close(handle)
