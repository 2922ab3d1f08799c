"""The page shows what the rows and their statistics say, leaves out what they do not, and is not broken by any name."""

import json
import re
import xml.etree.ElementTree as ET
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from p2r.evaluate.rows import rows_of
from p2r.evaluate.statistics import few_shot_statistics
from p2r.modes import MODES
from p2r.report import source_line, table, trials_line, write_report
from p2r.report.cases import shown_cases
from p2r.report.context import context_of
from p2r.report.patients import MEAN, patients_of
from p2r.report.tables import series_name
from p2r.storage import Storage

MakeRows = Callable[..., list[dict[str, Any]]]
HOSTILE = '"><script>alert(1)</script><img src=http://evil/x onerror=alert(2)>|$\\frac{\n`x`](javascript:alert(3))\x00'
TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body", "main", "nav", "ul", "li", "a", "h1", "h2", "h3", "p"),
    *(
        "dl",
        "div",
        "dt",
        "dd",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "b",
        "figure",
        "picture",
        "source",
    ),
    *("img", "figcaption", "details", "summary"),
}
FACTS = {
    "searched": [{"task": "acdc", "mode": "fine_tune", "learning_rate": 1e-3, "validation_dice_mean": 0.61}],
    "chosen": {"acdc": {"fine_tune": {"learning_rate": 1e-3}}},
    "failed": [{"trial": "acdc-final-fine_tune-n1-d3", "error": "the loss is nan at step 31"}],
    "overhead": {
        "num_trials": 8,
        "num_concurrent": 1,
        "sweep_s": 90.5,
        "trials_s": 80.0,
        "overhead_fraction": 0.0003565,
    },
    "test_reads": [{"time": "2026-01-02T03:04:05Z", "trial": "acdc-final-fine_tune-n1-d0", "num_scans": 6}],
}


