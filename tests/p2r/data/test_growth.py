"""Growth of a corpus is planned only from names, sizes and times of files."""

import hashlib
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from p2r.config import PERCENTILES, IngestConfig, SessionsConfig
from p2r.data.corpus import corpus_digest
from p2r.data.growth import Growth, plan_growth, preprocessing_of
from p2r.data.ledger import LedgerRow, parse_row
from p2r.data.pseudonyms import Names
from p2r.data.scans import Scan
from p2r.errors import DataError

PLAIN = Names("default")


def config_of(**changes: Any) -> IngestConfig:
    return IngestConfig(**{"sources": ("x",), "licence": "x", **changes})


def scans_of(*names: str, num_bytes: int = 2**20, modified: str = "1") -> list[Scan]:
    return [Scan(f"/data/{name}.nii.gz", name, num_bytes, modified) for name in names]


def keys_of(growth: Growth) -> list[str]:
    return [planned.key for plan in growth.plans for planned in plan.scans]


def row_of(scan: Scan, reason: str = "accepted", **changes: Any) -> LedgerRow:
    (plan,) = plan_growth([scan], config_of(), PLAIN).plans
    row = plan.scans[0].refused_row(reason, "").to_json() | {"voxels_sha256": digest_of(scan.key), **changes}
    if reason == "accepted":
        voxels = {
            "shape": [8, 8, 4, 1],
            "spacing_mm": [1.0] * 3,
            "dtype": "int16",
            "percentiles": list(map(float, PERCENTILES)),
        }
        row |= {"num_samples": 4, "shard": "shard", **voxels}
    status = reason if reason in ("accepted", "not_selected") else "refused"
    return parse_row({**row, "status": status}, where="row")


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_subject_never_straddles_shards_and_every_scan_is_planned_once() -> None:
    names = [f"sub-{number:02d}_run-{run}" for number in range(20) for run in range(3)]
    growth = plan_growth(scans_of(*names), config_of(shard_size_mib=7), PLAIN, first_number=5)
    assert sorted(keys_of(growth)) == sorted(names)
    homes = Counter(subject for plan in growth.plans for subject in {planned.subject for planned in plan.scans})
    assert set(homes.values()) == {1}
    assert [len(plan.scans) for plan in growth.plans] == [9, 9, 9, 9, 9, 9, 6]
    assert [plan.number for plan in growth.plans] == list(range(5, 12))


def test_the_plan_depends_on_the_seed_and_not_on_the_order_of_scans() -> None:
    scans = scans_of(*[f"sub-{number:02d}_T1w" for number in range(20)])
    growth = plan_growth(scans, config_of(shard_size_mib=3), PLAIN)
    assert growth == plan_growth(scans[::-1], config_of(shard_size_mib=3), PLAIN)
    assert growth != plan_growth(scans, config_of(shard_size_mib=3, seed=1), PLAIN)


def test_the_digest_of_a_plan_covers_exactly_the_inputs_of_its_shard() -> None:
    def digests(scans: list[Scan], *, number: int = 0, **changes: Any) -> list[str]:
        config = config_of(shard_size_mib=2, **changes)
        return [plan.digest(config) for plan in plan_growth(scans, config, PLAIN, first_number=number).plans]

    names = ("sub-1_a", "sub-1_b", "sub-2_a")
    expected = digests(scans_of(*names))
    assert digests(scans_of(*names), number=7) == expected
    assert digests(scans_of(*names), max_refused_fraction=1.0, provenance="elsewhere") == expected
    others = [
        digests(scans_of(*names, modified="2")),
        digests(scans_of(*names, num_bytes=2**20 + 1)),
        digests(scans_of(*names), codec="zstd"),
        digests(scans_of(*names), min_size=3),
        digests(scans_of(*names), cohort="other"),
        digests(scans_of(*names), licence="other"),
        digests(scans_of("sub-1_a", "sub-1_c", "sub-2_a")),
    ]
    assert all(set(other).isdisjoint(expected) or other != expected for other in others)
    assert len({tuple(other) for other in [expected, *others]}) == len(others) + 1


def test_unselected_subjects_and_nameless_scans_are_in_the_ledger_only() -> None:
    scans = scans_of("sub-1_a", "sub-2_a", "sub-3_a", "other")
    config = config_of(subject_pattern=r"^(sub-\d)", subjects=("sub-[1-2]",))
    growth = plan_growth(scans, config, PLAIN, allowed_subjects={"sub-2", "sub-3"})
    assert keys_of(growth) == ["sub-2_a"]
    assert {row.key: (row.status, row.reason) for row in growth.rows} == {
        "sub-1_a": ("not_selected", "not_selected"),
        "sub-3_a": ("not_selected", "not_selected"),
        "other": ("refused", "no_subject"),
    }


