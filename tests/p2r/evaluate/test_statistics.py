"""Statistics against naive loops, closed forms, scipy, and simulated data with known truth."""

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from p2r.errors import DataError
from p2r.evaluate.resampling import (
    _patients_needed,
    bootstrap_interval,
    draws_agree,
    efficiency_interval,
    holm,
    patients_needed,
    signed_rank_p,
)
from p2r.evaluate.rows import rows_of
from p2r.evaluate.statistics import Statistics, few_shot_statistics
from p2r.randomness import keyed_generator


def statistics_of(rows: Iterable[Any], **options: Any) -> dict[str, Any]:
    """The statistics of JSON rows, as JSON."""
    return few_shot_statistics(rows_of(rows), **options).to_json()


def row(mode: str, num_labelled: int, draw: int, dice: Iterable[float | None], **changes: Any) -> dict[str, Any]:
    return {
        "task": "acdc",
        "protocol": "leak_free",
        "mode": mode,
        "num_labelled": num_labelled,
        "draw": draw,
        "subjects": [f"train{draw}-{index}" for index in range(num_labelled)],
        "dice_by_subject": {f"patient{index:02d}": value for index, value in enumerate(dice)},
        **changes,
    }


def table(*, modes: dict[str, float], numbers: Iterable[int] = (1, 5), draws: int = 3) -> list[dict[str, Any]]:
    """Return rows of 8 patients; their Dice rises with n and by the mode's offset."""
    generator = np.random.default_rng(0)
    return [
        row(mode, n, draw, (0.5 + 0.1 * math.log(n) + offset + generator.normal(0, 0.03, 8)).tolist())
        for n, draw, (mode, offset) in itertools.product(numbers, range(draws), modes.items())
    ]


def test_the_bootstrap_resamples_draws_and_then_patients_as_a_naive_loop_does() -> None:
    values = np.array([[0.2, 0.4, 0.9], [0.3, math.nan, 0.7]])
    found = bootstrap_interval(values, generator=np.random.default_rng(3), num_resamples=500, confidence=0.8)
    generator = np.random.default_rng(3)
    draws = generator.multinomial(1, [1 / 2] * 2, size=500)
    patients = generator.multinomial(2, [1 / 3] * 3, size=500)
    means = []
    for of_draws, of_patients in zip(draws, patients, strict=True):
        chosen = [
            values[draw, patient]
            for draw in range(2)
            for patient in range(3)
            for _ in range(of_draws[draw] * of_patients[patient])
            if not math.isnan(values[draw, patient])
        ]
        if chosen:
            means.append(fmean(chosen))
    assert found == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))


def test_resampling_one_less_gives_the_textbook_standard_error() -> None:
    # Only patients: the variance of the mean is s^2 / P, with s^2 over P - 1. Only draws: the same over D.
    values = np.random.default_rng(1).normal(size=(1, 12))
    for of_one_level in (values, values.T):
        lower, upper = bootstrap_interval(
            of_one_level, generator=np.random.default_rng(0), num_resamples=40_000, confidence=0.6827
        )
        assert (upper - lower) / 2 == pytest.approx(values.std(ddof=1) / math.sqrt(12), rel=0.03)


def coverage(interval: Callable[[NDArray[np.float64]], tuple[float, float]], *, spread: float, draws: int) -> float:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        of_draws, of_patients = generator.normal(0, spread, (draws, 1)), generator.normal(0, 1, (1, 20))
        lower, upper = interval(of_draws + of_patients + generator.normal(0, 1, (draws, 20)))
        hits += lower <= 0 <= upper
    return hits / 400


# Coverages from the module's docstring, within the precision of 400 data sets (two standard errors are about 0.03).
@pytest.mark.parametrize(
    ("spread", "draws", "expected"), [(0.5, 1, 0.69), (0.5, 3, 0.93), (0.5, 5, 0.94), (1, 3, 0.88), (1, 5, 0.91)]
)
def test_intervals_cover_the_truth_as_often_as_documented(spread: float, draws: int, expected: float) -> None:
    def interval(values: NDArray[np.float64]) -> tuple[float, float]:
        return bootstrap_interval(values, generator=np.random.default_rng(0), num_resamples=400, confidence=0.95)

    assert coverage(interval, spread=spread, draws=draws) == pytest.approx(expected, abs=0.04)


