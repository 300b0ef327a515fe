"""Birds, persons and quadrupeds, each in a pose of its own."""

from collections.abc import Callable

import numpy as np

from d2f_core.correspondence.views.shape import FRONT_BACK, LEFT_RIGHT, Keypoints, Shape, pair, point
from d2f_core.correspondence.views.solids import (
    Solid,
    box,
    cylinder,
    ellipsoid,
    hexahedron,
    lofted,
    revolved,
    tube,
    turn,
)

BIRD = ("beak", "crown", "breast", "tail", "left eye", "right eye", "left wing tip", "right wing tip", "left foot",
        "right foot")  # fmt: skip
PERSON = (
    "nose", "crown",
    *(f"{side} {part}" for part in ("shoulder", "elbow", "hand", "hip", "knee", "toe") for side in ("left", "right")),
)  # fmt: skip
QUADRUPED = (
    "nose", "withers", "tail base", "tail tip", "left ear", "right ear", "left eye", "right eye",
    *(f"{side} {end} paw" for end in ("front", "back") for side in ("left", "right")),
)  # fmt: skip

Place = Callable[[float, float, float], np.ndarray]
"""Coordinates in a part's own frame -> position [3] in the object's frame."""


def make_quadruped(rng: np.random.Generator) -> Shape:
    length, girth = rng.uniform(0.28, 0.38), np.array([rng.uniform(0.09, 0.14), rng.uniform(0.1, 0.16)])
    height = rng.uniform(0.22, 0.42) + girth[1] * 0.6
    chest = ellipsoid([length * 0.45, 0, height], [length * 0.55, girth[0] * 1.05, girth[1] * 1.08], "fur")
    belly = ellipsoid([0, 0, height], [length, *girth * 0.97], "fur", repeats=(3, 2))
    rump = ellipsoid([-length * 0.55, 0, height + 0.01], [length * 0.45, girth[0] * 1.03, girth[1] * 1.03], "fur")
    solids: list[Solid] = [chest, belly, rump]
    keypoints: Keypoints = {"withers": point([length * 0.6, 0, height + girth[1] * 0.95], 0.05)}
    parts = (
        _legs(rng, length, girth, height),
        _quadruped_head(rng, length, girth, height),
        _tail(rng, length, girth, height),
    )
    for more, named in parts:
        solids, keypoints = [*solids, *more], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _legs(rng: np.random.Generator, length: float, girth: np.ndarray, height: float) -> tuple[list[Solid], Keypoints]:
    radius, solids, keypoints = rng.uniform(0.026, 0.045), [], {}
    for end, forward in FRONT_BACK:
        for side, y in LEFT_RIGHT:
            swing = rng.uniform(-0.11, 0.11)
            hip = np.array([forward * length * 0.66, y * girth[0] * 0.62, height - girth[1] * 0.2])
            foot = np.array([hip[0] + swing, hip[1], radius * 0.5])
            knee = np.array([hip[0] + swing * 0.35 + (0.02 if forward > 0 else -0.02), hip[1], hip[2] * 0.48])
            solids += tube([hip, knee, foot], [radius * 1.7, radius, radius * 0.8], "fur")
            solids.append(ellipsoid(foot + [radius * 0.5, 0, 0], [radius * 1.6, radius * 1.1, radius * 0.75], "muzzle"))
            keypoints[f"{side} {end} paw"] = point(foot + [radius * 0.6, 0, radius * 0.2], radius * 1.8)
    return solids, keypoints


def _quadruped_head(
    rng: np.random.Generator, length: float, girth: np.ndarray, height: float
) -> tuple[list[Solid], Keypoints]:
    neck, rise, size = rng.uniform(0.1, 0.32), rng.uniform(0.5, 1.25), rng.uniform(0.075, 0.1)
    base = np.array([length * 0.72, 0, height + girth[1] * 0.35])
    top = base + neck * np.array([np.cos(rise), 0, np.sin(rise)])
    turned = turn("z", rng.uniform(-0.35, 0.35)) @ turn("y", rng.uniform(-0.05, 0.45))
    centre, muzzle = top + [size * 0.4, 0, size * 0.3], rng.uniform(0.05, 0.13)

    def at(x: float, y: float, z: float) -> np.ndarray:
        return centre + turned @ np.array([x, y, z])

    snout = at(size * 0.75 + muzzle * 0.45, 0, -size * 0.25)
    tip = at(size * 0.75 + muzzle * 1.2 + 0.02, 0, -size * 0.15)
    solids = cylinder(base, top, (girth[1] * rng.uniform(0.55, 0.7), size * 0.75), "fur", sides=14)
    solids += [
        ellipsoid(centre, [size * 1.1, size * 0.9, size], "fur", turned=turned),
        ellipsoid(snout, [muzzle * 0.75 + 0.03, size * 0.52, size * 0.45], "muzzle", turned=turned),
        ellipsoid(tip, [0.022, 0.026, 0.022], "eye"),
    ]
    style = str(rng.choice(["pointed", "hanging", "round"]))
    keypoints: Keypoints = {"nose": point(tip, 0.03)}
    for side, y in LEFT_RIGHT:
        ear, ear_tip = _ear(style, at(-size * 0.2, y * size * 0.6, size * 0.65), y, turned)
        eye = at(size * 0.82, y * size * 0.52, size * 0.3)
        solids += [*ear, ellipsoid(eye, [0.019] * 3, "eye")]
        keypoints |= {f"{side} ear": point(ear_tip, 0.04), f"{side} eye": point(eye, 0.025)}
    return solids, keypoints