def test_the_subject_of_the_source_has_precedence_over_the_pattern() -> None:
    scan = Scan("/data/a.nii", "a", 1, subject="somebody")
    (plan,) = plan_growth([scan], config_of(), PLAIN).plans
    assert plan.scans[0].subject == "somebody"


def test_listed_subjects_without_scans_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"sub-3 without any scan"):
        plan_growth(scans_of("sub-1_a", "sub-2_a"), config_of(subjects=("sub-[1-3]",)), PLAIN)


def test_a_selection_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 scans"):
        plan_growth(scans_of("sub-1_a", "sub-2_a"), config_of(), PLAIN, allowed_subjects={"sub-9"})


@pytest.mark.parametrize("pattern", ["(", "sub", "(?=(sub))"])
def test_a_pattern_that_finds_no_subject_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="subject_pattern"):
        config_of(subject_pattern=pattern)


@pytest.mark.parametrize(
    ("reason", "changes", "is_read"),
    [
        ("accepted", {}, False),
        ("accepted", {"modified": "0"}, False),
        ("accepted", {"num_bytes": 3}, False),
        ("truncated", {}, False),
        ("unreadable", {}, True),
        ("too_large", {}, True),
        ("timeout", {}, True),
        ("truncated", {"modified": "0"}, True),
        ("truncated", {"num_bytes": 3}, True),
        ("duplicate", {}, False),
        ("not_selected", {}, True),
    ],
)
def test_only_new_scans_and_changed_refused_scans_are_read(reason: str, changes: dict[str, Any], is_read: bool) -> None:
    (scan,) = scans_of("sub-1_a")
    growth = plan_growth([scan], config_of(), PLAIN, ledger=[row_of(scan, reason, **changes)])
    assert keys_of(growth) == (["sub-1_a"] if is_read else [])
    assert [row.reason for row in growth.rows] == ([] if is_read else [reason])
    assert growth.is_new == is_read
    assert growth.changed == ((scan.path,) if reason == "accepted" and changes else ())


def test_rows_of_deleted_scans_stay() -> None:
    gone, new = scans_of("sub-1_a", "sub-2_a")
    growth = plan_growth([new], config_of(), PLAIN, ledger=[row_of(gone)])
    assert ([row.key for row in growth.rows], keys_of(growth)) == (["sub-1_a"], ["sub-2_a"])


def test_a_second_file_of_the_same_name_gets_another_key() -> None:
    held, new = Scan("/old/sub-1_a.nii", "sub-1_a", 1), Scan("/new/sub-1_a.nii", "sub-1_a", 1)
    growth = plan_growth([new], config_of(), PLAIN, ledger=[row_of(held)])
    (key,) = keys_of(growth)
    assert key.startswith("sub-1_a-") and key != "sub-1_a"
    assert keys_of(plan_growth([new], config_of(), PLAIN, ledger=[row_of(held)])) == [key]


def test_a_plan_lists_the_scans_of_its_subjects_in_the_corpus() -> None:
    first, second, other = scans_of("sub-1_a", "sub-1_b", "sub-2_a")
    (plan,) = plan_growth([second], config_of(), PLAIN, ledger=[row_of(first), row_of(other)]).plans
    assert plan.known == (("sub-1", digest_of("sub-1_a"), "sub-1_a"),)


def test_the_number_of_thumbnails_is_bounded() -> None:
    growth = plan_growth(scans_of(*[f"sub-{number}" for number in range(1000)]), config_of(shard_size_mib=3), PLAIN)
    assert sum(planned.is_shown for plan in growth.plans for planned in plan.scans) == 96
    assert sum(plan.max_refused_thumbnails for plan in growth.plans) == 96 < len(growth.plans)


def test_preprocessing_excludes_keys_that_only_select_or_name() -> None:
    section = config_of(sources=("a", "b"), provenance="p", cohort="c", seed=3, shard_size_mib=1, pseudonyms=True)
    assert preprocessing_of(section) == preprocessing_of(config_of())
    assert preprocessing_of(config_of(record="npy")) != preprocessing_of(config_of())
    assert preprocessing_of(config_of(slice_axis=1)) != preprocessing_of(config_of())


@pytest.mark.parametrize("reference", [None, "t1"])
def test_the_order_of_contrasts_is_part_of_a_corpus(reference: str | None) -> None:
    sections = [
        config_of(
            sessions=SessionsConfig(contrasts=dict.fromkeys(order, "*"), reference=reference, fourth_axis="contrasts")
        )
        for order in (("flair", "t1"), ("t1", "flair"))
    ]
    assert preprocessing_of(sections[0]) != preprocessing_of(sections[1])
    assert corpus_digest(sections[0]) != corpus_digest(sections[1])
