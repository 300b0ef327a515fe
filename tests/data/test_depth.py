"""Depth maps: what is no depth never counts, hostile files make no array, and the learnt form has no unit."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2f_core.data.depth import BadDepthError, clean_depth, crop_and_resize, latent_mask, normalise_depth, planar_depth
from d2f_core.data.depth_files import decode_depth, decode_depth_png, decode_mask, encode_depth


def npy_bytes(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def npy_header(text: str, numbers: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + numbers


def png_bytes(levels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(levels).save(sink, "PNG")
    return sink.getvalue()


def a_depth(height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 9, (height, width)).astype(np.float32)


def test_a_depth_map_survives_its_file_and_what_is_no_depth_is_nan():
    depth = a_depth()
    depth[0, :6] = [np.inf, -np.inf, np.nan, 0, -1, 3]
    found = decode_depth(encode_depth(depth))
    assert found.dtype == np.float32 and np.isnan(found[0, :5]).all()
    np.testing.assert_array_equal(found[np.isfinite(found)], depth.ravel()[5:])


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_and_byte_order_is_read(dtype, order):
    depth = np.asarray(a_depth(), dtype, order=order)
    np.testing.assert_allclose(decode_depth(npy_bytes(depth)), depth.astype("f8"), rtol=1e-6)


class Unpickled(Exception):
    pass


class Trap:
    def __reduce__(self):
        return (exec, ("raise __import__('tests.data.test_depth').data.test_depth.Unpickled",))


def npy_of(shape: str, kind: str = "<f4", numbers: bytes = bytes(16)) -> bytes:
    return npy_header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n", numbers)


BAD_ARRAYS = {
    "no npy": (b"hello", "bad_depth: no .npy file"),
    "empty": (b"", "bad_depth: no .npy file"),
    "cut header": (npy_bytes(a_depth())[:40], "bad_depth: no .npy file"),
    "cut numbers": (npy_bytes(a_depth())[:-4], "bad_depth: 380 bytes of numbers"),
    "more numbers": (npy_bytes(a_depth()) + b"1234", "bad_depth: 388 bytes of numbers"),
    "objects": (npy_bytes(np.array([[Trap()]], dtype=object)), "bad_depth: numbers of type object"),
    "integers": (npy_bytes(np.ones((4, 4), np.int32)), "bad_depth: numbers of type int32"),
    "complex": (npy_bytes(np.ones((4, 4), np.complex64)), "bad_depth: numbers of type complex64"),
    "three axes": (npy_bytes(np.ones((2, 2, 3), "f4")), r"bad_depth: an array of shape \(2, 2, 3\)"),
    "no pixels": (npy_bytes(np.ones((0, 4), "f4")), r"bad_depth: an array of shape \(0, 4\)"),
    "more than memory": (npy_of("(3000000, 3000000)"), "too_many_pixels"),
    "more than integers": (npy_of("(4294967296, 4294967296)"), "too_many_pixels"),
    "negative": (npy_of("(-2, -2)"), "bad_depth: an array of shape"),
    "deep nesting": (npy_header("(" * 60_000), "bad_depth: no .npy file"),
    "a record type": (npy_of("(2, 2)", "i4,f4"), "bad_depth"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_array_that_is_no_depth_is_refused_before_it_is_made(name):
    data, reason = BAD_ARRAYS[name]
    with pytest.raises(BadDepthError, match=f"^{reason}"):
        decode_depth(data)


def test_the_limit_on_pixels_is_the_callers():
    with pytest.raises(BadDepthError, match=r"^too_many_pixels: an array of shape \(8, 12\), at most 95"):
        decode_depth(encode_depth(a_depth()), 95)
    with pytest.raises(BadDepthError, match=r"^too_many_pixels: 12x8 px, at most 95"):
        decode_depth_png(png_bytes(np.ones((8, 12), np.uint16)), 0.01, 95)


def test_grey_levels_become_metres_and_their_ends_no_depth():
    depth = decode_depth_png(png_bytes(np.array([[0, 1, 8000, 65534, 65535]], np.uint16)), 0.01)
    np.testing.assert_allclose(depth, [[np.nan, 0.01, 80, 655.34, np.nan]], rtol=1e-6)


@pytest.mark.parametrize("levels", [np.ones((4, 4), np.uint8), np.ones((4, 4, 3), np.uint8)])
def test_a_png_of_eight_bits_is_no_depth(levels):
    with pytest.raises(BadDepthError, match=r"^bad_depth: a PNG of mode"):
        decode_depth_png(png_bytes(levels), 0.01)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", png_bytes(np.ones((9, 9), np.uint16))[:48], b"GIF89a"])
def test_a_broken_png_is_refused(data):
    for decode, reason in ((lambda file: decode_depth_png(file, 0.01), "bad_depth"), (decode_mask, "bad_mask")):
        with pytest.raises(BadDepthError, match=f"^{reason}: "):
            decode(data)


def test_a_mask_counts_what_is_not_black():
    mask = decode_mask(png_bytes(np.array([[0, 1, 255]], np.uint8)))
    assert mask.tolist() == [[False, True, True]]


@settings(deadline=None, derandomize=True)
@given(scale=st.floats(0.01, 100), shift=st.floats(0, 50), seed=st.integers(0, 1000))
def test_the_learnt_form_knows_neither_unit_nor_offset(scale, shift, seed):
    depth = np.random.default_rng(seed).uniform(1, 9, (8, 8))
    valid = np.random.default_rng(seed + 1).random((8, 8)) < 0.7
    values, near, far = normalise_depth(depth, valid)
    again, *_ = normalise_depth(depth * scale + shift, valid)
    np.testing.assert_allclose(again, values, atol=2e-5)
    assert values.dtype == np.float32 and values.min() == -1 and values.max() == 1 and (values[~valid] == 1).all()
    inside = valid & (depth > near) & (depth < far)
    np.testing.assert_allclose((values[inside] + 1) / 2 * (far - near) + near, depth[inside], rtol=1e-4)
    ends = np.sum(depth[valid] < near), np.sum(depth[valid] > far)
    assert all(abs(count - 0.02 * valid.sum()) <= 1 for count in ends)


@pytest.mark.parametrize(
    ("depth", "valid", "reason"),
    [
        (a_depth(4, 4), np.zeros((4, 4), bool), "no_valid_depth: 0 of 16 pixels"),
        (np.full((4, 4), np.inf), np.ones((4, 4), bool), "no_valid_depth: 16 of 16 pixels, 16 of them not finite"),
        (np.full((4, 4), 2.5), np.ones((4, 4), bool), "flat_depth: 2.5 m"),
        (a_depth(4, 4), np.ones((4, 5), bool), "mask_size: the mask is 5x4 px, the depth 4x4"),
    ],
)
def test_a_depth_that_teaches_nothing_is_refused(depth, valid, reason):
    with pytest.raises(BadDepthError, match=f"^{reason}"):
        normalise_depth(depth, valid)


def test_a_latent_counts_only_when_every_pixel_below_it_does():
    valid = np.ones((8, 12), bool)
    valid[5, 7] = False
    mask = latent_mask(valid, (2, 3))
    assert mask.dtype == np.uint8 and mask.tolist() == [[[1, 1, 1], [1, 0, 1]]]
    with pytest.raises(BadDepthError, match=r"^mask_size: 12x8 px cannot be divided into 5x2 latents"):
        latent_mask(valid, (2, 5))
    with pytest.raises(BadDepthError, match=r"^no_valid_depth: 48 of 96 pixels"):
        latent_mask(np.arange(96).reshape(8, 12) % 2 == 0, (2, 3))


def test_distances_to_the_camera_become_depth_along_the_axis():
    focal, depth = 50.0, 4.0
    x, y = np.meshgrid(np.arange(31) - 15.0, np.arange(21) - 10.0)
    distance = depth * np.sqrt(x**2 + y**2 + focal**2) / focal  # of a wall that faces the camera
    np.testing.assert_allclose(planar_depth(distance, focal), depth, rtol=1e-6)


def test_resizing_keeps_depths_apart_and_cuts_as_told():
    depth = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
    half = crop_and_resize(depth, (2, 0, 8, 6), 3)
    np.testing.assert_array_equal(half, depth[1::2, 3:8:2])
    np.testing.assert_array_equal(crop_and_resize(depth, (2, 0, 8, 6), 6), depth[:, 2:8])
    assert set(crop_and_resize(depth, (2, 0, 8, 6), 17).ravel()) <= set(depth.ravel())


def test_cleaning_makes_no_noise():
    with warnings.catch_warnings(action="error"):
        assert np.isnan(clean_depth(np.array([[1e300, -1e300, np.nan]]))).all()
