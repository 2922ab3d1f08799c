"""Narrow pictures say what wide ones say: every name is there, inside the picture, and slices come from inside the organ."""

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from p2r.evaluate.rows import rows_of
from p2r.evaluate.statistics import few_shot_statistics
from p2r.modes import MODES
from p2r.report import canvas, few_shot_curve, outlines, variants_picture
from p2r.report.canvas import Drawing, KeyEntry, inside, key_lines
from p2r.report.distributions import by_stratum, class_boxes, where_in_the_organ
from p2r.report.forest import Difference, forest
from p2r.report.patients import patients_of
from p2r.report.sources import source_line

MakeRows = Callable[..., list[dict[str, Any]]]
STRATA = ("hypertrophic", "dilated", "infarction", "abnormal right ventricle", "normal", None)

NAMES = {mode: facts.title for mode, facts in MODES.items()}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is made into a picture from here on."""
    found: list[Figure] = []
    to_svg = canvas._to_svg

    def record(figure: Figure) -> bytes:
        found.append(figure)
        return to_svg(figure)

    monkeypatch.setattr(canvas, "_to_svg", record)
    return found


@pytest.fixture(scope="module")
def rows(make_rows: MakeRows) -> list[dict[str, Any]]:
    """All five modes, and strata with long names."""
    found = make_rows(modes=tuple(MODES), numbers=(1, 5, 20), classes=("RV", "MYO", "LV"))
    for row in found:
        for case, stratum in zip(row["cases"], STRATA, strict=True):
            case["stratum"] = stratum
    return found


def _charts(rows: list[dict[str, Any]]) -> Iterator[Drawing | None]:
    source, patients = source_line(rows_of(rows), None), patients_of(rows_of(rows))
    statistics = few_shot_statistics(rows_of(rows), seed=0, num_resamples=50)
    for numbers in ((1, 5, 20), (1,)):
        some = [row for row in rows if row["num_labelled"] in numbers]
        yield few_shot_curve(rows_of(some), "acdc", intervals=statistics.intervals, source=source)
    yield class_boxes(patients, title="acdc: every patient, class by class", source=source)
    thirds = ("base of the heart", "middle", "apex of the heart")
    yield where_in_the_organ(patients, title="acdc: Dice by third of the organ", names=thirds, source=source)
    lines = [Difference("20 labelled patients", name, mode, 0.1, 0.0, 0.2, 0.01) for mode, name in NAMES.items()]
    yield forest(
        lines, title="acdc: difference", subtitle="paired by patient", axis="Dice above scratch", source=source
    )
    variants = [
        {**row, "variant": variant}
        for variant in ("256", "16384", "without-elastic", "negatives-of-the-image")
        for row in rows
        if row["num_labelled"] < 20
    ]
    yield variants_picture(rows_of(variants), title="ablation: what each variant reaches", source=source)
    yield by_stratum(patients, title="acdc: Dice by stratum of the patients", source=source)


def test_every_mode_is_named_and_every_word_lies_inside(rows: list[dict[str, Any]], figures: list[Figure]) -> None:
    pictures = list(_charts(rows))
    assert len(figures) == 2 * len(pictures)
    for picture in pictures:
        assert picture is not None and picture.narrow is not None
        for svg in (picture.wide, picture.narrow):
            text = " ".join(" ".join(ET.fromstring(svg).itertext()).split())
            assert all(name in text for name in NAMES.values()), text
    for figure in figures:
        _lies_inside(figure)


def test_every_class_is_named_and_every_word_lies_inside(figures: list[Figure]) -> None:
    names = ["right ventricle", "myocardium", "left ventricle", "left atrium", "right atrium"]
    reference = np.arange(1, 6)[:, None, None] * np.pad(np.ones((5, 20, 30), np.int16), ((0, 0), (30, 30), (30, 30)))
    source = "fine-tuned of backbone a9a9a9a9a9a9 · task acdc · leak_free, test patient patient101 · n = 1, draw 0"
    picture = outlines(reference * 0.1, reference, reference, names, subtitle="1 labelled", source=source)
    assert picture.narrow is not None
    text = " ".join("".join(ET.fromstring(picture.narrow).itertext()).split())
    assert all(name in text for name in names)
    for figure in figures:
        _lies_inside(figure)


def test_a_key_breaks_into_as_many_lines_as_it_needs() -> None:
    entries = [KeyEntry(name, "o", "#000000") for name in NAMES.values()]
    assert key_lines(entries, 12.0) == [entries]
    narrow = key_lines(entries, 2.5)
    assert len(narrow) > 2 and [one for line in narrow for one in line] == entries
    assert key_lines(entries, 0.1) == [[one] for one in entries], "what fits nowhere has a line of its own"


@pytest.mark.parametrize(
    ("number", "most", "expected"), [(1, 2, [0]), (2, 2, [0, 1]), (5, 2, [1, 3]), (6, 2, [1, 4]), (9, 3, [1, 4, 7])]
)
def test_slices_of_narrow_pictures_come_from_inside(number: int, most: int, expected: list[int]) -> None:
    assert inside(np.arange(number), most).tolist() == expected


def _lies_inside(figure: Figure) -> None:
    """All that is drawn, the figure's own ground included, is no larger than the figure (inches)."""
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, (width, height, box)
