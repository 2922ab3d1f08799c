"""The example of docs/extending.md: a mode that is only an entry of a table is trained, reported, drawn and shown."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.status import Sweep
from p2r.evaluate.statistics import few_shot_statistics
from p2r.fewshot.search import few_shot
from p2r.fewshot.setup import TrialSetup
from p2r.modes import MODES
from p2r.pipeline.local import LocalExecutor
from p2r.report import write_report
from p2r.report.context import ReportContext
from p2r.storage import Storage


@pytest.fixture
def example(repository: Path) -> Iterator[str]:
    """Register the mode of the document, and return its name."""
    block = re.search(r"```python\n(.*?)```", (repository / "docs/extending.md").read_text(), re.DOTALL)
    assert block is not None
    before = dict(MODES)
    exec(block[1], {})
    (name,) = MODES.keys() - before.keys()
    yield name
    del MODES[name]


def test_the_mode_of_the_example_is_trained_reported_drawn_and_shown(
    example: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    setup: TrialSetup = request.getfixturevalue("make")(modes=["scratch", example])
    found = few_shot([setup], runner=LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    rows = [result.reported() for result in found.results]
    assert [row.mode for row in rows] == ["scratch", example] and not found.failed
    statistics = few_shot_statistics(rows, seed=0, num_resamples=20)
    storage = Storage(str(tmp_path / "page"))
    write_report(storage, rows=rows, context=ReportContext(), pictures={}, statistics=statistics)
    title, colour = MODES[example].title, MODES[example].colour
    assert title in storage.read_bytes("report.html").decode()
    picture = storage.read_bytes("pictures/few-shot-disc.svg").decode()
    assert title in picture and colour in picture
    assert Sweep().mode_titles[example] == title
