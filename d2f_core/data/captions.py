"""What a caption must be, wherever captioned images are read."""

from d2f_core.data.image_headers import BadImageError


def check_caption(caption: str | None) -> str:
    """The caption without outer white space.

    Raises:
        BadImageError: the caption is missing, empty or not UTF-8.
    """
    if caption is None or not caption.strip():
        raise BadImageError("no_caption: empty" if caption is not None else "no_caption: none found")
    if "\ufffd" in caption:
        raise BadImageError("bad_caption: not UTF-8")
    return caption.strip()