def _ear(style: str, base: np.ndarray, y: int, turned: np.ndarray) -> tuple[list[Solid], np.ndarray]:
    """An ear and its tip."""
    if style == "pointed":
        tip = base + turned @ np.array([0, y * 0.03, 0.11])
        return cylinder(base - turned @ np.array([0, 0, 0.03]), tip, (0.045, 0.004), "ear", sides=8), tip
    if style == "hanging":
        middle = base + turned @ np.array([0, y * 0.045, -0.045])
        return [ellipsoid(middle, [0.04, 0.018, 0.075], "ear", turned=turned)], middle + turned @ np.array(
            [0, y * 0.01, -0.06]
        )
    middle = base + turned @ np.array([0, y * 0.02, 0.03])
    return [ellipsoid(middle, [0.02, 0.045, 0.05], "ear", turned=turned)], middle + turned @ np.array([0, 0, 0.035])


def _tail(rng: np.random.Generator, length: float, girth: np.ndarray, height: float) -> tuple[list[Solid], Keypoints]:
    span, rise = rng.uniform(0.15, 0.36), rng.uniform(-1.1, 1.0)
    base = np.array([-length * 0.95, 0, height + girth[1] * 0.35])
    middle = base + span / 2 * np.array([-np.cos(rise), 0, np.sin(rise)])
    bend = rise + rng.uniform(-0.7, 0.7)
    end = middle + span / 2 * np.array([-np.cos(bend), rng.uniform(-0.3, 0.3), np.sin(bend)])
    solids = tube([base, middle, end], [0.032, 0.026, 0.016], "ear")
    return solids, {"tail base": point(base + [0, 0, 0.02], 0.05), "tail tip": point(end)}


def make_person(rng: np.random.Generator) -> Shape:
    leg, torso = rng.uniform(0.42, 0.5), rng.uniform(0.28, 0.34)
    shoulder, hip, deep = rng.uniform(0.12, 0.16), rng.uniform(0.08, 0.105), rng.uniform(0.065, 0.095)
    heights = np.array(
        [leg - 0.05, leg + 0.02, leg + torso * 0.4, leg + torso * 0.85, leg + torso, leg + torso + 0.025]
    )
    half = np.array([hip * 0.85, hip * 1.05, hip * 0.98, shoulder, shoulder * 0.88, shoulder * 0.3])
    deeps = deep * np.array([0.85, 1, 0.9, 1.05, 0.85, 0.4])
    angles = np.linspace(0, 2 * np.pi, 25)
    outline = np.stack(
        [deeps[:, None] * np.cos(angles), half[:, None] * np.sin(angles), heights[:, None] + 0 * angles], -1
    )
    solids: list[Solid] = [lofted(outline, "shirt", repeats=(2, 2))]
    if rng.random() < 0.3:
        solids.append(revolved([0, 0, leg], [(0.06, hip * 0.95), (-0.06, hip * 1.4), (-0.2, hip * 1.9)], "shirt"))
    keypoints: Keypoints = {}
    parts = (_person_head(rng, leg + torso), _arms(rng, shoulder, leg + torso - 0.03), _person_legs(rng, hip, leg))
    for more, named in parts:
        solids, keypoints = [*solids, *more], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _person_head(rng: np.random.Generator, shoulders: float) -> tuple[list[Solid], Keypoints]:
    size, turned = rng.uniform(0.07, 0.088), turn("z", rng.uniform(-0.4, 0.4))
    centre = np.array([0.01, 0, shoulders + 0.05 + size])

    def at(x: float, y: float, z: float) -> np.ndarray:
        return centre + size * (turned @ np.array([x, y, z]))

    nose = at(1.2, 0, -0.1)
    solids = [
        *cylinder([0, 0, shoulders - 0.02], [0, 0, shoulders + 0.06], (0.04, 0.034), "skin"),
        ellipsoid(centre, size * np.array([0.98, 0.84, 1.15]), "skin", turned=turned),
        ellipsoid(at(-0.2, 0, 0.25), size * np.array([0.98, 0.94, 1.02]), "hair", turned=turned),
        *cylinder(at(0.8, 0, 0.1), nose, (0.014, 0.014), "skin", sides=8),
        *(ellipsoid(at(0.86, y * 0.36, 0.12), [0.012] * 3, "eye") for _, y in LEFT_RIGHT),
    ]
    crown = at(-0.1, 0, 1.27)
    if rng.random() < 0.35:
        brim = [(0.0, 1.0), (0.0, 1.75), (0.15, 1.75), (0.17, 1.02), (0.95, 0.9), (0.95, 0.0)]
        profile = [(height * size, radius * size) for height, radius in brim]
        solids.append(revolved(at(-0.1, 0, 0.55), profile, "hat"))
        crown = at(-0.1, 0, 1.5)
    return solids, {"nose": point(nose), "crown": point(crown, 0.05)}


