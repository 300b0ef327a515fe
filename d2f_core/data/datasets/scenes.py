"""Scenes with known depth: random objects on a floor, rendered by PyBullet's CPU renderer.

A scene is a pure function of (seed, split, number). No object and no texture of `test` occurs in `train`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2f_core.data.datasets.meshes import Mesh, make_object, make_quad, object_name, object_numbers
from d2f_core.data.datasets.textures import make_sky, make_texture
from d2f_core.randomness import keyed_generator

NUM_TEXTURES = {"train": 500, "test": 100}
SUPERSAMPLING = 3
"""Rays per pixel along each side. Odd, so that one ray, whose depth is kept, goes through the pixel's centre."""
NEAR, FAR = 0.2, 60.0
"""Near and far clipping planes of the renderer, in metres."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """A textured mesh, placed in the scene."""

    mesh: Mesh
    texture: np.ndarray
    """Uint8 [height, width, 3]."""
    position: Sequence[float] = (0.0, 0.0, 0.0)
    """Position in metres; z points up."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    eye: Sequence[float]
    """Camera position in metres."""
    target: Sequence[float]
    up: Sequence[float] = (0.0, 0.0, 1.0)
    view_degrees: float = 60.0
    """Field of view across the square picture."""


@dataclass(frozen=True, kw_only=True)
class Light:
    direction: Sequence[float] = (1.0, 1.0, 2.0)
    """Vector towards the light."""
    colour: Sequence[float] = (1.0, 1.0, 1.0)
    ambient: float = 0.6
    diffuse: float = 0.4
    specular: float = 0.05
    shadow: bool = True


@dataclass(frozen=True, kw_only=True)
class Scene:
    bodies: tuple[Body, ...]
    camera: Camera
    light: Light
    sky: np.ndarray
    """Float [s, s, 3] in [0, 1], the background where no body is seen; s = size * SUPERSAMPLING."""
    text: str
    """The caption: what is seen, in words."""


def make_scene(seed: int, split: str, number: int, size: int) -> Scene:
    """Scene `number` of a split, for pictures of `size` pixels."""
    rng = keyed_generator(seed, f"{split}/{number}", "depth scene")
    walled = rng.random() < 0.65
    room = rng.uniform(2.2, 4.5) if walled else rng.uniform(4, 12)
    chosen = rng.choice(object_numbers(split), size=int(rng.integers(2, 8)), replace=False)
    bodies = [*_room(rng, split, room, walled), *_objects(rng, split, [int(object_) for object_ in chosen])]
    tint = rng.uniform(0.75, 1, 3)
    ambient = rng.uniform(0.35, 0.7)
    angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 2)
    light = Light(
        direction=(np.cos(angle), np.sin(angle), height),
        colour=tint.tolist(),
        ambient=ambient,
        diffuse=rng.uniform(0.9, 1.2) - ambient,
        specular=rng.uniform(0, 0.3),
        shadow=bool(rng.random() < 0.8),
    )
    camera, sky = _camera(rng, room, walled), make_sky(rng, size * SUPERSAMPLING)
    place = "between walls" if walled else "in the open"
    text = f"{', '.join(object_name(int(object_)) for object_ in chosen)}, {place}"
    return Scene(bodies=tuple(bodies), camera=camera, light=light, sky=sky, text=text)


def _texture(rng: np.random.Generator, split: str) -> np.ndarray:
    return make_texture(split, int(rng.integers(NUM_TEXTURES[split])))


def _room(rng: np.random.Generator, split: str, room: float, walled: bool) -> Iterator[Body]:
    """A square floor and, if `walled`, four inward-facing walls, with one texture or several."""
    low, high = -room, room
    floor = np.array([[low, low, 0], [high, low, 0], [high, high, 0], [low, high, 0]])
    yield Body(mesh=make_quad(floor, room * rng.uniform(0.3, 0.8)), texture=_texture(rng, split))
    if not walled:
        return
    texture, alike, top = _texture(rng, split), rng.random() < 0.6, rng.uniform(1.2, 4)
    corners = np.array([[low, low], [low, high], [high, high], [high, low]])
    for number in range(4):
        (x0, y0), (x1, y1) = corners[number], corners[(number + 1) % 4]
        wall = np.array([[x0, y0, 0], [x1, y1, 0], [x1, y1, top], [x0, y0, top]])
        mesh = make_quad(wall, room * rng.uniform(0.3, 0.7))
        yield Body(mesh=mesh, texture=texture if alike else _texture(rng, split))


def _objects(rng: np.random.Generator, split: str, numbers: Sequence[int]) -> Iterator[Body]:
    """The objects turned at random, standing on the floor and apart from one another."""
    places: list[tuple[float, float, float]] = []
    for number in numbers:
        size = rng.uniform(0.4, 1.5)
        mesh = _turned(make_object(number), rng, size, tumbled=rng.random() < 0.5)
        for _ in range(20):
            angle, distance = rng.uniform(0, 2 * np.pi), 1.6 * np.sqrt(rng.random())
            x, y = distance * np.cos(angle), distance * np.sin(angle)
            if all(np.hypot(x - px, y - py) > 0.45 * (size + other) for px, py, other in places):
                break
        else:
            continue  # no room left for it
        places.append((x, y, size))
        yield Body(mesh=mesh, texture=_texture(rng, split), position=(x, y, -mesh.vertices[:, 2].min()))


