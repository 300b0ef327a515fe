"""Aspect-ratio buckets: sizes of about equal area, and the one that an image is cropped to.

Sizes are made as NovelAI's and kohya's trainers make them: all widths and heights that are multiples of a step, with at
most the area of the square of the resolution.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache

Size = tuple[int, int]
"""Width and height in pixels."""
AUTO = "auto"
SIZE_RULE = re.compile("([1-9][0-9]*)x([1-9][0-9]*)")
WIDEST = 4
"""Longest side over shortest of the sizes that are made."""
MOST_AREA = 2
"""Times the area of the square of the resolution that a given size may have, and the reverse: batches of all sizes have
as many images, and must fit into the same memory."""


class BucketSizeError(ValueError):
    """Sizes that images cannot be parted into; the message gives the rule and the fix."""


def size_name(size: Size) -> str:
    """`WIDTHxHEIGHT`."""
    return f"{size[0]}x{size[1]}"


def make_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """The sizes whose sides are multiples of `step` pixels, from a shortest of half the resolution on, each the highest
    of its width or the widest of its height with at most the resolution's square as area; by aspect, tall ones first.

    Raises:
        BucketSizeError: the step is below 1, or leaves the square alone.
    """
    if step < 1:
        raise BucketSizeError(f"bucket_step={step} must be at least 1 pixel. Use 64.")
    shortest, longest = resolution // 2, resolution * 2
    square = max(1, resolution // step) * step
    found = {(square, square)}
    for side in range(-(-shortest // step) * step, longest + 1, step):
        other = min(longest, resolution**2 // side) // step * step
        if other >= shortest and max(side, other) <= WIDEST * min(side, other):
            found |= {(side, other), (other, side)}
    if len(found) < 2:
        raise BucketSizeError(
            f"bucket_step={step} leaves a single size at resolution={resolution}. Give a smaller step, such as "
            f"{max(1, resolution // 8)}."
        )
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


@lru_cache
def parse_sizes(texts: tuple[str, ...], resolution: int, step: int) -> tuple[Size, ...]:
    """The sizes that `--buckets` names: those of `make_sizes` for `auto`, else one of each `WIDTHxHEIGHT`, in order.

    Raises:
        BucketSizeError: a text is no size, comes twice, or its area is not about that of the resolution's square.
    """
    if texts == (AUTO,):
        return make_sizes(resolution, step)
    found = []
    for text in texts:
        if not (match := SIZE_RULE.fullmatch(text)):
            raise BucketSizeError(f"buckets: {text!r} is not WIDTHxHEIGHT in pixels, such as 832x1216, or auto alone.")
        size = int(match[1]), int(match[2])
        if size in found:
            raise BucketSizeError(f"buckets: {text} is there twice. Leave one out.")
        if not resolution**2 <= MOST_AREA * size[0] * size[1] <= MOST_AREA**2 * resolution**2:
            edge = round(math.sqrt(size[0] * size[1]))
            raise BucketSizeError(
                f"buckets: {text} has not about the area of resolution={resolution}, half to twice its square. Give "
                f"--resolution {edge}, or another size."
            )
        found.append(size)
    return tuple(found)


def nearest_size(whole: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect is nearest to that of an image, by the logarithm of their ratio.

    Of several with that aspect, the largest that the image is not enlarged to, or else the smallest.
    """
    aspect = math.log(whole[0] / whole[1])
    distances = [round(abs(math.log(width / height) - aspect), 9) for width, height in sizes]
    near = [size for size, distance in zip(sizes, distances, strict=True) if distance == min(distances)]
    fitting = [size for size in near if not enlarges(whole, size)]
    if fitting:
        return max(fitting, key=_by_area)
    return min(near, key=_by_area)


def _by_area(size: Size) -> tuple[int, Size]:
    return size[0] * size[1], size


def enlarges(whole: Size, size: Size) -> bool:
    """Whether an image has to be enlarged to fill a size."""
    return whole[0] < size[0] or whole[1] < size[1]
