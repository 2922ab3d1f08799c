"""Rules that assign subjects to the splits of a task."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2r.errors import DataError
from p2r.evaluate.tasks import Task, load_task, task_sha256
from tests.p2r.evaluate.conftest import MakeTask, people

HUNDRED = tuple(f"p{number:03d}" for number in range(100))


def test_a_rule_parts_all_subjects_and_the_seed_decides_how(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED)
    drawn = [task_of(split_rule={"seed": seed, "validation": 10, "test": 0.2}).subjects for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for subjects in drawn:
        assert sorted(subject for split in subjects.values() for subject in split) == list(HUNDRED)
        assert len(subjects["validation"]) == 10
        assert 10 < len(subjects["test"]) < 30
        assert all(list(split) == sorted(split) for split in subjects.values())
    exact = task_of(split_rule={"validation": 10, "test": 20}).subjects
    assert [len(exact[split]) for split in ("train", "validation", "test")] == [70, 10, 20]


def test_with_fractions_a_subject_that_joins_moves_nobody(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    rule = {"seed": 3, "validation": 0.2, "test": 0.3}
    people(tmp_path, *HUNDRED[:60])
    before = task_of(split_rule=rule).subjects
    people(tmp_path, *HUNDRED[60:], "late")
    after = task_of(split_rule=rule).subjects
    assert all(set(before[split]) <= set(after[split]) for split in before)
    assert 10 < len(after["validation"]) < 30
    assert 20 < len(after["test"]) < 40


def test_with_numbers_a_subject_that_joins_moves_at_most_one_of_each_split(
    tmp_path: Path, task_of: Callable[..., Task]
) -> None:
    people(tmp_path, *HUNDRED[:40])
    before = task_of(split_rule={"validation": 8, "test": 10}).subjects
    for late in HUNDRED[40:50]:
        people(tmp_path, late)
        after = task_of(split_rule={"validation": 8, "test": 10}).subjects
        assert all(len(set(before[split]) - set(after[split])) <= 1 for split in ("validation", "test"))
        before = after


def test_a_stratified_rule_takes_every_split_from_all_strata(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED)
    strata = {"NOR": ["p[000-049]"], "DCM": ["p[050-079]"], "RV": ["p[080-099]"]}
    task = task_of(strata=strata, split_rule={"validation": 10, "test": 0.2, "stratified": True})
    counts = {split: Counter(task.strata[subject] for subject in task.subjects[split]) for split in task.subjects}
    assert counts == {
        "train": {"NOR": 35, "DCM": 21, "RV": 14},
        "validation": {"NOR": 5, "DCM": 3, "RV": 2},
        "test": {"NOR": 10, "DCM": 6, "RV": 4},
    }


def test_who_is_left_out_of_a_rule_is_in_no_split(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    (tmp_path / "labels/p003.nii.gz").unlink()
    rule = {"validation": 2, "test": 2, "leave_out": ["p[003-004]"]}
    found = task_of(split_rule=rule, strata={"a": ["p[000-004]"]})
    assert sorted(scan.subject for scan in found.scans) == [
        name for name in HUNDRED[:10] if name not in ("p003", "p004")
    ]
    assert found.strata == {"p000": "a", "p001": "a", "p002": "a"}
    with pytest.raises(DataError, match=r"split_rule\.leave_out names p077 without any scan"):
        task_of(split_rule={**rule, "leave_out": ["p077"]})
    with pytest.raises(DataError, match=r"p003\.nii\.gz .* has no label map"):
        task_of(split_rule={**rule, "leave_out": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"splits": {"train": ["p000"], "validation": ["p001"], "test": ["p002"]}},
            "exactly one of splits and split_rule",
        ),
        ({"split_rule": None}, "exactly one of splits and split_rule"),
        ({"split_rule": {"validation": 0.5, "test": 0.5}}, "leave some for training"),
        ({"split_rule": {"validation": 1.5, "test": 0.5}}, "a number of subjects, or a fraction"),
        ({"split_rule": {"validation": 0, "test": 0.5}}, "a number of subjects, or a fraction"),
        ({"split_rule": {"validation": 5, "test": 5}}, "leaves train without subjects, of 10"),
        ({"split_rule": {"validation": 5, "test": 20}}, "leaves train, validation without subjects, of 10"),
        ({"split_rule": {"validation": 0.001, "test": 0.2}}, "leaves validation without subjects"),
        ({"split_rule": {"validation": 2, "test": 2, "stratified": True}}, "stratified needs strata"),
        ({"split_rule": {"validation": 2, "test": 2, "leave_out": ["p[9-1]"]}}, "split_rule.leave_out: subjects"),
        ({"split_rule": {"validation": 2, "test": 2, "stratify": True}}, "did you mean stratified"),
        ({"strata": {"a": ["p[000-005]"], "b": ["p005"]}}, "p005 is in the strata a and b"),
        ({"strata": {"a": ["p[5-1]"]}}, "strata.a: subjects"),
        ({"label_name": "gt"}, "label_name"),
        ({"image_name": "{key}/{key}"}, "image_name"),
    ],
)
def test_a_broken_rule_is_refused(
    tmp_path: Path, task_of: Callable[..., Task], changes: dict[str, Any], message: str
) -> None:
    people(tmp_path, *HUNDRED[:10])
    with pytest.raises(DataError) as refusal:
        task_of(**{"split_rule": {"validation": 2, "test": 2}, **changes})
    assert message in str(refusal.value)


def test_a_stratified_rule_names_who_has_no_stratum(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    rule = {"validation": 2, "test": 2, "stratified": True}
    with pytest.raises(DataError, match=r"a stratum for every subject, p008, p009 have none"):
        task_of(split_rule=rule, strata={"a": ["p[000-003]"], "b": ["p[004-007]"]})


def test_a_tasks_digest_tells_that_a_rule_splits_others(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    digests = set()
    for seed in (0, 1):
        task_of(split_rule={"validation": 2, "test": 2, "seed": seed})
        digests.add(task_sha256(tmp_path / "toy.yaml"))
        assert task_sha256(tmp_path / "toy.yaml") in digests
    people(tmp_path, "late")
    assert len({*digests, task_sha256(tmp_path / "toy.yaml")}) == 3


def test_scans_without_a_label_map_are_used_unless_their_patient_is_held_out_or_left_out(
    tmp_path: Path, task_of: Callable[..., Task]
) -> None:
    people(tmp_path, "a_1", "b_1", "c_1", "d_1")
    for name in ("a_2", "b_2", "c_2", "e_1", "f_1", "g_seg"):
        (tmp_path / f"images/{name}.nii.gz").touch()
    splits = {"train": ["a", "d"], "validation": ["b"], "test": ["c"]}
    task = task_of(splits=splits, unlabelled="use")
    assert [scan.key for scan in task.unlabelled] == ["a_2", "e_1", "f_1"]
    assert [scan.key for scan in task.scans] == ["a_1", "b_1", "c_1", "d_1"]
    assert task_of(splits=splits, unlabelled="leave_out").unlabelled == ()
    by_rule = task_of(split_rule={"validation": 1, "test": 1, "leave_out": ["e"]}, unlabelled="use")
    found = {scan.subject for scan in by_rule.unlabelled}
    assert "f" in found and not found & {"e", *by_rule.subjects["validation"], *by_rule.subjects["test"]}
    with pytest.raises(DataError, match="leave_out names z without any scan"):
        task_of(split_rule={"validation": 1, "test": 1, "leave_out": ["z"]}, unlabelled="use")


def test_without_strata_nobody_has_one(make_task: MakeTask) -> None:
    assert load_task(make_task()).strata == {}
    strata = load_task(make_task(strata={"old": ["sub-[01-02]", "sub-99"], "young": ["sub-03"]})).strata
    assert strata == {"sub-01": "old", "sub-02": "old", "sub-03": "young"}