def _turned(mesh: Mesh, rng: np.random.Generator, size: float, *, tumbled: bool) -> Mesh:
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    if tumbled:
        rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        rotation *= np.sign(np.linalg.det(rotation))  # no mirror image, whose triangles would face inwards
    repeats = rng.uniform(0.6, 1.6)
    return Mesh(vertices=size * mesh.vertices @ rotation.T, normals=mesh.normals @ rotation.T, uvs=mesh.uvs * repeats)


def _camera(rng: np.random.Generator, room: float, walled: bool) -> Camera:
    """A camera inside the room that looks at the objects, and never stands among them."""
    farthest = min(room * 1.2, 5.5) if walled else 5.5  # 1.2: the corners are farther than the walls
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(2.4, max(2.6, farthest))
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    if walled:
        x, y = np.clip([x, y], -room + 0.1, room - 0.1)
    height = rng.uniform(0.4, 1.2) if rng.random() < 0.5 else rng.uniform(1.2, 3.2)
    target = (rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(0, 0.7))
    roll = rng.normal(0, 0.12)
    across = np.array([-np.sin(angle), np.cos(angle), 0])
    up = np.cos(roll) * np.array([0, 0, 1]) + np.sin(roll) * across
    return Camera(eye=(x, y, height), target=target, up=up.tolist(), view_degrees=rng.uniform(38, 72))


def render(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [size, size, 3], and its depth along the optical axis, float32 [size, size] in metres.

    Depth is NaN where no body is seen. It is that of the ray through a pixel's centre; the picture is the mean of
    3 x 3 rays.

    Raises:
        ValueError: pybullet is not installed.
    """
    try:
        import pybullet
    except ImportError as error:
        raise ValueError(f"Scenes need pybullet ({error}). Install this project with [demo].") from None
    client = pybullet.connect(pybullet.DIRECT)  # one per scene, so that none depends on those before it
    try:
        with tempfile.TemporaryDirectory() as directory:
            for number, body in enumerate(scene.bodies):
                _place(pybullet, client, body, Path(directory, f"{number}.bmp"))
        return _photograph(pybullet, client, scene, size)
    finally:
        pybullet.disconnect(client)


def _place(pybullet: Any, client: int, body: Body, texture: Path) -> None:
    mesh = body.mesh
    shape = pybullet.createVisualShape(
        pybullet.GEOM_MESH,
        vertices=mesh.vertices.tolist(),
        indices=list(range(len(mesh.vertices))),
        uvs=mesh.uvs.tolist(),
        normals=mesh.normals.tolist(),
        rgbaColor=[1, 1, 1, 1],
        physicsClientId=client,
    )
    placed = pybullet.createMultiBody(0, -1, shape, list(body.position), physicsClientId=client)
    Image.fromarray(body.texture).save(texture)  # PyBullet takes textures from files alone
    loaded = pybullet.loadTexture(str(texture), physicsClientId=client)
    pybullet.changeVisualShape(placed, -1, textureUniqueId=loaded, physicsClientId=client)


def _photograph(pybullet: Any, client: int, scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    rays, camera, light = size * SUPERSAMPLING, scene.camera, scene.light
    half = NEAR * np.tan(np.radians(camera.view_degrees) / 2)
    # The renderer's rays go through the lower left corners of its pixels. Half a pixel brings them to the centres.
    shift = half / rays
    frustum = (-half + shift, half + shift, -half + shift, half + shift, NEAR, FAR)
    _, _, colours, z_buffer, bodies = pybullet.getCameraImage(
        rays,
        rays,
        pybullet.computeViewMatrix(list(camera.eye), list(camera.target), list(camera.up)),
        pybullet.computeProjectionMatrix(*frustum),
        lightDirection=list(light.direction),
        lightColor=list(light.colour),
        lightDistance=10,
        shadow=int(light.shadow),
        lightAmbientCoeff=light.ambient,
        lightDiffuseCoeff=light.diffuse,
        lightSpecularCoeff=light.specular,
        renderer=pybullet.ER_TINY_RENDERER,
        physicsClientId=client,
    )
    z_buffer = np.reshape(z_buffer, (rays, rays)).astype(np.float64)
    seen = np.reshape(bodies, (rays, rays)) >= 0
    depth = np.where(seen, FAR * NEAR / (FAR - (FAR - NEAR) * z_buffer), np.nan)
    picture = np.reshape(np.asarray(colours, np.float64), (rays, rays, 4))[..., :3]
    picture = np.where(seen[..., None], picture, 255 * scene.sky)
    picture = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))
    middle = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
    return picture.round().astype(np.uint8), depth[middle, middle].astype(np.float32)