def test_the_same_patients_in_all_draws_are_no_more_patients_than_there_are() -> None:
    # Five equal draws of twenty patients carry no more information than one.
    one = np.random.default_rng(0).normal(size=(1, 20))
    intervals = [
        bootstrap_interval(values, generator=np.random.default_rng(0), num_resamples=8000, confidence=0.95)
        for values in (one, np.repeat(one, 5, axis=0))
    ]
    assert intervals[0] == pytest.approx(intervals[1], abs=0.03)


def test_a_difference_says_in_how_many_draws_it_has_its_sign() -> None:
    offsets = [0.1, 0.02, -0.05, 0.0, 0.03]
    rows = [
        row(mode, 1, draw, (0.5 + (mode == "fine_tune") * offset + 0.01 * np.arange(4)).tolist())
        for draw, offset in enumerate(offsets)
        for mode in ("scratch", "fine_tune")
    ]
    (found,) = statistics_of(rows, seed=0, num_resamples=20)["differences"]
    assert found["difference_by_draw"] == pytest.approx(offsets)
    assert found["draws"] == 5 and found["draws_agree"] == 3, "a draw without a difference agrees with nothing"
    assert draws_agree(np.array([[-0.2, math.nan], [0.1, 0.05]])) == 1
    assert draws_agree(np.zeros((3, 2))) == 0


def test_the_signed_rank_test_is_exact_on_few_patients() -> None:
    # All 2^n signs of the ranks, counted.
    differences = np.array([0.03, -0.01, 0.05, 0.02, 0.07, -0.04])
    ranks = [3, 1, 5, 2, 6, 4]
    observed = min(3 + 5 + 2 + 6, 1 + 4)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product([0, 1], repeat=6)]
    as_extreme = sum(total <= observed or total >= sum(ranks) - observed for total in sums)
    assert signed_rank_p(differences) == pytest.approx(as_extreme / 2**6)
    assert signed_rank_p(np.full(1, 0.2)) == 1.0
    assert signed_rank_p(np.linspace(0.01, 0.05, 5)) == pytest.approx(2 / 2**5)


def test_zero_differences_are_left_out_and_ties_get_the_mean_rank() -> None:
    differences = np.array([0.1, 0.1, -0.1, 0.2, 0.3])
    ranks = [2, 2, 2, 4, 5]
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product([0, 1], repeat=5)]
    expected = sum(total <= 2 or total >= 13 for total in sums) / 2**5
    assert signed_rank_p(differences) == pytest.approx(expected)
    assert signed_rank_p(np.append(differences, [0.0, 0.0, 1e-15])) == pytest.approx(expected)
    assert signed_rank_p(np.zeros(4)) == 1.0
    # Ties that rounding broke are ties: 0.1 + 0.2 is not 0.3.
    assert signed_rank_p(np.array([0.1 + 0.2, -0.3, 0.3, 0.5])) == signed_rank_p(np.array([0.3, -0.3, 0.3, 0.5]))


