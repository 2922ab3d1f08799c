"""`p2r inspect`: the contents of a URL. A corpus is shown as a table, an artefact as its manifest, a folder as a list."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from p2r.artefact import Artefact, open_artefact
from p2r.artefact_manifest import BackboneManifest
from p2r.console import console, show, show_json, visible
from p2r.data.drift import Drift, measure_drift
from p2r.data.ledger import AcceptedRow, is_accepted, read_ledger
from p2r.data.manifest import FORMAT, MAX_MANIFEST_BYTES, Manifest, facts_of, load_manifest, ranges_of
from p2r.documents import read_json, way_out
from p2r.errors import InputError
from p2r.modes import facts_of as facts_of_mode
from p2r.pointers import resolve
from p2r.published.collection import read_figures
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage

_HIDDEN = {"subject_digests", "voxel_digests", "salt"}
_MAX_REVISIONS = 10
_MAX_SHIFTS = 30
_DISTANCE = (
    "D: largest difference of the two cumulative distributions, from 0 to 1; changed: larger than in 99 % of comparisons of scans from "
    "one distribution"
)


def inspect(url: str, *, as_json: bool) -> None:
    """Print the contents of a URL; a pin selects the manifest.

    Raises:
        InputError: The URL holds nothing of p2r, or its manifest differs from the pin.
    """
    reference = resolve(parse_reference(url))
    storage = Storage(reference.url)
    if not storage.exists("manifest.json"):
        _list_contents(storage)
        return
    content = storage.read_bytes("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    reference.check(content)
    with way_out("restore the file from a copy; `p2r verify` checks the files beside it"):
        manifest = read_json(content, where=storage.at("manifest.json"), max_bytes=MAX_MANIFEST_BYTES)
    kind = str(manifest.get("format")) if isinstance(manifest, dict) else ""
    if not as_json and kind.startswith(("p2r-backbone/", "p2r-model/")):
        of_artefact = Reference(storage.url, hashlib.sha256(content).hexdigest())
        _print_tables([*artefact_tables(manifest, pin=str(of_artefact)), *_figures_tables(open_artefact(of_artefact))])
        return
    if as_json or kind != FORMAT:
        pin = {"pin": str(Reference(storage.url, hashlib.sha256(content).hexdigest()))}
        shown = _hide_keys(manifest, _HIDDEN)
        show_json({**shown, **pin} if isinstance(shown, dict) else shown)
        return
    _print_tables(corpus_tables(storage))


def inspect_drift(url: str, other: str, *, as_json: bool) -> None:
    """Print the drift from one corpus or revision to another; a pin `URL@sha256:HEX` selects a revision.

    Raises:
        InputError: A URL holds no corpus, or not this revision.
    """
    drift = measure_drift(_accepted_of(url), _accepted_of(other))
    if as_json:
        show_json(asdict(drift))
        return
    _print_tables(drift_tables(drift))


def _accepted_of(url: str) -> list[AcceptedRow]:
    reference = parse_reference(url)
    storage = Storage(reference.url)
    manifest = load_manifest(storage, revision=reference.sha256)
    return [row for row in read_ledger(storage, manifest) if is_accepted(row)]


def drift_tables(drift: Drift) -> list[Table]:
    """Return tables of a drift: numbers of scans, their groups, and the quantities that differ most."""
    what = "new scans" if drift.compares_new else "second"
    facts = [
        ("scans", f"{drift.num_before:,}, then {drift.num_after:,}; {drift.num_shared:,} in both"),
        ("compared", "the first with the new scans of the second" if drift.compares_new else "all scans of both"),
    ]
    groups = Table("scans", "first", what, title="Groups", title_justify="left")
    for name, *counts in drift.groups:
        groups.add_row(plain(name), *(f"{count:,}" for count in counts))
    table = Table("contrast", "quantity", "first", what, "D", "", title="Medians and distances", title_justify="left")
    differing = [shift for shift in drift.shifts if shift.distance]
    left_out = len(drift.shifts) - len(differing[:_MAX_SHIFTS])
    equal = "equal" if len(differing) <= _MAX_SHIFTS else "equal or nearly so"
    table.caption = _DISTANCE + (f"; {left_out} further quantities are {equal}" if left_out else "")
    table.caption_justify = "left"
    for shift in differing[:_MAX_SHIFTS]:
        medians = (f"{shift.before:.4g}", f"{shift.after:.4g}", f"{shift.distance:.2f}")
        table.add_row(
            plain(shift.contrast or "not named"), shift.quantity, *medians, "changed" if shift.is_change else ""
        )
    return [_facts_table("Drift", facts), groups, table]


def _print_tables(tables: list[Table]) -> None:
    shown = console()
    for table in tables:
        shown.print(table)


def artefact_tables(manifest: dict[str, object], *, pin: str) -> list[Table]:
    """Return tables of a backbone's or model's manifest: facts, and the corpora of its pretraining.

    Args:
        manifest: Content of `manifest.json`.
        pin: Reference pinned to this manifest.
    """
    facts = Table(title=pin.partition("@")[0], title_justify="left", show_header=False)
    for name, value in _artefact_facts(manifest, pin):
        facts.add_row(name, plain(value))
    listed = manifest.get("corpora")
    corpora = [corpus for corpus in listed if isinstance(corpus, dict)] if isinstance(listed, list) else []
    if not corpora:
        return [facts]
    named = ("cohort", "num_subjects", "num_samples", "licence", "provenance")
    table = Table(*(name.replace("num_", "") for name in named), title="Pretrained on", title_justify="left")
    for corpus in corpora:
        table.add_row(*(plain(str(corpus.get(name, ""))) for name in named))
    return [facts, table]


def _artefact_facts(manifest: dict[str, object], pin: str) -> Iterator[tuple[str, str]]:
    yield "kind", str(manifest["format"])
    yield "pin", pin
    yield "licence", str(manifest.get("licence", "unknown"))
    for name in ("job", "description", "step", "samples_seen", "task"):
        if manifest.get(name) is not None:
            yield name.replace("_", " "), str(manifest[name])
    pretrain, trial = _section(manifest, "pretrain"), _section(manifest, "trial")
    if pretrain:
        model, image = _section(pretrain, "model"), _section(pretrain, "image")
        yield (
            "network",
            f"{model.get('name')}, channels {model.get('channels')}, {model.get('feature_channels')} features",
        )
        yield "input", f"{image.get('dimensions', 2)}D, {image.get('size')} pixels of {image.get('spacing_mm')} mm"
    if trial:
        facts = facts_of_mode(str(trial.get("mode")))
        yield "mode", facts.title if facts else str(trial.get("mode"))
        yield "labelled patients", str(trial.get("num_labelled"))
        dice = _section(manifest, "validation").get("dice_mean")
        yield "validation Dice", f"{dice:.3f}" if isinstance(dice, float) else "unknown"
    num_bytes = _section(_section(manifest, "files"), "weights").get("num_bytes")
    if isinstance(num_bytes, int):
        yield "weights", f"{num_bytes / 2**20:.1f} MiB"
    yield "published by", f"p2r {manifest.get('p2r_version', '?')}, commit {manifest.get('code', '?')}"


def _figures_tables(artefact: Artefact) -> list[Table]:
    """Return tables of an artefact's lineage, metrics and results; those without content are left out."""
    metrics, results, problems = read_figures(artefact)
    tables = []
    manifest = artefact.manifest
    if isinstance(manifest, BackboneManifest) and (lineage := manifest.lineage) is not None:
        rows = [("parent", f"{one.reference} ({one.format})") for one in lineage.parents]
        rows += [
            ("origin", one) for one in lineage.origins if one not in {parent.reference for parent in lineage.parents}
        ]
        rows += [("checkpoint", f"sha256 {lineage.checkpoint_sha256}"), ("trained by", f"commit {lineage.code or '?'}")]
        tables.append(_facts_table("Lineage", rows))
    if metrics is not None:
        facts = {
            key: value for key, value in metrics.model_dump(exclude={"format", "health"}).items() if value is not None
        }
        named = {**facts, **(metrics.health or {})}
        tables.append(
            _facts_table("Pretraining", [(name.replace("_", " "), f"{one:.4g}") for name, one in named.items()])
        )
    if results:
        table = Table(
            "task", "mode", "labelled", "Dice", "interval", "patients", "split", title_justify="left", title="Results"
        )
        for one in results:
            figures = (
                str(one.num_labelled),
                f"{one.mean:.3f}",
                f"{one.lower:.3f} to {one.upper:.3f}",
                str(one.patients),
            )
            split = one.split + ", transductive" * one.transductive
            table.add_row(*map(plain, (one.task, one.mode, *figures, split)))
        tables.append(table)
    if problems:
        tables.append(_facts_table("Problems", [("damaged", problem) for problem in problems]))
    return tables


