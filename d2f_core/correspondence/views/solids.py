"""Solids that objects are built from: boxes, cylinders, ellipsoids, bodies of revolution, tubes.

The frame of an object: x to its front, y to its left, z up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Point = Sequence[float] | np.ndarray
"""Three numbers."""


@dataclass(frozen=True, kw_only=True)
class Solid:
    """Triangles of one material that share no corners: corners [3 k, 3 k + 1, 3 k + 2] are triangle k."""

    corners: np.ndarray
    """Float64 [corners, 3]."""
    normals: np.ndarray
    """Float64 [corners, 3] of length 1, to either side of the surface."""
    uvs: np.ndarray
    """Float64 [corners, 2]; a texture repeats with period 1."""
    material: str


def turn(axis: str, angle: float) -> np.ndarray:
    """Rotation [3, 3] by `angle` radians about "x", "y" or "z"."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotation, (c, s) = np.eye(3), (np.cos(angle), np.sin(angle))
    rotation[first, first] = rotation[second, second] = c
    rotation[first, second], rotation[second, first] = -s, s
    return rotation


def surface(points: np.ndarray, material: str, *, closed: bool = False, repeats: tuple[float, float] = (1, 1)) -> Solid:
    """A smooth surface through a grid of points [a, b, 3].

    Args:
        closed: the last row of points is the first again.
        repeats: times the texture repeats along each side.
    """
    around = np.concatenate([points[-2:-1], points, points[1:2]]) if closed else points
    along = np.gradient(around, axis=0)[1:-1] if closed else np.gradient(points, axis=0)
    normals = np.cross(along, np.gradient(points, axis=1))
    steps = (np.linspace(0, times, count) for times, count in zip(repeats, points.shape[:2], strict=True))
    uvs = np.stack(np.meshgrid(*steps, indexing="ij"), -1)
    corners = _triangles(points)
    flat = np.repeat(_flat_normals(corners), 3, axis=0)
    smooth, length = _triangles(normals), np.linalg.norm(_triangles(normals), axis=1, keepdims=True)
    # At a pole, the points of a row coincide and have no normal of their own.
    unit = np.where(length > 1e-9, smooth / np.maximum(length, 1e-12), flat)
    return Solid(corners=corners, normals=unit, uvs=_triangles(uvs), material=material)


def _triangles(values: np.ndarray) -> np.ndarray:
    """Corners [6 * quads, n] of the two triangles of each cell of a grid [a, b, n]."""
    a, b, c, d = values[:-1, :-1], values[1:, :-1], values[1:, 1:], values[:-1, 1:]
    return np.stack([a, b, c, a, c, d], axis=2).reshape(-1, values.shape[-1])


def _flat_normals(corners: np.ndarray) -> np.ndarray:
    """Normals [triangles, 3] of length 1; any for a triangle without area."""
    a, b, c = np.moveaxis(corners.reshape(-1, 3, 3), 1, 0)
    normals = np.cross(b - a, c - a)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 1e-12, normals / np.maximum(length, 1e-12), [0.0, 0.0, 1.0])


FACES = np.array([[3, 2, 1, 0], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])


def hexahedron(corners: np.ndarray | Sequence[Point], material: str) -> Solid:
    """Eight corners: four of a lower face in order around it, then those above them."""
    faces = np.asarray(corners, float)[FACES]
    sides = np.linalg.norm(np.roll(faces, -1, axis=1) - faces, axis=2)
    zero = np.zeros(len(faces))
    uvs = np.stack([[zero, zero], [sides[:, 0], zero], [sides[:, 0], sides[:, 1]], [zero, sides[:, 1]]])
    order = [0, 1, 2, 0, 2, 3]
    points = faces[:, order].reshape(-1, 3)
    normals = np.repeat(_flat_normals(points), 3, axis=0)
    uvs = 2 * uvs.transpose(2, 0, 1)[:, order].reshape(-1, 2)
    return Solid(corners=points, normals=normals, uvs=uvs, material=material)


