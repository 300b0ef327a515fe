"""Chairs with and without armrests, and teapots."""

import numpy as np

from d2f_core.correspondence.views.shape import FRONT_BACK, LEFT_RIGHT, Keypoints, Shape, pair, point
from d2f_core.correspondence.views.solids import Solid, box, cylinder, ellipsoid, hexahedron, revolved, tube

CHAIR = (
    *(f"{side} {end} leg" for end in ("front", "back") for side in ("left", "right")),
    *(f"{side} seat corner" for side in ("left", "right")),
    *(f"{side} top of back" for side in ("left", "right")),
    *(f"{side} end of armrest" for side in ("left", "right")),
)
TEAPOT = ("spout tip", "spout base", "handle", "handle top", "handle bottom", "knob",
          "front rim", "back rim", "left rim", "right rim")  # fmt: skip


def make_chair(rng: np.random.Generator) -> Shape:
    width, depth, height = rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.55), rng.uniform(0.38, 0.55)
    thickness, radius = rng.uniform(0.035, 0.08), rng.uniform(0.016, 0.03)
    solids = [box([0, 0, height], [depth, width, thickness], "seat", top=(1, rng.uniform(0.9, 1.05)))]
    legs, keypoints = _chair_legs(rng, width, depth, height - thickness / 2, radius)
    back, top = _chair_back(rng, width, depth, height, radius)
    corners = pair("seat corner", [depth * 0.48, width * 0.47, height + thickness / 2])
    solids, keypoints = [*solids, *legs, *back], {**keypoints, **corners, **top}
    if rng.random() < 0.45:
        arms, ends = _armrests(rng, width, depth, height, radius)
        solids, keypoints = [*solids, *arms], {**keypoints, **ends}
    return Shape(solids=solids, keypoints=keypoints)


def _chair_legs(
    rng: np.random.Generator, width: float, depth: float, height: float, radius: float
) -> tuple[list[Solid], Keypoints]:
    splay, foot, square = rng.uniform(0, 0.07), radius * rng.uniform(0.6, 1), rng.random() < 0.5
    solids: list[Solid] = []
    keypoints: Keypoints = {}
    for end, x in FRONT_BACK:
        for side, y in LEFT_RIGHT:
            top = np.array([x * (depth / 2 - radius), y * (width / 2 - radius), height])
            ground = top + [x * splay, y * splay, -height]
            solids += cylinder(ground, top, (foot, radius), "frame", sides=4 if square else 12)
            keypoints[f"{side} {end} leg"] = point(ground + [0, 0, 0.01], 1.6 * radius + 0.01)
    if rng.random() < 0.5:
        z, x = rng.uniform(0.3, 0.6) * height, depth / 2 - radius
        for _, y in LEFT_RIGHT:
            bar = y * (width / 2 - radius)
            solids += cylinder([x, bar, z], [-x, bar, z], (radius * 0.6, radius * 0.6), "frame", sides=8)
    return solids, keypoints


def _chair_back(
    rng: np.random.Generator, width: float, depth: float, height: float, radius: float
) -> tuple[list[Solid], Keypoints]:
    tall, lean, x, half = rng.uniform(0.38, 0.7), rng.uniform(0, 0.14), -depth / 2 + radius, width * 0.47

    def at(share: float, y: float) -> np.ndarray:
        return np.array([x - lean * share, y, height + tall * share])

    keypoints = pair("top of back", at(1, half), 0.04)
    style = rng.choice(["board", "spindles", "ladder", "panel"])
    if style == "board":
        edge = np.array([0.02, 0, 0])
        low, high = (np.stack([at(z, -half) - edge, at(z, -half) + edge, at(z, half) + edge, at(z, half) - edge])
                     for z in (0, 1))  # fmt: skip
        return [hexahedron(np.concatenate([low, high]), "back")], keypoints
    solids = [wall for y in (-half, half) for wall in cylinder(at(0, y), at(1, y), (radius, radius), "frame")]
    solids += tube([at(1, -half), at(1, half)], [1.5 * radius] * 2, "frame")
    count = int(rng.integers(3, 6))
    shares = (np.arange(count) + 1) / (count + 1)
    if style == "spindles":
        for y in (2 * shares - 1) * half:
            solids += cylinder(at(0, y), at(1, y), (radius * 0.6, radius * 0.6), "back", sides=8)
    elif style == "ladder":
        solids += [box(at(share, 0), [0.025, 2 * half, 0.45 * tall / count], "back") for share in shares]
    else:
        solids.append(box(at(0.68, 0), [0.035, 2 * half, tall * 0.5], "back"))
    return solids, keypoints


