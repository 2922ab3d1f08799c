"""A backbone trained on test patients is refused, or every result is labelled transductive."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import p2r.__main__ as one_process
from p2r.backbone import load_backbone
from p2r.errors import DataError, JobError
from p2r.evaluate.rows import rows_of
from p2r.fewshot.leaks import Known
from p2r.job import overrides_of, read_job
from p2r.report import label_of, table
from p2r.report.tables import is_transductive
from tests.publishing import publish_toy


def test_every_row_and_title_is_labelled_if_allowed(
    write_toy_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [
        "ingest.subjects_of=null", "pretrain.steps=2", "finetune.num_labelled=[1]", "finetune.steps=2",
        "finetune.modes=[scratch, linear_probe]",
    ]  # fmt: skip
    arguments = [str(write_toy_job(tmp_path)), *(word for override in overrides for word in ("--set", override))]
    monkeypatch.setattr(sys, "argv", ["p2r", *arguments])
    assert one_process.main() == 2
    assert "sub-06 of the validation split" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["p2r", *arguments, "--allow-transductive"])
    assert one_process.main() == 0
    said = capsys.readouterr()
    assert "TRANSDUCTIVE" in said.err
    assert "transductive" in said.out
    report = json.loads((tmp_path / "storage/report/report.json").read_text())
    assert len(report["rows"]) == 2
    assert {(row["transductive"], row["protocol"]) for row in report["rows"]} == {(True, "leak_free")}
    page = (tmp_path / "storage/report/report.md").read_text()
    assert "(transductive: the backbone has seen these patients)" in page.splitlines()[0]
    assert "> **Note.** Transductive: validation or test patients are in the backbone's pretraining corpus" in page
    assert "transductive" in str(table(rows_of(report["rows"])).title)
    best, of_all = (tmp_path / "storage/models/disc").glob("*/README-*.md")
    assert "transductive" in best.read_text() and "transductive" in of_all.read_text()


def test_a_backbone_without_a_list_of_corpora_is_unknown_and_not_clean(
    write_toy_job: Callable[..., Path],
    published: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    silent = Path(shutil.copytree(published["backbone"].removeprefix("file://"), tmp_path / "silent"))
    manifest = json.loads((silent / "manifest.json").read_text())
    assert manifest.pop("corpora")
    (silent / "manifest.json").write_text(json.dumps(manifest))
    overrides = [
        "kind=finetune", f"finetune.backbone={silent}", "finetune.num_labelled=[1]", "finetune.steps=2",
        "finetune.modes=[scratch, fine_tune]",
    ]  # fmt: skip
    arguments = [str(write_toy_job(tmp_path)), *(word for override in overrides for word in ("--set", override))]
    monkeypatch.setattr(sys, "argv", ["p2r", *arguments])
    assert one_process.main() == 2
    assert "does not list the corpora of its pretraining" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["p2r", *arguments, "--allow-transductive"])
    assert one_process.main() == 0
    said = capsys.readouterr()
    assert "patients may be in the backbone's corpus" in said.err and "corpora unknown" in said.out
    report = json.loads((tmp_path / "storage/report/report.json").read_text())
    assert {(row["transductive"], row["corpora"]) for row in report["rows"]} == {(True, "unknown")}
    assert report["context"]["backbone"]["pin"].startswith(f"file://{silent}@sha256:")
    page = (tmp_path / "storage/report/report.md").read_text()
    assert "(corpora unknown: the backbone may have seen these patients)" in page.splitlines()[0]
    assert "> **Note.** Corpora unknown:" in page and "patients are in the backbone's pretraining corpus" not in page
    cards = [card.read_text() for card in (tmp_path / "storage/models/disc").glob("*/README-*.md")]
    assert len(cards) == 2, "the best, and one of all patients; both fine-tuned"
    assert all("may include validation or test patients" in card for card in cards)


def test_a_job_without_fine_tuning_has_nothing_to_allow(repository: Path) -> None:
    with pytest.raises(JobError, match=r"ingest\.yaml has no finetune section.*--allow-transductive"):
        read_job(repository / "jobs/ingest.yaml", overrides_of(None, allow_transductive=True))


def test_rows_without_a_leak_are_not_labelled(published: dict[str, str]) -> None:
    report = json.loads(Path(published["report"].removeprefix("file://")).with_suffix(".json").read_text())
    assert {(row["transductive"], row["protocol"]) for row in report["rows"]} == {(False, "leak_free")}
    rows = rows_of(report["rows"])
    assert not is_transductive(rows) and label_of(rows) == ""
    page = Path(published["report"].removeprefix("file://")).read_text()
    assert "Transductive" not in page and "(transductive" not in page


@pytest.mark.parametrize("corpora", [None, []])
def test_an_empty_list_of_corpora_says_as_little_as_none(corpora: list[str] | None, tmp_path: Path) -> None:
    backbone = load_backbone(publish_toy(str(tmp_path), corpora=corpora)["pin"])
    with pytest.raises(DataError, match="does not list the corpora of its pretraining"):
        Known(backbone, is_allowed=False)
    known = Known(backbone, is_allowed=True)
    assert known.is_any and known.is_unknown
