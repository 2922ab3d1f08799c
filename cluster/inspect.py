"""What lies at a URL, for people: a corpus as a table, an artefact as its manifest, a folder as a list of these."""

import hashlib
from typing import Any

from rich.table import Table
from rich.text import Text

from p2r.console import console, show, show_json, visible
from p2r.data.manifest import FORMAT, Manifest, facts_of, load_manifest, manifest_sha256, ranges_of
from p2r.documents import read_json
from p2r.errors import InputError
from p2r.reference import parse_reference
from p2r.report.text import one_line
from p2r.storage import Storage

_HIDDEN = {"subject_digests", "voxel_digests", "salt"}
_MAX_REVISIONS = 10
_MAX_BYTES = 2**30


def inspect(url: str, *, as_json: bool) -> None:
    """Print what is stored at a URL; with a pin, this very manifest.

    Raises:
        InputError: if that is nothing of p2r's, or another one than is pinned.
    """
    reference = parse_reference(url)
    storage = Storage(reference.url)
    if not storage.exists("manifest.json"):
        _list(storage)
        return
    content = storage.read_bytes("manifest.json")
    reference.check(content)
    manifest = read_json(content, where=storage.at("manifest.json"), max_bytes=_MAX_BYTES)
    if as_json or not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        pin = {"pin": str(reference._replace(url=storage.url, sha256=hashlib.sha256(content).hexdigest()))}
        shown = _without(manifest, _HIDDEN)
        show_json({**shown, **pin} if isinstance(shown, dict) else shown)
        return
    tables = console()
    for table in corpus_tables(storage):
        tables.print(table)


def corpus_tables(storage: Storage) -> list[Table]:
    """Return what is to be said about a corpus: facts, ranges, what became of its inputs, its revisions."""
    manifest = load_manifest(storage)
    facts = Table(title=storage.url, title_justify="left", show_header=False)
    for name, text in facts_of(manifest):
        facts.add_row(name, plain(text))
    ranges = Table("", "axis", "smallest", "median", "largest", title="Accepted scans", title_justify="left")
    for row in ranges_of(manifest):
        ranges.add_row(*row)
    reasons = Table("inputs", "", title="What became of every input", title_justify="left")
    for reason, count in manifest["reasons"].items():
        reasons.add_row(f"{count:,}", plain(reason))
    for name, count in manifest["summary"]["dtypes"].items():
        reasons.add_row(f"{count:,}", plain(f"stored as {name}"))
    revisions = Table("revision", "scans", "shards", "sha256", title="Revisions", title_justify="left")
    for sha256, older in _revisions(storage, manifest):
        revisions.add_row(str(older["revision"]), f"{older['num_records']:,}", f"{len(older['shards']):,}", sha256)
    return [facts, ranges, reasons, revisions]


def _revisions(storage: Storage, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """Return the newest revisions, newest first."""
    found = [(manifest_sha256(manifest), manifest)]
    while (previous := found[-1][1]["previous"]) is not None and len(found) < _MAX_REVISIONS:
        found.append((previous, load_manifest(storage, revision=previous)))
    return found


def plain(text: str) -> Text:
    """Return text of one line that neither rich nor the terminal takes for a command."""
    return Text(visible(text))


def _list(storage: Storage) -> None:
    manifests = [name for name in storage.list() if name.endswith("/manifest.json")]
    if not manifests:
        raise InputError(f"{storage.url} holds nothing of p2r's: no manifest.json at any depth")
    for name in manifests:
        show(f"{_format(storage, name):20} {storage.at(name.removesuffix('/manifest.json'))}")


def _format(storage: Storage, name: str) -> str:
    try:
        manifest = read_json(storage.read_bytes(name), where=name, max_bytes=_MAX_BYTES)
    except InputError:
        return "damaged"
    return one_line(str(manifest.get("format", "?"))[:80]) if isinstance(manifest, dict) else "?"


def _without(value: Any, hidden: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(child, hidden) for key, child in value.items() if key not in hidden}
    if isinstance(value, list):
        return [_without(child, hidden) for child in value]
    return value
