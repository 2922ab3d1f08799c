from concurrent.futures import ThreadPoolExecutor

from p2r.counters import Counters


def test_sums_are_kept_by_name_and_labels() -> None:
    counters = Counters()
    counters.add("bytes", 10)
    counters.add("bytes", 2.5)
    counters.add("retries", cause="503", bucket="b")
    counters.add("retries", bucket="b", cause="503")
    counters.add("retries")
    assert counters.snapshot() == {"bytes": 12.5, "retries": 1, 'retries{bucket="b",cause="503"}': 2}


def test_threads_lose_no_count() -> None:
    counters = Counters()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [counters.add("x") for _ in range(2000)], range(8)))
    assert counters.snapshot() == {"x": 16_000}


def test_a_snapshot_does_not_change() -> None:
    counters = Counters()
    counters.add("x")
    before = counters.snapshot()
    counters.add("x")
    assert before == {"x": 1}