def _armrests(
    rng: np.random.Generator, width: float, depth: float, height: float, radius: float
) -> tuple[list[Solid], Keypoints]:
    z, solids = height + rng.uniform(0.18, 0.26), []
    for _, y in LEFT_RIGHT:
        solids.append(box([0, y * width / 2, z], [depth * 0.95, 0.05, 0.03], "frame"))
        post = [depth * 0.4, y * width / 2]
        solids += cylinder([*post, height], [*post, z], (radius, radius), "frame")
    return solids, pair("end of armrest", [depth * 0.46, width / 2, z + 0.015], 0.04)


def make_teapot(rng: np.random.Generator) -> Shape:
    height, radius = rng.uniform(0.3, 0.48), rng.uniform(0.2, 0.28)
    z = np.linspace(0, height, 11)
    taper, bulge = rng.uniform(0.45, 0.85), rng.uniform(0.05, 0.55)
    radii = (taper + (1 - taper) * (1 - z / height) ** rng.uniform(0.5, 1.5)) * (1 + bulge * np.sin(np.pi * z / height))
    radii *= radius / radii.max()
    profile = [(0.0, 0.0), *zip(z.tolist(), radii.tolist(), strict=True), (height, 0.0)]
    rim = float(radii[-1])
    keypoints: Keypoints = {
        "front rim": point([rim, 0, height]),
        "back rim": point([-rim, 0, height]),
        **pair("rim", [0, rim, height]),
    }
    solids: list[Solid] = [revolved([0, 0, 0], profile, "body")]
    for parts, named in (_spout(rng, z, radii), _handle(rng, z, radii), _lid(rim, height)):
        solids, keypoints = [*solids, *parts], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _spout(rng: np.random.Generator, z: np.ndarray, radii: np.ndarray) -> tuple[list[Solid], Keypoints]:
    low = rng.uniform(0.25, 0.5) * z[-1]
    wall = float(np.interp(low, z, radii))
    length, rise, thick = rng.uniform(0.16, 0.28), rng.uniform(0.14, 0.36), rng.uniform(0.045, 0.07)
    along = np.linspace(0, 1, 6)
    points = np.stack([wall * 0.85 + length * along, 0 * along, low + rise * along ** rng.uniform(1, 2)], 1)
    solids = tube(list(points), list(np.linspace(thick, rng.uniform(0.02, 0.03), 6)), "trim")
    return solids, {"spout tip": point(points[-1], 0.04), "spout base": point(points[0] + [0.06, 0, thick], 0.06)}


def _handle(rng: np.random.Generator, z: np.ndarray, radii: np.ndarray) -> tuple[list[Solid], Keypoints]:
    low, high, reach = rng.uniform(0.12, 0.3) * z[-1], rng.uniform(0.72, 0.92) * z[-1], rng.uniform(0.12, 0.24)
    walls = np.interp([low, high], z, radii) * 0.95
    angles = np.linspace(-np.pi / 2, np.pi / 2, 9)
    x = -(np.linspace(walls[0], walls[1], 9) + reach * np.cos(angles))
    points = np.stack([x, 0 * x, (low + high) / 2 + (high - low) / 2 * np.sin(angles)], 1)
    solids = tube(list(points), [rng.uniform(0.018, 0.032)] * 9, "trim")
    names = {"handle bottom": 1, "handle": 4, "handle top": 7}
    return solids, {name: point(points[number], 0.05) for name, number in names.items()}


def _lid(rim: float, height: float) -> tuple[list[Solid], Keypoints]:
    lid = [(0.0, 0.95 * rim), (0.025, 0.85 * rim), (0.05, 0.5 * rim), (0.06, 0.0)]
    solids = [revolved([0, 0, height], lid, "lid"), ellipsoid([0, 0, height + 0.085], [0.035] * 3, "trim")]
    return solids, {"knob": point([0, 0, height + 0.115], 0.05)}
