"""A search for validation and test patients refuses what it finds, or records it where the job allows it."""

from dataclasses import replace
from pathlib import Path

import pytest

from p2r.artefact import CorpusFacts
from p2r.backbone import Backbone, load_backbone
from p2r.data.volume import read_volume
from p2r.errors import DataError
from p2r.evaluate.tasks import Task, load_task
from p2r.fewshot.leaks import Known


@pytest.fixture
def backbone(published: dict[str, str]) -> Backbone:
    return load_backbone(published["backbone"])


@pytest.fixture
def task(toy_data: Path) -> Task:
    return load_task(toy_data / "task.yaml")


def with_corpora(backbone: Backbone, corpora: list[CorpusFacts] | None) -> Backbone:
    facts = backbone.manifest.facts.model_copy(update={"corpora": corpora})
    backbone.manifest = replace(backbone.manifest, facts=facts)
    return backbone


@pytest.mark.parametrize("is_allowed", [False, True])
def test_patients_that_are_in_no_corpus_are_no_leak(backbone: Backbone, task: Task, is_allowed: bool) -> None:
    known = Known(backbone, is_allowed=is_allowed)
    subject = task.subjects["test"][0]
    (scan, *_) = task.scans_of((subject,))
    known.see_subject(subject, "test", task=task)
    known.see_scan(scan, [read_volume(scan.image)], "test")
    assert (known.is_any, known.is_unknown) == (False, False)


def test_a_subject_of_a_corpus_is_found_by_name(backbone: Backbone, task: Task) -> None:
    known = Known(backbone, is_allowed=True)
    known.see_subject(task.subjects["train"][0], "test", task=task)
    assert (known.is_any, known.is_unknown) == (True, False)
    with pytest.raises(
        DataError, match=r"of the test split of task disc is in the backbone's corpus file://.*would leak"
    ):
        Known(backbone, is_allowed=False).see_subject(task.subjects["train"][0], "test", task=task)


def test_a_scan_of_a_corpus_is_found_by_its_voxels(backbone: Backbone, task: Task) -> None:
    (scan, *_) = task.scans_of((task.subjects["train"][0],))
    known = Known(backbone, is_allowed=True)
    known.see_scan(scan, [read_volume(scan.image)], "validation")
    assert (known.is_any, known.is_unknown) == (True, False)
    with pytest.raises(DataError, match="of the validation split is in the backbone's corpus"):
        Known(backbone, is_allowed=False).see_scan(scan, [read_volume(scan.image)], "validation")


@pytest.mark.parametrize("corpora", [None, []])
def test_unknown_corpora_are_refused_or_recorded_from_the_start(
    backbone: Backbone, task: Task, corpora: list[CorpusFacts] | None
) -> None:
    unknown = with_corpora(backbone, corpora)
    with pytest.raises(DataError, match=r"does not list the corpora of its pretraining.*--allow-transductive"):
        Known(unknown, is_allowed=False)
    known = Known(unknown, is_allowed=True)
    assert (known.is_any, known.is_unknown) == (True, True)
    known.see_subject(task.subjects["test"][0], "test", task=task)
    assert (known.is_any, known.is_unknown) == (True, True), "an unknown corpus stays unknown"
