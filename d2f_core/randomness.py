"""Random numbers keyed by sample rather than by process.

Philox is counter-based: (seed, key) selects a stream directly, so the numbers of a sample are the same on any worker,
in any order, after any restart, and no generator state has to be saved.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def keyed_generator(seed: int, key: str | int, purpose: str = "") -> np.random.Generator:
    """The random generator of a (seed, key, purpose); equal arguments give equal numbers on any machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def keyed_normal(seed: int, keys: Sequence[str | int], shape: tuple[int, ...], purpose: str = "noise") -> np.ndarray:
    """Standard normal noise, float32 [len(keys), *shape]; row i depends only on (seed, keys[i], purpose)."""
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(out, keys, strict=True):
        keyed_generator(seed, key, purpose).standard_normal(dtype=np.float32, out=row)
    return out


def keyed_uniform(seed: int, keys: Sequence[str | int], purpose: str) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 [len(keys)]; entry i depends only on (seed, keys[i], purpose)."""
    return np.array([keyed_generator(seed, key, purpose).random(dtype=np.float32) for key in keys], dtype=np.float32)


def sample_keys(epochs: Iterable[int], rows: Iterable[int]) -> list[str]:
    """Keys that seed each sample's random numbers."""
    return [f"{epoch}/{row}" for epoch, row in zip(epochs, rows, strict=True)]
