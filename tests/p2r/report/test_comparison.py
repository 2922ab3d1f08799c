"""Two reports side by side: paired where that is fair, unpaired with the reason where it is not, never mixed."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from p2r.errors import DataError
from p2r.report.comparison import compare_runs, comparison_table, read_runs, reasons_of, write_comparison
from p2r.storage import Storage

MakeRows = Callable[..., list[dict[str, Any]]]


def write(folder: Path, rows: Any, **report: Any) -> str:
    (folder / "report").mkdir(parents=True)
    context = {"job": folder.name, "backbone": {"url": f"s3://b/{folder.name}"}, "code": "0123", "seed": 0}
    content = {"format": "p2r-report/1", "rows": rows, "context": context, **report}
    (folder / "report/report.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def two(make_rows: MakeRows, tmp_path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return make_rows(gain=0.1), make_rows(gain=0.2, seed=1)


def compared(tmp_path: Path, *rows: Any) -> dict[str, Any]:
    return compare_runs(read_runs([write(tmp_path / f"run-{number}", one) for number, one in enumerate(rows)]))


def test_the_difference_is_that_of_each_patient(two: Any, tmp_path: Path) -> None:
    comparison = compared(tmp_path, *two)
    found = {(one["mode"], one["num_labelled"]): one for one in comparison["differences"]}
    assert set(found) == {(mode, number) for mode in ("scratch", "fine_tune") for number in (1, 5)}
    for (mode, number), one in found.items():
        ours, theirs = (
            [row["dice_by_subject"] for row in rows if (row["mode"], row["num_labelled"]) == (mode, number)]
            for rows in two
        )
        naive = np.mean([b[name] - a[name] for a, b in zip(ours, theirs, strict=True) for name in a])
        assert one["difference"] == pytest.approx(naive)
        assert one["lower"] <= naive <= one["upper"]
        assert (one["run"], one["against"], one["patients"], one["draws"]) == ("B", "A", 6, 2)
    assert not comparison["unpaired"] and not comparison["not_compared"]


def test_a_run_equals_itself(make_rows: MakeRows, tmp_path: Path) -> None:
    comparison = compared(tmp_path, make_rows(), make_rows())
    assert {(one["difference"], one["p"]) for one in comparison["differences"]} == {(0.0, 1.0)}


def test_other_labelled_patients_are_shown_unpaired_with_the_reason(two: Any, tmp_path: Path) -> None:
    for row in two[1]:
        if row["num_labelled"] == 5:
            row["subjects"] = [f"other{index}" for index in range(5)]
    comparison = compared(tmp_path, *two)
    assert {one["num_labelled"] for one in comparison["differences"]} == {1}
    assert {one["num_labelled"] for one in comparison["unpaired"]} == {5}
    assert (
        "draw 0 is patient0500" in comparison["unpaired"][0]["reason"]
        and "other0" in comparison["unpaired"][0]["reason"]
    )
    assert len(comparison["cells"]) == 4
    console = Console(width=160, file=StringIO())
    console.print(comparison_table(comparison))
    assert console.file.getvalue().count("unpaired") == 2  # type: ignore[attr-defined]
    assert len(reasons_of(comparison)) == 1


def test_other_test_patients_are_shown_unpaired_by_name(two: Any, tmp_path: Path) -> None:
    for row in two[1]:
        row["dice_by_subject"]["stranger"] = row["dice_by_subject"].pop("patient101")
    comparison = compared(tmp_path, *two)
    assert not comparison["differences"]
    assert comparison["unpaired"][0]["reason"] == (
        "the patients read differ: only A has patient101, only B has stranger"
    )


@pytest.mark.parametrize("changes", [{"protocol": "paper_compat"}, {"split": "validation"}, {"transductive": True}])
def test_protocols_and_splits_are_never_mixed(make_rows: MakeRows, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"nothing that all of these reports were asked alike.*never mixed"):
        compared(tmp_path, make_rows(), make_rows(**changes))
    both = make_rows() + make_rows(**changes)
    comparison = compared(tmp_path / "again", make_rows(), both)
    assert {(cell["protocol"], cell["split"]) for cell in comparison["cells"]} == {("leak_free", "test")}
    assert "never mixed" in comparison["not_compared"][0]


def test_an_earlier_spelling_of_the_protocol_is_the_same_protocol(make_rows: MakeRows, tmp_path: Path) -> None:
    assert compared(tmp_path, make_rows(), make_rows(protocol="leak-free"))["differences"]


def test_what_only_one_has_is_named(make_rows: MakeRows, tmp_path: Path) -> None:
    comparison = compared(tmp_path, make_rows(), make_rows(numbers=(1,)) + make_rows(task="brain"))
    assert {cell["num_labelled"] for cell in comparison["cells"]} == {1}
    assert "task brain: only in B" in comparison["not_compared"]
    assert "acdc (leak_free, test), n = 5, from scratch: only in A" in comparison["not_compared"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dice_mean": 1.5}, "row 0: dice_mean: .*less than or equal to 1"),
        ({"dice_mean": float("nan")}, "row 0: dice_mean: .*finite|row 0: dice_mean: .*greater"),
        ({"num_labelled": "1"}, "row 0: num_labelled: .*integer"),
        ({"subjects": "patient001"}, "row 0: subjects: .*list"),
        ({"dice_by_subject": None}, "row 0: dice_by_subject: .*dict"),
        ({"draw": 1}, "rows 0 and 2 are of one trial"),
        ({"backbone": "other"}, "several backbones"),
    ],
)
def test_a_report_that_breaks_its_rules_is_refused_by_name(
    make_rows: MakeRows, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = make_rows()
    broken[0].update(change)
    with pytest.raises(DataError, match=message):
        compared(tmp_path, make_rows(), broken)


@pytest.mark.parametrize(
    "content", ["{}", '{"format": "p2r-corpus/2"}', "[1]", '{"format": "p2r-report/1", "rows": []}']
)
def test_what_is_no_report_is_refused(make_rows: MakeRows, tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"x\.json"):
        read_runs([write(tmp_path / "a", make_rows()), str(path)])


def test_reports_must_be_two_and_different(make_rows: MakeRows, tmp_path: Path) -> None:
    url = write(tmp_path / "a", make_rows())
    with pytest.raises(DataError, match="2 to 8"):
        read_runs([url])
    with pytest.raises(DataError, match="given twice"):
        read_runs([url, f"{url}/report/report.json"])
    with pytest.raises(DataError, match=r"no report at .*nowhere"):
        read_runs([url, str(tmp_path / "nowhere")])


def test_the_command_prints_a_table_and_writes_a_page(two: Any, tmp_path: Path) -> None:
    urls = [write(tmp_path / "[red]a", two[0]), write(tmp_path / "b", two[1])]
    done = CliRunner().invoke(app, ["compare", *urls, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "fine-tuned" in done.stdout and "B - A" in done.stdout and "[red]a" in done.stdout
    assert f"page: file://{tmp_path}/out/comparison.html" in done.stdout
    report = json.loads((tmp_path / "out/comparison.json").read_text())
    assert report["pictures"] == ["pictures/runs-acdc.png", "pictures/differences-acdc.png"]
    for name in report["pictures"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "A and B side by side" in (tmp_path / "out/comparison.html").read_text()


def test_equal_reports_give_equal_pages(two: Any, tmp_path: Path) -> None:
    comparison = compared(tmp_path, *two)
    for name in ("one", "two"):
        write_comparison(Storage(str(tmp_path / name)), comparison)
    assert (tmp_path / "one/comparison.html").read_bytes() == (tmp_path / "two/comparison.html").read_bytes()
