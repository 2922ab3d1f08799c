"""Draws, trials and the choice of learning rates."""

from dataclasses import dataclass, field

import pytest

from p2r.config import FinetuneConfig, SearchConfig
from p2r.errors import DataError
from p2r.evaluate.protocol import Trial, choose_learning_rates, draw_subjects, final_trials, search_trials

PATIENTS = tuple(f"patient{number:03d}" for number in range(1, 21))


@dataclass
class Task:
    name: str = "acdc"
    subjects: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"train": PATIENTS})


CONFIG = FinetuneConfig(tasks=("acdc.yaml",), num_labelled=(1, 5), draws=2)


def trial(mode: str = "scratch", rate: float = 1e-3, num_labelled: int = 1, task: str = "acdc") -> Trial:
    return Trial(task, mode, num_labelled, 0, PATIENTS[:num_labelled], rate, "search")  # type: ignore[arg-type]


def test_a_draw_is_the_same_every_time_and_in_whatever_order_the_patients_come() -> None:
    first = draw_subjects(PATIENTS, num_labelled=5, draw=1, seed=3)
    assert first == draw_subjects(PATIENTS[::-1], num_labelled=5, draw=1, seed=3)
    assert list(first) == sorted(set(first))
    assert len(first) == 5


def test_a_draw_never_changes_between_versions() -> None:
    assert draw_subjects(PATIENTS, num_labelled=2, draw=0, seed=0) == ("patient016", "patient018")


def test_seed_draw_and_number_each_change_the_draw() -> None:
    draws = [draw_subjects(PATIENTS, num_labelled=5, draw=draw, seed=seed) for draw in range(4) for seed in range(4)]
    assert len(set(draws)) == len(draws)


def test_every_patient_is_drawn_equally_often() -> None:
    counts = dict.fromkeys(PATIENTS, 0)
    for draw in range(2000):
        for subject in draw_subjects(PATIENTS, num_labelled=2, draw=draw, seed=0):
            counts[subject] += 1
    assert all(140 < count < 260 for count in counts.values())  # 200 expected, standard deviation 13


def test_all_patients_can_be_drawn() -> None:
    assert draw_subjects(PATIENTS, num_labelled=20, draw=0, seed=0) == PATIENTS


def test_more_patients_than_exist_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"21 labelled patients.*has 20"):
        draw_subjects(PATIENTS, num_labelled=21, draw=0, seed=0)


def test_every_mode_trains_on_the_same_patients() -> None:
    trials = final_trials(CONFIG, Task(), {"scratch": 1e-3, "linear_probe": 1e-2, "fine_tune": 2e-3})
    by_setting: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for found in trials:
        by_setting.setdefault((found.num_labelled, found.draw), set()).add(found.subjects)
    assert len(by_setting) == 4
    assert all(len(subjects) == 1 for subjects in by_setting.values())


def test_search_uses_the_first_draw_and_equally_many_rates_per_mode() -> None:
    trials = search_trials(CONFIG, Task())
    assert [found.id for found in trials] == [
        "acdc-search-scratch-n1-d0-lr0.001",
        "acdc-search-scratch-n1-d0-lr0.003",
        "acdc-search-linear_probe-n1-d0-lr0.003",
        "acdc-search-linear_probe-n1-d0-lr0.01",
        "acdc-search-fine_tune-n1-d0-lr0.001",
        "acdc-search-fine_tune-n1-d0-lr0.003",
    ]
    finals = final_trials(CONFIG, Task(), {"scratch": 1e-3, "linear_probe": 1e-2, "fine_tune": 2e-3})
    assert {found.subjects for found in trials} == {finals[0].subjects}


def test_final_trials_are_stable_and_named_without_the_rate() -> None:
    rates = {"scratch": 1e-3, "linear_probe": 1e-2, "fine_tune": 2e-3}
    trials = final_trials(CONFIG, Task(), rates)  # type: ignore[arg-type]
    assert trials == final_trials(CONFIG, Task(), rates)  # type: ignore[arg-type]
    assert len({found.id for found in trials}) == len(trials) == 12
    assert [found.id for found in trials[:4]] == [
        "acdc-final-scratch-n1-d0",
        "acdc-final-linear_probe-n1-d0",
        "acdc-final-fine_tune-n1-d0",
        "acdc-final-scratch-n1-d1",
    ]
    assert trials[1].learning_rate == 1e-2
    assert trials[0].to_row()["protocol"] == "leak-free"


def test_the_rate_of_the_best_mean_validation_dice_is_chosen_and_of_equals_the_smaller() -> None:
    chosen = choose_learning_rates(
        [
            (trial("scratch", 1e-3, 1), 0.50),
            (trial("scratch", 1e-3, 5), 0.60),
            (trial("scratch", 3e-3, 1), 0.55),
            (trial("scratch", 3e-3, 5), 0.54),
            (trial("fine_tune", 3e-3), 0.7),
            (trial("fine_tune", 1e-3), 0.7),
        ]
    )
    assert chosen == {"scratch": 1e-3, "fine_tune": 1e-3}


def test_an_unfair_or_broken_search_is_refused() -> None:
    with pytest.raises(ValueError, match="same draws"):
        choose_learning_rates(
            [(trial(rate=1e-3), 0.5), (trial(rate=3e-3), 0.5), (trial(rate=3e-3, num_labelled=5), 0.6)]
        )
    with pytest.raises(ValueError, match="is nan"):
        choose_learning_rates([(trial(), float("nan"))])
    with pytest.raises(ValueError, match="one task at a time"):
        choose_learning_rates([(trial(), 0.5), (trial(task="other"), 0.5)])
    with pytest.raises(ValueError, match="equally many"):
        SearchConfig(learning_rates={"scratch": (1e-3,), "fine_tune": (1e-3, 3e-3)})
