"""Procedural textures for rendered scenes, numbered; train and test have none in common."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from d2f_core.randomness import keyed_generator

TEXTURE_SIZE = 64
"""Height and width in pixels; a pattern repeats without a seam."""


@lru_cache(maxsize=512)
def make_texture(split: str, number: int) -> np.ndarray:
    """Uint8 [64, 64, 3], a pure function of the split and the number."""
    rng = keyed_generator(0, f"{split}/{number}", "texture")
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))](rng)
    first, second = _colour(rng), _colour(rng)
    colours = first + (second - first) * pattern[..., None]
    grain = 1 + rng.uniform(0.05, 0.25) * (_noise(rng, 0.6)[..., None] - 0.5)
    return (255 * np.clip(colours * grain, 0, 1)).astype(np.uint8)


def make_sky(rng: np.random.Generator, size: int) -> np.ndarray:
    """Float [size, size, 3] in [0, 1]: the background, a gradient between two colours, sometimes with clouds."""
    top, bottom = rng.uniform(0.2, 1, 3), rng.uniform(0.5, 1, 3)
    ramp = np.linspace(0, 1, size)[:, None, None]
    sky = np.broadcast_to(top + (bottom - top) * ramp, (size, size, 3))
    if rng.random() < 0.5:
        step = np.arange(size) * TEXTURE_SIZE // size
        clouds = _noise(rng, 1.6)[np.ix_(step, step)][..., None]
        sky = sky + (1 - sky) * np.clip(2 * clouds - 0.8, 0, 1)
    return sky


def _colour(rng: np.random.Generator) -> np.ndarray:
    colour, grey = rng.uniform(0.05, 1, 3), rng.uniform(0.1, 1)
    return colour + (grey - colour) * rng.uniform(0, 0.7)


def _noise(rng: np.random.Generator, power: float) -> np.ndarray:
    """Seamless noise in [0, 1] whose amplitude falls with frequency to the power `power`."""
    radius = np.hypot(np.fft.fftfreq(TEXTURE_SIZE)[:, None], np.fft.rfftfreq(TEXTURE_SIZE)[None, :])
    radius[0, 0] = np.inf
    real, imaginary = rng.standard_normal((2, *radius.shape))
    values = np.fft.irfft2((real + 1j * imaginary) / radius**power)
    return (values - values.min()) / (values.max() - values.min())


def _grid(rng: np.random.Generator, warp: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates in [0, 1), distorted by noise of strength `warp`."""
    line = (np.arange(TEXTURE_SIZE) + 0.5) / TEXTURE_SIZE
    return line[None, :] + warp * _noise(rng, 1.5), line[:, None] + warp * _noise(rng, 1.5)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, rng.uniform(1, 2))


def _plain(rng: np.random.Generator) -> np.ndarray:
    return 0.3 * _noise(rng, 1.2)


def _checks(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(rng, 0)
    count = int(rng.integers(1, 4)) * 2
    return ((np.floor(x * count) + np.floor(y * count)) % 2).astype(float)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(rng, rng.choice([0, 0.08, 0.2]))
    return 0.5 + 0.5 * np.sin(2 * np.pi * int(rng.integers(2, 6)) * (x if rng.random() < 0.5 else y))


def _bricks(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(rng, 0)
    rows = int(rng.integers(2, 5)) * 2
    row = np.floor(y * rows)
    across = (x * rows / 2 + 0.5 * (row % 2)) % 1
    return 1 - ((across < 0.08) | ((y * rows) % 1 < 0.16)) * 1.0


def _dots(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(rng, rng.choice([0, 0.05]))
    count = int(rng.integers(2, 6))
    return (np.hypot((x * count) % 1 - 0.5, (y * count) % 1 - 0.5) < rng.uniform(0.2, 0.42)) * 1.0


PATTERNS: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (_clouds, _plain, _checks, _stripes, _bricks, _dots)
