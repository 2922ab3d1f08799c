"""A real browser shows the pages: light and dark, narrow and wide, without a word in its console or on the network."""

import json
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from p2r.evaluate.rows import rows_of
from p2r.evaluate.statistics import few_shot_statistics
from p2r.report import write_report
from p2r.report.comparison import compare_runs
from p2r.report.comparison_page import write_comparison
from p2r.report.context import context_of
from p2r.report.runs import read_runs
from p2r.storage import Storage
from tests.browser import Browser

MakeRows = Callable[..., list[dict[str, Any]]]
HOSTILE = (
    '"><script>console.log(1)</script><img src=http://127.0.0.1:9/x onerror=console.log(2)> <svg onload=console.log(3)>'
)


@pytest.fixture(scope="module")
def pages(make_rows: MakeRows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with names that would do harm if they were more than text, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    first, second = (make_rows(classes=("RV", HOSTILE), task=HOSTILE, seed=seed) for seed in (0, 1))
    write_report(
        Storage(str(folder / "a")),
        rows=rows_of(first),
        context=context_of(
            {"title": HOSTILE, "caveats": [HOSTILE], "job": "x" * 300, "failed": [{"trial": "y" * 300}]}
        ),
        pictures={},
        statistics=few_shot_statistics(rows_of(first), seed=0, num_resamples=50),
    )
    (folder / "b").mkdir()
    (folder / "b/report.json").write_text(json.dumps({"format": "p2r-report/1", "rows": second}))
    runs = read_runs([str(folder / name / "report.json") for name in ("a", "b")])
    write_comparison(Storage(str(folder / "c")), compare_runs(runs))
    return {"report": folder / "a/report.html", "comparison": folder / "c/comparison.html"}


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [380, 1400])
def test_a_page_is_shown_whole_light_and_dark(tab: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        tab.open(pages[name], width=width, scheme=scheme)
        decoded = tab.value_of(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0, () => false)))"
        )
        assert len(decoded) >= 2 and all(decoded)
        assert tab.value_of("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.value_of("[...document.images].every(i => i.alt && i.getBoundingClientRect().width <= innerWidth)")
        assert tab.value_of("document.querySelectorAll('script, svg, iframe, object').length") == 0
        grounds.append(_ground_of_the_first_picture(tab))
        said = [event for event in tab.events if event["method"] in _SAID]
        assert not said, said
        asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    light, dark = grounds
    assert light > 0.95 and dark < 0.2


@pytest.mark.parametrize("width", [380, 1400])
def test_a_narrow_page_takes_the_narrow_pictures(tab: Browser, pages: dict[str, Path], width: int) -> None:
    tab.open(pages["report"], width=width, scheme="light")
    natural = tab.value_of("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert all(found < 500 if width == 380 else found > 700 for found in natural)


def test_tables_and_headings_are_marked_for_screen_readers(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["report"], width=1400, scheme="light")
    assert tab.value_of("document.querySelectorAll('h1').length") == 1
    assert tab.value_of("document.documentElement.lang") == "en"
    assert tab.value_of("[...document.querySelectorAll('th')].every(one => ['row', 'col'].includes(one.scope))")
    assert tab.value_of("[...document.querySelectorAll('tbody tr')].every(one => one.querySelector('th[scope=row]'))")
    levels = tab.value_of("[...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    targets = tab.value_of("[...document.querySelectorAll('nav a')].map(one => !!document.querySelector(one.hash))")
    assert len(targets) > 3 and all(targets)


_SAID = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")


def _ground_of_the_first_picture(tab: Browser) -> float:
    """Median brightness where the first picture is: of its ground, because most of a chart is ground."""
    box = tab.value_of(
        "(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])(document.images[0].getBoundingClientRect())"
    )
    left, top, width, height = map(round, box)
    shown = np.asarray(imread(BytesIO(tab.screenshot())))[top : top + height, left : left + width, :3]
    return float(np.median(shown))
