"""Which pictures look alike: hashes that survive what people do to files, and clusters that miss no pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from d2f_core.import_images import alike
from d2f_core.import_images.alike import clusters
from d2f_core.import_images.looks import perceptual_hash, sharpness
from tests.import_images.photos import photo


def bits(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


@pytest.mark.parametrize("number", range(6))
def test_a_copy_of_another_size_or_light_looks_alike_and_another_picture_does_not(number: int) -> None:
    image, _ = photo(number, scale=4)
    assert bits(image, image.resize([side // 3 for side in image.size])) <= 4
    assert bits(image, ImageEnhance.Brightness(image).enhance(1.05)) <= 4
    assert bits(image, ImageOps.mirror(image)) > 10
    assert bits(image, photo(number + 6, scale=4)[0]) > 10


def test_even_pictures_of_all_colours_have_one_hash() -> None:
    assert {perceptual_hash(Image.new("RGB", (50, 40), colour)) for colour in ("white", "black", "red")} == {0}


def test_a_blurred_picture_is_less_sharp_at_any_size() -> None:
    for scale in (2, 8):
        assert sharpness(photo(1, scale=scale)[0]) > 5 * sharpness(photo(1, blurred=True, scale=scale)[0])


def plainly(hashes: list[int], distance: int) -> list[int]:
    """Each picture's cluster by comparing each with each until nothing changes."""
    cluster = list(range(len(hashes)))
    for _ in hashes:
        for one, a in enumerate(hashes):
            for other, b in enumerate(hashes):
                if (a ^ b).bit_count() <= distance:
                    cluster[one] = cluster[other] = min(cluster[one], cluster[other])
    return cluster


near = st.tuples(st.sampled_from([0, 2**64 - 1, 0x0123456789ABCDEF]), st.lists(st.integers(0, 63), max_size=5))


@given(st.lists(near, max_size=12), st.integers(0, 6))
def test_clusters_are_those_of_comparing_each_with_each(drawn: list[tuple[int, list[int]]], distance: int) -> None:
    hashes = [value ^ sum(1 << bit for bit in set(flipped)) for value, flipped in drawn]
    assert clusters(np.array(hashes, np.uint64), distance).tolist() == plainly(hashes, distance)


def test_below_zero_not_even_equal_hashes_are_alike() -> None:
    assert clusters(np.array([7, 7], np.uint64), -1).tolist() == [0, 1]


def test_a_burst_of_alike_pictures_is_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counted(values: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(values)
        return np.bitwise_count(values)

    draw = np.random.default_rng(0)
    flipped = draw.integers(0, 64, (3000, 2))
    burst = np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64), axis=1) ^ np.uint64(0x0123456789ABCDEF)
    spread = draw.integers(0, 2**64, 20_000, dtype=np.uint64)
    monkeypatch.setattr(alike, "bits_of", counted)
    assert len(np.unique(clusters(np.concatenate([burst, spread]), 4))) == 20_001
    assert compared < 1_000_000  # each with each: 266 million
