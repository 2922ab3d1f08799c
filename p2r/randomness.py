"""Random generators keyed by what they are for, never by worker, rank or order of calls.

`keyed_generator(seed, "views", epoch, position)` gives the same stream on every machine, for any number of ranks and
after any restart: this is what makes a resumed run the run that it would have been.
"""

import hashlib

import numpy as np


def keyed_generator(seed: int, *key: int | str) -> np.random.Generator:
    """Return a generator whose stream depends on `seed` and `key` alone.

    Philox is counter-based: two different keys give independent streams, and making one costs microseconds.
    """
    text = "\x1f".join([str(seed), *(str(part) for part in key)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
