"""The categories, and their objects: triangles with textures, and keypoints that mean the same on each object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2f_core.correspondence.views.config import CategoryName, Split
from d2f_core.correspondence.views.creatures import BIRD, PERSON, QUADRUPED, make_bird, make_person, make_quadruped
from d2f_core.correspondence.views.household import CHAIR, TEAPOT, make_chair, make_teapot
from d2f_core.correspondence.views.shape import Keypoint, MakeShape, flip_partner
from d2f_core.correspondence.views.solids import Solid
from d2f_core.correspondence.views.vehicles import BIKE, CAR, PLANE, make_bike, make_car, make_plane
from d2f_core.data.datasets.textures import make_texture
from d2f_core.randomness import keyed_generator

NUM_TEXTURES = 1000
"""Textures that the objects of a split choose from; the splits have none in common."""
SPREAD = 0.06
"""Standard deviation of the logarithm by which an object is stretched along each axis."""
# Colour and share of it in the material's texture, for what is recognised by its colour.
TINTS = {
    "rubber": ((0.07, 0.07, 0.08), 0.9),
    "glass": ((0.12, 0.17, 0.23), 0.85),
    "metal": ((0.6, 0.62, 0.65), 0.7),
    "lamp": ((1.0, 0.97, 0.8), 0.9),
    "tail lamp": ((0.85, 0.06, 0.05), 0.9),
    "eye": ((0.03, 0.03, 0.03), 0.97),
    "beak": ((0.9, 0.55, 0.12), 0.7),
    "shoe": ((0.15, 0.12, 0.1), 0.5),
}
SKIN = ((0.95, 0.78, 0.66), (0.86, 0.64, 0.48), (0.66, 0.45, 0.3), (0.42, 0.27, 0.18))


@dataclass(frozen=True, kw_only=True)
class Category:
    make: MakeShape
    keypoints: tuple[str, ...]
    """Names of all keypoints; an object may lack some."""

    @property
    def partners(self) -> list[int]:
        """For each keypoint the index of the one that a mirror image shows in its place; -1 where it is itself."""
        found = [self.keypoints.index(flip_partner(name)) for name in self.keypoints]
        return [-1 if partner == number else partner for number, partner in enumerate(found)]


CATEGORIES: Mapping[CategoryName, Category] = {
    "bike": Category(make=make_bike, keypoints=BIKE),
    "bird": Category(make=make_bird, keypoints=BIRD),
    "car": Category(make=make_car, keypoints=CAR),
    "chair": Category(make=make_chair, keypoints=CHAIR),
    "person": Category(make=make_person, keypoints=PERSON),
    "plane": Category(make=make_plane, keypoints=PLANE),
    "quadruped": Category(make=make_quadruped, keypoints=QUADRUPED),
    "teapot": Category(make=make_teapot, keypoints=TEAPOT),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """An object of a category. Its box has the origin as its middle and a diagonal of 1; x front, y left, z up."""

    name: str
    triangles: np.ndarray
    """Float32 [triangles, 3, 3]."""
    normals: np.ndarray
    """Float32 [triangles, 3, 3]: of each corner, of length 1, to either side."""
    uvs: np.ndarray
    """Float32 [triangles, 3, 2]."""
    materials: np.ndarray
    """Int [triangles]: which texture."""
    textures: np.ndarray
    """Float32 [materials, height, width, 3] in [0, 1]."""
    keypoints: np.ndarray
    """Float64 [keypoints of the category, 3]; NaN for those that the object lacks."""
    radii: np.ndarray
    """Float64 [keypoints]: distance within which a surface belongs to the keypoint."""


def make_model(seed: int, split: Split, category: CategoryName, number: int) -> Model:
    """Object `number` of a category and split, a pure function of its arguments."""
    name = f"{category}/{split}/{number:04d}"
    rng = keyed_generator(seed, name, "view mesh")
    shape = CATEGORIES[category].make(rng)
    stretch = np.exp(rng.normal(0, SPREAD, 3))
    triangles, normals, uvs = (np.concatenate([getattr(solid, of) for solid in shape.solids])
                               for of in ("corners", "normals", "uvs"))  # fmt: skip
    triangles, normals = (triangles * stretch).reshape(-1, 3, 3), (normals / stretch).reshape(-1, 3, 3)
    low, high = triangles.min((0, 1)), triangles.max((0, 1))
    scale, middle = 1 / np.linalg.norm(high - low), (low + high) / 2
    keypoints, radii = _keypoints(CATEGORIES[category].keypoints, shape.keypoints)
    names = sorted({solid.material for solid in shape.solids})
    edges = triangles[:, 1:] - triangles[:, :1]
    real = (
        np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) > 1e-10
    )  # at a pole, quads have a side of length 0
    return Model(
        name=name,
        triangles=((triangles - middle) * scale)[real].astype(np.float32),
        normals=(normals / np.linalg.norm(normals, axis=2, keepdims=True))[real].astype(np.float32),
        uvs=uvs.reshape(-1, 3, 2)[real].astype(np.float32),
        materials=_materials(shape.solids, names)[real],
        textures=np.stack([_texture(rng, split, material) for material in names]),
        keypoints=(keypoints * stretch - middle) * scale,
        radii=radii * scale * float(stretch.max()),
    )


def _keypoints(names: Sequence[str], found: Mapping[str, Keypoint]) -> tuple[np.ndarray, np.ndarray]:
    """Positions [names, 3] and radii [names] in the order of the names."""
    positions, radii = np.full((len(names), 3), np.nan), np.zeros(len(names))
    for name, keypoint in found.items():
        positions[names.index(name)], radii[names.index(name)] = keypoint.position, keypoint.radius
    return positions, radii


def _materials(solids: Sequence[Solid], names: list[str]) -> np.ndarray:
    return np.concatenate([np.full(len(solid.corners) // 3, names.index(solid.material)) for solid in solids])


def _texture(rng: np.random.Generator, split: Split, material: str) -> np.ndarray:
    """Float32 [height, width, 3]: a texture of the split, paler or stronger, in the material's own colour if any."""
    texture = make_texture(f"views/{split}", int(rng.integers(NUM_TEXTURES))) / np.float32(255)
    texture = texture + (texture.mean((0, 1)) - texture) * np.float32(rng.uniform(0, 0.8))
    tone = SKIN[int(rng.integers(len(SKIN)))]
    colour, share = TINTS.get(material, (tone, 0.85 if material == "skin" else 0.0))
    return texture * np.float32(1 - share) + np.asarray(colour, np.float32) * np.float32(share)
