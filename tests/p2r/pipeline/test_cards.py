"""Model cards: what strangers have named is text in them."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2r.config import PublishConfig
from p2r.errors import JobError
from p2r.job import read_job
from p2r.pipeline import publishing

HOSTILE = "![x](http://evil.example/a.png) <img src=x> | a\n# heading [x](javascript:1)"


def test_a_card_shows_hostile_names_as_names(write_toy_job: Callable[..., Path], tmp_path: Path) -> None:
    job = read_job(write_toy_job(tmp_path))
    assert job.publish is not None
    facts = SimpleNamespace(num_subjects=1, num_records=1, num_samples=1, provenance=HOSTILE, contrasts=None)
    manifest = SimpleNamespace(facts=facts, sha256="0" * 64)
    config = job.publish.model_copy(update={"description": HOSTILE})
    corpora: Any = [SimpleNamespace(manifest=manifest)]
    card = publishing._write_card(job, config, corpora, f"file:///{HOSTILE}", HOSTILE, step=1)
    text = "\n".join(line for line in card.splitlines() if not line.startswith("    "))  # but for code
    assert "<img" not in text and not re.search(r"(?<!\\)[\]\[]\(", text)
    assert "\n# heading" not in card and "| a" not in text.replace("\\| a", "")
    assert text.count("http://evil.example/a.png") == 3


@pytest.mark.parametrize(
    ("licences", "is_free"),
    [
        (["CC0-1.0", "CC-BY-4.0"], True),
        (["own licence of Sanderson"], True),
        (["MIT", "unknown"], True),
        (["CC0-1.0", "CC-BY-NC-4.0"], False),
        (["CC BY-SA 4.0"], False),
        (["cc-by-nd-4.0"], False),
        (["non-commercial use only"], False),
        (["GPL-3.0-only"], False),
        (["LGPLv3"], False),
        (["AGPL-3.0-or-later"], False),
        (["ODbL-1.0"], False),
    ],
)
def test_another_licence_is_refused_only_where_the_corpus_forbids_it(licences: list[str], is_free: bool) -> None:
    config = PublishConfig(name="toy", licence="CC-BY-4.0")
    if is_free:
        assert publishing._choose_licence(config, licences) == "CC-BY-4.0"
        return
    with pytest.raises(JobError, match="which forbids other terms"):
        publishing._choose_licence(config, licences)
