"""Draws, candidates, trials, and the choice of the best."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from p2r.config import FinetuneConfig, SearchConfig
from p2r.errors import DataError
from p2r.evaluate.sampling import draw_subjects
from p2r.fewshot.protocol import (
    Settings,
    Trial,
    candidates_of,
    choose_settings,
    final_trials,
    numbers_of,
    search_trials,
    settings_of,
)
from p2r.modes import Mode

PATIENTS = tuple(f"patient{number:03d}" for number in range(1, 21))


@dataclass
class Task:
    name: str = "acdc"
    subjects: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"train": PATIENTS})
    strata: dict[str, str] = field(default_factory=dict)


CONFIG = FinetuneConfig(tasks=("acdc.yaml",), num_labelled=(1, 5), draws=2)


def trial(mode: Mode = "scratch", rate: float = 1e-3, num_labelled: int = 1, task: str = "acdc") -> Trial:
    settings = Settings(learning_rate=rate)
    return Trial(task, mode, num_labelled, 0, PATIENTS[:num_labelled], settings, "search")


def chosen(**rates: float) -> dict[Any, Settings]:
    return {mode: Settings(learning_rate=rate) for mode, rate in rates.items()}


def labels(config: FinetuneConfig) -> list[str]:
    return [found.id for found in search_trials(config, Task())]


def test_a_draw_is_reproducible_and_independent_of_the_order_of_patients() -> None:
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
    trials = final_trials(CONFIG, Task(), chosen(scratch=1e-3, linear_probe=1e-2, fine_tune=2e-3))
    by_setting: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for found in trials:
        by_setting.setdefault((found.num_labelled, found.draw), set()).add(found.subjects)
    assert len(by_setting) == 4
    assert all(len(subjects) == 1 for subjects in by_setting.values())


def test_search_uses_the_first_draw_and_equally_many_learning_rates_per_mode() -> None:
    trials = search_trials(CONFIG, Task())
    assert [found.id for found in trials] == [
        "acdc-search-scratch-n1-d0-lr0.001",
        "acdc-search-scratch-n1-d0-lr0.003",
        "acdc-search-linear_probe-n1-d0-lr0.003",
        "acdc-search-linear_probe-n1-d0-lr0.01",
        "acdc-search-fine_tune-n1-d0-lr0.001",
        "acdc-search-fine_tune-n1-d0-lr0.003",
    ]
    finals = final_trials(CONFIG, Task(), chosen(scratch=1e-3, linear_probe=1e-2, fine_tune=2e-3))
    assert {found.subjects for found in trials} == {finals[0].subjects}


def test_final_trials_are_stable_and_named_without_the_rate() -> None:
    rates = chosen(scratch=1e-3, linear_probe=1e-2, fine_tune=2e-3)
    trials = final_trials(CONFIG, Task(), rates)
    assert trials == final_trials(CONFIG, Task(), rates)
    assert len({found.id for found in trials}) == len(trials) == 12
    assert [found.id for found in trials[:4]] == [
        "acdc-final-scratch-n1-d0",
        "acdc-final-linear_probe-n1-d0",
        "acdc-final-fine_tune-n1-d0",
        "acdc-final-scratch-n1-d1",
    ]
    row = trials[1].to_row()
    assert (row["learning_rate"], row["settings"], row["protocol"]) == (1e-2, {"learning_rate": 1e-2}, "leak_free")


def test_the_settings_of_the_best_mean_validation_dice_are_chosen_and_ties_go_to_the_smaller_rate() -> None:
    found = choose_settings(
        [
            (trial("scratch", 1e-3, 1), 0.50),
            (trial("scratch", 1e-3, 5), 0.60),
            (trial("scratch", 3e-3, 1), 0.55),
            (trial("scratch", 3e-3, 5), 0.54),
            (trial("fine_tune", 3e-3), 0.7),
            (trial("fine_tune", 1e-3), 0.7),
        ]
    )
    assert found == chosen(scratch=1e-3, fine_tune=1e-3)


def test_failed_and_stopped_candidates_are_excluded_and_a_mode_without_any_has_no_settings() -> None:
    found = choose_settings(
        [
            (trial("scratch", 1e-3, 1), 0.50),
            (trial("scratch", 3e-3, 1), None),
            (trial("fine_tune", 3e-3), None),
        ]
    )
    assert found == chosen(scratch=1e-3)


def test_an_unfair_or_broken_search_is_refused() -> None:
    with pytest.raises(ValueError, match="same draws"):
        choose_settings([(trial(rate=1e-3), 0.5), (trial(rate=3e-3), 0.5), (trial(rate=3e-3, num_labelled=5), 0.6)])
    with pytest.raises(ValueError, match="is nan"):
        choose_settings([(trial(), float("nan"))])
    with pytest.raises(ValueError, match="one task at a time"):
        choose_settings([(trial(), 0.5), (trial(task="other"), 0.5)])
    with pytest.raises(ValueError, match="equally many"):
        SearchConfig(learning_rates={"scratch": (1e-3,), "fine_tune": (1e-3, 3e-3)})


def test_all_means_the_train_split_and_no_number_occurs_twice() -> None:
    assert numbers_of((1, "all", 20, 5), Task()) == {1: 1, 20: "all", 5: 5}
    config = FinetuneConfig(tasks=("a",), num_labelled=(1, "all"), draws={1: 5, "all": 2}, modes=("scratch",))
    trials = final_trials(config, Task(), chosen(scratch=1e-3))
    assert [(found.num_labelled, found.draw) for found in trials] == [
        *((1, draw) for draw in range(5)),
        (20, 0),
        (20, 1),
    ]
    assert trials[-1].subjects == PATIENTS


def test_a_mode_may_be_limited_to_some_numbers_with_the_same_patients() -> None:
    values = {"tasks": ["a"], "num_labelled": [1, 5, "all"], "modes": ["scratch", "fine_tune"]}
    rates = chosen(scratch=1e-3, fine_tune=1e-3)

    def trials(**more: object) -> list[Trial]:
        return final_trials(FinetuneConfig.model_validate({**values, **more}), Task(), rates)

    some = trials(num_labelled_by_mode={"fine_tune": [5, "all"]})
    left_out = [(found.mode, found.num_labelled) for found in trials() if found not in some]
    assert left_out == [("fine_tune", 1)] * 3 and set(some) < set(trials())


STRATA = {patient: "ABCD"[index // 5] for index, patient in enumerate(PATIENTS)}


@pytest.mark.parametrize("num_labelled", [1, 2, 4, 6, 8, 13, 20])
def test_a_stratified_draw_has_all_strata_in_proportion(num_labelled: int) -> None:
    of_strata = dict.fromkeys("ABCD", 0)
    for draw in range(40):
        subjects = draw_subjects(PATIENTS, num_labelled=num_labelled, draw=draw, seed=0, strata=STRATA)
        assert list(subjects) == sorted(set(subjects)) and len(subjects) == num_labelled
        counts = {stratum: sum(STRATA[subject] == stratum for subject in subjects) for stratum in "ABCD"}
        assert set(counts.values()) <= {num_labelled // 4, -(-num_labelled // 4)}
        for stratum, count in counts.items():
            of_strata[stratum] += count
    assert min(of_strata.values()) > 0.5 * num_labelled * 40 / 4  # every stratum is drawn at some point


def test_unequal_strata_are_drawn_in_proportion() -> None:
    strata = {patient: "many" if index < 15 else "few" for index, patient in enumerate(PATIENTS)}
    subjects = draw_subjects(PATIENTS, num_labelled=8, draw=0, seed=0, strata=strata)
    assert sorted(strata[subject] for subject in subjects) == ["few"] * 2 + ["many"] * 6


def test_a_stratified_draw_needs_the_stratum_of_every_patient() -> None:
    config = FinetuneConfig(tasks=("a",), stratify=True)
    with pytest.raises(DataError, match=r"patient001 has none \(20 of 20 lack one\)"):
        final_trials(config, Task(), chosen(scratch=1e-3))


def test_a_single_candidate_needs_no_trial_and_a_prototype_has_no_learning_rate() -> None:
    rates = {"scratch": (1e-3,), "fine_tune": (2e-3,)}
    config = FinetuneConfig(
        tasks=("a",), modes=("scratch", "fine_tune", "prototype"), search=SearchConfig(learning_rates=rates)
    )
    assert search_trials(config, Task()) == []
    (only,) = candidates_of(config, "prototype")
    assert settings_of(config, "prototype", only) == Settings(
        prototypes_per_class=4, background_prototypes=16, prototype_smoothing_pixels=2.0
    )


def test_a_grid_has_every_combination_of_the_modes_settings() -> None:
    search = {
        "learning_rates": {"scratch": [1e-3, 2e-3, 3e-3, 4e-3], "fine_tune": [1e-3, 2e-3]},
        "space": {"warmup_head_steps": [0, 50], "steps": [100]},
    }
    config = FinetuneConfig.model_validate({"tasks": ["a"], "modes": ["scratch", "fine_tune"], "search": search})
    assert len(labels(config)) == 8
    assert labels(config)[0] == "acdc-search-scratch-n1-d0-lr0.001-steps100"
    assert labels(config)[-1] == "acdc-search-fine_tune-n1-d0-lr0.002-steps100-warmup_head_steps50"
    search["learning_rates"]["scratch"] = [1e-3, 2e-3]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"equally many candidates for every mode, got scratch 2, fine_tune 4"):
        FinetuneConfig.model_validate({"tasks": ["a"], "modes": ["scratch", "fine_tune"], "search": search})


def test_candidates_drawn_from_distributions_depend_only_on_the_seed_and_are_equal_for_every_mode() -> None:
    rates = {"scratch": {"loguniform": [1e-4, 1e-2]}, "fine_tune": {"loguniform": [1e-5, 1e-3]}}
    space = {"weight_decay": {"choice": [0, 1e-4]}, "steps": {"randint": [10, 20]}}
    values = {
        "tasks": ["a"],
        "modes": ["scratch", "fine_tune"],
        "search": {"learning_rates": rates, "space": space, "num_samples": 64},
    }
    config = FinetuneConfig.model_validate(values)
    scratch, fine_tune = candidates_of(config, "scratch"), candidates_of(config, "fine_tune")
    assert (
        scratch == candidates_of(config, "scratch") != candidates_of(config.model_copy(update={"seed": 1}), "scratch")
    )
    assert len(scratch) == 64
    for one, other in zip(scratch, fine_tune, strict=True):
        assert one["learning_rate"] == pytest.approx(10 * other["learning_rate"], rel=1e-3)
        assert one["weight_decay"] == other["weight_decay"] and 10 <= one["steps"] < 20
    rates_drawn = sorted(candidate["learning_rate"] for candidate in scratch)
    assert rates_drawn[0] >= 1e-4 and rates_drawn[-1] <= 1e-2
    assert 5e-4 < rates_drawn[32] < 2e-3  # evenly on a logarithmic scale


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draws": {1: 5}}, "draws gives no number of draws for 5 labelled patients"),
        ({"num_labelled": ["some"]}, "num_labelled"),
        ({"search": {"space": {"steps": [0.5]}}}, "search.space.steps: .*valid integer.*got 0.5"),
        ({"search": {"space": {"weight_decay": {"uniform": [-1, 1]}}}}, "search.space.weight_decay: .*got -1"),
        ({"search": {"space": {"weight_decay": {"uniform": [0, 1], "choice": [1]}}}}, "has one of uniform"),
        ({"search": {"space": {"weight_decay": {"loguniform": [0, 1]}}}}, "bounds above 0"),
        ({"search": {"learning_rates": {"prototype": [1e-3]}}}, "trains nothing"),
        ({"search": {"scheduler": "asha", "num_labelled": [1, 5]}}, "must hold one number"),
        ({"modes": ["mean_teacher"], "protocol": "paper_compat"}, "mean_teacher"),
        ({"modes": ["scratch", "scratch"]}, "modes must differ, got scratch, scratch"),
        ({"tasks": ["a", "a"]}, "tasks must differ"),
        ({"search": {"learning_rates": {"scratch": [1e-3, 0.0]}}}, "learning_rates.scratch must be above 0, got 0"),
        ({"search": {"learning_rates": {"scratch": {"uniform": [-1, 1]}}}}, "scratch must be above 0, got -1"),
        (
            {"search": {"space": {"weight_decay": [0.1, 0.1]}}},
            r"candidates of weight_decay must differ, got \[0.1, 0.1\]",
        ),
        (
            {
                "modes": ["scratch", "fine_tune"],
                "search": {"learning_rates": {"scratch": [1e-3], "fine_tune": {"loguniform": [1e-4, 1e-2]}}},
            },
            "equally many candidates for every mode, got scratch 1, fine_tune 8: some modes have only lists",
        ),
        ({"num_labelled_by_mode": {"prototype": [1]}}, "names prototype, which is not in modes"),
        ({"views": {"shown_fraction": [0.3, 0.6]}}, "views.shown_fraction is for pretraining only"),
        ({"modes": ["weak_to_strong"], "protocol": "paper_compat"}, "take weak_to_strong out of modes"),
        ({"steps_by_mode": {"weak_to_strong": 9}}, "steps_by_mode names weak_to_strong, which is not in modes"),
        (
            {"modes": ["scratch", "prototype"], "steps_by_mode": {"prototype": 9}},
            "steps_by_mode names prototype, which trains nothing",
        ),
        ({"search": {"space": {"confidence_threshold": [0.9, 1.0]}}}, "confidence_threshold: .*less than 1, got 1.0"),
        ({"search": {"space": {"feature_dropout": [1.0]}}}, "feature_dropout: .*less than 1, got 1.0"),
        (
            {"search": {"space": {"cutmix_probability": [1.5]}}},
            "cutmix_probability: .*less than or equal to 1, got 1.5",
        ),
        (
            {"num_labelled_by_mode": {"scratch": [1, 2, "all"]}},
            r"scratch has 2, all, which is not in num_labelled \[1, 5\]",
        ),
    ],
)
def test_an_impossible_section_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.model_validate({"tasks": ["a"], **values})


def test_modes_have_the_steps_of_the_section_or_their_own_and_a_long_scratch_three_times_as_many() -> None:
    modes = ["scratch", "scratch_long", "weak_to_strong", "fine_tune"]
    section = FinetuneConfig.model_validate(
        {"tasks": ["a"], "modes": modes, "steps": 100, "steps_by_mode": {"weak_to_strong": 400}}
    )
    steps = {mode: settings_of(section, mode, {"learning_rate": 1e-3}).steps for mode in section.modes}
    assert steps == {"scratch": 100, "scratch_long": 300, "weak_to_strong": 400, "fine_tune": 100}
    assert settings_of(section, "weak_to_strong", {"learning_rate": 1e-3, "steps": 7}).steps == 7
    given = section.model_copy(update={"steps_by_mode": {"scratch_long": 500}})
    assert settings_of(given, "scratch_long", {"learning_rate": 1e-3}).steps == 500


def test_the_settings_of_weak_to_strong_can_be_searched() -> None:
    space = {"confidence_threshold": (0.9, 0.95), "feature_dropout": (0.0, 0.5)}
    section = FinetuneConfig.model_validate(
        {
            "tasks": ["a"],
            "modes": ["weak_to_strong"],
            "search": {"learning_rates": {"weak_to_strong": [1e-3]}, "space": space},
        }
    )
    found = [
        settings_of(section, "weak_to_strong", candidate) for candidate in candidates_of(section, "weak_to_strong")
    ]
    assert {(one.confidence_threshold, one.feature_dropout) for one in found} == {
        (threshold, dropout) for threshold in (0.9, 0.95) for dropout in (0.0, 0.5)
    }
    assert {one.cutmix_probability for one in found} == {0.5}


def test_the_settings_of_self_training_can_be_searched_and_whole_numbers_stay_whole() -> None:
    space = {"self_training_rounds": {"randint": (1, 5)}, "plausible_size_factor": (1.5, 3.0)}
    section = FinetuneConfig.model_validate(
        {
            "tasks": ["a"],
            "modes": ["prototype_self_training"],
            "search": {"learning_rates": {"prototype_self_training": [1e-3]}, "space": space, "num_samples": 12},
        }
    )
    mode: Mode = "prototype_self_training"
    found = [settings_of(section, mode, candidate) for candidate in candidates_of(section, mode)]
    rounds = {one.self_training_rounds for one in found}
    assert rounds <= {1, 2, 3, 4} and len(rounds) > 1 and all(isinstance(one, int) for one in rounds)
    assert {one.plausible_size_factor for one in found} == {1.5, 3.0}
    assert {one.agreement_views for one in found} == {3}