def _facts_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(plain(name), plain(value))
    return table


def _section(mapping: dict[str, object], name: str) -> dict[str, object]:
    found = mapping.get(name)
    return found if isinstance(found, dict) else {}


def corpus_tables(storage: Storage) -> list[Table]:
    """Return tables of a corpus: facts, ranges, outcome of its inputs, revisions."""
    manifest = load_manifest(storage)
    facts = Table(title=storage.url, title_justify="left", show_header=False)
    for name, text in facts_of(manifest):
        facts.add_row(name, plain(text))
    ranges = Table("", "axis", "smallest", "median", "largest", title="Accepted scans", title_justify="left")
    for row in ranges_of(manifest):
        ranges.add_row(*row)
    reasons = Table("inputs", "", title="Outcome of every input", title_justify="left")
    for reason, count in manifest.facts.reasons.items():
        reasons.add_row(f"{count:,}", plain(reason))
    for name, count in manifest.facts.summary.dtypes.items():
        reasons.add_row(f"{count:,}", plain(f"stored as {name}"))
    records = "sessions" if manifest.facts.contrasts else "scans"
    revisions = Table("revision", records, "shards", "sha256", title="Revisions", title_justify="left")
    for sha256, older in _newest_revisions(storage, manifest):
        revisions.add_row(str(older.facts.revision), f"{older.facts.num_records:,}", f"{len(older.shards):,}", sha256)
    return [facts, ranges, reasons, revisions]


