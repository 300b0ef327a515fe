"""Which size an image is brought to, and which part of it is kept."""

from d2f_core.data.aspect_buckets import Size, nearest_size
from d2f_core.data.image_rules import Crop, ImageRules
from d2f_core.randomness import keyed_generator

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


def size_of(whole: Size, rules: ImageRules) -> Size:
    """Width and height that an image is cropped and resized to."""
    return nearest_size(whole, rules.sizes) if rules.sizes else (rules.resolution, rules.resolution)


def crop_box(whole: Size, size: Size, crop: Crop, key: str = "") -> Box:
    """The largest box of one aspect inside an image, in whole pixels.

    Args:
        whole: width and height of the image in pixels.
        size: any width and height of the aspect.
        crop: where the box lies along the side that is cut. `center`: in the middle. `top`: at the upper edge of an
            image that is too tall, in the middle of one that is too wide. `random`: anywhere, each place as likely.
        key: what `random` is drawn from; equal keys give equal places in images of equal sizes.
    """
    (width, height), (to_width, to_height) = whole, size
    if width * to_height > height * to_width:
        kept = (max(1, round(height * to_width / to_height)), height)
    else:
        kept = (width, max(1, round(width * to_height / to_width)))
    room = (width - kept[0], height - kept[1])
    if crop == "random":
        left, top = (int(place) for place in keyed_generator(0, key, "crop").integers(0, room, endpoint=True))
    else:
        left, top = room[0] // 2, 0 if crop == "top" else room[1] // 2
    return left, top, left + kept[0], top + kept[1]
