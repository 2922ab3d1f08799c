"""`publish.exports`: a published backbone -> folders for other tools in the job's storage.

<storage>/exports/NAME-VERSION/FORMAT/    the files of `p2r export`, and export.json, which is written last

VERSION is that of the backbone: for a checkpoint, `1-step-2`.
"""

import tempfile
from pathlib import Path

from p2r.artefact import MANIFEST, Manifest, Published
from p2r.config import PublishConfig
from p2r.export import export
from p2r.exports import ExportName
from p2r.logs import Say
from p2r.published.promotion import split_version
from p2r.recent import read_bounded
from p2r.signature import SIGNATURE, SIGNATURE_BYTES
from p2r.storage import Storage

_RECORD = "export.json"
_MAX_RECORD_BYTES = 2**20


def write_exports(config: PublishConfig, storage: Storage, published: Published[Manifest], say: Say) -> list[str]:
    """Write the formats of `publish.exports` unless they are there already, and return their URLs.

    Args:
        config: Section publish.
        storage: The job's storage.
        published: Manifest of the published backbone.
        say: Receives a line for each format.

    Raises:
        InputError: A format cannot hold the backbone, or its package is missing.
    """
    urls = []
    version_storage = Storage(published.url)
    for to, where in _folders(config, storage, version_storage).items():
        urls.append(where.url)
        if _is_exported(where, published.pin):
            _copy_signature(version_storage, where)
            say(f"publish | {to} | {where.url} | was exported already")
            continue
        with tempfile.TemporaryDirectory(prefix="p2r-export-") as name:
            folder = Path(name, to)
            lines = export(published.pin, to=to, folder=folder)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            where.delete(_RECORD)  # until all files are of this backbone
            where.delete(SIGNATURE)  # of an earlier backbone
            for path in paths:
                where.upload(path, path.relative_to(folder).as_posix())
            checks = [line.removeprefix("checked: ") for line in lines if line.startswith("checked: ")]
            where.write_json(_RECORD, {"pin": published.pin, "format": to, "checks": checks})
        say(f"publish | {to} | {where.url} | {len(paths)} files | {'; '.join(checks)}")
    return urls


def sign_exports(config: PublishConfig, storage: Storage, published: Published[Manifest]) -> None:
    """Copy the signature of a backbone into each of its exports with a manifest: it is made after them."""
    version_storage = Storage(published.url)
    for where in _folders(config, storage, version_storage).values():
        _copy_signature(version_storage, where)


def _folders(config: PublishConfig, storage: Storage, version_storage: Storage) -> dict[ExportName, Storage]:
    _, version = split_version(version_storage)
    return {to: storage.child(f"exports/{config.name}-{version}/{to}") for to in config.exports}


def _copy_signature(version_storage: Storage, where: Storage) -> None:
    signature = read_bounded(version_storage, SIGNATURE, SIGNATURE_BYTES)
    if signature is not None and where.exists(MANIFEST):
        where.write_bytes(SIGNATURE, signature)


def _is_exported(where: Storage, pin: str) -> bool:
    if not where.exists(_RECORD):
        return False
    record = where.read_json(_RECORD, max_bytes=_MAX_RECORD_BYTES)
    return isinstance(record, dict) and record.get("pin") == pin
