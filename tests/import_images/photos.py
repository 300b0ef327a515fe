"""Photographs that are drawn by chance: smooth light, a few shapes and grain, in many sizes, with captions."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZES = ((96, 64), (64, 96), (80, 80), (120, 64), (64, 110), (128, 96))
SHAPES, COLOURS = ("circle", "square", "line"), ("red", "green", "blue", "yellow", "white", "black")


def photo(number: int, *, blurred: bool = False, scale: int = 1) -> tuple[Image.Image, str]:
    """A picture and its caption; equal numbers give equal ones."""
    draw = np.random.default_rng(number)
    width, height = (side * scale for side in SIZES[number % len(SIZES)])
    light = Image.fromarray(draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height), 3)
    words, pen = [], ImageDraw.Draw(light)
    for _ in range(3):
        shape, colour = draw.choice(SHAPES), draw.choice(COLOURS)
        left, top = draw.integers(0, width // 2), draw.integers(0, height // 2)
        box = (left, top, left + draw.integers(8, width // 2), top + draw.integers(8, height // 2))
        kind = {"circle": pen.ellipse, "square": pen.rectangle, "line": pen.line}[str(shape)]
        kind([int(edge) for edge in box], fill=str(colour))
        words.append(f"a {colour} {shape}")
    grain = draw.normal(0, 6, (height, width, 3))
    image = Image.fromarray((np.asarray(light) + grain).clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(4)) if blurred else image, " and ".join(words)


def jpeg(image: Image.Image, quality: int = 90, **how: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality, **how)
    return sink.getvalue()


def write_photos(directory: Path, count: int, *, first: int = 0, scale: int = 1) -> Path:
    """JPEG files with a caption beside each."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image, caption = photo(number, scale=scale)
        put(directory, f"photo{number:04d}", image, caption)
    return directory


def put(directory: Path, name: str, image: Image.Image, caption: str, **how: Any) -> Path:
    (directory / f"{name}.txt").write_text(caption)
    file = directory / f"{name}.jpg"
    file.write_bytes(jpeg(image, **how))
    return file
