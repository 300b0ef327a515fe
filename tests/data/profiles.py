"""Colour profiles built as bytes, and the colours that they mean by their matrices."""

import struct

import numpy as np

D65 = (0.3127, 0.3290)
D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB_CURVE = struct.pack(
    ">4s4xHH5i", b"para", 3, 0, *(round(value * 65536) for value in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
Primaries = tuple[tuple[float, float], ...]


def gamma_curve(gamma: float) -> bytes:
    return struct.pack(">4s4xHHi", b"para", 0, 0, round(gamma * 65536))


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries: Primaries) -> np.ndarray:
    """Linear RGB of these primaries and a D65 white -> XYZ."""
    columns = np.stack([_xyz(*each) for each in primaries], 1)
    return columns * np.linalg.solve(columns, _xyz(*D65))


def matrix_profile(primaries: Primaries, curve: bytes = SRGB_CURVE) -> bytes:
    """A display profile (ICC 4.3): XYZ of the primaries, adapted to D50 by Bradford's matrix, and one curve."""
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ _xyz(*D65))) @ BRADFORD
    columns = (adapt @ to_xyz(primaries)).T
    tags = [(name, _xyz_tag(column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)]
    return _profile(b"RGB ", [*tags, *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC"))])


def grey_profile(curve: bytes) -> bytes:
    return _profile(b"GRAY", [(b"kTRC", curve)])


def cmyk_profile() -> bytes:
    """A press whose ink K alone has an effect, from white to grey: L* is 100 without it and 50 with."""
    corners = np.arange(16) & 1
    lab = np.stack([np.where(corners, 32640, 65280), np.full(16, 32768), np.full(16, 32768)], 1).astype(">u2")
    identity = "".join("1 0 0 0 1 0 0 0 1".split())
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(int(v) << 16 for v in identity))
    curve = struct.pack(">2H", 0, 65535)
    table += struct.pack(">2H", 2, 2) + curve * 4 + lab.tobytes() + curve * 3
    return _profile(b"CMYK", [(b"A2B0", table), (b"A2B1", table)], device=b"prtr", space=b"Lab ")


def _xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _profile(
    colours: bytes, tags: list[tuple[bytes, bytes]], *, device: bytes = b"mntr", space: bytes = b"XYZ "
) -> bytes:
    text = b"mluc" + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", 2, 28) + b"\0T"
    tags = [(b"desc", text), (b"cprt", text), (b"wtpt", _xyz_tag(D50)), *tags]
    at, index, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags:
        index += name + struct.pack(">II", at + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    size = at + len(body)
    version = 0x02400000 if space == b"Lab " else 0x04300000  # mft2 holds Lab as version 2 does
    head = struct.pack(">I4xI", size, version) + device + colours + space + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB's curve: 0 to 255 -> light."""
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def in_srgb(light: np.ndarray, primaries: Primaries) -> np.ndarray:
    """Light of these primaries as sRGB values, 0 to 255."""
    light = (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries) @ light).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