def _arms(rng: np.random.Generator, shoulder: float, z: float) -> tuple[list[Solid], Keypoints]:
    radius, length, bare, solids, keypoints = (
        rng.uniform(0.028, 0.038),
        rng.uniform(0.13, 0.165),
        rng.random() < 0.5,
        [],
        {},
    )
    for side, y in LEFT_RIGHT:
        out, forward = rng.uniform(0.15, 1.3), rng.uniform(-0.5, 0.8)
        joint = np.array([0, y * (shoulder - 0.005), z - 0.01])
        elbow = joint + length * _limb(out, forward, y)
        hand = elbow + length * _limb(out, forward + rng.uniform(0, 1.1), y)
        solids += tube([joint, elbow], [radius * 1.25, radius], "shirt")
        solids += tube([elbow, hand], [radius * 0.97, radius * 0.75], "skin" if bare else "shirt")
        solids.append(ellipsoid(hand, [0.034] * 3, "skin"))
        keypoints |= {
            f"{side} shoulder": point(joint + [0, 0, radius * 0.6], radius * 1.8),
            f"{side} elbow": point(elbow, radius * 1.6),
            f"{side} hand": point(hand, 0.045),
        }
    return solids, keypoints


def _limb(out: float, forward: float, y: int) -> np.ndarray:
    """Direction of a limb that hangs down when both angles are 0."""
    return np.array([np.sin(forward) * np.cos(out), y * np.sin(out), -np.cos(out) * np.cos(forward)])


def _person_legs(rng: np.random.Generator, hip: float, leg: float) -> tuple[list[Solid], Keypoints]:
    solids: list[Solid] = []
    keypoints: Keypoints = {}
    for side, y in LEFT_RIGHT:
        forward = rng.uniform(-0.4, 0.5)
        joint = np.array([0, y * hip * 0.58, leg - 0.01])
        knee = joint + leg * 0.47 * _limb(0.05, forward, y)
        foot = knee + leg * 0.47 * _limb(0.0, forward - rng.uniform(0, 0.5), y)
        solids += tube([joint, knee, foot], [0.058, 0.046, 0.034], "trousers")
        solids.append(box(foot + [0.035, 0, -0.015], [0.14, 0.062, 0.045], "shoe", top=(0.8, 0.8), shift=-0.02))
        keypoints |= {
            f"{side} hip": point(joint + [0, y * 0.03, 0.02], 0.07),
            f"{side} knee": point(knee + [0.02, 0, 0], 0.06),
            f"{side} toe": point(foot + [0.1, 0, -0.015], 0.035),
        }
    return solids, keypoints


def make_bird(rng: np.random.Generator) -> Shape:
    length, radius, pitch = rng.uniform(0.2, 0.27), rng.uniform(0.1, 0.14), rng.uniform(0, 0.6)
    turned, centre = turn("y", -pitch), np.array([0, 0, rng.uniform(0.14, 0.32) + radius])

    def at(x: float, y: float, z: float) -> np.ndarray:
        return centre + turned @ np.array([x, y, z])

    body = ellipsoid(centre, [length, radius * 0.9, radius], "plumage", turned=turned, repeats=(2, 2))
    breast = ellipsoid(
        at(length * 0.3, 0, -radius * 0.14), [length * 0.66, radius * 0.88, radius * 0.95], "breast", turned=turned
    )
    solids: list[Solid] = [body, breast]
    keypoints: Keypoints = {"breast": point(at(length * 0.82, 0, -radius * 0.4), 0.06)}
    spread = rng.uniform(0.3, 0.5) if rng.random() < 0.5 else 0.0
    parts = (
        _bird_head(rng, at(length * 0.72, 0, radius * 0.35), radius),
        _bird_tail(rng, at(-length * 0.85, 0, 0), turned),
        _spread_wings(rng, at, length, radius, spread) if spread else _folded_wings(at, length, radius, turned),
        _bird_legs(centre, radius),
    )
    for more, named in parts:
        solids, keypoints = [*solids, *more], {**keypoints, **named}
    return Shape(solids=solids, keypoints=keypoints)