def _newest_revisions(storage: Storage, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """Return the newest revisions, newest first."""
    found = [(manifest.sha256, manifest)]
    while (previous := found[-1][1].facts.previous) is not None and len(found) < _MAX_REVISIONS:
        found.append((previous, load_manifest(storage, revision=previous)))
    return found


def plain(text: str) -> Text:
    """Return one line of text in which neither rich nor the terminal finds a command."""
    return Text(visible(text))


def _list_contents(storage: Storage) -> None:
    manifests = [name for name in storage.list() if name.endswith("/manifest.json")]
    if not manifests:
        raise InputError(f"{storage.url} holds nothing of p2r: no manifest.json at any depth")
    for name in manifests:
        show(f"{_read_format(storage, name):20} {storage.at(name.removesuffix('/manifest.json'))}")


def _read_format(storage: Storage, name: str) -> str:
    try:
        manifest = storage.read_json(name, max_bytes=MAX_MANIFEST_BYTES)
    except InputError:
        return "damaged"
    return plain(str(manifest.get("format", "?"))[:80]).plain if isinstance(manifest, dict) else "?"


def _hide_keys(value: Any, hidden: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _hide_keys(child, hidden) for key, child in value.items() if key not in hidden}
    if isinstance(value, list):
        return [_hide_keys(child, hidden) for child in value]
    return value
