"""Untrusted ledgers, manifests and thumbnails are bounded, and every violation raises p2r's own error."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r import documents
from p2r.data.ledger import ledger_bytes, parse_ledger, read_ledger
from p2r.data.manifest import Manifest, manifest_bytes, parse_manifest
from p2r.data.order import Order, counts_of
from p2r.data.shards import index_name, parse_index
from p2r.data.thumbnails import from_bytes
from p2r.errors import DataError
from p2r.storage import Storage

Corpus = tuple[Storage, Manifest]
HUGE = 2**60


def test_a_ledger_is_unchanged_after_writing_and_reading(small_corpus: Corpus) -> None:
    rows = read_ledger(*small_corpus)
    assert parse_ledger(ledger_bytes(rows), name="ledger") == rows


@pytest.mark.parametrize(
    "field", ["key", "source", "num_bytes", "modified", "subject", "status", "reason", "num_samples", "shard", "shape"]
)
def test_an_accepted_row_that_lacks_a_field_is_refused_by_name(small_corpus: Corpus, field: str) -> None:
    first, *others = [row.to_json() for row in read_ledger(*small_corpus)]
    lacking = {name: value for name, value in first.items() if name != field}
    content = b"".join(json.dumps(row).encode() + b"\n" for row in [*others[:2], lacking])
    with pytest.raises(DataError, match=f"ledger, line 3: {field}: Field required"):
        parse_ledger(content, name="ledger")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": HUGE}, "num_samples: Input should be less than"),
        ({"num_samples": 0}, "num_samples: Input should be greater"),
        ({"num_samples": None}, "num_samples: Input should be a valid integer"),
        ({"num_samples": 2**70}, "is not JSON: .* not a whole number of 64 bits"),
        ({"num_bytes": -1}, "num_bytes"),
        ({"spacing_mm": [1.0, 1e300, 1.0]}, "spacing_mm.1: Input should be less than 10000"),
        ({"spacing_mm": [1.0, 0.0, 1.0]}, "spacing_mm.1: Input should be greater than 0"),
        ({"spacing_mm": [1.0]}, "spacing_mm"),
        ({"percentiles": [1e308] * 17}, "percentiles must never decrease"),
        ({"percentiles": [float(n) for n in range(17, 0, -1)]}, "percentiles must never decrease"),
        ({"shape": [1, 2, HUGE, 1]}, "shape.2"),
        ({"dtype": "|O"}, "dtype"),
        ({"voxels_sha256": "../x"}, "voxels_sha256"),
        ({"status": "perhaps"}, "status"),
        ({"reason": "a\nb"}, "reason"),
        ({"subject": None}, "subject"),
        ({"key": 7}, "key"),
    ],
)  # fmt: skip
def test_a_row_that_breaks_a_rule_is_refused_by_name(
    small_corpus: Corpus, change: dict[str, Any], message: str
) -> None:
    row = {**read_ledger(*small_corpus)[0].to_json(), **change}
    with pytest.raises(DataError, match=f"ledger, line 1:? ?.*{message}"):
        parse_ledger(json.dumps(row).encode(), name="ledger")


@pytest.mark.parametrize("field", ["num_samples", "num_records", "num_volumes", "num_bytes"])
def test_counts_that_arrays_cannot_add_up_are_refused(small_corpus: Corpus, field: str) -> None:
    manifest = small_corpus[1]
    shards = [{**shard, field: HUGE} for shard in manifest["shards"]]
    hostile = {**manifest, "shards": shards, field: HUGE * len(shards)}
    with pytest.raises(DataError, match=f"{field}"):
        parse_manifest(manifest_bytes(hostile), name="manifest.json")


def test_a_large_manifest_is_read_like_a_small_one_and_gives_the_same_order(
    small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = small_corpus[0].read_bytes("manifest.json")
    before = parse_manifest(content, name="manifest.json")
    monkeypatch.setattr(documents, "_MANY_BYTES", 0)
    after = parse_manifest(content, name="manifest.json")
    assert after == before == json.loads(content)
    orders = [Order([counts_of(one)], seed=3, global_batch=8) for one in (before, after)]
    assert orders[0].samples(5).positions.tolist() == orders[1].samples(5).positions.tolist()


PIECES = [b"null", b"[", b"]", b"{", b"}", b"-1", b"9" * 30, b"1e999", b"1e300", b'"x"', b"\xff", b"NaN", b'"key": "k", ', b"\n",
          b"\\u0000", b"\\ud800", b"true", b" :", b'\\":', b"0.0", str(HUGE).encode()]  # fmt: skip


@settings(max_examples=250, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_every_damaged_document_of_a_corpus_raises_a_data_error(data: st.DataObject, small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    shard = manifest["shards"][0]
    readers = {
        "manifest.json": lambda content: parse_manifest(content, name="manifest.json"),
        "ledger.jsonl": lambda content: parse_ledger(content, name="ledger"),
        index_name(shard["name"]): lambda content: parse_index(content, name="index", num_bytes=shard["num_bytes"]),
        f"thumbnails/{manifest['thumbnails_sha256']}.jsonl": from_bytes,
    }
    name = data.draw(st.sampled_from(sorted(readers)))
    content = bytearray(storage.read_bytes(name)[:6000])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 6))] = data.draw(st.sampled_from(PIECES))
    try:
        readers[name](bytes(content))
    except DataError as error:
        assert str(error)


@settings(max_examples=250, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_the_reader_of_large_documents_agrees_with_the_other_or_defers_to_it(data: st.DataObject) -> None:
    content = bytearray(
        b'{"a": [1, -2.5e3, {"b": null, "c": "x: y"}], "d\\u00e9": {"a": 9223372036854775807, "": true}, "e\\\\": []}'
    )
    pieces = [*PIECES, b'"a": 1, ', b'"": 2, ', b'"a" : 3, ', b'{"a": {"a": 1, "a": 1}}', b'": "', b'\\"']
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(pieces))
    try:
        found = documents._parse_fast(bytes(content), 4)
    except documents._Unsure:
        return
    assert found == documents.read_json(bytes(content), where="d", max_bytes=10_000, max_depth=4)
