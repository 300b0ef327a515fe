"""Images of an object by ray casting (Embree): colours, depth, and which points a camera sees.

Embree's rays are float32. Depth is computed anew, in float64, on the plane of the triangle that a ray has met.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from d2f_core.correspondence.views.cameras import ViewCamera
from d2f_core.correspondence.views.categories import NUM_TEXTURES, Model
from d2f_core.correspondence.views.config import Split
from d2f_core.data.datasets.textures import TEXTURE_SIZE, make_sky, make_texture

SAMPLES = 2
"""Rays for the colour of a pixel, along each side. Depth has one ray of its own, through the pixel's centre."""
FLOOR_ENDS = (1.0, 2.6)
"""Distance from the object's middle at which the floor begins to fade into the background, and where it has."""
FAR = 2.0
"""Distance from which an object of diagonal 1 is looked at from outside."""
OFFSET = 2e-3
"""Distance from a surface at which its shadow rays begin."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What surrounds an object, and its light."""

    background: np.ndarray
    """Float32 [height, width, 3] in [0, 1], one colour for each colour ray."""
    floor: np.ndarray | None
    """Texture of the floor, float32 [height, width, 3]; None: the object floats."""
    light: np.ndarray
    """Unit vector towards the light, float32 [3]."""
    ambient: float
    diffuse: float
    specular: float
    shadow: float
    """Share of the light that a shadow takes."""


def draw_look(rng: np.random.Generator, split: Split, size: int) -> Look:
    angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.3)
    light = np.array([np.cos(height) * np.cos(angle), np.cos(height) * np.sin(angle), np.sin(height)], np.float32)
    ambient = rng.uniform(0.4, 0.65)
    return Look(
        background=_background(rng, split, size * SAMPLES),
        floor=_surroundings(rng, split) if rng.random() < 0.6 else None,
        light=light,
        ambient=ambient,
        diffuse=1.1 - ambient,
        specular=rng.uniform(0, 0.25),
        shadow=rng.uniform(0.5, 1),
    )


def _surroundings(rng: np.random.Generator, split: Split) -> np.ndarray:
    """A texture that no object has, paler than theirs."""
    texture = make_texture(f"surroundings/{split}", int(rng.integers(NUM_TEXTURES))) / np.float32(255)
    return texture + (texture.mean((0, 1)) - texture) * np.float32(rng.uniform(0.3, 0.9))


def _background(rng: np.random.Generator, split: Split, size: int) -> np.ndarray:
    """A sky, or a piece of a texture, enlarged."""
    if rng.random() < 0.6:
        return make_sky(rng, size).astype(np.float32)
    side = int(rng.integers(12, TEXTURE_SIZE))
    left, top = rng.integers(0, TEXTURE_SIZE - side, 2)
    piece = (_surroundings(rng, split)[top : top + side, left : left + side] * 255).round().astype(np.uint8)
    enlarged = Image.fromarray(piece).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(enlarged) / np.float32(255)


