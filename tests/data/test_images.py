"""Pictures: what is accepted becomes upright square RGB; what is not has a reason."""

import dataclasses
import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2f_core.data.image_decoding import _check_cost, decode, to_rgb
from d2f_core.data.image_headers import read_declared
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import BadImageError, prepare_image
from d2f_core.identity import identity_values
from tests.data.hostile_pictures import chunk, header
from tests.data.pictures import file_bytes, pixels

RULES = ImageRules(resolution=16, min_side=8, max_pixels=10_000)


def saved(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **how)
    return sink.getvalue()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(height=st.integers(8, 60), width=st.integers(8, 60), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_the_centre_square_is_kept_whatever_the_shape(height, width, kind):
    image = prepare_image(file_bytes(pixels(0, height, width), kind), RULES)
    left, top, right, bottom = image.crop
    assert image.pixels.shape == (16, 16, 3) and image.pixels.dtype == np.uint8
    assert (image.width, image.height) == (width, height)
    assert right - left == bottom - top == min(width, height)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1


@pytest.mark.parametrize("shape", [(16, 16), (16, 30), (31, 16)])
def test_pixels_of_the_right_size_are_untouched(shape):
    original = pixels(1, *shape)
    image = prepare_image(file_bytes(original), RULES)
    left, top, right, bottom = image.crop
    np.testing.assert_array_equal(image.pixels, original[top:bottom, left:right])


PADDED = dataclasses.replace(RULES, fit="pad")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(height=st.integers(8, 60), width=st.integers(8, 60), fit=st.sampled_from(["crop", "pad"]))
def test_a_point_comes_back_from_where_it_went(height, width, fit):
    image = prepare_image(file_bytes(pixels(0, height, width)), dataclasses.replace(RULES, fit=fit))
    points = np.array([[[0, 0], [width, height], [width / 3, height / 7], [0.5, height - 0.5]]])
    np.testing.assert_allclose(image.to_original(image.to_pixels(points)), points, atol=1e-9)
    left, top, right, bottom = image.crop
    corners = image.to_pixels(np.array([[left, top], [right, bottom]]))
    np.testing.assert_allclose(corners.ravel(), image.box, atol=1e-9)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(height=st.integers(8, 60), width=st.integers(8, 60))
def test_a_padded_image_is_whole_and_in_the_middle_between_black_bars(height, width):
    image = prepare_image(file_bytes(np.full((height, width, 3), 255, np.uint8)), PADDED)
    left, top, right, bottom = image.box
    assert image.crop == (0, 0, width, height) and (image.width, image.height) == (width, height)
    assert max(right - left, bottom - top) == 16
    assert abs(left - (16 - right)) <= 1 and abs(top - (16 - bottom)) <= 1
    assert abs((right - left) / (bottom - top) - width / height) <= width / height * 0.5 / min(
        right - left, bottom - top
    )
    inside = np.zeros((16, 16), bool)
    inside[top:bottom, left:right] = True
    assert (image.pixels[inside] == 255).all() and (image.pixels[~inside] == 0).all()


@pytest.mark.parametrize("shape", [(16, 16), (16, 9), (8, 16)])
def test_pixels_of_a_padded_image_of_the_right_size_are_untouched(shape):
    original = pixels(1, *shape)
    image = prepare_image(file_bytes(original), PADDED)
    left, top, right, bottom = image.box
    np.testing.assert_array_equal(image.pixels[top:bottom, left:right], original)


@pytest.mark.parametrize(("fit", "shape"), [("crop", (120, 160)), ("pad", (120, 160)), ("pad", (200, 90))])
def test_a_mark_in_the_picture_is_found_where_its_point_is_said_to_be(fit, shape):
    original, (x, y) = np.zeros((*shape, 3), np.uint8), (61, 44)
    original[y - 8 : y + 8, x - 8 : x + 8] = 255
    image = prepare_image(file_bytes(original), ImageRules(resolution=64, min_side=8, max_pixels=10**6, fit=fit))
    weights = image.pixels[..., 0] / image.pixels[..., 0].sum()
    rows, columns = np.mgrid[:64, :64] + 0.5
    found = (weights * columns).sum(), (weights * rows).sum()
    np.testing.assert_allclose(found, image.to_pixels(np.array([x, y])), atol=0.1)


def test_the_rules_of_old_are_known_by_what_they_were_and_make_the_same_pixels():
    rules = {"resolution": 16, "min_side": 8, "max_pixels": 10_000}
    assert identity_values(RULES) == rules and identity_values(PADDED) == rules | {"fit": "pad"}
    hashes = [
        hashlib.sha256(prepare_image(file_bytes(pixels(2, *shape)), RULES).pixels.tobytes()).hexdigest()[:16]
        for shape in ((40, 23), (16, 30), (9, 12))
    ]
    assert hashes == ["e71067f07668d2aa", "8367ea5b8df04804", "4122e1c036c6f74c"]
    with pytest.raises(ValueError, match=r"fit='stretch' is not a way to make a square\. Use 'crop' or 'pad'"):
        ImageRules(**rules, fit="stretch")


def test_transparency_becomes_white():
    for image in (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), Image.new("LA", (16, 16), (0, 0))):
        assert (prepare_image(saved(image), RULES).pixels == 255).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 0, 0, 200])
    assert (prepare_image(saved(palette, transparency=1), RULES).pixels == 255).all()
    assert (prepare_image(saved(palette, transparency=0), RULES).pixels[0, 0] == (0, 0, 200)).all()


