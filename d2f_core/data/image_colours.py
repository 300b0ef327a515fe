"""Embedded colour profiles (ICC) -> sRGB, the space that all image networks of this field were trained in.

Phones store Display P3, some cameras Adobe RGB, print shops CMYK: the same numbers mean other colours there. A profile
comes from a stranger's file, so its size is limited before it is unpacked, and Little CMS reads it before any pixel is
decoded. A file whose profile cannot be read is refused, because its colours are then unknown: what a viewer would show
of it is a guess, and a guess would be learned.
"""

import io
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

from d2f_core.data.image_headers import BadImageError, Declared

MAX_PROFILE_BYTES = 4 * 2**20
"""Largest profile that is read, in bytes. Those of displays have 0.5 to 3 KB, those of presses up to 3 MB."""
CACHED_PROFILES = 8
SAME_COLOURS = 1
"""A profile that moves no colour by more than this, of 255, is sRGB itself in one of its many spellings."""
CLASSES = ("scnr", "mntr", "prtr", "spac")
"""Profiles that say what an image's numbers mean; device links, abstract and named-colour profiles do not."""
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode by the colour space of a profile; for others, such as Lab, no picture that is accepted has values."""
# ITU-T H.273: primaries of BT.709 or unspecified; transfer functions of BT.709, unspecified, BT.601 and sRGB, which
# everybody shows as sRGB.
SRGB_PRIMARIES, SRGB_TRANSFERS = (1, 2), (1, 2, 6, 13)

Mode = Literal["RGB", "L", "CMYK"]


def embedded_profile(declared: Declared) -> bytes | None:
    """The file's colour profile; None where it has none.

    Raises:
        BadImageError: `bad_profile`: it is too large, damaged or incomplete; `colours`: it is declared by numbers
            (cICP) that do not mean sRGB.
    """
    if declared.cicp is not None and not _means_srgb(declared.cicp):
        raise BadImageError(
            f"colours: cICP {list(declared.cicp)} is wide gamut or high dynamic range, which is not converted; save "
            "the image as sRGB or with an ICC profile"
        )
    if declared.cicp is not None or not declared.profile:
        return None
    if declared.format == "PNG":
        return _inflated(bytes(declared.profile[0]))
    if sum(len(part) for part in declared.profile) > MAX_PROFILE_BYTES:
        raise _too_large()
    return _joined(declared.profile) if declared.format == "JPEG" else bytes(declared.profile[0])


def _means_srgb(cicp: bytes) -> bool:
    return len(cicp) == 4 and cicp[0] in SRGB_PRIMARIES and cicp[1] in SRGB_TRANSFERS


def _inflated(part: bytes) -> bytes:
    """The profile in a PNG's iCCP chunk: a name, 0, the method 0, and the compressed profile."""
    _, found, packed = part.partition(b"\0")
    unpack = zlib.decompressobj()
    try:
        profile = unpack.decompress(packed[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error as error:
        raise BadImageError(f"bad_profile: cannot be unpacked: {error}") from None
    if len(profile) > MAX_PROFILE_BYTES:
        raise _too_large()
    if not found or not unpack.eof:
        raise BadImageError("bad_profile: cut off")
    return profile


def _joined(parts: Sequence[memoryview]) -> bytes:
    """The profile in the segments of a JPEG, each of which begins with its number from 1 and their count."""
    if any(len(part) < 2 for part in parts):
        raise BadImageError("bad_profile: a segment without its number")
    numbered = sorted((part[0], part) for part in parts if len(part) >= 2)
    if [number for number, _ in numbered] != list(range(1, parts[0][1] + 1)):
        raise BadImageError(f"bad_profile: {len(parts)} of {parts[0][1]} segments, or one twice")
    return b"".join(part[2:] for _, part in numbered)


def _too_large() -> BadImageError:
    return BadImageError(f"bad_profile: larger than {MAX_PROFILE_BYTES:,} bytes")


def check_profile(profile: bytes) -> bool:
    """Whether the profile says something else than sRGB.

    Raises:
        BadImageError: it cannot be parsed, or describes no image's colours.
    """
    mode = _mode(profile)
    return mode is not None and _transform(profile, mode) is not None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB, L or CMYK image as sRGB. A profile for other values than the image has says nothing about it and is
    passed over, as browsers do; only grey values also have a meaning in the space of an RGB profile.

    Raises:
        BadImageError: the profile cannot be parsed.
    """
    mode = _mode(profile)
    if mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    transform = _transform(profile, mode) if mode == image.mode else None
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)  # pyright: ignore[reportReturnType]


@lru_cache(CACHED_PROFILES)
def _mode(profile: bytes) -> Mode | None:
    opened: Any = _open(profile).profile
    if opened.device_class.strip() not in CLASSES:
        raise BadImageError(f"bad_profile: of class {opened.device_class!r}, which describes no image's colours")
    return MODES.get(opened.xcolor_space.ljust(4))  # pyright: ignore[reportReturnType]


def _open(profile: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (OSError, ImageCms.PyCMSError):
        raise BadImageError("bad_profile: cannot be parsed") from None


@lru_cache(CACHED_PROFILES)
def _transform(profile: bytes, mode: Mode) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a mode's values to sRGB; None where it would change nothing."""
    try:
        transform = ImageCms.buildTransform(
            _open(profile),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        raise BadImageError("bad_profile: cannot be parsed") from None
    if mode == "CMYK":
        return transform
    probe = _probe().convert(mode)
    moved = np.asarray(ImageCms.applyTransform(probe, transform), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return transform if np.abs(moved).max() > SAME_COLOURS else None


def _probe() -> Image.Image:
    """All greys, and 17 levels of each primary in all combinations."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    greys = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    return Image.fromarray(np.concatenate([colours, greys])[None])