def _bird_head(rng: np.random.Generator, base: np.ndarray, radius: float) -> tuple[list[Solid], Keypoints]:
    size, neck, turned = rng.uniform(0.068, 0.095), rng.uniform(0.02, 0.2), turn("z", rng.uniform(-0.4, 0.4))
    centre = base + [neck * 0.4 + 0.03, 0, neck + size * 0.5]

    def at(x: float, y: float, z: float) -> np.ndarray:
        return centre + size * (turned @ np.array([x, y, z]))

    tip = at(1, 0, -0.2) + turned @ np.array([rng.uniform(0.07, 0.16), 0, -0.01])
    solids = [
        *tube([base, centre], [radius * 0.6, size * 0.75], "plumage", sides=14),
        ellipsoid(centre, [size, size * 0.9, size], "head", turned=turned),
        *cylinder(at(0.75, 0, -0.05), tip, (size * 0.42, 0.006), "beak"),
    ]
    eyes = {side: at(0.62, y * 0.68, 0.28) for side, y in LEFT_RIGHT}
    solids += [ellipsoid(eye, [0.019] * 3, "eye") for eye in eyes.values()]
    named = {f"{side} eye": point(eye, 0.025) for side, eye in eyes.items()}
    return solids, {"beak": point(tip), "crown": point(at(0, 0, 1), 0.04), **named}


def _bird_tail(rng: np.random.Generator, base: np.ndarray, turned: np.ndarray) -> tuple[list[Solid], Keypoints]:
    length, width = rng.uniform(0.14, 0.28), rng.uniform(0.05, 0.1)
    end = base + turned @ np.array([-length, 0, rng.uniform(-0.03, 0.08)])
    outline = [end + [0, -width, 0], base + [0, -0.045, 0], base + [0, 0.045, 0], end + [0, width, 0]]
    corners = [where + [0, 0, z] for z in (-0.012, 0.012) for where in outline]
    return [hexahedron(corners, "wing")], {"tail": point(end, 0.05)}


def _folded_wings(at: Place, length: float, radius: float, turned: np.ndarray) -> tuple[list[Solid], Keypoints]:
    tip = at(-length * 1.1, radius * 0.62, radius * 0.02)
    size = [length * 0.78, radius * 0.24, radius * 0.62]
    solids: list[Solid] = []
    for _, y in LEFT_RIGHT:
        solids.append(ellipsoid(at(-length * 0.14, y * radius * 0.78, radius * 0.15), size, "wing", turned=turned))
        start, end = at(-length * 0.5, y * radius * 0.8, radius * 0.1), tip * [1, y, 1]
        solids += cylinder(start, end, (radius * 0.32, 0.012), "wing")
    return solids, pair("wing tip", tip, 0.05)


def _spread_wings(
    rng: np.random.Generator, at: Place, length: float, radius: float, span: float
) -> tuple[list[Solid], Keypoints]:
    lift = rng.uniform(0, 0.6)
    front, back = at(length * 0.45, radius * 0.7, radius * 0.45), at(-length * 0.45, radius * 0.7, radius * 0.3)
    out = np.array([-0.05, np.cos(lift), np.sin(lift)]) * span
    tip = front + out
    thick = np.array([0, -0.012 * np.sin(lift), 0.012])
    corners = [where + sign * thick for sign in (-1, 1) for where in (front, back, back + out * 0.85, tip)]
    solids = [hexahedron(np.array(corners) * [1, y, 1], "wing") for _, y in LEFT_RIGHT]
    return solids, pair("wing tip", tip, 0.05)


def _bird_legs(centre: np.ndarray, radius: float) -> tuple[list[Solid], Keypoints]:
    foot = np.array([centre[0] + 0.02, radius * 0.42, 0.012])
    solids: list[Solid] = []
    for _, y in LEFT_RIGHT:
        hip, end = (where * [1, y, 1] for where in (centre + [0, radius * 0.42, -radius * 0.6], foot))
        solids += cylinder(hip, end, (0.018, 0.013), "beak", sides=8)
        solids.append(box(end + [0.025, 0, 0], [0.1, 0.05, 0.018], "beak", top=(0.8, 0.8)))
    return solids, pair("foot", foot + [0.02, 0, 0.012], 0.05)
