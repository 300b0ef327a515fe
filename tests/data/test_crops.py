"""Crops: the largest box of an aspect, where it was asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.crops import crop_box
from d2f_core.data.image_rules import CROPS, check_crop

sides = st.integers(1, 5000)
aspects = st.sampled_from([(1, 1), (832, 1216), (1216, 832), (512, 2048), (704, 1408)])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(whole=st.tuples(sides, sides), size=aspects, crop=st.sampled_from(CROPS), key=st.text(max_size=3))
def test_the_box_is_the_largest_of_its_aspect_and_lies_inside_the_image(whole, size, crop, key):
    left, top, right, bottom = crop_box(whole, size, crop, key)
    kept = right - left, bottom - top
    assert 0 <= left < right <= whole[0] and 0 <= top < bottom <= whole[1]
    assert kept[0] == whole[0] or kept[1] == whole[1]
    wanted = kept[1] * size[0] / size[1], kept[0] * size[1] / size[0]
    assert abs(kept[0] - wanted[0]) <= 0.51 or abs(kept[1] - wanted[1]) <= 0.51 or min(kept) == 1


def test_the_centre_and_the_top_are_where_they_are_called():
    assert crop_box((1200, 801), (512, 512), "center") == (199, 0, 1000, 801)
    assert crop_box((640, 1001), (512, 512), "center") == (0, 180, 640, 820)
    assert crop_box((640, 1001), (512, 512), "top") == (0, 0, 640, 640)
    assert crop_box((1200, 801), (512, 512), "top") == (199, 0, 1000, 801), "of a wide image, the middle"


def test_a_random_place_is_the_key_s_and_every_place_comes_up():
    places = [crop_box((13, 10), (1, 1), "random", f"sample {number}")[0] for number in range(200)]
    assert places == [crop_box((13, 10), (1, 1), "random", f"sample {number}")[0] for number in range(200)]
    assert {place: places.count(place) for place in set(places)}.keys() == {0, 1, 2, 3}
    assert min(places.count(place) for place in range(4)) > 30
    assert places[:4] == [1, 3, 0, 3], "stored tables were cut so"


def test_another_word_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"crop='centre' is not a way to crop\. Use one of center, top, random\."):
        check_crop("centre")
