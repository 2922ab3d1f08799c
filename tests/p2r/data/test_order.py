"""The order of samples is a pure function with the invariants that pretraining relies on."""

import itertools
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r.data import order
from p2r.data.order import (
    Order,
    check_micro_batch,
    check_world_size,
    counts_of,
    global_batch,
    locate,
    num_lanes,
    rank_batch,
    sizes_for_micro_batch,
    steps_per_epoch,
)
from p2r.errors import DataError


def manifest_of(*counts: int) -> dict[str, object]:
    shards = [{"name": f"shard-{i:06d}.tar", "num_samples": n} for i, n in enumerate(counts)]
    return {"num_samples": sum(counts), "shards": shards}


UNEVEN = manifest_of(31, 7, 90, 1, 44, 120, 12)  # 305 samples
GOLDEN = [258, 36, 61, 1, 19, 149, 179, 241]


def epoch_of(manifest: dict[str, object], size: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    steps = range(steps_per_epoch(manifest, size))
    return np.concatenate([global_batch(manifest, seed=seed, epoch=epoch, step=s, global_batch=size) for s in steps])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    size=st.integers(1, 60),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_an_epoch_takes_every_sample_at_most_once_and_leaves_out_less_than_a_batch(
    counts: list[int], size: int, seed: int, epoch: int
) -> None:
    manifest, total = manifest_of(*counts), sum(counts)
    if total < size:
        with pytest.raises(DataError, match=str(total)):
            steps_per_epoch(manifest, size)
        return
    taken = epoch_of(manifest, size, seed=seed, epoch=epoch)
    assert len(np.unique(taken)) == len(taken) == total - total % size
    assert taken.min() >= 0
    assert taken.max() < total


def test_every_sample_occurs_exactly_once_if_the_batch_divides_the_corpus() -> None:
    np.testing.assert_array_equal(np.sort(epoch_of(UNEVEN, 61)), np.arange(305))


def test_windows_of_a_long_lane_use_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_WINDOW", 10)
    np.testing.assert_array_equal(np.sort(epoch_of(UNEVEN, 5)), np.arange(305))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 16, 30, 255, 256, 257, 1000])
def test_shuffling_a_window_is_a_uniform_permutation(length: int) -> None:
    num_keys = 4000
    keys = order._mix_words(np.arange(num_keys, dtype=np.uint64))
    index = np.arange(min(length, 32), dtype=np.uint64)
    sent = np.stack([order._permute_index(np.full(num_keys, i, np.uint64), length, keys) for i in index], axis=1)
    one = np.stack(
        [order._permute_index(np.uint64(i) + np.zeros(1, np.uint64), length, keys[:1]) for i in range(length)]
    )
    assert sorted(one[:, 0].tolist()) == list(range(length))
    assert all(len(set(row)) == len(index) for row in sent[:50].tolist())
    share = (
        np.bincount(sent[:, 0].astype(int), minlength=length) / num_keys
    )  # destination of the first sample, over all keys
    assert np.abs(share - 1 / length).max() < 5 * np.sqrt(1 / length / num_keys) + 0.02 / length


def test_lanes_longer_than_a_real_window_use_every_sample_once() -> None:
    prime = 4001  # the only lane is longer than two windows, and steps cross their borders
    manifest = manifest_of(20_000, 15_000, 10 * prime - 35_000)
    assert num_lanes(prime) == 1
    np.testing.assert_array_equal(np.sort(epoch_of(manifest, prime)), np.arange(10 * prime))


