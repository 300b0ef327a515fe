"""BMP, GIF, TIFF and AVIF: told by their content, checked by their headers, and decoded as other formats are."""

import dataclasses
import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from d2f_core.data.image_containers import read_container
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import BadImageError, prepare_image
from tests.data.pictures import file_bytes, pixels
from tests.data.profiles import DISPLAY_P3, matrix_profile
from tests.data.test_images import CORNERS, STORED_AS

STORED = ImageRules(resolution=16, min_side=8, max_pixels=10_000)
RULES = dataclasses.replace(STORED, decoding="srgb")
P3 = matrix_profile(DISPLAY_P3)
avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
AVIF = pytest.param("AVIF", marks=avif)


def saved(image: Image.Image, kind: str, **how) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **how)
    return sink.getvalue()


def reason(data: bytes, rules: ImageRules = RULES) -> str:
    with pytest.raises(BadImageError) as caught:
        prepare_image(data, rules)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "mode", "how"),
    [
        ("BMP", "RGB", {}),
        ("BMP", "L", {}),
        ("BMP", "1", {}),
        ("GIF", "P", {}),
        ("GIF", "L", {"interlace": 0}),
        *[
            ("TIFF", mode, {"compression": compression})
            for mode, compression in [
                ("RGB", None), ("RGB", "tiff_lzw"), ("RGB", "tiff_deflate"), ("L", "packbits"), ("1", "group4"),
                ("P", None), ("CMYK", "tiff_lzw"), ("RGBA", "tiff_deflate"), ("LA", None),
            ]
        ],
    ],
)  # fmt: skip
def test_every_pixel_of_a_lossless_file_is_read(kind, mode, how):
    image = Image.fromarray(pixels(0, 16, 16)).convert(mode)
    expected = prepare_image(saved(image, "TIFF" if mode == "CMYK" else "PNG"), RULES).pixels
    np.testing.assert_array_equal(prepare_image(saved(image, kind, **how), RULES).pixels, expected)
    assert reason(saved(image, kind, **how), STORED).startswith(f"format: {kind} is not one of PNG, JPEG, WEBP")


@avif
def test_an_avif_is_read_with_its_profile_orientation_and_frames():
    image = Image.new("RGB", (40, 20), (200, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    prepared = prepare_image(saved(image, "AVIF", quality=100, icc_profile=P3, exif=exif), RULES)
    assert (prepared.width, prepared.height, prepared.turned) == (20, 40, True)
    np.testing.assert_allclose(prepared.pixels[8, 8], (217, 42, 23), atol=3)
    assert reason(saved(image, "AVIF", save_all=True, append_images=[image.rotate(180)])).startswith("animated: 2")
    assert reason(saved(Image.new("RGB", (200, 200)), "AVIF")).startswith("too_many_pixels: 200x200")


@avif
@pytest.mark.parametrize(("primaries", "refused"), [(1, False), (9, True)])
def test_an_avifs_colours_by_numbers_are_srgbs_or_a_reason(primaries, refused):
    data = saved(Image.new("RGB", (16, 16)), "AVIF").replace(
        b"nclx\0\x01\0\x0d", b"nclx\0" + bytes([primaries]) + b"\0\x0d"
    )
    if refused:
        assert reason(data).startswith("colours: cICP [9, 13")
    else:
        assert prepare_image(data, RULES).pixels.max() < 3


@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_of_a_tiff_is_turned_upright_once(orientation):
    image = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation]))
    prepared = prepare_image(saved(image, "TIFF", tiffinfo={274: orientation}), RULES)
    np.testing.assert_array_equal(prepared.pixels, CORNERS)
    assert prepared.turned == (orientation != 1)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", AVIF, "BMP"])
def test_profiles_of_these_formats_are_converted_or_there_are_none(kind):
    image = Image.new("RGB", (16, 16), (200, 60, 40))
    how = {"icc_profile": P3} if kind in ("TIFF", "AVIF") else {}
    expected = (217, 42, 23) if how else (200, 60, 40)
    np.testing.assert_allclose(prepare_image(saved(image, kind, **how), RULES).pixels[8, 8], expected, atol=4)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_of_either_byte_order_keeps_its_levels(order):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16).astype(order)
    data = saved(Image.fromarray(levels), "TIFF", big_tiff=False)
    np.testing.assert_array_equal(prepare_image(data, RULES).pixels[..., 0].ravel(), np.arange(256))


def test_a_gif_of_one_frame_is_read_and_an_animated_one_is_not():
    frame, other = Image.fromarray(pixels(1, 16, 16)).convert("P"), Image.fromarray(pixels(2, 16, 16)).convert("P")
    assert reason(saved(frame, "GIF", save_all=True, append_images=[other, frame])).startswith("animated: 3 frames")
    clear = Image.new("P", (16, 16), 1)
    clear.putpalette([0, 0, 0, 9, 9, 9])
    assert (prepare_image(saved(clear, "GIF", transparency=1), RULES).pixels == 255).all()


def test_of_a_tiff_of_several_pages_only_thumbnails_are_passed_over():
    first = Image.fromarray(pixels(1, 16, 16))
    data = saved(first, "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert reason(data).startswith("animated: 2 frames")
    thumbnail = Image.new("RGB", (8, 8))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    data = saved(first, "TIFF", save_all=True, append_images=[thumbnail])
    np.testing.assert_array_equal(prepare_image(data, RULES).pixels, pixels(1, 16, 16))


def test_what_pillow_would_read_darkly_or_inverted_is_refused():
    white_is_zero = saved(Image.fromarray(np.zeros((16, 16), np.uint16)), "TIFF", tiffinfo={262: 0})
    at = white_is_zero.index(struct.pack("<HHI", 262, 3, 1))
    data = white_is_zero[: at + 8] + b"\0\0" + white_is_zero[at + 10 :]
    assert reason(data).startswith("mode: 16 bits per value, or 16 whose 0 is white")


def test_the_decoder_sees_only_the_tags_of_a_tiffs_picture():
    exif = Image.Exif()
    exif[0x010E] = "text" * 99
    data = saved(Image.fromarray(pixels(0, 16, 16)), "TIFF", exif=exif, icc_profile=P3, tiffinfo={700: b"<xmp/>"})
    bare: Any = read_container(data)
    opened: Any = Image.open(io.BytesIO(bare.picture))
    tags = opened.tag_v2
    assert 256 in tags and not {270, 700, 34675, 274} & set(tags)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(12), "format: HEIC is not read; convert it to JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "format: HEIC is not read; convert it to JPEG"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "format: isom is not one of PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF"),
        (b"\xff\x0a" + bytes(20), "format: JPEG XL is not read; convert it to PNG or JPEG (djxl)"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "format: JPEG XL"),
        (b"II+\0" + bytes(20), "format: BigTIFF"),
    ],
)
def test_a_format_that_is_not_read_has_a_reason_that_says_what_to_do(data, expected):
    assert reason(data).startswith(expected)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", AVIF])
def test_damaged_files_are_decoded_or_refused_and_nothing_else(kind):
    data, draw = file_bytes(pixels(3), kind), np.random.default_rng(0)
    for _ in range(150):
        start, length = int(draw.integers(0, min(len(data), 500))), int(draw.integers(1, 12))
        damaged = data[:start] + draw.bytes(length) + data[start + length :]
        try:
            assert prepare_image(damaged, RULES).pixels.shape == (16, 16, 3)
        except BadImageError as error:
            assert ":" in str(error) and "object at 0x" not in str(error)
