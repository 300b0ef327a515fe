"""Depth maps and masks as files: .npy and 16-bit PNG. Declared sizes are checked before any array is allocated."""

import io
from typing import Any

import numpy as np
from PIL import Image

from d2f_core.data.depth import BadDepthError, clean_depth
from d2f_core.data.image_headers import PNG, BadImageError, read_declared, too_large

MAX_DEPTH_BYTES = 256 * 2**20
"""Largest depth or mask file that is read, in bytes."""
MAX_DEPTH_PIXELS = 50_000_000
MAX_NPY_HEADER = 1000
"""Longest .npy header in bytes; numpy writes 118 for a two-dimensional array."""
NO_DEPTH_LEVEL = 65535
"""Level of a 16-bit PNG that means "no depth": the far plane (VKITTI's sky). Level 0 means it too."""

NPY_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def encode_depth(depth: np.ndarray) -> bytes:
    """A .npy file of float32 [height, width]; values that are no depth become NaN (`clean_depth`)."""
    if depth.ndim != 2:
        raise BadDepthError(f"bad_depth: an array of shape {depth.shape}, not [height, width]")
    sink = io.BytesIO()
    np.lib.format.write_array(sink, clean_depth(depth), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def decode_depth(data: bytes, max_pixels: int = MAX_DEPTH_PIXELS) -> np.ndarray:
    """Float32 [height, width] in metres of a .npy file of floats; NaN where there is no depth.

    Raises:
        BadDepthError: `too_large`, `too_many_pixels` or `bad_depth`.
    """
    array = decode_npy(data, max_pixels)
    if array.ndim != 2:
        raise BadDepthError(f"bad_depth: an array of shape {array.shape}, not [height, width]")
    return clean_depth(array)


def decode_npy(data: bytes, max_numbers: int) -> np.ndarray:
    """The array of floats in a .npy file, read-only; objects are never unpickled.

    Raises:
        BadDepthError: `too_large`, `too_many_pixels` or `bad_depth`.
    """
    _check_bytes(data)
    file = io.BytesIO(data)
    try:
        read_header = NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read_header(file, max_header_size=MAX_NPY_HEADER)
    except Exception as error:  # the header is a Python literal: parsing it raises a dozen types
        raise BadDepthError(f"bad_depth: no .npy file ({type(error).__name__})") from None
    if dtype.kind != "f":
        raise BadDepthError(f"bad_depth: numbers of type {dtype}, not floating point")
    if any(size < 1 for size in shape):
        raise BadDepthError(f"bad_depth: an array of shape {shape}")
    count = 1
    for size in shape:  # Python's integers: numpy's would overflow
        count *= size
    if count > max_numbers:
        raise BadDepthError(f"too_many_pixels: an array of shape {shape}, at most {max_numbers} are decoded")
    if len(data) - file.tell() != count * dtype.itemsize:
        raise BadDepthError(
            f"bad_depth: {len(data) - file.tell()} bytes of numbers, its header says {shape} of {dtype}"
        )
    array = np.frombuffer(data, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def decode_depth_png(data: bytes, metres_per_level: float, max_pixels: int = MAX_DEPTH_PIXELS) -> np.ndarray:
    """Float32 [height, width] in metres of a 16-bit grey PNG; NaN for the levels 0 and 65535.

    Raises:
        BadDepthError: `too_large`, `too_many_pixels` or `bad_depth`.
    """
    levels = _decode_grey(data, max_pixels, what="bad_depth", modes=("I;16", "I"))
    return clean_depth(np.where(levels == NO_DEPTH_LEVEL, np.nan, levels * np.float64(metres_per_level)))


def decode_mask(data: bytes, max_pixels: int = MAX_DEPTH_PIXELS) -> np.ndarray:
    """Bool [height, width] of a grey PNG: True where it is not 0.

    Raises:
        BadDepthError: `too_large`, `too_many_pixels` or `bad_mask`.
    """
    return _decode_grey(data, max_pixels, what="bad_mask", modes=("1", "L", "I;16", "I")) != 0


def _decode_grey(data: bytes, max_pixels: int, *, what: str, modes: tuple[str, ...]) -> np.ndarray:
    _check_bytes(data)
    try:
        declared = read_declared(data) if data.startswith(PNG) else None
    except BadImageError as error:
        raise BadDepthError(f"{what}: {error}") from None
    if declared is None:
        raise BadDepthError(f"{what}: no PNG file")
    if declared.width * declared.height > max_pixels:
        raise BadDepthError(
            f"too_many_pixels: {declared.width}x{declared.height} px, at most {max_pixels} pixels are decoded"
        )
    try:
        with Image.open(io.BytesIO(declared.picture), formats=["PNG"]) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise a dozen types on broken data; each means the same here
        raise BadDepthError(f"{what}: cannot be decoded ({type(error).__name__})") from None
    if image.mode not in modes:
        raise BadDepthError(f"{what}: a PNG of mode {image.mode}, not one of {', '.join(modes)}")
    return np.asarray(image)


def _check_bytes(data: bytes) -> None:
    if len(data) > MAX_DEPTH_BYTES:
        raise BadDepthError(too_large(len(data), MAX_DEPTH_BYTES))
