"""A report of a job shows cases as their trials left them, and is made without those that cannot be read."""

import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from p2r.engine.reporting import _UNREADABLE, _prediction
from p2r.engine.scoring import npz_bytes
from p2r.storage import Storage


def test_the_report_of_a_job_shows_its_best_and_worst_case(published: dict[str, str]) -> None:
    storage = Storage(published["storage"]).child("report")
    report = storage.read_json("report.json")
    row = next(row for row in report["rows"] if (row["mode"], row["num_labelled"]) == ("scratch", 1))
    for rank in ("best", "worst"):
        assert f"pictures/case-{rank}-disc.png" in report["pictures"]
        picture = ET.fromstring(storage.read_bytes(f"pictures/case-{rank}-disc.svg"))
        text = " ".join(" ".join(picture.itertext()).split())
        assert "1 labelled" in text and "task disc" in text and "leak_free" in text
        assert any(subject in text for subject in row["dice_by_subject"])
    assert "left_out" not in report["context"]
    assert report["statistics"]["intervals"]
    page = storage.read_bytes("report.html").decode()
    for part in ("At a glance", "Single patients", "No trial failed.", "Readings of the test split", "What it cost"):
        assert part in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "No data left|EOF"),
        (b"PK\x03\x04 damaged", "not a zip|pickled"),
        (npz_bytes({"other": np.zeros((4, 4, 2, 1), np.uint8)}), "no prediction of scan"),
        (npz_bytes({"scan": np.zeros((4, 4, 3, 1), np.uint8)}), r"the grid \(4, 4, 3, 1\), its scan \(4, 4, 2, 1\)"),
    ],
)
def test_a_prediction_that_cannot_be_read_is_left_out_by_name(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    setup: Any = SimpleNamespace(storage=str(tmp_path))
    scan: Any = SimpleNamespace(labels=SimpleNamespace(data=np.zeros((4, 4, 2, 1), np.int16)))
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(_UNREADABLE, match=message):
        _prediction({"predictions": "a.npz"}, "scan", setup, scan)
