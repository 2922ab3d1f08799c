"""Two reports side by side: paired where that is fair, unpaired with the reason where it is not, never mixed."""

import hashlib
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import cli
from cluster.cli import app
from p2r.config import FinetuneConfig
from p2r.errors import DataError, InputError
from p2r.report.comparison import Comparison, compare_runs
from p2r.report.comparison_page import write_comparison
from p2r.report.comparison_tables import comparison_line, comparison_table, notes_of, reasons_of
from p2r.report.forest import figures_text
from p2r.report.runs import read_runs
from p2r.storage import Storage

MakeRows = Callable[..., list[dict[str, Any]]]


def write(folder: Path, rows: Any, *, finetune: dict[str, Any] | None = None, chosen: Any = None) -> str:
    (folder / "report").mkdir(parents=True)
    context = {"job": folder.name, "backbone": {"url": f"s3://b/{folder.name}"}, "code": "0123", "seed": 0}
    section = FinetuneConfig(tasks=("x",), **(finetune or {})).model_dump(mode="json", exclude={"tasks", "backbone"})
    context |= {"finetune": section, "chosen": chosen or []}
    content = {"format": "p2r-report/1", "rows": rows, "context": context}
    (folder / "report/report.json").write_text(json.dumps(content))
    return str(folder)


def publish(storage: Path, name: str, **manifest: Any) -> tuple[str, str]:
    """Put down the manifest of a backbone, and return its URL and digest."""
    folder = storage / "backbones" / name / "1"
    folder.mkdir(parents=True)
    file = {"sha256": "0" * 64, "num_bytes": 1}
    files = dict.fromkeys(("model.safetensors", "config.json"), file)
    content = json.dumps({"format": "p2r-backbone/1", "files": files, "licence": f"licence of {name}", **manifest})
    (folder / "manifest.json").write_text(content)
    return str(folder), hashlib.sha256(content.encode()).hexdigest()