@pytest.mark.parametrize("size", [8, 12, 24])
def test_every_world_size_reads_the_same_global_batches(size: int) -> None:
    for epoch, step in itertools.product((0, 1), (0, 3, steps_per_epoch(UNEVEN, size) - 1)):
        whole = global_batch(UNEVEN, seed=3, epoch=epoch, step=step, global_batch=size)
        for world_size in (n for n in range(1, size + 1) if num_lanes(size) % n == 0):
            parts = [
                rank_batch(UNEVEN, seed=3, epoch=epoch, step=step, global_batch=size, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert {len(part) for part in parts} == {size // world_size}
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_batch_larger_than_the_lanes_still_divides_over_ranks() -> None:
    manifest = manifest_of(5000, 4000)
    assert num_lanes(3000) == 1000
    whole = global_batch(manifest, seed=0, epoch=0, step=1, global_batch=3000)
    parts = [
        rank_batch(manifest, seed=0, epoch=0, step=1, global_batch=3000, rank=rank, world_size=8) for rank in range(8)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(epoch_of(manifest, 3000))) == 9000


def test_two_ranks_never_read_the_same_sample() -> None:
    mine, theirs = (
        np.concatenate(
            [
                rank_batch(UNEVEN, seed=0, epoch=0, step=step, global_batch=16, rank=rank, world_size=2)
                for step in range(steps_per_epoch(UNEVEN, 16))
            ]
        )
        for rank in (0, 1)
    )
    assert not set(mine) & set(theirs)


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    first = epoch_of(UNEVEN, 16)
    np.testing.assert_array_equal(first, epoch_of(UNEVEN, 16))
    for other in (epoch_of(UNEVEN, 16, epoch=1), epoch_of(UNEVEN, 16, seed=1)):
        assert (first != other).mean() > 0.9


def test_each_epoch_leaves_out_other_samples() -> None:
    left_out = [set(range(305)) - set(epoch_of(UNEVEN, 16, epoch=epoch)) for epoch in range(30)]
    assert all(len(out) == 305 % 16 for out in left_out)
    assert len(set().union(*left_out)) > 10
    single = [set(range(30)) - set(epoch_of(manifest_of(30), 16, epoch=epoch)) for epoch in range(30)]
    assert len(set().union(*single)) > 20


def test_batches_mix_shards() -> None:
    manifest = manifest_of(*[50] * 20)
    shards, _ = locate(manifest, global_batch(manifest, seed=0, epoch=0, step=0, global_batch=20))
    assert len(set(shards.tolist())) >= 15


def test_steps_are_shuffled_within_a_lane() -> None:
    taken = np.stack([global_batch(UNEVEN, seed=0, epoch=0, step=step, global_batch=4) for step in range(40)])
    assert (np.abs(np.diff(taken, axis=0)) == 1).mean() < 0.2


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "from p2r.data.order import global_batch\n"
        f"print(global_batch({UNEVEN!r}, seed=7, epoch=2, step=5, global_batch=12).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(global_batch(UNEVEN, seed=7, epoch=2, step=5, global_batch=12).tolist())


def test_the_order_equals_that_of_earlier_versions() -> None:
    """A change here prevents existing runs from resuming: change `order.ORDER` with it."""
    assert order.ORDER == "lanes/2"
    assert global_batch(UNEVEN, seed=0, epoch=0, step=0, global_batch=8).tolist() == GOLDEN


WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96)


def test_a_thousand_uneven_shards_give_the_same_batches_on_every_world_size() -> None:
    counts = np.random.default_rng(0).integers(1, 1000, 1000)
    manifest = manifest_of(*counts.tolist())
    assert num_lanes(768) == 768
    num_steps = steps_per_epoch(manifest, 768)
    assert int(counts.sum()) - num_steps * 768 < 768 + 768
    for step in (0, 1, num_steps // 2, num_steps - 1):
        whole = global_batch(manifest, seed=1, epoch=2, step=step, global_batch=768)
        assert len(set(locate(manifest, whole)[0].tolist())) > 300  # batches mix the corpus
        for world_size in WORLD_SIZES:
            parts = [
                rank_batch(manifest, seed=1, epoch=2, step=step, global_batch=768, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), whole)
    taken = epoch_of(manifest, 768, seed=1, epoch=2)
    assert len(np.unique(taken)) == len(taken)


def test_a_run_with_changing_world_sizes_repeats_and_skips_nothing() -> None:
    manifest = manifest_of(*np.random.default_rng(1).integers(1, 60, 1000).tolist())
    prepared = Order([counts_of(manifest)], seed=0, global_batch=768)
    (num_steps,) = prepared.steps_per_epoch
    taken = []
    for step in range(num_steps):
        world_size = WORLD_SIZES[step % len(WORLD_SIZES)]
        parts = [prepared.samples(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        taken.append(np.concatenate([part.positions for part in parts]))
    np.testing.assert_array_equal(np.concatenate(taken), epoch_of(manifest, 768))


MIXED = [[40, 25, 60], [9, 8], [300]]


def test_every_batch_of_a_mixture_has_its_corpora_by_weight() -> None:
    mixture = Order(MIXED, seed=0, global_batch=16, weights=[2, 1, 1])
    assert mixture.shares == (0.5, 0.25, 0.25)
    assert mixture.steps_per_epoch == (15, 4, 75)
    passed: list[dict[int, list[int]]] = [{}, {}, {}]
    for step in range(30):
        samples = mixture.samples(step)
        corpora, shards, _ = mixture.locate(samples.positions)
        assert np.bincount(corpora).tolist() == [8, 4, 4]
        assert all(0 <= shard < len(MIXED[corpus]) for corpus, shard in zip(corpora, shards, strict=True))
        for world_size in (2, 4, 8):
            parts = [mixture.samples(step, rank=rank, world_size=world_size) for rank in range(world_size)]
            np.testing.assert_array_equal(np.concatenate([part.positions for part in parts]), samples.positions)
            np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), samples.epochs)
            of_ranks = [np.bincount(mixture.locate(part.positions)[0], minlength=3)[0] for part in parts]
            assert set(of_ranks) == {8 // world_size}  # every rank gets the same mixture
        for corpus, epoch, position in zip(corpora, samples.epochs, samples.positions, strict=True):
            assert epoch == step // mixture.steps_per_epoch[corpus]
            passed[corpus].setdefault(int(epoch), []).append(int(position))
    assert all(len(set(positions)) == len(positions) for epochs in passed for positions in epochs.values())
    assert sorted(passed[1]) == list(range(8))  # eight epochs of the smallest corpus


def test_steps_taken_together_are_the_steps_taken_one_by_one() -> None:
    mixture = Order(MIXED, seed=0, global_batch=16, weights=[2, 1, 1])
    one_by_one = [mixture.slice(step, range(3, 14)) for step in range(2, 40)]  # ten epochs of the smallest corpus
    for one, other in zip(mixture.slices(range(2, 40), range(3, 14)), one_by_one, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.epochs, other.epochs)


def test_a_mixture_without_weights_takes_corpora_by_size() -> None:
    assert Order([[300], [100]], seed=0, global_batch=8).shares == (0.75, 0.25)


@pytest.mark.parametrize(
    ("weights", "size", "message"),
    [([1, 1, 1000], 16, "less than one of the 16 lanes"), ([1, 30, 1], 64, "part of one of them")],
)
def test_an_impossible_mixture_is_refused(weights: list[float], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Order(MIXED, seed=0, global_batch=size, weights=weights)


def test_the_order_of_a_billion_samples_is_prepared_at_once_and_a_batch_takes_milliseconds() -> None:
    """Bounds are ten times the measured values, which are in `bench_stream.py`."""
    counts = np.random.default_rng(0).integers(5_000, 15_000, 100_000).tolist()
    began = time.perf_counter()
    tracemalloc.start()
    prepared = Order([counts], seed=0, global_batch=768)
    prepared.samples(0)
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
    times = []
    for step in np.random.default_rng(1).integers(0, 1_000_000, 200).tolist():
        began = time.perf_counter()
        samples = prepared.samples(step, rank=5, world_size=8)
        times.append(time.perf_counter() - began)
        assert len(np.unique(samples.positions)) == 96
    assert np.median(times) < 5e-3


def test_positions_count_planes_over_the_shards() -> None:
    shards, samples = locate(UNEVEN, np.array([0, 30, 31, 37, 38, 304]))
    assert shards.tolist() == [0, 0, 1, 1, 2, 6]
    assert samples.tolist() == [0, 30, 0, 6, 0, 11]


def test_a_world_size_that_does_not_divide_the_lanes_is_refused_with_those_that_do() -> None:
    check_world_size(12, 6)
    for world_size in (5, 8, 24, 0):
        with pytest.raises(DataError, match="use 1, 2, 3, 4, 6, 12 ranks"):
            check_world_size(12, world_size)


def test_a_micro_batch_must_divide_the_part_of_a_rank() -> None:
    assert sizes_for_micro_batch(12, [1, 2, 3, 4], 3) == [1, 2, 4]  # parts of 12, 6, 4 and 3 images
    assert sizes_for_micro_batch(12, [1, 2, 3, 4], None) == [1, 2, 3, 4]
    check_micro_batch(12, 2, 3)
    check_micro_batch(12, 2, None)
    with pytest.raises(DataError, match="got 4 for 12 images over 2 workers: 6 each"):
        check_micro_batch(12, 2, 4)
    with pytest.raises(DataError, match="got 5 for 12 images over 3 workers: 4 each"):
        sizes_for_micro_batch(12, [3, 4], 5)


def test_a_corpus_smaller_than_a_global_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"305 samples.*306"):
        global_batch(UNEVEN, seed=0, epoch=0, step=0, global_batch=306)


def test_steps_and_ranks_out_of_range_are_value_errors() -> None:
    with pytest.raises(ValueError, match="step"):
        global_batch(UNEVEN, seed=0, epoch=0, step=19, global_batch=16)
    with pytest.raises(ValueError, match="rank"):
        rank_batch(UNEVEN, seed=0, epoch=0, step=0, global_batch=16, rank=2, world_size=2)
    with pytest.raises(ValueError, match="global_batch"):
        num_lanes(0)


def test_a_position_in_a_mixture_is_found_in_its_corpus_shard_and_sample() -> None:
    mixture = Order([[3, 1, 2], [2, 4]], seed=0, global_batch=4)
    expected = [
        (corpus, shard, sample)
        for corpus, counts in enumerate([[3, 1, 2], [2, 4]])
        for shard, count in enumerate(counts)
        for sample in range(count)
    ]
    assert [tuple(map(int, place)) for place in zip(*mixture.locate(np.arange(12)), strict=True)] == expected
    shuffled = np.array([11, 0, 6, 5])
    assert [tuple(map(int, place)) for place in zip(*mixture.locate(shuffled), strict=True)] == [
        expected[position] for position in shuffled
    ]
    assert mixture.num_samples(1, 1) == 4
