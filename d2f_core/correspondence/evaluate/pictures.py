"""Pairs of images side by side, with lines from each point to where a matcher found it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from d2f_core.correspondence.evaluate.measure import both, read_image
from d2f_core.data.sources.pair_sample import PairSample

HEIGHT, GAP = 320, 16
"""Of the drawing in pixels: twice the height that a page shows, for high-density screens."""
RIGHT, WRONG, GUESS = "#1a9850", "#d73027", "#8c8c8c"
RADIUS, WIDTH = 5, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """One point of a pair, in pixels of the original images."""

    source: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    guess: np.ndarray
    """Of the floor, without a look at the images."""
    right: bool


def draw_pair(pair: PairSample, lines: Sequence[Line]) -> Image.Image:
    """Source and target; green where the point was found, red where not with a ring around the true place, and a grey
    dot where the floor guessed."""
    images, scales = [], []
    for image in both(pair):
        picture = Image.fromarray(read_image(image))
        scale = HEIGHT / picture.height
        images.append(picture.resize((max(1, round(picture.width * scale)), HEIGHT), Image.Resampling.LANCZOS))
        scales.append(scale)
    left = images[0].width + GAP
    canvas = Image.new("RGB", (left + images[1].width, HEIGHT), "white")
    canvas.paste(images[0], (0, 0))
    canvas.paste(images[1], (left, 0))
    draw = ImageDraw.Draw(canvas)

    def place(point: np.ndarray, target: bool) -> tuple[float, float]:
        x, y = (point * scales[target]).tolist()
        return x + (left if target else 0), y

    for line in lines:
        _dot(draw, place(line.guess, True), GUESS)
    for line in lines:
        colour = RIGHT if line.right else WRONG
        begin, end = place(line.source, False), place(line.predicted, True)
        draw.line([begin, end], fill=colour, width=WIDTH)
        _dot(draw, begin, colour)
        _dot(draw, end, colour)
        if not line.right:
            x, y = place(line.truth, True)
            draw.ellipse([x - 8, y - 8, x + 8, y + 8], outline=RIGHT, width=WIDTH)
    return canvas


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], colour: str) -> None:
    x, y = at
    draw.ellipse([x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS], fill=colour, outline="white")