def test_the_signed_rank_test_of_twenty_patients_is_scipys_exact_one() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 20)
    assert signed_rank_p(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04 raised to the previous value.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    generator = random.Random(0)
    for _ in range(200):
        p_values = [generator.choice([0.001, 0.01, 0.02, 0.04, generator.random()]) for _ in range(5)]
        rejected = set()
        for step, index in enumerate(sorted(range(5), key=p_values.__getitem__)):
            if p_values[index] > 0.05 / (5 - step):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_label_efficiency_is_interpolated_over_the_logarithm() -> None:
    scratch = {1: 0.5, 10: 0.7, 100: 0.8}
    assert patients_needed(0.6, scratch) == (pytest.approx(10**0.5), None)
    assert patients_needed(0.75, scratch) == (pytest.approx(10**1.5), None)
    assert patients_needed(0.5, scratch) == (1.0, None)
    assert patients_needed(0.8, scratch) == (pytest.approx(100), None)


def test_the_interval_of_label_efficiency_follows_test_patients_and_draws() -> None:
    """Scratch gains 0.1 from 1 to 10 labelled patients for everybody; a mode with 1 lies half-way, for everybody or on average."""
    patients = [f"p{number}" for number in range(20)]
    draw: tuple[int, tuple[str, ...]] = (0, ("a",))
    base: dict[str, float] = dict(zip(patients, np.linspace(0.3, 0.7, 20).tolist(), strict=True))
    scratch = {
        number: {draw: {one: dice + gain for one, dice in base.items()}} for number, gain in ((1, 0.0), (10, 0.1))
    }

    def interval(gains: list[float]) -> tuple[float | str, float | str]:
        ours = {draw: {one: base[one] + gain for one, gain in zip(patients, gains, strict=True)}}
        generator = np.random.default_rng(0)
        return efficiency_interval(ours, scratch, generator=generator, num_resamples=500, confidence=0.95)

    for dice in (0.2, 0.4, 0.45, 0.5, 0.58, 0.7, 0.9):  # the same as one by one
        curve = {1: 0.4, 3: 0.5, 10: 0.45, 30: 0.7}
        (needed,) = _patients_needed(np.array([dice]), np.array([list(curve.values())]), list(curve))
        number, side = patients_needed(dice, curve)
        assert needed == (pytest.approx(number) if side is None else {"below": -np.inf, "above": np.inf}[side])
    assert interval([0.05] * 20) == (pytest.approx(10**0.5), pytest.approx(10**0.5)), (
        "patients are the same in all tables"
    )
    lower, upper = interval([0.0, 0.1] * 10)
    assert isinstance(lower, float) and isinstance(upper, float) and 1 < lower < 10**0.5 < upper < 10
    assert interval([-0.3, 0.4] * 10) == ("below", "above"), "it reaches beyond both ends"
    assert interval([0.2] * 20) == ("above", "above") and interval([-0.1] * 20) == ("below", "below")


def test_label_efficiency_is_never_extrapolated() -> None:
    scratch = {5: 0.7, 10: 0.8}
    assert patients_needed(0.69, scratch) == (None, "below")
    assert patients_needed(0.81, scratch) == (None, "above")
    assert patients_needed(0.9, {5: 0.7}) == (None, "above")
    assert patients_needed(0.7, {5: 0.7}) == (5.0, None)


def test_where_scratch_falls_back_the_first_time_that_it_reaches_a_dice_counts() -> None:
    scratch = {1: 0.5, 2: 0.7, 5: 0.6, 10: 0.9}
    assert patients_needed(0.6, scratch) == (pytest.approx(2**0.5), None)
    assert patients_needed(0.7, scratch) == (pytest.approx(2), None)
    found, _ = patients_needed(0.8, scratch)
    assert found is not None and 5 < found < 10


def test_intervals_differences_and_label_efficiency_stand_side_by_side() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.1, "linear_probe": -0.2})
    found = statistics_of(rows, seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(entry["mode"], entry["num_labelled"]) for entry in found["intervals"]] == [
        (mode, n) for mode in ("fine_tune", "linear_probe", "scratch") for n in (1, 5)
    ]
    for entry in found["intervals"]:
        of_group = [r for r in rows if (r["mode"], r["num_labelled"]) == (entry["mode"], entry["num_labelled"])]
        assert entry["mean"] == pytest.approx(fmean(v for r in of_group for v in r["dice_by_subject"].values()))
        assert entry["lower"] < entry["mean"] < entry["upper"]
        assert (entry["draws"], entry["patients"]) == (3, 8)
    fine_tune = [entry for entry in found["differences"] if entry["mode"] == "fine_tune"]
    assert [entry["against"] for entry in found["differences"]] == ["scratch"] * 4
    assert all(0.05 < entry["lower"] < entry["difference"] < entry["upper"] < 0.15 for entry in fine_tune)
    # Eight of eight patients gain: 2 / 2^8, and Holm doubles the smaller of two.
    assert [entry["p"] for entry in fine_tune] == [pytest.approx(2 / 2**8)] * 2
    assert [entry["p_holm"] for entry in fine_tune] == [pytest.approx(4 / 2**8)] * 2
    efficiency = {(entry["mode"], entry["num_labelled"]): entry for entry in found["label_efficiency"]}
    # Scratch gains 0.1 per factor e: it needs about e patients for the Dice of fine-tuning with 1.
    assert efficiency["fine_tune", 1]["scratch_patients"] == pytest.approx(math.e, rel=0.3)
    assert efficiency["fine_tune", 5]["beyond"] == "above"
    assert efficiency["linear_probe", 1]["beyond"] == "below"
    assert found["left_out"] == found["between_backbones"] == []


def test_draws_are_averaged_within_a_patient_before_the_test() -> None:
    ours, theirs = [[0.9, 0.5, 0.7], [0.5, 0.6, 0.9]], [[0.6, 0.6, 0.6], [0.5, 0.4, 0.7]]
    rows = [row("fine_tune", 1, draw, ours[draw]) for draw in (0, 1)]
    rows += [row("scratch", 1, draw, theirs[draw]) for draw in (0, 1)]
    entry = statistics_of(rows, seed=0)["differences"][0]
    assert entry["p"] == signed_rank_p(np.array([0.15, 0.05, 0.15]))
    assert entry["difference"] == pytest.approx(0.35 / 3)


