"""A shard plan -> the shard, its index, and a receipt with the outcome of every scan.

A shard is named by the digest of its content and never overwritten, so any number of runs may build at once. The receipt
is written last: a run that finds the receipt and its shard has nothing to build. Builds are therefore idempotent, and
resuming after a kill or a task that ran twice needs nothing else.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from p2r.config import IngestConfig
from p2r.data.growth import MAY_PASS, ShardPlan
from p2r.data.ledger import LedgerRow, is_accepted, parse_row
from p2r.data.manifest import Shard, parse_shard
from p2r.data.records import Records
from p2r.data.shards import index_name, write_shard
from p2r.data.thumbnails import Thumbnails, from_rows, lowest_lots, thumbnail, to_rows
from p2r.data.volume import read_volume
from p2r.documents import read_json
from p2r.errors import DamagedError, DataError, RefusedScan
from p2r.storage import Storage

_FORMAT = "p2r-receipt/1"
_MAX_RECEIPT_BYTES = 1 << 28


@dataclass(frozen=True)
class Built:
    """Result of building a plan."""

    entry: Shard | None
    """The shard's entry in the manifest; None if every scan was refused."""
    rows: tuple[LedgerRow, ...]
    """Ledger rows of the scans, in the plan's order."""
    thumbnails: Thumbnails
    """Thumbnails of the scans that the report may show."""
    is_found: bool = False
    """True if an earlier run built it."""


def build_shard(plan: ShardPlan, config: IngestConfig, storage: Storage) -> Built:
    """Read a plan's scans and write its shard and index to `storage`: the same bytes on every run and every machine."""
    receipt = f"receipts/{plan.digest(config)}.json"
    if (found := _read_receipt(storage, receipt)) is not None:
        return found
    rows: list[LedgerRow] = []
    thumbnails: Thumbnails = {}
    with tempfile.TemporaryDirectory(prefix="p2r-shard-") as folder:
        tar = Path(folder, "shard.tar")
        records = Records(plan, config, rows, thumbnails).read()
        written = write_shard(tar, records, record=config.record, codec=config.codec, block_size=config.block_size)
        entry: Shard | None = None
        if written.num_records:
            entry = written._replace(name=f"shard-{plan.number:06d}-{written.sha256[:12]}.tar")
            _upload(storage, tar.with_suffix(".idx"), index_name(entry.name))
            _upload(storage, tar, entry.name)
            named = {"shard": entry.name}
            rows = [row.model_copy(update=named) if is_accepted(row) else row for row in rows]
    thumbnails |= _draw_refused_thumbnails(plan, config, rows)
    content = {
        "format": _FORMAT,
        "entry": None if entry is None else entry._asdict(),
        "rows": [row.to_json() for row in rows],
        "thumbnails": to_rows(thumbnails),
    }
    storage.write_bytes(receipt, (json.dumps(content, sort_keys=True, allow_nan=False) + "\n").encode())
    return Built(entry, tuple(rows), thumbnails)


def _read_receipt(storage: Storage, path: str) -> Built | None:
    """Return the result recorded in a receipt; None if the receipt, its shard or its index is absent or damaged."""
    try:
        found = storage.read_tagged(path, max_bytes=_MAX_RECEIPT_BYTES)
    except DamagedError:
        return None
    if found is None:
        return None
    try:
        receipt = read_json(found[0], where=path, max_bytes=_MAX_RECEIPT_BYTES, error=DataError)
        if receipt["format"] != _FORMAT:
            return None
        thumbnails = from_rows(receipt["thumbnails"])
        rows = [parse_row(row, where=path) for row in receipt["rows"]]
        entry = None if receipt["entry"] is None else parse_shard(receipt["entry"], where=path)
        if entry is not None:
            index = index_name(entry.name)
            if _stored_size(storage, entry.name) != entry.num_bytes or not _stored_size(storage, index):
                return None
    except (ValueError, TypeError, KeyError, AttributeError, DataError):
        return None  # damaged, or written by another version: build the shard again
    if any(row.reason in MAY_PASS for row in rows):
        return None
    return Built(entry, tuple(rows), thumbnails, is_found=True)


def _upload(storage: Storage, file: Path, name: str) -> None:
    if storage.upload(file, name, if_absent=True):
        return
    # The name contains a digest of the content, so an existing object is identical unless it was truncated.
    if _stored_size(storage, name) != file.stat().st_size:
        storage.upload(file, name)


def _stored_size(storage: Storage, path: str) -> int | None:
    return storage.version(path)[0] if storage.exists(path) else None


def _draw_refused_thumbnails(plan: ShardPlan, config: IngestConfig, rows: list[LedgerRow]) -> Thumbnails:
    """Return thumbnails of refused scans that are readable, so that users can see the refused images."""
    scans = {planned.key: planned.scan for planned in plan.scans}
    refused = lowest_lots(
        (row.key for row in rows if not is_accepted(row) and row.key in scans), plan.max_refused_thumbnails
    )
    found: Thumbnails = {}
    for key in refused:
        try:
            found[key] = thumbnail(read_volume(scans[key].path, max_mib=config.max_scan_mib, max_frames=1))
        except RefusedScan:
            continue  # its tile in the report shows the reason instead
    return found
