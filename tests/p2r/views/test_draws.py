"""Random numbers: pure functions of key, name and index, with the statistics of random numbers."""

import numpy as np
import pytest
import torch
from scipy import stats

from p2r.device import _hash_counters
from p2r.randomness import keyed_generator
from p2r.views.draws import Draws, _mix_bits


def draws(num: int, *, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws.of_samples(seed, epochs=np.full(num, epoch), positions=np.arange(num))


def test_numbers_do_not_depend_on_other_samples_of_the_batch() -> None:
    together, alone = draws(9), Draws(draws(9).keys[4:5])
    assert np.array_equal(together.uniform("x", 3, 2)[4], alone.uniform("x", 3, 2)[0])
    assert np.array_equal(together.normal("x", 5)[4], alone.normal("x", 5)[0])
    assert torch.equal(together.noise("x", 1, 40, 33)[4], alone.noise("x", 1, 40, 33)[0])


def test_numbers_do_not_depend_on_what_was_drawn_before() -> None:
    one, other = draws(2), draws(2)
    one.uniform("first")
    assert np.array_equal(one.uniform("second"), other.uniform("second"))


def test_seed_epoch_position_and_name_each_give_other_numbers() -> None:
    base = draws(2)
    numbers = [*base.uniform("x"), *draws(2, seed=1).uniform("x"), *draws(2, epoch=1).uniform("x"), *base.uniform("y")]
    numbers += [*base.named("a").uniform("x"), *base.named("b").uniform("x"), *base.named("x").uniform("a")]
    assert len(set(numbers)) == len(numbers)


def test_one_number_is_taken_of_a_generator() -> None:
    generators = [keyed_generator(0, index) for index in range(3)]
    keys = Draws.of_generators(generators).keys
    expected = [keyed_generator(0, index) for index in range(3)]
    assert keys.tolist() == [int(generator.integers(2**64, dtype=np.uint64)) for generator in expected]
    assert [generator.random() for generator in generators] == [generator.random() for generator in expected]


def test_the_hashes_are_those_of_their_sources() -> None:
    golden = 0x9E3779B97F4A7C15
    states = np.array([1234567 + golden, (1234567 + 2 * golden) % 2**64], dtype=np.uint64)
    assert _mix_bits(states).tolist() == [6457827717110365317, 3203168211198807973]  # splitmix64, seed 1234567

    def triple32(x: int) -> int:
        x ^= x >> 17
        x = x * 0xED5AD4BB % 2**32
        x ^= x >> 11
        x = x * 0xAC4C1B51 % 2**32
        x ^= x >> 15
        x = x * 0x31848BAB % 2**32
        return x ^ x >> 14

    counter = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    hashes = _hash_counters(counter, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    assert (hashes[0].numpy().view(np.uint32)).tolist() == [triple32(x % 2**32) for x in counter.tolist()]


def test_the_numbers_of_a_key_stay_what_they_are() -> None:
    one = draws(1)
    assert one.uniform("x", 2)[0].tolist() == pytest.approx([0.594030614649998, 0.891935692953037], abs=1e-15)
    expected = [-1.614764, -1.051559, 0.017185, 0.195472]
    assert one.noise("x", 4)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = draws(2000).uniform("x", 50)
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 1e-3
    assert (np.abs(np.corrcoef(numbers.T) - np.eye(50)) < 0.1).all()  # of one index with another
    assert abs(np.corrcoef(numbers[:-1].flatten(), numbers[1:].flatten())[0, 1]) < 0.015  # of neighbouring samples
    assert abs(np.corrcoef(numbers.flatten(), draws(2000).uniform("y", 50).flatten())[0, 1]) < 0.015
    between = draws(2000).between(-3, 5, "x", 50)
    assert -3 <= between.min() < -2.9
    assert 4.9 < between.max() <= 5


def test_normal_numbers_are_normal() -> None:
    assert stats.kstest(draws(500).normal("x", 20).flatten(), "norm").pvalue > 1e-3


def test_noise_is_normal() -> None:
    noise = draws(4).noise("x", 1, 256, 255).double().flatten().numpy()
    num = noise.size
    assert abs(noise.mean()) < 4 / num**0.5
    assert abs(noise.var() - 1) < 4 * (2 / num) ** 0.5
    assert abs(stats.skew(noise)) < 4 * (6 / num) ** 0.5
    assert abs(stats.kurtosis(noise)) < 4 * (24 / num) ** 0.5
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 4.2 < np.abs(noise).max() < 4.9


def test_noise_is_independent_of_place_sample_contrast_and_name() -> None:
    noise = draws(6).noise("x", 2, 128, 128).double()
    flat = noise.flatten(1)
    power = torch.fft.rfft(flat).abs()[:, 1:-1].square() / flat.shape[1]  # white: exponential with mean 1
    assert stats.kstest(power.flatten().numpy(), "expon").pvalue > 1e-3
    others = [noise.flatten(0, 1).flatten(1), draws(6).noise("y", 128, 128).double().flatten(1)]
    rows = torch.cat(others)
    for values in (rows, rows.square()):  # the two numbers of a pair share a radius: squares would tell
        correlation = torch.corrcoef(values) - torch.eye(len(values))
        assert correlation.abs().max() < 5 / 128
    half = flat.shape[1] // 2
    for values in (flat, flat.square(), flat.abs()):
        assert np.abs(np.corrcoef(values[:, :half].flatten(), values[:, half:].flatten())[0, 1]) < 0.015


def test_an_odd_number_of_pixels_is_no_exception() -> None:
    assert draws(3).noise("x", 1, 7, 5).shape == (3, 1, 7, 5)
    assert draws(3).noise("x", 1).shape == (3, 1)


@pytest.mark.gpu
def test_noise_on_a_gpu_is_that_of_the_cpu_to_rounding() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = draws(4).noise("x", 1, 64, 65, device=torch.device("cuda")).cpu()
    torch.testing.assert_close(on_gpu, draws(4).noise("x", 1, 64, 65), rtol=1e-5, atol=1e-6)