def box(
    centre: Point,
    size: Point,
    material: str,
    *,
    top: tuple[float, float] = (1, 1),
    shift: float = 0,
    turned: np.ndarray | None = None,
) -> Solid:
    """A box of `size` around its centre.

    Args:
        top: the upper face's size in x and y, as a share of the lower one's.
        shift: how far the upper face is moved in x.
        turned: rotation about the centre, [3, 3].
    """
    x, y, z = np.asarray(size, float) / 2
    lower = np.array([[-x, -y, -z], [x, -y, -z], [x, y, -z], [-x, y, -z]])
    upper = lower * [*top, -1] + [shift, 0, 0]
    rotation = np.eye(3) if turned is None else turned
    return hexahedron(np.concatenate([lower, upper]) @ rotation.T + np.asarray(centre, float), material)


def ring(start: np.ndarray, end: np.ndarray, sides: int) -> np.ndarray:
    """Unit vectors [sides + 1, 3] around the line from start to end; the last is the first again."""
    axis = (end - start) / max(float(np.linalg.norm(end - start)), 1e-12)
    across = np.cross(axis, [0.0, 0.0, 1.0] if abs(axis[2]) < 0.9 else [1.0, 0.0, 0.0])
    across /= np.linalg.norm(across)
    angles = np.linspace(0, 2 * np.pi, sides + 1)[:, None]
    return np.cos(angles) * across + np.sin(angles) * np.cross(axis, across)


def cylinder(start: Point, end: Point, radii: tuple[float, float], material: str, *, sides: int = 12) -> list[Solid]:
    """A closed cylinder, or a cone where the radii at start and end differ."""
    ends = np.asarray([start, end], float)
    around = ring(ends[0], ends[1], sides)
    rims = ends[:, None] + around * np.asarray(radii, float)[:, None, None]
    caps = [np.stack([np.repeat(centre[None], sides + 1, 0), rim], 1) for centre, rim in zip(ends, rims, strict=True)]
    wall = surface(rims.transpose(1, 0, 2), material, closed=True, repeats=(2, 1))
    return [wall, *(surface(cap, material, closed=True) for cap in caps)]


def ellipsoid(
    centre: Point,
    radii: Point,
    material: str,
    *,
    turned: np.ndarray | None = None,
    repeats: tuple[float, float] = (2, 1),
) -> Solid:
    """An ellipsoid with half axes `radii`, turned about its centre."""
    longitude, latitude = np.linspace(0, 2 * np.pi, 19)[:, None], np.linspace(-np.pi / 2, np.pi / 2, 11)[None]
    flat = np.cos(latitude)
    points = np.stack([flat * np.cos(longitude), flat * np.sin(longitude), np.sin(latitude) + 0 * longitude], -1)
    rotation = np.eye(3) if turned is None else turned
    points = (points * np.asarray(radii, float)) @ rotation.T + np.asarray(centre, float)
    return surface(points, material, closed=True, repeats=repeats)


def revolved(
    centre: Point, profile: Sequence[tuple[float, float]], material: str, *, repeats: tuple[float, float] = (3, 1)
) -> Solid:
    """A body of revolution about the vertical axis through `centre`; the profile is (height, radius) from one end."""
    heights, radii = np.asarray(profile, float).T
    angles = np.linspace(0, 2 * np.pi, 25)[:, None]
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles), heights + 0 * angles], -1)
    return surface(points + np.asarray(centre, float), material, closed=True, repeats=repeats)


def tube(points: Sequence[Point], radii: Sequence[float], material: str, *, sides: int = 10) -> list[Solid]:
    """Cylinders from point to point, with a ball at each joint and both ends; one radius per point."""
    pairs = zip(points, points[1:], radii, radii[1:], strict=False)
    walls = [wall for a, b, r, s in pairs for wall in cylinder(a, b, (r, s), material, sides=sides)[:1]]
    return walls + [ellipsoid(point, [radius] * 3, material) for point, radius in zip(points, radii, strict=True)]


def lofted(sections: np.ndarray, material: str, *, repeats: tuple[float, float] = (2, 3)) -> Solid:
    """A smooth surface through closed cross-sections [sections, points, 3], whose last point is the first again."""
    return surface(sections.transpose(1, 0, 2), material, closed=True, repeats=repeats)
