"""Objects for rendered scenes: pybullet_data's random bodies, and as many procedural solids of revolution and prisms.

Every tenth object belongs to the test split. Meshes are centred, with 1 as their largest extent.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from d2f_core.randomness import keyed_generator

NUM_BODIES = 1000
"""Number of objects in each of the two families."""
BROKEN = 168
"""Number of the pybullet_data body that is left out: all vertices in its file are NaN."""
RINGS = 16
"""Cross-sections of a solid of revolution, from bottom to top."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Triangles that share no corners: corners 3 k, 3 k + 1, 3 k + 2 are triangle k, counter-clockwise from outside."""

    vertices: np.ndarray
    """Float [corners, 3]."""
    normals: np.ndarray
    """Float [corners, 3], of length 1."""
    uvs: np.ndarray
    """Float [corners, 2]; a texture repeats with period 1."""


def object_numbers(split: str) -> list[int]:
    """The objects of a split; `train` and `test` have none in common."""
    whole = (number for number in range(2 * NUM_BODIES) if number != BROKEN)
    return [number for number in whole if (number % 10 == 9) == (split == "test")]


def object_name(number: int) -> str:
    return f"body {number:03d}" if number < NUM_BODIES else f"turned {number - NUM_BODIES:03d}"


@lru_cache(maxsize=512)
def make_object(number: int) -> Mesh:
    """Object `number` of 0 ... 1999.

    Raises:
        ValueError: pybullet's models are not installed.
    """
    if number >= NUM_BODIES:
        return _turned(number)
    try:
        import pybullet_data
    except ImportError as error:
        raise ValueError(f"Scenes need pybullet ({error}). Install this project with [demo].") from None
    path = Path(pybullet_data.getDataPath(), f"random_urdfs/{number:03d}/{number:03d}.obj")
    return make_mesh(*_read_obj(path.read_text()))


def make_mesh(vertices: np.ndarray, triangles: np.ndarray, *, smooth: bool = False) -> Mesh:
    """A centred mesh of unit size; textures are projected along the axis that a triangle faces most.

    Args:
        vertices: float [n, 3].
        triangles: int [m, 3], counter-clockwise seen from outside.
        smooth: round the shading over edges.
    """
    low, high = vertices.min(0), vertices.max(0)
    vertices = (vertices - (low + high) / 2) / (high - low).max()
    corners = vertices[triangles]
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    real = np.linalg.norm(areas, axis=1) > 1e-9  # at a tip, quads have one side of zero length
    triangles, corners, areas = triangles[real], corners[real], areas[real]
    flat = areas / np.linalg.norm(areas, axis=1, keepdims=True)
    normals = np.repeat(flat, 3, axis=0)
    if smooth:
        summed = np.zeros_like(vertices)
        np.add.at(summed, triangles.ravel(), np.repeat(areas, 3, axis=0))
        summed /= np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-12)
        normals = summed[triangles.ravel()]
    axis = np.abs(flat).argmax(1)
    across = np.stack([(axis == 0) * 1, np.where(axis == 2, 1, 2)], axis=1)
    uvs = np.take_along_axis(corners, across[:, None, :].repeat(3, axis=1), axis=2)
    return Mesh(vertices=corners.reshape(-1, 3), normals=normals, uvs=uvs.reshape(-1, 2) + 0.5)


def make_quad(corners: np.ndarray, repeats: float) -> Mesh:
    """A flat rectangle with the given corners.

    Args:
        corners: float [4, 3], counter-clockwise seen from its front.
        repeats: times the texture repeats along each side.
    """
    triangles = [0, 1, 2, 0, 2, 3]
    normal = np.cross(corners[1] - corners[0], corners[3] - corners[0])
    uvs = repeats * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    normals = np.tile(normal / np.linalg.norm(normal), (len(triangles), 1))
    return Mesh(vertices=corners[triangles], normals=normals, uvs=uvs[triangles])


def _turned(number: int) -> Mesh:
    """A random solid of revolution: vases, bowls, cones, discs; with few sides, prisms, boxes and pyramids."""
    rng = keyed_generator(0, number, "turned object")
    sides = int(rng.choice([3, 4, 5, 6, 8, 20, 20, 20]))
    height = rng.uniform(0.3, 2.2)
    t = np.linspace(0, 1, RINGS)
    if sides <= 8 and rng.random() < 0.6:  # a prism, perhaps narrower at one end
        radius = 0.5 * (1 - rng.choice([0, 0, 0.4, 1]) * t)
    else:
        waves = sum(rng.normal() / order * np.sin(order * np.pi * t + rng.uniform(0, np.pi)) for order in range(1, 5))
        radius = np.clip(0.5 + 0.22 * waves, 0.08, 1)
        if rng.random() < 0.4:  # closed like a ball
            radius = radius * np.sqrt(np.clip(1 - (2 * t - 1) ** 2, 0, None))
    angles = 2 * np.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.6, 1)], 1)
    side = np.concatenate(
        [radius[:, None, None] * ring, np.broadcast_to(height * t[:, None, None], (RINGS, sides, 1))], 2
    )
    vertices = np.concatenate([side.reshape(-1, 3), [[0, 0, 0], [0, 0, height]]])
    here, beside = np.arange(sides), (np.arange(sides) + 1) % sides
    low = (np.arange(RINGS - 1) * sides)[:, None]
    quads = [part.ravel() for part in (low + here, low + beside, low + sides + beside, low + sides + here)]
    top, bottom_centre, top_centre = (RINGS - 1) * sides, len(vertices) - 2, len(vertices) - 1
    triangles = np.concatenate(
        [
            np.stack([quads[0], quads[1], quads[2]], 1),
            np.stack([quads[0], quads[2], quads[3]], 1),
            np.stack([np.full(sides, bottom_centre), beside, here], 1),
            np.stack([np.full(sides, top_centre), top + here, top + beside], 1),
        ]
    )
    return make_mesh(vertices, triangles, smooth=sides > 8)


def _read_obj(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an OBJ file whose faces are all triangles."""
    lines = [line.split() for line in text.splitlines()]
    vertices = [[float(number) for number in line[1:4]] for line in lines if line[:1] == ["v"]]
    faces = [[int(corner.partition("/")[0]) - 1 for corner in line[1:]] for line in lines if line[:1] == ["f"]]
    return np.array(vertices), np.array(faces)
