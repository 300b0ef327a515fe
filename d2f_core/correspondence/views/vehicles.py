"""Bikes, cars and planes, each of several kinds."""

import numpy as np

from d2f_core.correspondence.views.shape import FRONT_BACK, LEFT_RIGHT, Keypoints, Shape, pair, point
from d2f_core.correspondence.views.solids import Solid, box, cylinder, ellipsoid, hexahedron, lofted, tube, turn

BIKE = ("front hub", "back hub", "saddle", "left grip", "right grip", "left pedal", "right pedal", "lamp", "tail lamp")
CAR = (
    *(f"{side} {end} {part}" for part in ("wheel", "roof corner") for end in ("front", "back")
      for side in ("left", "right")),
    *(f"{side} {part}" for part in ("headlight", "tail light", "mirror") for side in ("left", "right")),
)  # fmt: skip
PLANE = ("nose", "tail end", "fin tip", "left wing tip", "right wing tip", "left tailplane tip", "right tailplane tip",
         "left engine", "right engine")  # fmt: skip

# Length, place and narrowing of the cabin: saloon, estate, pick-up, sports car.
CABINS = {
    "saloon": ((0.46, 0.54), (-0.1, -0.03), (0.62, 0.75)),
    "estate": ((0.6, 0.68), (-0.15, -0.11), (0.8, 0.9)),
    "pick-up": ((0.28, 0.34), (0.06, 0.12), (0.72, 0.85)),
    "sports": ((0.38, 0.46), (-0.14, -0.08), (0.5, 0.65)),
}


def make_car(rng: np.random.Generator) -> Shape:
    kind = str(rng.choice(list(CABINS)))
    width, height, ground = rng.uniform(0.38, 0.46), rng.uniform(0.13, 0.18), rng.uniform(0.055, 0.085)
    deck = ground + height
    length, place, top = (rng.uniform(*bounds) for bounds in CABINS[kind])
    glass = rng.uniform(0.12, 0.17)
    solids = [
        box([0, 0, ground + height * 0.3], [1, width, height * 0.6], "paint"),
        box([0, 0, ground + height * 0.8], [1, width, height * 0.4], "paint", top=(0.95, 0.9)),
        box([place, 0, deck + glass / 2], [length, width * 0.88, glass], "glass", top=(top, 0.84)),
        box([place, 0, deck + glass + 0.01], [length * top * 1.04, width * 0.77, 0.02], "paint", top=(0.92, 0.92)),
    ]
    roof = [place, width * 0.37, deck + glass + 0.01]
    keypoints: Keypoints = {}
    for end, sign in FRONT_BACK:
        keypoints |= pair(f"{end} roof corner", [roof[0] + sign * length * top / 2, *roof[1:]], 0.04)
    wheels, hubs = _car_wheels(rng, width)
    lamps, lights = _car_lamps(rng, width, ground + height * rng.uniform(0.5, 0.62))
    mirror = [place + length * 0.42, width / 2 + 0.02, deck + 0.035]
    solids += [*wheels, *lamps, *_car_extras(kind, width, deck)]
    solids += [ellipsoid(np.multiply(mirror, [1, y, 1]), [0.018, 0.03, 0.022], "paint") for _, y in LEFT_RIGHT]
    mirrors = pair("mirror", np.add(mirror, [0, 0.015, 0]))
    return Shape(solids=solids, keypoints={**keypoints, **hubs, **lights, **mirrors})


def _car_wheels(rng: np.random.Generator, width: float) -> tuple[list[Solid], Keypoints]:
    radius, front, back = rng.uniform(0.08, 0.11), rng.uniform(0.28, 0.33), rng.uniform(0.28, 0.33)
    solids: list[Solid] = []
    keypoints: Keypoints = {}
    for end, x in (("front", front), ("back", -back)):
        for side, sign in LEFT_RIGHT:
            inner, outer = sign * (width / 2 - 0.06), sign * (width / 2 + 0.012)
            hub = np.array([x, outer + sign * 0.006, radius])
            solids += cylinder([x, inner, radius], [x, outer, radius], (radius, radius), "rubber", sides=20)
            solids += cylinder([x, outer, radius], hub, (radius * 0.6, radius * 0.55), "metal", sides=14)
            keypoints[f"{side} {end} wheel"] = point(hub, 0.02)
    return solids, keypoints