def test_half_transparent_red_on_white_is_pink():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    np.testing.assert_allclose(prepare_image(saved(image), RULES).pixels[0, 0], (255, 127, 127), atol=1)


def test_sixteen_bit_grey_keeps_its_levels():
    levels = (np.arange(16 * 16, dtype=np.uint16) * 256).reshape(16, 16)
    image = prepare_image(saved(Image.fromarray(levels)), RULES)
    np.testing.assert_array_equal(image.pixels[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_modes_with_one_meaning_are_converted(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert prepare_image(file_bytes(pixels(2), kind, mode), RULES).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["F", "LAB", "HSV"])
def test_a_mode_that_could_mean_several_colours_is_refused(mode):
    image = Image.new("RGB", (4, 4)).convert("L").convert("F") if mode == "F" else Image.new(mode, (4, 4))
    with pytest.raises(BadImageError, match=f"mode: {mode} has no certain meaning as RGB"):
        to_rgb(image)


CORNERS = np.zeros((16, 16, 3), np.uint8)
CORNERS[:8, :8], CORNERS[:8, 8:], CORNERS[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
STORED_AS = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: np.rot90(CORNERS),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(CORNERS, -1),
}
"""How a file of each EXIF orientation holds the picture whose upper left corner is red, upper right one green."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_of_every_format_is_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    data = saved(Image.fromarray(np.ascontiguousarray(STORED_AS[orientation])), kind, exif=exif, **how)
    difference = prepare_image(data, RULES).pixels.astype(int) - CORNERS
    assert np.abs(difference).max() <= 4


GREEN = dataclasses.replace(RULES, background="#00c800")


@pytest.mark.parametrize("rules", [GREEN, dataclasses.replace(GREEN, decoding="srgb")])
def test_transparency_becomes_the_background_and_bars_have_its_colour(rules):
    for image in (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), Image.new("LA", (16, 16), (0, 0))):
        assert (prepare_image(saved(image), rules).pixels == (0, 200, 0)).all()
    half = prepare_image(saved(Image.new("RGBA", (16, 16), (200, 0, 0, 128))), rules).pixels[0, 0]
    np.testing.assert_allclose(half, (100, 100, 0), atol=1)
    padded = prepare_image(saved(Image.new("RGB", (16, 8))), dataclasses.replace(rules, fit="pad"))
    assert (padded.pixels[:4] == (0, 200, 0)).all() and (padded.pixels[4:12] == 0).all()


@pytest.mark.parametrize("colour", ["green", "#12345", "0x123456"])
def test_a_background_that_is_no_colour_is_refused(colour):
    with pytest.raises(ValueError, match=r"is not a colour\. Give it as #rrggbb"):
        dataclasses.replace(RULES, background=colour)


def test_sixteen_bits_of_colour_are_scaled_and_not_clipped():
    rows = [b"\0" + struct.pack(">48H", *[level << 8 | 0x7F for level in (20, 128, 250)] * 16)] * 16
    data = header(16, 16, 16) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    assert (prepare_image(data, RULES).pixels == (20, 128, 250)).all()
    with pytest.raises(BadImageError, match="mode: values from 0 to 70000 have no certain meaning as grey"):
        to_rgb(Image.fromarray(np.array([[0, 70_000]], np.int32)))


def test_of_a_phones_picture_with_a_second_one_behind_it_the_first_is_read():
    first = Image.fromarray(pixels(4, 16, 16))
    data = saved(first, "MPO", save_all=True, append_images=[Image.fromarray(pixels(5, 16, 16))])
    np.testing.assert_array_equal(prepare_image(data, RULES).pixels, prepare_image(saved(first, "JPEG"), RULES).pixels)


def test_a_photo_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = prepare_image(saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif), RULES)
    assert (image.width, image.height, image.crop) == (20, 40, (0, 10, 20, 30))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable: empty file"),
        (b"no image at all", "undecodable: not a PNG, JPEG, WEBP file"),
        (file_bytes(pixels(0))[:200], "undecodable: "),
        (file_bytes(pixels(0), "JPEG")[:300], "undecodable: "),
        (file_bytes(pixels(0), "WEBP")[:200], "undecodable: "),
        (file_bytes(pixels(0), "GIF"), "format: GIF is not one of PNG, JPEG, WEBP"),
        (file_bytes(pixels(0), "BMP"), "format: BMP"),
        (file_bytes(pixels(0), "TIFF"), "format: TIFF"),
        (b"\0\0\0\x1cftypavif", "format: avif"),
        (file_bytes(pixels(0, 7, 30)), "too_small: 30x7 px, the short side must be at least 8"),
        (file_bytes(pixels(0, 101, 100)), "too_many_pixels: 100x101 px, at most 10000 pixels are decoded"),
        (
            saved(Image.new("L", (16, 16)), save_all=True, append_images=[Image.new("L", (16, 16), 9)]),
            "animated: 2 frames",
        ),
    ],
)
def test_what_cannot_be_used_has_its_reason(data, reason):
    with pytest.raises(BadImageError) as caught:
        prepare_image(data, RULES)
    assert str(caught.value).startswith(reason)


def test_a_decompression_bomb_is_refused_by_its_header():
    bomb = saved(Image.new("1", (20_000, 20_000)), compress_level=9)
    assert len(bomb) < 200_000
    with pytest.raises(BadImageError, match=r"^too_many_pixels"):
        prepare_image(bomb, ImageRules(resolution=16, min_side=8, max_pixels=100_000_000))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    start=st.integers(0, 400), junk=st.binary(min_size=1, max_size=40), kind=st.sampled_from(["PNG", "JPEG", "WEBP"])
)
def test_damaged_files_are_decoded_or_refused_and_nothing_else(start, junk, kind):
    data = file_bytes(pixels(3), kind)
    damaged = data[:start] + junk + data[start + len(junk) :]
    try:
        assert prepare_image(damaged, RULES).pixels.shape == (16, 16, 3)
    except BadImageError as error:
        assert ":" in str(error) and "0x" not in str(error)


@pytest.mark.parametrize("fit", ["crop", "pad", "whole"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_nobody_sees_it(fit, orientation):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    smooth = Image.fromarray(pixels(3, 9, 13)).resize((1296, 904), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    smooth.save(sink, "JPEG", quality=95, exif=exif)
    rules = ImageRules(resolution=64, min_side=1, max_pixels=10**7, fit=fit, decoding="srgb")
    reduced = decode(sink.getvalue(), rules, reduced=True)
    factor = 4 if fit == "crop" else 8  # the short side has the resolution, or the long one
    assert (reduced.image.width * factor, reduced.image.height * factor) == (reduced.width, reduced.height)
    made = prepare_image(sink.getvalue(), rules)
    whole = prepare_image(sink.getvalue(), dataclasses.replace(rules, decoding="stored"))
    assert (made.width, made.height, made.crop, made.box) == (whole.width, whole.height, whole.crop, whole.box)
    assert np.abs(made.pixels.astype(int) - whole.pixels).mean() < 0.5


@pytest.mark.parametrize(("side", "decoded"), [(252, 252), (254, 254), (256, 128), (257, 257), (1022, 511)])
def test_a_jpeg_is_halved_as_long_as_twice_the_result_is_left_and_the_half_is_whole(side, decoded):
    sink = io.BytesIO()
    Image.new("RGB", (side, side)).save(sink, "JPEG")
    rules = ImageRules(resolution=64, min_side=1, max_pixels=10**7, decoding="srgb")
    assert decode(sink.getvalue(), rules, reduced=True).image.width == decoded
    for as_it_is in (dataclasses.replace(rules, decoding="stored"), rules):
        assert decode(sink.getvalue(), as_it_is, reduced=as_it_is is not rules).image.width == side


def large(width: int = 320, height: int = 240, **how) -> bytes:
    smooth = Image.fromarray(pixels(3, 5, 7)).resize((width, height), Image.Resampling.BICUBIC)
    return saved(smooth, "JPEG", **how)


LARGE = ImageRules(resolution=8, min_side=1, max_pixels=3000, decoding="srgb")
"""320x240 are 76,800 pixels, 25 times as many; at 1/8 they are 1,200."""


def test_a_photo_of_more_pixels_than_the_limit_is_read_if_it_is_decoded_in_less_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow's own limit stays what it is for the others
    whole = prepare_image(large(), dataclasses.replace(LARGE, max_pixels=10**6, decoding="stored"))
    made = prepare_image(large(), LARGE)
    assert (made.width, made.height, made.crop) == (320, 240, whole.crop)
    assert np.abs(made.pixels.astype(int) - whole.pixels).mean() < 1.5
    odd, plain = large(1607, 1201), dataclasses.replace(LARGE, max_pixels=10**7, decoding="stored")
    made, whole = prepare_image(odd, dataclasses.replace(LARGE, max_pixels=40_000)), prepare_image(odd, plain)
    assert np.abs(made.pixels.astype(int) - whole.pixels).mean() < 1.5 and made.crop == whole.crop


@pytest.mark.parametrize(
    ("data", "rules", "reason"),
    [
        (large(), dataclasses.replace(LARGE, decoding="stored"), "too_many_pixels: 320x240 px, at most 3000 pixels"),
        (large(), dataclasses.replace(LARGE, resolution=64), "too_many_pixels: 320x240 px, at most 3000 pixels"),
        (saved(Image.new("RGB", (320, 240))), LARGE, "too_many_pixels: 320x240 px, at most 3000 pixels"),
        (large(progressive=True), LARGE, r"too_many_pixels: .* decoded, and these take the memory of 15600"),
    ],
)
def test_other_images_above_the_limit_are_left_out(data, rules, reason):
    with pytest.raises(BadImageError, match=reason):
        prepare_image(data, rules)


def test_a_progressive_jpeg_counts_with_what_is_kept_until_its_last_scan():
    wanted = {(True, 0): 6, (True, 2): 3, (False, 0): 0, (False, 2): 0}
    for (progressive, subsampling), each in wanted.items():
        declared = read_declared(large(progressive=progressive, subsampling=subsampling))
        assert declared is not None and declared.coefficient_bytes == each * 320 * 240
        assert (declared.scans > 1) == progressive
    grey = read_declared(saved(Image.new("L", (320, 240)), "JPEG", progressive=True))
    assert grey is not None and grey.coefficient_bytes == 2 * 320 * 240
    assert prepare_image(large(progressive=True), dataclasses.replace(LARGE, max_pixels=16_000)).width == 320


def test_passes_over_a_picture_are_no_more_than_those_of_the_largest_that_is_decoded_in_full():
    rules = dataclasses.replace(LARGE, max_pixels=16_000)
    scan = large(progressive=True)
    scans = read_declared(scan)
    assert scans is not None
    monstrous = dataclasses.replace(scans, scans=30)
    _check_cost(monstrous, (320, 240), 76_800)
    with pytest.raises(BadImageError, match="too_many_scans: 30 of 320x240 px"):
        _check_cost(monstrous, (40, 30), rules.max_pixels)
    with pytest.raises(BadImageError, match="too_many_pixels"):
        _check_cost(dataclasses.replace(scans, width=50_000, height=20_000), (6250, 2500), 50_000_000)