def test_the_order_of_the_rows_and_other_groups_change_nothing() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.1, "linear_probe": -0.2})
    expected = statistics_of(rows, seed=7)
    for seed in range(3):
        shuffled = [{**r, "dice_by_subject": dict(reversed(r["dice_by_subject"].items()))} for r in rows]
        random.Random(seed).shuffle(shuffled)
        assert statistics_of(iter(shuffled), seed=7) == expected
    fewer = statistics_of([r for r in rows if r["mode"] != "linear_probe"], seed=7)
    for part in ("intervals", "differences", "label_efficiency"):
        assert fewer[part] == [entry for entry in expected[part] if entry["mode"] != "linear_probe"]
    assert statistics_of(rows, seed=8)["intervals"] != expected["intervals"]


def test_incomparable_rows_are_kept_apart() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.1}, numbers=(1,))
    others: list[dict[str, Any]] = [
        {"protocol": "paper_compat"},
        {"transductive": True},
        {"transductive": True, "corpora": "unknown"},
        {"task": "hippocampus"},
        {"split": "validation"},
    ]
    alone = statistics_of(rows, seed=0)
    together = statistics_of(rows + [{**r, **change} for change in others for r in rows], seed=0)
    assert len(together["intervals"]) == 6 * len(alone["intervals"])
    assert len(together["differences"]) == 6 * len(alone["differences"])
    assert all(entry in together["intervals"] for entry in alone["intervals"])
    assert {(e["protocol"], e["transductive"], e.get("corpora")) for e in together["intervals"]} == {
        ("leak_free", False, None),
        ("paper_compat", False, None),
        ("leak_free", True, None),
        ("leak_free", True, "unknown"),
    }


def test_unknown_corpora_are_named_and_change_no_figure() -> None:
    rows = [{**r, "transductive": True} for r in table(modes={"scratch": 0.0, "fine_tune": 0.1})]
    expected = statistics_of(rows, seed=0)
    found = statistics_of([{**r, "corpora": "unknown"} for r in rows], seed=0)
    for part in ("intervals", "differences", "label_efficiency"):
        assert found[part] == [{**entry, "corpora": "unknown"} for entry in expected[part]]
        assert not any("corpora" in entry for entry in expected[part])
    earlier = Statistics.model_validate(expected)
    assert earlier.intervals[0].corpora is None


def test_without_scratch_every_pair_of_modes_is_compared() -> None:
    found = statistics_of(table(modes={"fine_tune": 0.1, "linear_probe": 0.0, "prototype": 0.05}), seed=0)
    pairs = {(entry["mode"], entry["against"]) for entry in found["differences"]}
    assert pairs == {("linear_probe", "fine_tune"), ("prototype", "fine_tune"), ("prototype", "linear_probe")}
    assert found["label_efficiency"] == []


def test_two_backbones_are_compared_mode_by_mode_and_with_a_shared_scratch() -> None:
    shared = table(modes={"scratch": 0.0}, numbers=(1,))
    a = [{**r, "backbone": "a"} for r in table(modes={"fine_tune": 0.1}, numbers=(1,))]
    b = [{**r, "backbone": "b"} for r in table(modes={"fine_tune": 0.2}, numbers=(1,))]
    found = statistics_of(shared + a + b, seed=0)
    assert [(entry["backbone"], entry["against"]) for entry in found["differences"]] == [
        ("a", "scratch"),
        ("b", "scratch"),
    ]
    (between,) = found["between_backbones"]
    assert (between["mode"], between["backbone"], between["against_backbone"]) == ("fine_tune", "b", "a")
    assert between["difference"] == pytest.approx(0.1, abs=0.001)
    assert [entry["backbone"] for entry in found["label_efficiency"]] == ["a", "b"]


def test_a_pair_uses_the_draws_that_both_modes_have() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.1}, numbers=(1,), draws=4)
    lost = [r for r in rows if not (r["mode"] == "fine_tune" and r["draw"] == 2)]
    found = statistics_of(lost, seed=0)
    assert [entry["draws"] for entry in found["intervals"]] == [3, 4]
    kept = statistics_of([r for r in rows if r["draw"] != 2], seed=0)
    assert found["differences"] == kept["differences"]