class Page(HTMLParser):
    """What of a page is markup: tags, and what would be loaded or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path, rows: list[dict[str, Any]], **context: Any) -> tuple[Page, str]:
    write_report(
        Storage(str(folder)),
        rows=rows_of(rows),
        context=context_of({"code": "0123abcd", **context}),
        pictures={},
        statistics=few_shot_statistics(rows_of(rows), seed=0, num_resamples=50),
    )
    return Page((folder / "report.html").read_text()), (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def standard(make_rows: MakeRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standard")
    written(folder, make_rows(), **FACTS)
    return folder


def test_the_page_shows_every_part(standard: Path) -> None:
    page, text = Page((standard / "report.html").read_text()), (standard / "report.md").read_text()
    for part in ("At a glance", "Setup", "Against scratch", "Label efficiency", "Failure analysis"):
        assert part in page.text and part in text
    for part in ("1 trial failed", "nan at step 31", "test split was evaluated once", "Search winners", "Cost"):
        assert part in page.text and part in text
    for word in ("HD95: ", "NSD: ", "A draw is", "fine-tuned: all weights", "Leak-free: "):
        assert word in text and text.index(word) < text.index("| labelled patients | mode |"), (
            "explained before its use"
        )
    assert {path.stem for path in (standard / "pictures").glob("*.svg")} == {
        f"{kind}-acdc" for kind in ("few-shot", "classes", "differences", "thirds", "strata", "reliability")
    }
    assert page.tags.count("img") == 6
    assert set(page.tags) <= TAGS


def test_every_picture_says_where_its_figures_come_from(standard: Path) -> None:
    for path in (standard / "pictures").glob("*.svg"):
        text = " ".join(" ".join(ET.parse(path).getroot().itertext()).split())
        for fact in ("a9a9a9a9a9a9", "task acdc", "leak_free", "n = 1, 5", "2 draws", "seed 0", "code 7c0de"):
            assert fact in text, (path.name, fact)


def test_every_picture_of_a_job_says_what_it_shows_and_nothing_that_it_does_not(published: dict[str, str]) -> None:
    storage = Storage(published["storage"]).child("report")
    report = storage.read_json("report.json")
    backbone = report["context"]["backbone"]
    code = report["rows"][0]["code"]
    model = Storage(published["model"]).read_json("manifest.json")["trial"]
    of_backbone = (f"backbone {backbone['sha256'][:12]}", "pretrained on corpus", f"by code {backbone['code']}")
    of_rows = (
        f"backbone {backbone['sha256'][:12]}",
        "task disc",
        "leak_free, test",
        "n = 1, 3",
        "1 draw",
        f"code {code}",
    )
    facts = {
        "view-pairs": of_backbone,
        "embedding": (*of_backbone, "task disc", "validation patient"),
        "outlines": (
            series_name((model["mode"], "")),
            "task disc",
            "leak_free, validation patient",
            f"n = {model['num_labelled']}, draw {model['draw']}",
            f"code {code}",
        ),
        "case": ("from scratch;", "task disc", "leak_free, test patient", "n = 1, draw 0", f"code {code}"),
    }
    kinds = set()
    for path in report["pictures"]:
        kind = next((kind for kind in facts if Path(path).name.startswith(kind)), "rows")
        kinds.add(kind)
        text = " ".join(" ".join(ET.fromstring(storage.read_bytes(path.replace(".png", ".svg"))).itertext()).split())
        for fact in facts.get(kind, of_rows):
            assert fact in text, (path, fact, text)
        assert ("1 draw" in text) == (kind == "rows"), (path, text)
        if kind in ("outlines", "case"):  # of single trials: those from scratch have no backbone
            assert "pretrained" not in text and ("of backbone" in text) == (
                kind == "case" or model["mode"] != "scratch"
            )
    assert kinds == {"rows", *facts}


def test_a_picture_of_trials_names_each_and_no_backbone_from_scratch(make_rows: MakeRows) -> None:
    rows = make_rows(numbers=(5,), num_draws=1)
    assert trials_line(rows_of(rows), None, patient="test patient patient101") == (
        "from scratch; fine-tuned of backbone a9a9a9a9a9a9 · task acdc · leak_free, test patient patient101 · n = 5, draw 0 · "
        "seed 0 · code 7c0de"
    )
    assert source_line(rows_of(make_rows(modes=("scratch",))), None).startswith("from scratch · task acdc")


def test_figures_have_words_units_and_a_minus(make_rows: MakeRows, tmp_path: Path) -> None:
    page, text = written(tmp_path, make_rows(gain=-0.1), corpus={"num_samples": 880}, **FACTS)
    for fact in (
        "| trials run | 8 |",
        "| sweep, wall-clock time | 1.5 min |",
        "| overhead | 0.036 % |",
        "| task | mode | learning rate | validation Dice |",
        "| acdc | fine-tuned | 0.001 | 0.61 |",
        "| corpus.samples | 880 |",
        "| difference, 95 % interval |",
    ):
        assert fact in text, fact
    assert not re.search(r"num_|_s\b|_fraction|`", page.text)
    differences = " ".join("".join(ET.parse(tmp_path / "pictures/differences-acdc.svg").getroot().itertext()).split())
    assert "line: 95 % interval" in differences
    assert "\N{MINUS SIGN}0.1" in page.text
    assert not re.search(r"(?<![\w.-])-[0-9]", page.text), "a hyphen is no minus"
    assert json.loads((tmp_path / "report.json").read_text())["context"]["overhead"] == FACTS["overhead"]


def test_rows_of_earlier_reports_are_shown_without_what_they_lack(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows:
        for key in (
            "cases",
            "code",
            "seconds",
            "device",
            "dice_by_subject",
            "seed",
            "transductive",
            "validation_dice_mean",
            "calibration",
        ):
            del row[key]
        row["protocol"] = "leak-free"
    report = write_report(
        Storage(str(tmp_path)), rows=rows_of(rows), context=context_of({"code": "0123abcd"}), pictures={}
    )
    assert report["pictures"] == ["pictures/few-shot-acdc.png"]
    assert "code of the trials | 0123abcd" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "Failure analysis" not in page and "Calibration" not in page


def test_the_page_and_the_table_say_how_far_confidence_can_be_trusted(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[:2]:
        del row["calibration"]  # of an earlier version
    page, text = written(tmp_path, rows)
    assert "Calibration" in page.text
    (line,) = [line for line in text.splitlines() if line.startswith("| 5 | fine-tuned | 0.2")]
    level = 0.5 + 0.05 * np.log(5) + 0.1
    assert line == f"| 5 | fine-tuned | {0.6 - level / 2:.3f} ± 0.000 | 0.300 ± 0.000 | 0.010 | 0.020 |"
    drawn = " ".join(ET.parse(tmp_path / "pictures/reliability-acdc.svg").getroot().itertext())
    for words in ("confidence and accuracy", "1 labelled patient", "5 labelled patients", "dashed: calibrated"):
        assert words in drawn
    for row in rows:
        row.pop("calibration", None)
    _, text = written(tmp_path / "without", rows)
    assert "Calibration" not in text, "rows without calibration have no such section"


def test_the_terminal_table_has_a_line_for_each_cell_within_80_columns(make_rows: MakeRows) -> None:
    rows = rows_of(make_rows(num_draws=3, gain=0.2, numbers=(1, 5)))
    printed = Console(width=80, file=StringIO())
    printed.print(table(rows))
    lines = printed.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("acdc, test patients") and all(len(line) <= 80 for line in lines)
    cells = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [(cell[0], cell[1]) for cell in cells].count(("1", "fine-tuned")) == 1
    assert all(cell.count("±") == 1 for cell in cells) and len(cells) == len(
        {(row.num_labelled, row.mode) for row in rows}
    )


def test_the_card_of_what_a_patient_is_worth_states_its_interval(make_rows: MakeRows, tmp_path: Path) -> None:
    page, _ = written(tmp_path / "more", make_rows(num_draws=3, gain=0.3))
    assert "labelled patients from scratch, for the same Dice; 95 % above 5" in page.text
    page, _ = written(tmp_path / "between", make_rows(num_draws=3, gain=0.04))
    worth = re.search(r"labelled patients from scratch, for the same Dice; 95 % (\S+ ?\S*) to ", page.text)
    assert worth is not None and worth[1] in {"below 1"} | {f"{number / 10}" for number in range(10, 50)}


def test_the_table_of_differences_says_how_many_draws_agree(make_rows: MakeRows, tmp_path: Path) -> None:
    _, text = written(tmp_path, make_rows(num_draws=3, gain=0.2, numbers=(1,)))
    assert "| draws of its sign |" in text and "| 3 of 3 |" in text


def test_the_page_shows_pseudo_labels_over_the_training_of_every_trial(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(modes=("scratch", "prototype_self_training"), numbers=(1,), num_draws=2, num_patients=3)
    for row in rows:
        if row["mode"] != "scratch":
            first = {"step": 0, "by": "prototypes", "counted_fraction": 0.2, "plausible_frames": 7, "frames": 9}
            last = {**first, "step": 50, "by": "teacher", "change": 0.031, "ended_at_step": 50, "ended_by": "change"}
            row["pseudo_labels"] = {
                "steps": [50, 100],
                "confident_fraction": [0.4, 0.9],
                "class_fractions": {"LV": [0.01, 0.02], "RV": [0.0, 0.01], "background": [0.99, 0.97]},  # as JSON sorts
                "rounds": [{**first, "change": None}, last],
            }
    page, text = written(tmp_path, rows, tasks={"acdc": {"classes": ["RV", "LV"]}})
    assert "Pseudo-labels over training" in page.text and "Rounds of self-training (4)" in page.text
    assert (
        "| self-training, n = 1, draw 1 | 51 | teacher | 20.0 % | 7 of 9 | 3.1 % | rounds end (little changed) |"
        in text
    )
    drawn = " ".join(ET.parse(tmp_path / "pictures/pseudo-labels-acdc.svg").getroot().itertext())
    assert drawn.index("RV") < drawn.index("LV"), "in the order of the labels, as in pictures of segmentations"
    for words in ("pixels that count", "RV", "LV", "self-training, n = 1, draw 0", "self-training, n = 1, draw 1"):
        assert words in drawn
    assert "background" not in drawn


def test_every_mode_of_a_page_is_explained_and_no_other(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(modes=("scratch_weak_to_strong", "weak_to_strong"), numbers=(1,))
    page, text = written(tmp_path, rows)
    assert "Modes: W2S, scratch: weak to strong, from random weights; weak to strong: fine-tuned, and" in page.text
    assert "linear probe" not in text
    assert "| modes | W2S, scratch; weak to strong |" in text
    assert all(facts.training for facts in MODES.values())


def test_protocols_are_kept_apart_and_named_everywhere(make_rows: MakeRows, tmp_path: Path) -> None:
    labels = ("leak_free", "paper_compat", "transductive")
    few: dict[str, Any] = {"numbers": (1,), "num_patients": 2}
    rows = make_rows(**few) + make_rows(**few, protocol="paper_compat") + make_rows(**few, transductive=True)
    page, text = written(tmp_path, rows)
    assert "transductive" in text.splitlines()[0]
    assert text.count("> **Note.**") == 2
    places = [page.text.index(f"Protocol: {label}.") for label in labels]
    assert places == sorted(places)
    for label in labels:
        suffix = "" if label == "leak_free" else f"-{label.replace('_', '-')}"
        for kind in ("few-shot", "differences", "classes"):
            picture = ET.parse(tmp_path / f"pictures/{kind}-acdc{suffix}.svg").getroot()
            assert [label in "".join(picture.itertext()) for label in labels] == [one == label for one in labels], kind


def test_rows_of_unknown_corpora_have_intervals_and_differences_of_their_own(
    make_rows: MakeRows, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"numbers": (1,), "num_patients": 2, "transductive": True}
    written(tmp_path, make_rows(**few, corpora="unknown") + make_rows(**few, gain=0.3, seed=1))
    for kind, words in (("few-shot", "band: 95 %"), ("differences", "95 %")):
        for label in ("corpora-unknown", "transductive"):
            picture = ET.parse(tmp_path / f"pictures/{kind}-acdc-{label}.svg").getroot()
            assert words in "".join(picture.itertext()), (kind, label)


def test_hostile_names_are_names(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(task=HOSTILE, classes=(HOSTILE, "LV"), modes=("scratch", HOSTILE), numbers=(1,))
    for row in rows:
        row["subjects"] = [HOSTILE]
        row["backbone_sha256"] = row["code"] = row["device"] = row["split"] = HOSTILE
        for case in row["cases"]:
            case["stratum"] = HOSTILE
    context = dict.fromkeys(("title", "job", "licence", "code"), HOSTILE)
    facts = {"failed": [{HOSTILE: HOSTILE}], "searched": [{HOSTILE: HOSTILE}], "overhead": {HOSTILE: HOSTILE}}
    about = {HOSTILE: {"title": HOSTILE, "licence": HOSTILE, "citation": HOSTILE, "splits": {HOSTILE: [HOSTILE]}}}
    page, text = written(tmp_path, rows, caveats=[HOSTILE], left_out=[HOSTILE], tasks=about, **context, **facts)
    assert set(page.tags) <= TAGS
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("src", "srcset"):
            assert re.fullmatch(r"data:image/(svg\+xml|png);base64,[A-Za-z0-9+/=]+", value)
        if name == "href":
            assert value.startswith("#s") or value == "data:,"
    assert "<script>alert(1)</script>" in page.text, "what was named is seen"
    assert "\x00" not in page.text
    for name, value in page.attributes:
        if name in ("src", "srcset"):
            root = ET.fromstring(b64decode(value.partition(",")[2]))
            assert not [one for one in root.iter() if str(one.tag).endswith(("}script", "}foreignObject", "}a"))]
    assert "<" not in text.replace("&lt;", "") and not re.search(r"(?<!\\)\]\(javascript", text)
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1, lines
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "report.html", "report.md", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows


@pytest.mark.parametrize("names", [(), ("base", "middle", "apex")])
def test_thirds_are_called_as_the_task_calls_them(make_rows: MakeRows, tmp_path: Path, names: tuple[str, ...]) -> None:
    page, text = written(tmp_path, make_rows(numbers=(1,)), tasks={"acdc": {"thirds": list(names)}})
    shown = names or ("lower", "middle", "upper")
    assert f"| mode | {' | '.join(shown)} |" in text
    assert ("Dice in base, middle and apex: the lower, middle and upper third" in page.text) == bool(names)
    picture = [one.strip() for one in ET.parse(tmp_path / "pictures/thirds-acdc.svg").getroot().itertext()]
    assert [one for one in picture if one in shown] == list(shown)
    # Whoever shows a heart says which end is which; of any other organ nothing is known.
    assert ("apex" in page.text) == bool(names)


def test_a_patient_is_the_mean_of_its_frames_and_then_of_its_draws(make_rows: MakeRows) -> None:
    rows = make_rows(modes=("scratch",), numbers=(1,), num_patients=1)
    for row, values in zip(rows, ((0.2, 0.4), (0.7,)), strict=True):
        case = row["cases"][0]
        row["cases"] = [
            {**case, "frame": frame, "scores": {"RV": {"dice": dice}}, "thirds": {"RV": [dice, None, 0.5]}}
            for frame, dice in enumerate(values)
        ]
        row["dice_by_subject"] = {"patient101": sum(values) / len(values)}
    (patient,) = patients_of(rows_of(rows))
    assert patient.dice["RV"] == pytest.approx((0.3 + 0.7) / 2)
    assert patient.dice[MEAN] == pytest.approx((0.3 + 0.7) / 2)
    assert patient.stratum == "NOR"
    assert patient.thirds == (pytest.approx(0.5), None, pytest.approx(0.5))


def test_the_shown_trial_is_chosen_on_validation_and_its_cases_by_their_dice(make_rows: MakeRows) -> None:
    rows = make_rows(modes=("scratch", "linear_probe", "fine_tune"), num_draws=3, predictions="a.npz")
    for row in rows:
        row["validation_dice_mean"] = {"scratch": 0.99, "linear_probe": 0.9, "fine_tune": 0.1}[row["mode"]] - row[
            "draw"
        ] / 100
    best, median, worst = shown_cases(rows_of(rows))
    assert (best.rank, median.rank, worst.rank) == ("best", "median", "worst")
    assert list(best.trials) == ["from scratch", "linear probe"]
    assert [(row["num_labelled"], row["draw"]) for row in best.trials.values()] == [(1, 1), (1, 1)]
    of_trial = sorted(
        sum(score["dice"] for score in case["scores"].values()) / 2 for case in best.trials["linear probe"]["cases"]
    )
    assert [one.dice["linear probe"] for one in (worst, median, best)] == pytest.approx(
        [of_trial[0], of_trial[2], of_trial[-1]]
    )
    assert shown_cases(rows_of([{**row, "predictions": None} for row in rows])) == []
