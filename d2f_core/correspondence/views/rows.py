"""The rows of a table of views: one per image, with its camera, depth and keypoints.

Any two rows of one `mesh` are views of one rigid object: `multiview` takes a pixel of the one, by its depth and the two
cameras, to its place in the other.
"""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2f_core.correspondence.views.cameras import ViewCamera, draw_camera
from d2f_core.correspondence.views.categories import CATEGORIES, Model, make_model
from d2f_core.correspondence.views.config import CategoryName, MakeViewsConfig, Split
from d2f_core.correspondence.views.render import Scene, draw_look, render_depth, render_picture, seen, seen_from_around
from d2f_core.data.depth_files import encode_depth
from d2f_core.data.schema import array_field
from d2f_core.randomness import keyed_generator

SURFACE_POINTS = 256
"""Points of an object's surface whose places are stored with each of its views."""
SEEN_WITHIN = 5e-4
"""Distance of a point of the surface behind the first surface, as a share of the object's diagonal, that rounding may
make."""
POINT = pa.list_(pa.float64(), 2)
POINT_3D = pa.list_(pa.float64(), 3)

VIEW_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("mesh", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        array_field("intrinsics", "float64", (3, 3)),
        array_field("rotation", "float64", (3, 3)),
        array_field("translation", "float64", (3,)),
        pa.field("azimuth", pa.float64(), nullable=False),
        pa.field("elevation", pa.float64(), nullable=False),
        pa.field("depth", pa.binary(), nullable=False),
        array_field("box", "float64", (4,)),
        pa.field("keypoint_names", pa.list_(pa.string()), nullable=False),
        pa.field("keypoints", pa.list_(POINT), nullable=False),
        pa.field("visible", pa.list_(pa.bool_()), nullable=False),
        pa.field("flip_partners", pa.list_(pa.int32()), nullable=False),
        pa.field("world_keypoints", pa.list_(POINT_3D), nullable=False),
        array_field("surface_points", "float32", (SURFACE_POINTS, 2)),
        array_field("surface_visible", "bool", (SURFACE_POINTS,)),
        pa.field("source_uri", pa.string(), nullable=False),
    ]
)
"""`image_id` is the SHA-256 of the image, a PNG file. Positions are (x, y) in pixels, the centre of the first pixel at
(0.5, 0.5). The camera is that of `multiview.Camera`; azimuth and elevation are in degrees, from the object's front
towards its left, and above the horizon. `depth` is a .npy file (`depth_files.decode_depth`): depth of the object at
the pixels' centres, NaN elsewhere. `box` is x, y, width, height around the pixels of the object.

All rows of a category have the same `keypoint_names` and `flip_partners` (the keypoint that a mirror image shows in its
place, -1 for itself). The place of a keypoint that an object lacks is NaN; one that is not `visible` is hidden by the
object. `surface_points` are places of points spread evenly over what can be seen of the object from around it, and
`surface_visible` says which the camera sees: point i of two rows of one mesh is one point, whatever its depth map."""


def make_rows(config: MakeViewsConfig, split: Split, category: CategoryName, number: int) -> Iterator[dict[str, Any]]:
    """The views of one object, a pure function of the arguments and of the config's seed, size and views per mesh.

    Raises:
        ValueError: embreex is not installed.
    """
    model = make_model(config.seed, split, category, number)
    scene, corners = Scene(model), np.unique(model.triangles.reshape(-1, 3), axis=0).astype(np.float64)
    surface = _surface_points(config.seed, scene)
    for view in range(config.views_per_mesh):
        rng = keyed_generator(config.seed, f"{model.name}/{view}", "view")
        azimuth = 360 * (view + rng.random()) / config.views_per_mesh
        camera = draw_camera(rng, corners, config.size, azimuth)
        look = draw_look(rng, split, config.size)
        uri = f"rendered:{config.seed}/{config.size}/{model.name}/{view}-of-{config.views_per_mesh}"
        about = {"category": category, "mesh": model.name, "split": split, "source_uri": uri}
        image = _png(render_picture(scene, camera, look, config.size))
        geometry = _geometry(scene, camera, config.size)
        points = {**_keypoints(category, model, scene, camera), **_surface(surface, scene, camera)}
        yield {**about, **_image(image, config.size), **geometry, **points}


def _surface_points(seed: int, scene: Scene) -> np.ndarray:
    """Points [`SURFACE_POINTS`, 3] drawn evenly from the part of the surface that can be seen from around the object;
    solids that reach into each other have much that cannot.
    """
    rng = keyed_generator(seed, scene.model.name, "surface points")
    found = np.empty((0, 3))
    while len(found) < SURFACE_POINTS:
        drawn = _draw_points(rng, scene.model)
        found = np.concatenate([found, drawn[seen_from_around(scene, drawn, SEEN_WITHIN)]])
    return found[:SURFACE_POINTS]


def _draw_points(rng: np.random.Generator, model: Model) -> np.ndarray:
    """Points [`SURFACE_POINTS`, 3] drawn evenly from the area of all triangles."""
    a, b, c = model.triangles.astype(np.float64).transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = rng.choice(len(area), SURFACE_POINTS, p=area / area.sum())
    across, along = rng.random((2, SURFACE_POINTS, 1))
    # Outside the triangle, a point of the parallelogram is turned about its middle into the triangle.
    beyond = across + along > 1
    across, along = (np.where(beyond, 1 - share, share) for share in (across, along))
    return a[chosen] + across * (b - a)[chosen] + along * (c - a)[chosen]


def _png(picture: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


def _image(image: bytes, size: int) -> dict[str, Any]:
    return {"image_id": hashlib.sha256(image).hexdigest(), "image": image, "width": size, "height": size}


def _geometry(scene: Scene, camera: ViewCamera, size: int) -> dict[str, Any]:
    depth = render_depth(scene, camera, size)
    rows, columns = (np.flatnonzero(np.isfinite(depth).any(axis)) for axis in (1, 0))
    left, top = float(columns[0]), float(rows[0])
    box = np.array([left, top, columns[-1] + 1 - left, rows[-1] + 1 - top])
    arrays = {
        "intrinsics": camera.intrinsics,
        "rotation": camera.rotation,
        "translation": camera.translation,
        "box": box,
    }
    return {
        **{name: np.ascontiguousarray(values, np.float64).tobytes() for name, values in arrays.items()},
        "azimuth": camera.azimuth,
        "elevation": camera.elevation,
        "depth": encode_depth(depth),
    }


def _keypoints(category: CategoryName, model: Model, scene: Scene, camera: ViewCamera) -> dict[str, Any]:
    return {
        "keypoint_names": list(CATEGORIES[category].keypoints),
        "keypoints": camera.project(model.keypoints).tolist(),
        "visible": seen(scene, camera, model.keypoints, model.radii).tolist(),
        "flip_partners": CATEGORIES[category].partners,
        "world_keypoints": model.keypoints.tolist(),
    }


def _surface(points: np.ndarray, scene: Scene, camera: ViewCamera) -> dict[str, Any]:
    visible = seen(scene, camera, points, np.full(len(points), SEEN_WITHIN))
    return {
        "surface_points": camera.project(points).astype(np.float32).tobytes(),
        "surface_visible": visible.tobytes(),
    }
