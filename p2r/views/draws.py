"""A sample's key, the name of a draw, an index -> a random number, without state.

Every number is a hash of its purpose (a counter-based generator). So adding or disabling a transform does not change the
numbers of others, and a sample's numbers do not depend on the rest of the batch. Noise, one number per pixel, is generated
on the device in integers; a stateful stream per sample would need the host, one sample after another.

Parameters are few and are drawn on the host in double precision (splitmix64). Noise is drawn on the device (`p2r.device`),
two values from each hash by the Box-Muller transform: CPU and CUDA agree up to the rounding of four functions. With 16 bits
for the radius, noise is bounded by 4.9 standard deviations.

Letters: B samples. Source: Steele, Lea, Flood 2014 (splitmix64).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.device import random_bits
from p2r.randomness import keyed_number

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Draws:
    """The random numbers of B samples."""

    keys: NDArray[np.uint64]
    """(B,) keys; a sample's numbers depend only on its key and their names."""

    @classmethod
    def of_samples(cls, seed: int, *, epochs: NDArray[np.int64], positions: NDArray[np.int64]) -> "Draws":
        """Key samples by the seed of the run, the epoch, and their position in the corpus."""
        pairs = zip(epochs.tolist(), positions.tolist(), strict=True)
        return cls(np.array([keyed_number(seed, "views", *pair) >> 64 for pair in pairs], dtype=np.uint64))

    @classmethod
    def of_generators(cls, generators: Sequence[np.random.Generator]) -> "Draws":
        """Key samples by exactly one number from each generator."""
        keys = [generator.integers(2**64, dtype=np.uint64) for generator in generators]
        return cls(np.array(keys, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.keys)

    def named(self, name: str) -> "Draws":
        """Return independent draws of the same samples."""
        return Draws(_mix_bits(self.keys ^ _hash_name(name)))

    def take(self, rows: NDArray[np.intp]) -> "Draws":
        """Select samples by index."""
        return Draws(self.keys[rows])

    def of_contrasts(self, number: int) -> "Draws":
        """Return independent draws of each of C contrasts of the samples: B C keys, the contrasts of a sample one after another.

        The first contrast has the sample's own draws. So images of one contrast, and samples with `number` 1, draw as ever.
        """
        others = [self.named(f"contrast {index}").keys for index in range(1, number)]
        return Draws(np.stack([self.keys, *others], axis=1).reshape(-1))

    def named_rows(self, names: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the keys (R,) of independent draws of samples, by index of sample and of name in `rows` (R, 2)."""
        hashes = np.array([_hash_name(name) for name in names], dtype=np.uint64)
        return _mix_bits(self.keys[rows[:, 0]] ^ hashes[rows[:, 1]])

    def uniform(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Return (B, *shape) numbers in [0, 1)."""
        index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        hashes = _mix_bits(self.named(name).keys[:, None] + index * _GOLDEN)
        return ((hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(len(self), *shape)

    def between(self, low: float, high: float, name: str, *shape: int) -> NDArray[np.float64]:
        """Return (B, *shape) numbers in [low, high]."""
        return low + (high - low) * self.uniform(name, *shape)

    def normal(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Return (B, *shape) standard normal numbers."""
        radius, angle = np.moveaxis(self.uniform(name, 2, *shape), 1, 0)
        deviates: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        return deviates

    def noise(self, name: str, *shape: int, device: torch.device | None = None) -> Tensor:
        """Return (B, *shape) standard normal numbers, float32, generated on the device."""
        size = math.prod(shape)
        bits = random_bits(self.named(name).keys, (size + 1) // 2, device=device)
        radius = (((bits >> 16) & 0xFFFF).float() + 0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
        angle = (bits & 0xFFFF).float().mul_(2 * math.pi * 2.0**-16)
        pairs = torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)
        return pairs[:, :size].reshape(len(self), *shape)


def _mix_bits(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble bijectively, such that every bit of the result depends on every bit of `state`."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@cache
def _hash_name(name: str) -> np.uint64:
    return np.uint64(keyed_number(0, name) >> 64)