def _car_lamps(rng: np.random.Generator, width: float, z: float) -> tuple[list[Solid], Keypoints]:
    y = width * rng.uniform(0.34, 0.4)
    solids = [box([0, 0, z - 0.03], [1.02, width * 0.5, 0.03], "metal")]  # grille and rear plate
    for _, sign in LEFT_RIGHT:
        solids.append(ellipsoid([0.495, sign * y, z], [0.022, 0.042, 0.03], "lamp"))
        solids.append(box([-0.495, sign * y, z], [0.03, 0.07, 0.045], "tail lamp"))
    return solids, {**pair("headlight", [0.515, y, z]), **pair("tail light", [-0.51, y, z])}


def _car_extras(kind: str, width: float, deck: float) -> list[Solid]:
    """The bed of a pick-up, the wing of a sports car."""
    if kind == "pick-up":
        sides = [box([-0.28, y * width * 0.44, deck + 0.03], [0.4, 0.03, 0.07], "paint") for _, y in LEFT_RIGHT]
        return [*sides, box([-0.475, 0, deck + 0.03], [0.025, width * 0.9, 0.07], "paint")]
    if kind == "sports":
        posts = [box([-0.44, y * width * 0.3, deck + 0.03], [0.03, 0.02, 0.07], "paint") for _, y in LEFT_RIGHT]
        return [*posts, box([-0.45, 0, deck + 0.07], [0.09, width * 0.92, 0.015], "paint")]
    return []


