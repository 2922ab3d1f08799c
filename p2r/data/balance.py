"""Corpora -> the shares of a batch by contrast, scanner or field strength.

The ledger of a revision states these properties of each scan. Records with one value form a part (`parts`), and the sample order
deals its lanes to parts by weight, as it does to corpora. A session with several contrasts belongs to the part of each of them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from p2r.config import BalanceConfig, ImageConfig
from p2r.data.drift import UNKNOWN, field_strength_of, scanner_of
from p2r.data.ledger import AcceptedRow, is_accepted, read_ledger
from p2r.data.parts import Balance, Members
from p2r.data.stream import Corpus
from p2r.errors import DataError

_PROPERTIES: dict[str, Callable[[AcceptedRow], str]] = {"scanner": scanner_of, "field_strength": field_strength_of}
_MAX_SHOWN = 8


@dataclass
class _Record:
    """A record of a corpus."""

    shard: int
    """Number of its shard, counted over all corpora."""
    num_samples: int
    values: set[str] = field(default_factory=set)


def read_balance(
    corpora: Sequence[Corpus], config: BalanceConfig, *, image: ImageConfig, contrasts: tuple[str, ...] | None
) -> Balance:
    """Read the values of all records from the ledgers of the corpora, and give each value its weight.

    Args:
        corpora: Corpora of the run.
        config: The job's section.
        image: The network's grid, which determines the samples of a record.
        contrasts: Contrasts that the network reads; scans of others do not count.

    Raises:
        DataError: No scan states the property, all have the same value, or the weights name other values.
    """
    found = []
    num_shards = 0
    for corpus in corpora:
        found.append(_read_records(corpus, config, image, contrasts, first_shard=num_shards))
        num_shards += len(corpus.manifest.shards)
    counts = Counter(value for records in found for record in records.values() for value in record.values)
    weights = _choose_weights(counts, config, where=", ".join(corpus.storage.url for corpus in corpora))
    numbers = {value: number for number, value in enumerate(weights)}
    num_samples, num_records = ([[0] * num_shards for _ in weights] for _ in range(2))
    members = []
    for corpus, records in zip(corpora, found, strict=True):
        parts: dict[str, tuple[int, ...]] = {}
        for key, record in records.items():
            parts[key] = tuple(sorted(numbers[value] for value in record.values & numbers.keys()))
            for number in parts[key]:
                num_samples[number][record.shard] += record.num_samples
                num_records[number][record.shard] += 1
        members.append(Members(len(corpus.manifest.shards), corpus.contrast, parts))
    return Balance(
        by=config.by,
        values=tuple(weights),
        weights=tuple(weights.values()),
        num_samples=tuple(map(tuple, num_samples)),
        num_records=tuple(map(tuple, num_records)),
        members=tuple(members),
    )


def _read_records(
    corpus: Corpus,
    config: BalanceConfig,
    image: ImageConfig,
    contrasts: tuple[str, ...] | None,
    *,
    first_shard: int,
) -> dict[str, _Record]:
    """Return the records of a corpus with the values of the scans that the network reads, by key."""
    shards = {shard.name: number for number, shard in enumerate(corpus.manifest.shards, start=first_shard)}
    records: dict[str, _Record] = {}
    for row in filter(is_accepted, read_ledger(corpus.storage, corpus.manifest)):
        contrast = row.contrast or corpus.contrast
        if contrasts is not None and contrast not in contrasts:
            continue
        if row.shard not in shards:
            raise DataError(
                f"{corpus.storage.url}: the ledger names {row.shard[:80]!r}, which is no shard of this revision; ingest "
                "this corpus again"
            )
        num_samples = row.num_samples if image.dimensions == 2 else row.shape[3] * image.patches_per_volume
        record = records.setdefault(row.record or row.key, _Record(shards[row.shard], num_samples))
        record.values.add((contrast or UNKNOWN) if config.by == "contrast" else _PROPERTIES[config.by](row))
    return records


def _choose_weights(counts: Mapping[str, int], config: BalanceConfig, *, where: str) -> dict[str, float]:
    """Return the weight of each value that is drawn.

    Args:
        counts: Number of records with each value.
        config: The job's section.
        where: Corpora, for messages.
    """
    if not counts.keys() - {UNKNOWN}:
        raise DataError(
            f"pretrain.balance.by is {config.by}, which no scan of {where} states: it comes from the JSON file beside a scan, or from "
            "DICOM, when a corpus is ingested; ingest these scans again with it, or leave out pretrain.balance"
        )
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    shown = ", ".join(f"{value!r} ({counts[value]} records)" for value in ordered[:_MAX_SHOWN])
    shown += f", and {len(ordered) - _MAX_SHOWN} more" if len(ordered) > _MAX_SHOWN else ""
    if config.weights is None:
        if len(ordered) == 1:
            raise DataError(
                f"pretrain.balance.by is {config.by}, and all records of {where} have the same: {shown}; leave out pretrain.balance"
            )
        return dict.fromkeys(sorted(ordered), 1.0)
    if absent := sorted(config.weights.keys() - counts.keys()):
        raise DataError(
            f"pretrain.balance.weights names {', '.join(map(repr, absent))}, which no record of {where} has; {config.by} is {shown}"
        )
    if missing := [value for value in ordered if value not in config.weights]:
        raise DataError(
            f"pretrain.balance.weights lacks {', '.join(map(repr, missing[:_MAX_SHOWN]))}; in {where}, {config.by} is {shown}: give each "
            "a weight; 0 leaves its records out"
        )
    return {value: config.weights[value] for value in sorted(config.weights) if config.weights[value] > 0}
