import pytest

from p2r.schedule import averaging, learning_rate


def test_the_rate_rises_then_falls_to_nearly_nothing() -> None:
    rates = [learning_rate(step, peak=1.0, num_steps=100, warmup_fraction=0.1) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(0, peak=0.5, num_steps=1, warmup_fraction=0.0) == 0.5


def test_the_mean_of_the_first_weights_is_plain_and_then_forgets() -> None:
    weights = [5.0, 1.0, 3.0, 7.0]  # before any step, and after each
    mean = weights[0]
    for step, weight in enumerate(weights[1:]):
        share = averaging(step, decay=0.999)
        mean = (1 - share) * mean + share * weight
    assert mean == pytest.approx(4.0)
    assert averaging(10_000, decay=0.999) == pytest.approx(0.001)