def make_plane(rng: np.random.Generator) -> Shape:
    radius = rng.uniform(0.05, 0.075)
    x = np.linspace(0.5, -0.5, 22)
    nose = np.sqrt(np.clip((0.5 - x) / 0.14, 0, 1))
    radii = radius * np.maximum(nose * np.minimum(1, 0.22 + 0.78 * np.clip((x + 0.5) / 0.35, 0, 1) ** 0.8), 0.02)
    rise = np.where(x < -0.1, (-0.1 - x) * 0.12, 0)
    angles = np.linspace(0, 2 * np.pi, 21)
    around = np.stack([0 * angles, np.cos(angles), np.sin(angles)], -1)
    axis = np.stack([x, 0 * x, rise], -1)
    solids: list[Solid] = [lofted(axis[:, None] + radii[:, None, None] * around, "hull")]
    windows = np.linspace(0.3, -0.25, 9)
    solids += [ellipsoid([at, y * radius * 0.97, radius * 0.2], [0.012, 0.006, 0.012], "glass")
               for at in windows for _, y in LEFT_RIGHT]  # fmt: skip
    solids.append(ellipsoid([0.4, 0, radius * 0.55], [0.05, radius * 0.72, radius * 0.4], "glass"))
    keypoints: Keypoints = {"nose": point([0.5, 0, 0], 0.04), "tail end": point([-0.5, 0, float(rise[-1])], 0.04)}
    for parts, named in (_main_wings(rng, radius), _tail(rng, float(rise[-1]))):
        solids, keypoints = [*solids, *parts], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _wings(
    root: tuple[float, float], chords: tuple[float, float], tip: tuple[float, float, float], thick: float
) -> list[Solid]:
    """Both wings: from the middle of the root (x, z) to that of the left tip, with the chords there."""
    ends = np.array([[root[0], 0, root[1]], tip])
    corners = []
    for end, chord, depth in zip(ends, chords, (thick, thick / 2), strict=True):
        corners += [end + [x * chord / 2, 0, z * depth] for x, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return [hexahedron(np.array(corners) * [1, y, 1], "wing") for _, y in LEFT_RIGHT]


def _main_wings(rng: np.random.Generator, radius: float) -> tuple[list[Solid], Keypoints]:
    span, sweep, lift = rng.uniform(0.38, 0.52), rng.uniform(0.02, 0.28), rng.uniform(-0.01, 0.08)
    x, z, chords = rng.uniform(0.04, 0.14), rng.uniform(-0.6, 0.6) * radius, (rng.uniform(0.17, 0.25), 0.08)
    tip = (x - sweep, span, z + lift)
    solids, keypoints = _wings((x, z), chords, tip, 0.018), pair("wing tip", tip, 0.04)
    if rng.random() < 0.75:
        out, size = rng.uniform(0.3, 0.48) * span, rng.uniform(0.028, 0.04)
        engine = np.array([x + 0.06 - sweep * out / span, out, z + lift * out / span - 0.045])
        for _, y in LEFT_RIGHT:
            front, back = ((engine + [dx, 0, 0]) * [1, y, 1] for dx in (0.07, -0.08))
            solids += cylinder(front, back, (size, size * 0.7), "engine", sides=14)
        return solids, {**keypoints, **pair("engine", engine + [0.07, 0, 0], 0.05)}
    angle = rng.uniform(0, np.pi)
    blade = box([0.525, 0, 0], [0.012, 0.03, 0.3], "engine", turned=turn("x", angle))
    return [*solids, *cylinder([0.48, 0, 0], [0.55, 0, 0], (0.025, 0.008), "engine"), blade], keypoints


def _tail(rng: np.random.Generator, z: float) -> tuple[list[Solid], Keypoints]:
    height, sweep = rng.uniform(0.15, 0.23), rng.uniform(0.03, 0.12)
    low, high = np.array([-0.42, 0, z]), np.array([-0.46 - sweep, 0, z + height])
    corners = []
    for end, chord, thick in ((low, 0.17, 0.012), (high, 0.08, 0.006)):
        corners += [end + [dx * chord / 2, dy * thick, 0] for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    at_top = rng.random() < 0.3
    root = (high[0], float(high[2]) * 0.97) if at_top else (-0.44, z + 0.01)
    tip = (root[0] - rng.uniform(0.03, 0.1), rng.uniform(0.14, 0.22), root[1] + 0.01)
    solids = [hexahedron(corners, "fin"), *_wings(root, (0.12, 0.06), tip, 0.01)]
    return solids, {"fin tip": point(high, 0.04), **pair("tailplane tip", tip, 0.04)}


def make_bike(rng: np.random.Generator) -> Shape:
    """A bicycle, or in two of five cases a motorcycle."""
    radius, base, tyre = rng.uniform(0.21, 0.26), rng.uniform(0.54, 0.66), rng.uniform(0.016, 0.03)
    motor = rng.random() < 0.4
    axle = radius + tyre * (2 if motor else 1)
    solids = [
        wall for x in (base / 2, -base / 2) for wall in _bike_wheel(rng, x, axle, radius, tyre * (2 if motor else 1))
    ]
    hubs = {f"{end} hub": point([sign * base / 2, 0, axle], 0.06) for end, sign in FRONT_BACK}
    seat = np.array([-base * 0.22, 0, axle + rng.uniform(0.28, 0.36)])
    head = np.array([base * 0.36, 0, axle + rng.uniform(0.32, 0.42)])
    crank = np.array([-0.03, 0, axle - 0.03])
    thick = 0.024 if motor else rng.uniform(0.014, 0.022)
    rear, front, neck = np.array([-base / 2, 0, axle]), np.array([base / 2, 0, axle]), head - [-0.02, 0, 0.09]
    bars = (
        (front, head),
        (crank, seat),
        (crank, neck),
        (seat - [0, 0, 0.05], neck),
        (rear, crank),
        (rear, seat - [0, 0, 0.05]),
    )
    for start, end in bars:
        solids += cylinder(start, end, (thick, thick), "frame", sides=10)
    if motor:
        solids.append(ellipsoid((seat + neck) / 2 + [0.04, 0, 0.03], [0.15, 0.075, 0.075], "frame"))
        solids.append(box(crank + [0.02, 0, 0.04], [0.2, 0.12, 0.18], "metal"))
    long = rng.uniform(0.3, 0.36) if motor else rng.uniform(0.18, 0.24)
    solids.append(box(seat + [-0.03, 0, 0.02], [long, rng.uniform(0.08, 0.11), 0.045], "saddle", top=(1, 0.75)))
    keypoints: Keypoints = {**hubs, "saddle": point(seat + [-0.03, 0, 0.045], 0.06)}
    for parts, named in (_handlebar(rng, head), _pedals(rng, crank), _bike_lamps(head, rear, radius)):
        solids, keypoints = [*solids, *parts], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _bike_wheel(rng: np.random.Generator, x: float, axle: float, radius: float, tyre: float) -> list[Solid]:
    around, across = np.linspace(0, 2 * np.pi, 33)[:, None], np.linspace(0, 2 * np.pi, 11)[None]
    out = radius + tyre * np.cos(across)
    torus = np.stack([x + out * np.cos(around), tyre * np.sin(across) + 0 * around, axle + out * np.sin(around)], -1)
    solids: list[Solid] = [lofted(torus.transpose(1, 0, 2), "rubber", repeats=(6, 1))]
    solids += cylinder([x, -0.04, axle], [x, 0.04, axle], (0.03, 0.03), "metal")
    count, first = int(rng.integers(4, 8)), rng.uniform(0, np.pi)
    for angle in first + np.pi * np.arange(count) / count:
        spoke = radius * np.array([np.cos(angle), 0, np.sin(angle)])
        centre = np.array([x, 0, axle])
        solids += cylinder(centre - spoke, centre + spoke, (0.006, 0.006), "metal", sides=6)[:1]
    return solids


def _handlebar(rng: np.random.Generator, head: np.ndarray) -> tuple[list[Solid], Keypoints]:
    half, back = rng.uniform(0.17, 0.26), rng.uniform(0, 0.1)
    stem, grip = head + [0, 0, 0.05], head + [-back, half, 0.07]
    solids = cylinder(head - [0, 0, 0.03], stem, (0.02, 0.02), "metal")
    for _, y in LEFT_RIGHT:
        bend, end = (
            (head + [dx, share * half, dz]) * [1, y, 1] for dx, share, dz in ((0, 0.6, 0.07), (-back, 1, 0.07))
        )
        solids += tube([stem, bend, end], [0.014, 0.014, 0.014], "metal")
        solids += cylinder(bend + (end - bend) * 0.3, end, (0.021, 0.021), "saddle")
    return solids, pair("grip", grip, 0.04)


def _pedals(rng: np.random.Generator, crank: np.ndarray) -> tuple[list[Solid], Keypoints]:
    angle, solids, keypoints = (
        rng.uniform(-0.5, 0.5),
        cylinder(crank - [0, 0.06, 0], crank + [0, 0.06, 0], (0.02, 0.02), "metal"),
        {},
    )
    for side, y in LEFT_RIGHT:
        elbow = crank + [0, y * 0.07, 0]
        end = elbow + [y * 0.1 * np.cos(angle), 0, y * 0.1 * np.sin(angle)]
        pedal = end + [0, y * 0.035, 0]
        solids += cylinder(elbow, end, (0.012, 0.012), "metal", sides=8)
        solids.append(box(pedal, [0.08, 0.07, 0.02], "saddle"))
        keypoints[f"{side} pedal"] = point(pedal, 0.05)
    return solids, keypoints


def _bike_lamps(head: np.ndarray, rear: np.ndarray, radius: float) -> tuple[list[Solid], Keypoints]:
    guard = rear + [-0.02, 0, radius + 0.05]
    tail = guard + [-0.11, 0, -0.02]
    solids = [
        ellipsoid(head + [0.06, 0, 0], [0.04, 0.045, 0.045], "lamp"),
        box(guard, [0.22, 0.06, 0.012], "frame"),
        box(tail, [0.03, 0.06, 0.04], "tail lamp"),
    ]
    return solids, {"lamp": point(head + [0.1, 0, 0]), "tail lamp": point(tail + [-0.015, 0, 0], 0.04)}