def test_draws_of_other_patients_are_not_paired_and_the_reason_is_listed() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.1}, numbers=(1,))
    for r in rows:
        if r["mode"] == "fine_tune":
            r["subjects"] = ["somebody else"]
    found = statistics_of(rows, seed=0)
    assert found["differences"] == []
    assert [(entry["mode"], entry["against"]) for entry in found["left_out"]] == [("fine_tune", "scratch")]
    assert "same labelled patients" in found["left_out"][0]["reason"]


def test_a_patient_without_any_class_is_left_out_of_the_draws_that_say_so() -> None:
    rows = [row("scratch", 1, 0, [0.4, None, 0.8]), row("scratch", 1, 1, [0.6, 0.2, None])]
    rows += [row("fine_tune", 1, 0, [0.5, 0.9, 0.9]), row("fine_tune", 1, 1, [0.7, None, 0.9])]
    found = statistics_of(rows, seed=0)
    by_mode = {entry["mode"]: entry for entry in found["intervals"]}
    assert by_mode["scratch"]["mean"] == pytest.approx(fmean([0.4, 0.8, 0.6, 0.2]))
    assert by_mode["scratch"]["patients"] == 3
    (difference,) = found["differences"]
    assert difference["patients"] == 2
    assert difference["difference"] == pytest.approx(0.1)
    nobody = statistics_of([row("scratch", 1, 0, [None, None])], seed=0)
    assert nobody["intervals"] == []
    assert [entry["reason"] for entry in nobody["left_out"]] == ["no test patient has a Dice"]


def test_one_draw_of_one_patient_has_an_interval_without_width() -> None:
    (entry,) = statistics_of([row("scratch", 1, 0, [0.5])], seed=0)["intervals"]
    assert (entry["lower"], entry["mean"], entry["upper"]) == (0.5, 0.5, 0.5)
    assert statistics_of([], seed=0)["intervals"] == []


def test_invalid_rows_are_refused_by_name() -> None:
    good = row("scratch", 1, 0, [0.5])
    with pytest.raises(DataError, match=r"acdc, one backbone, scratch, n = 1, draw 0 has two rows"):
        statistics_of([good, {**good, "subjects": ["another"]}], seed=0)
    with pytest.raises(DataError, match=r"the Dice of patient00 is 1\.2"):
        statistics_of([row("scratch", 1, 0, [1.2])], seed=0)
    with pytest.raises(DataError, match=r"the Dice of patient00 is nan"):
        statistics_of([row("scratch", 1, 0, [math.nan])], seed=0)
    with pytest.raises(DataError, match=r"dice_by_subject is missing"):
        statistics_of([{key: value for key, value in good.items() if key != "dice_by_subject"}], seed=0)
    with pytest.raises(ValueError, match="num_resamples must be positive"):
        statistics_of([good], seed=0, num_resamples=0)
    with pytest.raises(ValueError, match=r"confidence in \(0, 1\)"):
        statistics_of([good], seed=0, confidence=95)


def test_a_large_table_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    rows = [
        row(mode, n, draw, generator.uniform(0.4, 0.9, 20).tolist(), task=task)
        for task in ("a", "b", "c", "d")
        for mode in ("scratch", "linear_probe", "fine_tune")
        for n in (1, 2, 5, 10, 20)
        for draw in range(5)
    ]
    start = time.process_time()
    found = statistics_of(rows, seed=0)
    assert len(found["intervals"]) == 60
    assert time.process_time() - start < 5


def test_resamples_come_from_generators_keyed_by_their_purpose() -> None:
    values = np.random.default_rng(0).uniform(size=(3, 5))
    first, again = (
        bootstrap_interval(values, generator=keyed_generator(1, "a"), num_resamples=50, confidence=0.9)
        for _ in range(2)
    )
    assert first == again


def test_a_mode_is_compared_with_scratch_and_with_its_own_control() -> None:
    rows = table(modes={"scratch": 0.0, "fine_tune": 0.02, "scratch_weak_to_strong": 0.1, "weak_to_strong": 0.15})
    found = statistics_of(rows, seed=0, num_resamples=20)["differences"]
    pairs = {(one["mode"], one["against"]) for one in found}
    assert pairs == {
        ("fine_tune", "scratch"),
        ("scratch_weak_to_strong", "scratch"),
        ("weak_to_strong", "scratch"),
        ("weak_to_strong", "scratch_weak_to_strong"),
    }
    of_control = [one for one in found if one["against"] == "scratch_weak_to_strong"]
    assert [one["num_labelled"] for one in of_control] == [1, 5]
    assert all(one["difference"] == pytest.approx(0.05, abs=0.03) for one in of_control)
