"""Colour profiles: the colours that a file means become those of sRGB, whatever stores them."""

import dataclasses
import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from d2f_core.data.image_colours import MAX_PROFILE_BYTES
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import BadImageError, decode_image, prepare_image
from tests.data.hostile_pictures import big, chunk, jpeg_with, png_with, segment
from tests.data.pictures import file_bytes, pixels
from tests.data.profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    gamma_curve,
    grey_profile,
    in_srgb,
    linear,
    matrix_profile,
)

STORED = ImageRules(resolution=16, min_side=8, max_pixels=10_000)
RULES = dataclasses.replace(STORED, decoding="srgb")
P3 = matrix_profile(DISPLAY_P3)
ORANGE = (200, 60, 40)
ORANGE_OF_P3 = (217, 42, 23)
"""What Display P3 means by (200, 60, 40), in sRGB."""


def saved(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **how)
    return sink.getvalue()


def colour(data: bytes) -> np.ndarray:
    return prepare_image(data, RULES).pixels[8, 8].astype(int)


def plain(mode: str, value, size: int = 20) -> Image.Image:
    return Image.new(mode, (size, size), value)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(("kind", "how"), [("PNG", {}), ("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})])
def test_a_phones_display_p3_becomes_srgb_and_without_a_profile_the_values_stay(kind, how):
    np.testing.assert_allclose(in_srgb(linear(np.array(ORANGE)), DISPLAY_P3), ORANGE_OF_P3, atol=0.6)
    image = plain("RGB", ORANGE)
    np.testing.assert_allclose(colour(saved(image, kind, icc_profile=P3, **how)), ORANGE_OF_P3, atol=2)
    np.testing.assert_allclose(colour(saved(image, kind, **how)), ORANGE, atol=1)


@pytest.mark.parametrize("value", [ORANGE, (40, 120, 60), (128, 128, 128)])
def test_adobe_rgb_with_its_own_gamma_becomes_srgb(value):
    data = saved(plain("RGB", value), icc_profile=matrix_profile(ADOBE_RGB, gamma_curve(2.19921875)))
    expected = in_srgb((np.array(value) / 255) ** 2.19921875, ADOBE_RGB)
    np.testing.assert_allclose(colour(data), expected, atol=1)


def test_greys_of_another_gamma_become_those_of_srgb():
    data = saved(plain("L", 100), icc_profile=grey_profile(gamma_curve(1.8)))
    expected = in_srgb(np.full(3, (100 / 255) ** 1.8), SRGB)
    np.testing.assert_allclose(colour(data), expected, atol=1)
    opaque = saved(plain("LA", (100, 255)), icc_profile=grey_profile(gamma_curve(1.8)))
    np.testing.assert_array_equal(colour(opaque), colour(data))


def test_cmyk_is_read_by_its_presss_table():
    black, white = (
        saved(plain("CMYK", (0, 0, 0, k)), "JPEG", quality=100, icc_profile=cmyk_profile()) for k in (255, 0)
    )
    np.testing.assert_allclose(colour(black), 119, atol=1)  # L* 50
    assert (colour(white) > 250).all()
    assert (colour(saved(plain("CMYK", (0, 0, 0, 255)), "JPEG", quality=100)) == 0).all(), "as ever without a profile"


@pytest.mark.parametrize("profile", [srgb_profile(), matrix_profile(SRGB)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_srgb_by_any_spelling_and_no_profile_leave_every_bit(kind, profile):
    image = Image.fromarray(pixels(3, 40, 30))
    expected = prepare_image(saved(image, kind), STORED).pixels
    for data in (saved(image, kind, icc_profile=profile), saved(image, kind)):
        np.testing.assert_array_equal(prepare_image(data, RULES).pixels, expected)


def test_profiles_are_passed_over_where_values_are_asked_for_as_stored():
    assert tuple(prepare_image(saved(plain("RGB", ORANGE), icc_profile=P3), STORED).pixels[8, 8]) == ORANGE


def test_colours_are_converted_before_transparency_meets_white():
    data = saved(plain("RGBA", (*ORANGE, 128)), icc_profile=P3)
    np.testing.assert_allclose(colour(data), (np.array(ORANGE_OF_P3) + 255) / 2, atol=2)
    palette = plain("P", 1)
    palette.putpalette([0, 0, 0, *ORANGE])
    np.testing.assert_allclose(colour(saved(palette, icc_profile=P3)), ORANGE_OF_P3, atol=1)
    assert (colour(saved(palette, icc_profile=P3, transparency=1)) == 255).all()


def test_a_whole_image_is_converted_too_and_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(saved(Image.new("RGB", (40, 20), ORANGE), icc_profile=P3, exif=exif), RULES)
    assert image.size == (20, 40)
    np.testing.assert_allclose(np.asarray(image)[5, 5], ORANGE_OF_P3, atol=1)


def test_a_profile_for_other_values_than_the_pictures_says_nothing_about_it():
    grey = grey_profile(gamma_curve(1.8))
    assert tuple(colour(saved(plain("RGB", ORANGE), icc_profile=grey))) == ORANGE
    assert tuple(colour(saved(plain("L", 99), icc_profile=P3))) == (99, 99, 99)


def test_a_profile_in_several_segments_is_put_together_by_their_numbers():
    half = len(P3) // 2
    parts = [b"ICC_PROFILE\0" + bytes([n, 2]) + part for n, part in ((2, P3[half:]), (1, P3[:half]))]
    base = saved(plain("RGB", ORANGE), "JPEG", quality=100)
    data = base[:2] + b"".join(segment(0xE2, part) for part in parts) + base[2:]
    np.testing.assert_allclose(colour(data), ORANGE_OF_P3, atol=2)
    with pytest.raises(BadImageError, match="bad_profile: 1 of 2 segments"):
        colour(base[:2] + segment(0xE2, parts[0]) + base[2:])


LINK = P3[:12] + b"link" + P3[16:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(plain("RGB", ORANGE), icc_profile=P3[:100]), "bad_profile: cannot be parsed"),
        (saved(plain("RGB", ORANGE), "JPEG", icc_profile=b"x" * 700), "bad_profile: cannot be parsed"),
        (saved(plain("RGB", ORANGE), "WEBP", icc_profile=b"x" * 700), "bad_profile: cannot be parsed"),
        (saved(plain("RGB", ORANGE), icc_profile=LINK), "bad_profile: of class 'link'"),
        (saved(plain("RGB", ORANGE), "WEBP", icc_profile=bytes(MAX_PROFILE_BYTES + 1)), "bad_profile: larger than"),
        (png_with(chunk(b"iCCP", b"a\0\0" + big(b"\0"))), "bad_profile: larger than 4,194,304 bytes"),
        (png_with(chunk(b"iCCP", b"a\0\0nonsense")), "bad_profile: cannot be unpacked"),
        (png_with(chunk(b"iCCP", b"a")), "bad_profile: cut off"),
        (jpeg_with(segment(0xE2, b"ICC_PROFILE\0")), "bad_profile: a segment without its number"),
        (png_with(chunk(b"cICP", bytes([9, 16, 0, 1]))), "colours: cICP [9, 16, 0, 1] is wide gamut or high dynamic"),
    ],
)
def test_a_profile_that_cannot_be_read_is_a_reason_as_the_colours_are_unknown(data, reason):
    with pytest.raises(BadImageError) as caught:
        prepare_image(data, RULES)
    assert str(caught.value).startswith(reason)


def test_gamma_and_chromaticities_of_a_png_are_passed_over_and_cicp_goes_before_the_profile():
    plain_pixels = prepare_image(file_bytes(pixels(0)), RULES).pixels
    gamma = chunk(b"gAMA", struct.pack(">I", 45_455)) + chunk(b"cHRM", struct.pack(">8I", *[30_000] * 8))
    cicp = chunk(b"cICP", bytes([1, 13, 0, 1])) + chunk(b"iCCP", b"a\0\0nonsense")
    for extra in (gamma, cicp):
        found = prepare_image(png_with(extra, picture=pixels(0)), RULES).pixels
        np.testing.assert_array_equal(found, plain_pixels)