@pytest.fixture
def two(make_rows: MakeRows, tmp_path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return make_rows(gain=0.1), make_rows(gain=0.2, seed=1)


@pytest.fixture
def p2r(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call a command that is refused, and return its exit code and what it says on stderr."""

    def call(*arguments: str) -> tuple[int, str]:
        return cli.main(arguments), capsys.readouterr().err

    return call


def compared(tmp_path: Path, *rows: Any) -> Comparison:
    return compare_runs(read_runs([write(tmp_path / f"run-{number}", one) for number, one in enumerate(rows)]))


def _lines(comparison: Comparison) -> list[str]:
    return [" | ".join(comparison_line(comparison, cell)) for cell in comparison.cells]


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
        by_draw = [np.mean([b[name] - a[name] for name in a]) for a, b in zip(ours, theirs, strict=True)]
        assert one["draws_agree"] == sum(np.sign(by_draw) == np.sign(naive))
    assert any(f"{one['draws_agree']} of 2" in line for one in found.values() for line in _lines(comparison))
    assert not comparison["unpaired"] and not comparison["not_compared"]


def test_a_run_equals_itself(make_rows: MakeRows, tmp_path: Path) -> None:
    comparison = compared(tmp_path, make_rows(), make_rows())
    assert {(one["difference"], one["p"]) for one in comparison["differences"]} == {(0.0, 1.0)}


@pytest.mark.parametrize("width", [100, 140])
def test_the_table_of_four_runs_shows_every_difference_in_full(make_rows: MakeRows, tmp_path: Path, width: int) -> None:
    comparison = compared(tmp_path, *(make_rows(gain=gain, seed=1) for gain in (0.1, 0.2, 0.15, 0.05)))
    console = Console(width=width, file=StringIO())
    console.print(comparison_table(comparison))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(comparison["differences"]) == 12
    for one in comparison["differences"]:
        assert figures_text(one["difference"], one["lower"], one["upper"]) in shown


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
        "the evaluated patients differ: only A has patient101, only B has stranger"
    )


def test_results_without_a_patient_who_has_a_dice_in_both_are_shown_unpaired(two: Any, tmp_path: Path) -> None:
    for number, rows in enumerate(two):
        for row in rows:
            dice = row["dice_by_subject"]
            for patient in sorted(dice)[number::2] if row["num_labelled"] == 5 else ():
                dice[patient] = None
    comparison = compared(tmp_path, *two)
    assert {one["num_labelled"] for one in comparison["differences"]} == {1}
    assert {(one["num_labelled"], one["reason"]) for one in comparison["unpaired"]} == {
        (5, "no evaluated patient has a Dice in both, in a draw of the same labelled patients")
    }


@pytest.mark.parametrize("changes", [{"protocol": "paper_compat"}, {"split": "validation"}, {"transductive": True}])
def test_protocols_and_splits_are_never_mixed(make_rows: MakeRows, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"these reports have no result in common.*never mixed"):
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


def test_a_report_with_what_is_no_json_is_refused_by_name(make_rows: MakeRows, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json is not JSON: NaN"):
        compared(tmp_path, make_rows(), make_rows(dice_mean=float("nan")))


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
    with pytest.raises(DataError, match=r"nowhere.* has no report"):
        read_runs([url, str(tmp_path / "nowhere")])


def test_the_command_prints_a_table_and_writes_a_page(two: Any, tmp_path: Path) -> None:
    urls = [write(tmp_path / "[red]a", two[0]), write(tmp_path / "b", two[1])]
    done = CliRunner().invoke(app, ["compare", *urls, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "fine-tuned" in done.stdout and "minus A" in done.stdout and "[red]a" in done.stdout
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


def test_settings_that_differ_are_named_with_both_values(two: Any, tmp_path: Path) -> None:
    chosen = [
        [{"task": "acdc", "mode": "scratch", "settings": {"learning_rate": rate, "steps": steps}, "by": "search"}]
        for rate, steps in ((0.001, 12), (0.003, 3))
    ]
    rates = {mode: [0.001, 0.003] for mode in ("scratch", "linear_probe", "fine_tune")}
    others = {"steps": 3, "publish_model": False, "search": {"learning_rates": rates | {"scratch": [0.003, 0.01]}}}
    urls = [
        write(tmp_path / "a", two[0], finetune={"steps": 12, "search": {"learning_rates": rates}}, chosen=chosen[0]),
        write(tmp_path / "b", two[1], finetune=others, chosen=chosen[1]),
    ]
    done = CliRunner().invoke(app, ["compare", *urls, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    asked = (
        "A and B were run with different settings, which may explain a difference in Dice: finetune.steps (A 12, B 3); "
        "finetune.search.learning_rates.scratch (A [0.001, 0.003], B [0.003, 0.01])"
    )
    won = "acdc, from scratch (A learning_rate 0.001, B learning_rate 0.003)"
    page = (tmp_path / "out/comparison.html").read_text()
    for text in (asked, won):
        assert text in done.stdout and text in page
    assert done.stdout.index(asked) < done.stdout.index("Dice, mean")
    assert page.index(asked) < page.index(">Runs</h2>") < page.index("Settings that differ") < page.index(">acdc</h2>")
    written = json.loads((tmp_path / "out/comparison.json").read_text())
    assert written["settings"] == {
        "differ": [
            {"name": "finetune.steps", "values": {"A": 12, "B": 3}},
            {
                "name": "finetune.search.learning_rates.scratch",
                "values": {"A": [0.001, 0.003], "B": [0.003, 0.01]},
            },
        ],
        "chosen": [
            {
                "task": "acdc",
                "mode": "scratch",
                "values": {"A": {"learning_rate": 0.001}, "B": {"learning_rate": 0.003}},
            }
        ],
        "unknown": [],
    }
    assert [run["finetune"]["steps"] for run in written["runs"]] == [12, 3]
    assert [list(run["chosen"]) for run in written["runs"]] == chosen


def test_every_picture_says_which_settings_differ(two: Any, tmp_path: Path) -> None:
    urls = [
        write(tmp_path / f"steps{steps}", rows, finetune={"steps": steps})
        for rows, steps in zip(two, (12, 3), strict=True)
    ]
    write_comparison(Storage(str(tmp_path / "out")), compare_runs(read_runs(urls)))
    for name in ("runs-acdc", "differences-acdc"):
        assert "settings differ: finetune.steps" in drawn(tmp_path / f"out/pictures/{name}.svg")


def test_runs_of_equal_settings_have_no_note(two: Any, tmp_path: Path) -> None:
    comparison = compared(tmp_path, *two)
    assert comparison["settings"] == {"differ": [], "chosen": [], "unknown": []}
    assert not notes_of(comparison)


def test_nsd_of_another_tolerance_is_left_out_with_the_reason(two: Any, tmp_path: Path) -> None:
    urls = [
        write(tmp_path / f"nsd{mm}", rows, finetune={"nsd_tolerance_mm": mm})
        for rows, mm in zip(two, (2.0, 5.0), strict=True)
    ]
    comparison = compare_runs(read_runs(urls))
    assert notes_of(comparison) == [
        "NSD is left out, because it was measured with different tolerances (finetune.nsd_tolerance_mm: A 2.0 mm, B 5.0 mm); "
        "Dice does not depend on them"
    ]


def test_a_report_that_does_not_say_its_settings_is_named(two: Any, tmp_path: Path) -> None:
    urls = [write(tmp_path / name, rows) for name, rows in zip("ab", two, strict=True)]
    path = tmp_path / "a/report/report.json"
    report = json.loads(path.read_text())
    del report["context"]["finetune"]
    path.write_text(json.dumps(report))
    comparison = compare_runs(read_runs(urls))
    assert comparison["settings"]["unknown"] == ["A"]
    assert notes_of(comparison)[0].startswith("the settings of A")


def test_every_picture_says_n_draws_and_seed(make_rows: MakeRows, tmp_path: Path) -> None:
    comparison = compared(tmp_path, make_rows(), make_rows(num_draws=3, backbone_sha256="b7" * 32))
    write_comparison(Storage(str(tmp_path / "out")), comparison)
    for name in ("runs-acdc", "differences-acdc"):
        text = drawn(tmp_path / f"out/pictures/{name}.svg")
        assert "task acdc · leak_free, test patients · n = 1, 5 · seed 0 · code 7c0de · " in text
        assert "A: backbone a9a9a9a9a9a9, 2 draws · B: backbone b7b7b7b7b7b7, 3 draws" in text


def test_the_curve_shows_every_draw_and_a_band_for_every_line(two: Any, tmp_path: Path) -> None:
    comparison = compared(tmp_path, *two)
    shown = {(one["run"], one["mode"], one["num_labelled"]): one for one in comparison["intervals"]}
    for cell in comparison["cells"]:
        for letter in "AB":
            one = shown[letter, cell["mode"], cell["num_labelled"]]
            assert one["lower"] <= cell["dice"][letter] <= one["upper"]
            dice = [row["dice_mean"] for row in comparison["rows"] if row["run"] == letter and same_cell(row, cell)]
            assert len(dice) == 2 and np.mean(dice) == pytest.approx(cell["dice"][letter])
    write_comparison(Storage(str(tmp_path / "out")), comparison)
    svg = (tmp_path / "out/pictures/runs-acdc.svg").read_text()
    assert svg.count("opacity: 0.14") >= 4  # a band for each of two runs in two modes
    dots = set(re.findall(r'x="([\d.]+)" y="([\d.]+)" style="fill: [^"]*opacity: 0.45', svg))
    assert len(dots) == 2 * 2 * 2 * 2  # runs, modes, numbers of patients, draws


def test_a_page_shows_the_beginning_of_a_digest_and_the_json_all_of_it(two: Any, tmp_path: Path) -> None:
    write_comparison(Storage(str(tmp_path / "out")), compared(tmp_path, *two))
    digest = two[0][1]["backbone_sha256"]
    page = (tmp_path / "out/comparison.html").read_text()
    assert digest[:12] in page and digest[:13] not in page
    assert json.loads((tmp_path / "out/comparison.json").read_text())["runs"][0]["backbone_sha256"] == digest


def test_backbones_of_one_storage_are_compared_by_their_own_rows(make_rows: MakeRows, tmp_path: Path) -> None:
    storage = tmp_path / "job"
    (small, digest), (large, other) = publish(storage, "small"), publish(storage, "large")
    scratch = make_rows(modes=("scratch",))
    rows = [
        make_rows(modes=("fine_tune",), gain=gain, backbone_sha256=of) for gain, of in ((0.1, digest), (0.3, other))
    ]
    write(storage, scratch + rows[0] + rows[1])
    done = CliRunner().invoke(app, ["compare", small, large, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [run["backbone"] for run in comparison["runs"]] == [f"file://{small}", f"file://{large}"]
    assert [run["backbone_sha256"] for run in comparison["runs"]] == [digest, other]
    assert [run["licence"] for run in comparison["runs"]] == ["licence of small", "licence of large"]
    found = {one["mode"]: one["difference"] for one in comparison["differences"] if one["num_labelled"] == 1}
    assert found["scratch"] == 0 and found["fine_tune"] == pytest.approx(0.2, abs=0.03)


def test_a_backbone_of_another_report_or_of_none_is_refused_with_the_way_out(
    make_rows: MakeRows, tmp_path: Path, p2r: Callable[..., tuple[int, str]]
) -> None:
    report = write(tmp_path / "run", make_rows())
    other, digest = publish(tmp_path / "run", "other")
    bare, _ = publish(tmp_path / "bare", "bare")
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "manifest.json").write_bytes((tmp_path / "bare/backbones/bare/1/manifest.json").read_bytes())
    model, _ = publish(tmp_path / "models", "model", format="p2r-model/1")
    way_out = "give the storage, or the report.json, of a job that fine-tuned it"
    for url, message in (
        (
            other,
            f"{tmp_path}/run/report/report.json has no row of backbone file://{other} (sha256 {digest[:12]}): its rows are of "
            f"a9a9a9a9a9a9; {way_out}",
        ),
        (
            bare,
            f"its storage has no report, file://{tmp_path}/bare/report/report.json; run its job to the end, or",
        ),
        (str(stray), f"backbone file://{stray} is not in the storage of a job (STORAGE/backbones/NAME/VERSION)"),
        (model, "and is not a published backbone. Give the storage of a finished job"),
    ):
        code, said = p2r("compare", report, url)
        assert code == 2 and message in said, said
    with pytest.raises(DataError, match="has no row of backbone"):
        read_runs([other, report])


def drawn(svg: Path) -> str:
    """Return the words of a picture as one line: they are broken where there is no more room."""
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text()))


def same_cell(row: dict[str, Any], cell: dict[str, Any]) -> bool:
    return all(row[name] == cell[name] for name in ("task", "protocol", "split", "mode", "num_labelled"))
