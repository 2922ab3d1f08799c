"""Groups of a corpus's scans, and the drift from one revision to the next."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy.stats import ks_2samp

from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.drift import group_scans, measure_drift
from p2r.data.ledger import AcceptedRow, is_accepted, read_ledger
from p2r.report import write_corpus_report
from p2r.storage import Storage


def write(folder: Path, numbers: range, *, bright: float, maker: str | None, strength: float = 1.5) -> None:
    for number in numbers:
        rng = np.random.default_rng(number)
        voxels = rng.normal(bright, bright / 10, (16, 18, 3)) * rng.uniform(0.8, 1.2)
        path = folder / f"sub-{number:02d}_T1w.nii"
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 4.0, 1.0])), path)
        if maker:
            tags = {"Manufacturer": maker, "MagneticFieldStrength": strength, "PatientName": "nobody"}
            path.with_suffix(".json").write_text(json.dumps(tags))


def rows_of(storage: Storage) -> list[AcceptedRow]:
    return [row for row in read_ledger(storage, load_manifest(storage)) if is_accepted(row)]


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, list[list[AcceptedRow]]]:
    """A corpus of 15 scans, grown by 15 of the same kind, and by 15 brighter ones from another scanner."""
    folder = tmp_path_factory.mktemp("drift")
    scans, storage = folder / "scans", Storage(str(folder / "corpus"))
    scans.mkdir()
    found = []
    for first, kind in enumerate([(300, "Siemens"), (300, "Siemens"), (900, "GE")]):
        write(scans, range(15 * first, 15 * first + 15), bright=kind[0], maker=kind[1], strength=1.5 * (first // 2 + 1))
        list(ingest_locally(IngestConfig(sources=(str(scans),), licence="CC0-1.0"), storage))
        found.append(rows_of(storage))
    return storage, found


def test_new_scans_of_the_same_kind_do_not_drift_and_those_of_another_scanner_do(
    revisions: tuple[Storage, list[list[AcceptedRow]]],
) -> None:
    _, (first, second, third) = revisions
    same, other = measure_drift(first, second), measure_drift(second, third)
    assert (same.num_before, same.num_after, same.num_shared, same.compares_new) == (15, 30, 15, True)
    assert not any(shift.is_change for shift in same.shifts)
    changed = {shift.quantity: shift for shift in other.shifts if shift.is_change}
    assert set(changed) == {"intensity, median", "intensity, 99.5 %"}
    assert changed["intensity, median"].distance == 1 and changed["intensity, median"].after > 700
    assert {name: counts for name, *counts in other.groups} == {
        "contrast not stated": [30, 15],
        "scanner GE": [0, 15],
        "scanner Siemens": [30, 0],
        "field strength 1.5 T": [30, 0],
        "field strength 3 T": [0, 15],
    }


def test_distances_are_those_of_kolmogorov_and_smirnov(revisions: tuple[Storage, list[list[AcceptedRow]]]) -> None:
    _, (first, second, _) = revisions
    new = second[15:] if second[:15] == first else [row for row in second if row not in first]
    drift = measure_drift(first, second)
    (shift,) = [one for one in drift.shifts if one.quantity == "intensity, median"]
    medians = [[row.percentiles[8] for row in rows] for rows in (first, new)]
    assert shift.distance == pytest.approx(ks_2samp(*medians).statistic)
    assert (shift.before, shift.after) == tuple(np.median(one) for one in medians)


def test_corpora_that_share_only_some_scans_are_compared_whole(
    revisions: tuple[Storage, list[list[AcceptedRow]]],
) -> None:
    _, (first, _, third) = revisions
    drift = measure_drift(first, third[10:])
    assert not drift.compares_new and drift.num_shared == 5 and drift.num_after == 35


def test_the_report_lists_scans_by_scanner(revisions: tuple[Storage, list[list[AcceptedRow]]]) -> None:
    storage, (_, _, third) = revisions
    assert [(one.scanner, one.field_strength, one.num_scans) for one in group_scans(third)] == [
        ("Siemens", "1.5 T", 30),
        ("GE", "3 T", 15),
    ]
    write_corpus_report(storage)
    page = storage.read_bytes("report/report.md").decode()
    assert "| not named | Siemens | 1.5 T | 30 | 30 | 1 x 1 x 4 | 16 x 18 x 3 |" in page and "nobody" not in page


def test_a_scanner_typed_by_hand_is_not_in_a_ledger_with_pseudonyms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "ab" * 32)
    write(tmp_path, range(2), bright=300, maker="Dr Example's scanner", strength=7.0)
    storage = Storage(str(tmp_path / "corpus"))
    config: dict[str, Any] = {"sources": (str(tmp_path),), "licence": "CC0-1.0", "pseudonyms": True}
    list(ingest_locally(IngestConfig(**config), storage))
    (one,) = group_scans(rows_of(storage))
    assert (one.scanner, one.field_strength) == ("not stated", "7 T")
