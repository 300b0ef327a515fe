"""Aspect-ratio buckets: the sizes that are made, and the one that an image goes to."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.aspect_buckets import BucketSizeError, enlarges, make_sizes, nearest_size, parse_sizes

SDXL = ("1024x1024", "1152x896", "896x1152", "1216x832", "832x1216", "1344x768", "768x1344", "1536x640", "640x1536")
"""The sizes that SDXL's authors name for drawing."""


def test_the_sizes_of_auto_are_those_that_sdxl_is_drawn_at_and_others_of_their_kind():
    sizes = make_sizes(1024, 64)
    assert set(parse_sizes(SDXL, 1024, 64)) <= set(sizes) and len(sizes) == len(set(sizes)) == 33
    assert all(not width % 64 and not height % 64 and width * height <= 1024**2 for width, height in sizes)
    assert all((height, width) in sizes for width, height in sizes)
    assert parse_sizes(("auto",), 1024, 64) == sizes and sizes[0] == (512, 2048)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(width=st.integers(300, 20_000), height=st.integers(300, 20_000))
def test_an_image_goes_to_the_nearest_aspect(width, height):
    sizes = make_sizes(512, 64)
    chosen = nearest_size((width, height), sizes)
    off = {size: abs(math.log(width / height * size[1] / size[0])) for size in sizes}
    assert off[chosen] <= min(off.values()) + 1e-8


def test_common_photos_lose_little():
    sizes = make_sizes(1024, 64)
    found = {whole: nearest_size(whole, sizes) for whole in [(4000, 3000), (3000, 4000), (6000, 4000), (1080, 1920)]}
    assert list(found.values()) == [(1152, 896), (896, 1152), (1216, 832), (768, 1344)]


def test_of_equal_aspects_the_largest_is_taken_that_enlarges_nothing():
    sizes = ((512, 512), (640, 640), (576, 576), (640, 512))
    assert nearest_size((600, 601), sizes) == (576, 576) and nearest_size((900, 900), sizes) == (640, 640)
    assert nearest_size((100, 100), sizes) == (512, 512) and enlarges((100, 100), (512, 512))


@pytest.mark.parametrize(
    ("texts", "step", "message"),
    [
        (("832*1216",), 64, r"'832\*1216' is not WIDTHxHEIGHT in pixels, such as 832x1216, or auto alone"),
        (("auto", "1024x1024"), 64, "'auto' is not WIDTHxHEIGHT"),
        (("1024x1024", "1024x1024"), 64, "1024x1024 is there twice"),
        (("512x512",), 64, r"512x512 has not about the area of resolution=1024.* Give --resolution 512"),
        (("auto",), 0, "bucket_step=0 must be at least 1 pixel"),
        (("auto",), 1024, "bucket_step=1024 leaves a single size at resolution=1024"),
    ],
)
def test_sizes_that_cannot_be_are_refused(texts, step, message):
    with pytest.raises(BucketSizeError, match=message):
        parse_sizes(texts, 1024, step)