class Scene:
    """A model that rays can be cast at."""

    def __init__(self, model: Model) -> None:
        """Raises ValueError when embreex is not installed."""
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise ValueError(f"Views need embreex ({error}). Install this project with [correspondence].") from None
        self.model = model
        self._embree: Any = EmbreeScene()
        self._mesh = TriangleMesh(self._embree, model.triangles)  # Embree frees it with the last reference

    def cast(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What rays [n, 3] meet first.

        Returns:
            Its triangle, int [n], -1 for none; and the weights of that triangle's corners, float32 [n, 3].
        """
        hit = self._embree.run(*map(_float32, np.broadcast_arrays(origins, directions)), output=True)
        return hit["primID"], np.stack([1 - hit["u"] - hit["v"], hit["u"], hit["v"]], 1)

    def blocked(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Which rays [n, 3] meet anything, bool [n]."""
        return self._embree.run(*map(_float32, np.broadcast_arrays(origins, directions)), query="OCCLUDED") >= 0

    def reach(self, origin: np.ndarray, directions: np.ndarray, triangles: np.ndarray) -> np.ndarray:
        """How many times `directions` [n, 3] lead from the origin [3] or origins [n, 3] to the planes of the triangles
        [n], float64.
        """
        a, b, c = self.model.triangles[triangles].astype(np.float64).transpose(1, 0, 2)
        normals = np.cross(b - a, c - a)
        return (normals * (a - origin)).sum(1) / (normals * directions).sum(1)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def _samples(size: int, per_pixel: int) -> np.ndarray:
    """Positions of rays in pixels, float32 [(size * per_pixel) ** 2, 2], row by row."""
    line = ((np.arange(size * per_pixel) + 0.5) / per_pixel).astype(np.float32)
    return np.stack(np.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)


def render_depth(scene: Scene, camera: ViewCamera, size: int) -> np.ndarray:
    """Depth of the object at the pixels' centres, float32 [size, size]; NaN where it is not seen."""
    directions = camera.rays(_samples(size, 1).astype(np.float64))
    triangles, _ = scene.cast(camera.centre, directions)
    depth = np.full(len(directions), np.nan)
    met = triangles >= 0
    depth[met] = scene.reach(camera.centre, directions[met], triangles[met])
    return depth.reshape(size, size).astype(np.float32)


def seen(scene: Scene, camera: ViewCamera, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Which points [n, 3] the camera sees, bool [n]: the first surface towards one lies within its radius [n] of it.

    A point of NaN is not seen.
    """
    there = ~np.isnan(points[:, 0])
    towards = np.where(there[:, None], points, 0) - camera.centre
    triangles, _ = scene.cast(camera.centre, towards)
    met = there & (triangles >= 0)
    result = np.zeros(len(points), bool)
    share = scene.reach(camera.centre, towards[met], triangles[met])
    result[met] = np.abs(share - 1) * np.linalg.norm(towards[met], axis=1) <= radii[met]
    return result


def seen_from_around(scene: Scene, points: np.ndarray, within: float) -> np.ndarray:
    """Which points [n, 3] of the surface can be seen from somewhere far away, not from below, bool [n].

    Args:
        within: distance of a point behind the first surface that rounding may make.
    """
    result = np.zeros(len(points), bool)
    for elevation in (0.1, 0.6, 1.2):
        for azimuth in np.linspace(0, 2 * np.pi, 16, endpoint=False):
            flat = np.cos(elevation)
            away = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])
            origins = points + FAR * away
            triangles, _ = scene.cast(origins, -away)
            met = np.flatnonzero(triangles >= 0)
            reach = scene.reach(origins[met], -away, triangles[met])
            result[met] |= np.abs(reach - FAR) <= within
    return result


def render_picture(scene: Scene, camera: ViewCamera, look: Look, size: int) -> np.ndarray:
    """The image, uint8 [size, size, 3]: the mean of the colours of `SAMPLES` x `SAMPLES` rays per pixel."""
    directions = camera.rays(_samples(size, SAMPLES))
    colours = look.background.reshape(-1, 3).copy()
    if look.floor is not None:
        _paint_floor(scene, camera, look, look.floor, directions, colours)
    triangles, weights = scene.cast(camera.centre, directions)
    met = np.flatnonzero(triangles >= 0)
    colours[met] = _shade(scene, camera, look, directions[met], triangles[met], weights[met])
    pixels = np.clip(colours, 0, 1).reshape(size, SAMPLES, size, SAMPLES, 3).mean((1, 3))
    return (255 * pixels).round().astype(np.uint8)


def _lit(scene: Scene, look: Look, points: np.ndarray) -> np.ndarray:
    """Share of the light that reaches each point, float32 [n]."""
    blocked = scene.blocked(points + look.light * np.float32(OFFSET), look.light)
    return np.where(blocked, np.float32(1 - look.shadow), np.float32(1))


def _shade(
    scene: Scene, camera: ViewCamera, look: Look, directions: np.ndarray, triangles: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Colours [n, 3] of points of the object: ambient, diffuse and specular light (Blinn's half vector)."""
    model = scene.model
    points, normals, uvs = (
        (values[triangles] * weights[..., None]).sum(1) for values in (model.triangles, model.normals, model.uvs)
    )
    view = -directions / np.linalg.norm(directions, axis=1, keepdims=True)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    normals *= np.where((normals * view).sum(1, keepdims=True) < 0, np.float32(-1), np.float32(1))
    texel = (uvs * TEXTURE_SIZE).astype(int) % TEXTURE_SIZE
    base = model.textures[model.materials[triangles], texel[:, 1], texel[:, 0]]
    half = look.light + view
    half /= np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-6)
    lit = _lit(scene, look, points + normals * np.float32(OFFSET / 2))
    diffuse = look.ambient + look.diffuse * np.clip((normals * look.light).sum(1), 0, 1) * lit
    specular = look.specular * np.clip((normals * half).sum(1), 0, 1) ** 20 * lit
    return base * diffuse[:, None] + specular[:, None]


def _paint_floor(
    scene: Scene, camera: ViewCamera, look: Look, floor: np.ndarray, directions: np.ndarray, colours: np.ndarray
) -> None:
    """Draw the floor under the object over the background's colours [n, 3], with the object's shadow."""
    bottom = scene.model.triangles[..., 2].min()
    falling = np.flatnonzero(directions[:, 2] < -1e-3)
    share = (bottom - camera.centre[2]) / directions[falling, 2]
    points = (camera.centre + share[:, None] * directions[falling]).astype(np.float32)
    near, far = FLOOR_ENDS
    away = np.sqrt((points[:, :2] ** 2).sum(1))
    index, points, away = falling[away < far], points[away < far], away[away < far]
    texel = (points[:, :2] * TEXTURE_SIZE).astype(int) % TEXTURE_SIZE
    light = look.ambient + look.diffuse * look.light[2] * _lit(scene, look, points)
    fade = np.clip((away - near) / (far - near), 0, 1)[:, None]
    colours[index] += (floor[texel[:, 1], texel[:, 0]] * light[:, None] - colours[index]) * (1 - fade)
