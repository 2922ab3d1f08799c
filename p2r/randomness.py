"""Random generators keyed by purpose, never by worker, rank or order of calls.

`keyed_generator(seed, "views", epoch, position)` gives the same stream on every machine, for any number of ranks and after
any restart. This makes a resumed run equal to an uninterrupted one.
"""

import hashlib

import numpy as np


def keyed_generator(seed: int, *key: int | str) -> np.random.Generator:
    """Return a generator whose stream depends only on `seed` and `key`.

    Philox is counter-based: two different keys give independent streams, and making one costs microseconds.
    """
    return np.random.Generator(np.random.Philox(key=keyed_number(seed, *key)))


def keyed_number(seed: int, *key: int | str) -> int:
    """Return 128 bits that depend only on `seed` and `key`."""
    text = "\x1f".join([str(seed), *(str(part) for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
