"""What chaos draws and how it judges; the run itself is `make chaos`."""

from itertools import pairwise
from typing import Any

from tests.chaos.chaos import draw_curves, verdict
from tests.chaos.faults import APART, KINDS, Made, draw_faults

RUN: dict[str, Any] = {"losses": {1: 5.0, 2: 4.0, 3: 3.5}, "last_step": 3, "stream": {"step": 3}, "damaged": []}


def test_a_seed_draws_faults_far_enough_apart_and_every_kind_before_any_comes_twice() -> None:
    draws = draw_faults(7, 2 * len(KINDS))
    assert draws == draw_faults(7, 2 * len(KINDS)) != draw_faults(8, 2 * len(KINDS))
    assert all(APART[0] <= after.step - before.step <= APART[1] for before, after in pairwise(draws))
    kinds = [draw.kind for draw in draws]
    assert sorted(kinds[: len(KINDS)]) == sorted(kinds[len(KINDS) :]) == sorted(KINDS)


def judge(*, elastic: bool = False, left_over: tuple[str, ...] = (), **changes: object) -> dict[str, bool]:
    found = verdict(RUN, {**RUN, **changes}, steps=3, elastic=elastic, left_over=left_over)
    assert found["passed"] == all(found["checks"].values())
    return {name: good for name, good in found["checks"].items() if not good}


def test_the_verdict_names_what_is_not_as_it_must_be() -> None:
    near, far = {**RUN["losses"], 2: 4.0 + 1e-6}, {**RUN["losses"], 2: 4.1}
    assert judge() == {}
    assert set(judge(losses=near)) == {"curve"}
    assert judge(losses=near, elastic=True) == {}
    assert set(judge(losses=far, elastic=True)) == {"curve"}
    assert set(judge(losses={1: 5.0, 3: 3.5})) == {"every step once", "curve"}
    assert set(judge(last_step=2)) == {"last step"}
    assert set(judge(stream={"step": 2})) == {"same stream"}
    assert set(judge(damaged=["checkpoints/step-00000010/model.safetensors"])) == {"checkpoints whole"}
    assert set(judge(left_over=("10.77.1.2: 4711",))) == {"no process left"}


def test_the_picture_has_both_curves_and_every_fault() -> None:
    made = [Made("worker", 1, "process 7"), Made("store", 2, "store")]
    picture = draw_curves(RUN["losses"], RUN["losses"], made, title="2 faults")
    assert picture.png.startswith(b"\x89PNG")
    for word in (b"worker", b"store", b"without faults"):
        assert word in picture.svg
