"""Rendered views: their geometry is exact and agrees with `multiview`, and they depend on their names alone."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_core.correspondence.multiview import Camera, depth_at, pixel_centres, project, unproject, visible
from d2f_core.correspondence.views import categories, render
from d2f_core.correspondence.views.cameras import FILLS, ViewCamera, draw_camera
from d2f_core.correspondence.views.categories import CATEGORIES, Model, make_model
from d2f_core.correspondence.views.config import ALL_CATEGORIES, MakeViewsConfig
from d2f_core.correspondence.views.render import Scene, render_depth, seen, seen_from_around
from d2f_core.correspondence.views.rows import SURFACE_POINTS, VIEW_SCHEMA, make_rows
from d2f_core.correspondence.views.shape import flip_partner
from d2f_core.correspondence.views.solids import ellipsoid, hexahedron
from d2f_core.correspondence.views.table import view_inputs
from d2f_core.data.depth_files import decode_depth
from d2f_core.data.schema import array_kind, is_array

SIZE = 64
CONFIG = MakeViewsConfig(output="nowhere", size=SIZE, views_per_mesh=3)
HALF = np.array([0.3, 0.2, 0.1])
"""Half sides of a box around the origin."""


def box_model() -> Model:
    """A box with keypoints on the middle of its front, inside it, and none."""
    x, y, z = HALF
    lower = np.array([[-x, -y, -z], [x, -y, -z], [x, y, -z], [-x, y, -z]])
    solid = hexahedron(np.concatenate([lower, lower * [1, 1, -1]]), "paint")
    return Model(
        name="box",
        triangles=solid.corners.reshape(-1, 3, 3).astype(np.float32),
        normals=solid.normals.reshape(-1, 3, 3).astype(np.float32),
        uvs=solid.uvs.reshape(-1, 3, 2).astype(np.float32),
        materials=np.zeros(12, int),
        textures=np.full((1, 64, 64, 3), 0.5, np.float32),
        keypoints=np.array([[x, 0, 0], [0, 0, 0], [np.nan] * 3]),
        radii=np.array([0.01, 0.05, 0.05]),
    )


def camera_at(azimuth: float, points: np.ndarray, seed: int = 0) -> ViewCamera:
    return draw_camera(np.random.default_rng(seed), points.reshape(-1, 3).astype(float), SIZE, azimuth)


def camera_of(row: dict) -> Camera:
    names = ("intrinsics", "rotation", "translation")
    shapes = {name: array_kind(VIEW_SCHEMA.field(name))[0] for name in names}
    return Camera(
        **{name: torch.frombuffer(bytearray(row[name]), dtype=torch.float64).reshape(shapes[name]) for name in names}
    )


def picture(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """Three views of one object of each category."""
    return {category: list(make_rows(CONFIG, "train", category, 0)) for category in ALL_CATEGORIES}


def test_the_depth_of_a_box_is_what_the_ray_through_each_pixels_centre_meets():
    model = box_model()
    for azimuth in (10, 100, 220):
        camera = camera_at(azimuth, model.triangles, seed=azimuth)
        directions = camera.rays(pixel_centres((SIZE, SIZE), torch.zeros(1, dtype=torch.float64)).numpy())
        ends = np.sort((np.stack([-HALF, HALF])[:, None] - camera.centre) / directions, axis=0)
        near, far = ends[0].max(1), ends[1].min(1)
        depth = render_depth(Scene(model), camera, SIZE).ravel()
        clear = np.abs(far - near) > 1e-4  # not along an edge, where float32 may decide either way
        np.testing.assert_array_equal(np.isfinite(depth)[clear], (near < far)[clear])
        met = clear & (near < far)
        assert met.sum() > 300
        np.testing.assert_allclose(depth[met], near[met], rtol=3e-7)


def test_a_keypoint_is_seen_where_the_first_surface_lies_within_its_radius():
    model = box_model()
    scene, front, back = Scene(model), camera_at(0, model.triangles), camera_at(180, model.triangles)
    assert seen(scene, front, model.keypoints, model.radii).tolist() == [True, False, False]
    assert seen(scene, back, model.keypoints, model.radii).tolist() == [False, False, False]
    assert seen(scene, back, model.keypoints, np.full(3, 0.7)).tolist() == [True, True, False]


def test_what_no_one_can_see_is_not_among_the_points_of_a_surface():
    model = box_model()
    x, _, z = HALF
    points = np.array([[x, 0, 0.05], [0, 0, z], [0, 0, 0], [0, 0, -z], [-x, 0.1, 0]])
    assert seen_from_around(Scene(model), points, 5e-4).tolist() == [True, True, False, False, True]


def test_from_the_front_an_objects_left_is_at_the_right_and_from_behind_at_the_left():
    points = np.array([[0.1, 0.4, 0], [0.1, -0.4, 0], [0, 0, 0.3], [0, 0, -0.3]])
    front, back = (camera_at(azimuth, points).project(points) for azimuth in (0, 180))
    assert front[0, 0] > front[1, 0] + 10 and back[0, 0] < back[1, 0] - 10
    assert front[2, 1] < front[3, 1] - 10 and back[2, 1] < back[3, 1] - 10  # up is up: y points down


def test_every_category_has_keypoints_that_know_left_from_right():
    assert tuple(CATEGORIES) == ALL_CATEGORIES
    for name, category in CATEGORIES.items():
        partners, names = category.partners, category.keypoints
        sided = [number for number, partner in enumerate(partners) if partner >= 0]
        assert len(set(names)) == len(names) and sided, name
        assert all(partners[partners[number]] == number and partners[number] != number for number in sided), name
        assert {names[number].split()[0] for number in sided} == {"left", "right"}, name
        for number in range(4):
            points = make_model(0, "train", name, number).keypoints
            left = [n for n in sided if names[n].startswith("left")]
            apart = (points[left] - points[[partners[n] for n in left]])[:, 1]
            assert (apart[~np.isnan(apart)] > 0).all() and not np.isnan(apart).all(), (name, number)
    assert flip_partner("left front paw") == "right front paw" and flip_partner("nose") == "nose"


@pytest.mark.parametrize("category", ALL_CATEGORIES)
def test_an_object_is_whole_and_lies_in_the_image(category):
    for number in range(3):
        model = make_model(0, "val", category, number)
        points = model.triangles.reshape(-1, 3)
        assert np.linalg.norm(np.ptp(points, axis=0)) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(points.min(0) + points.max(0), 0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(model.normals, axis=2), 1, atol=1e-5)
        assert model.textures.min() >= 0 and model.textures.max() <= 1
        there = model.keypoints[~np.isnan(model.keypoints[:, 0])]
        assert len(there) >= 6 and np.linalg.norm(there, axis=1).max() < 0.52
        for azimuth in (0, 77, 200):
            image = camera_at(azimuth, points, seed=number).project(points.astype(float))
            assert image.min() >= 0 and image.max() <= SIZE
            assert FILLS[0] - 0.01 < np.ptp(image, axis=0).max() / SIZE < FILLS[1] + 0.01


def test_the_keypoints_of_a_row_are_where_multiview_projects_them(rows):
    for views in rows.values():
        for row in views:
            world = torch.tensor(row["world_keypoints"], dtype=torch.float64)
            pixels, depth = project(camera_of(row), world)
            torch.testing.assert_close(
                pixels, torch.tensor(row["keypoints"], dtype=torch.float64), rtol=0, atol=1e-9, equal_nan=True
            )
            there = ~world[:, 0].isnan()
            assert (depth[there] > 0).all() and not np.asarray(row["visible"])[~there.numpy()].any()
            assert len(row["keypoint_names"]) == len(world) == len(row["flip_partners"])
        assert any(any(row["visible"]) for row in views) and not all(all(row["visible"]) for row in views)


def test_a_point_of_the_surface_is_found_in_another_view_and_back_within_half_a_pixel(rows):
    """All pixels of one view go to the other by their own depth, and come back by the depth that it has there."""
    shared = 0
    for views in rows.values():
        for source, target in zip(views, [*views[1:], views[0]], strict=True):
            depths = [torch.tensor(decode_depth(row["depth"]), dtype=torch.float64) for row in (source, target)]
            centres = pixel_centres((SIZE, SIZE), depths[0])[depths[0].flatten() > 0]
            points = unproject(camera_of(source), centres, depths[0][depths[0] > 0])
            pixels, both = visible(camera_of(target), points, depths[1], tolerance=1e-3)
            found = unproject(camera_of(target), pixels, depth_at(depths[1], pixels))
            again, _ = project(camera_of(source), found)
            assert (again - centres)[both].norm(dim=-1).max() < 0.5 if both.any() else True
            shared += int(both.sum())
    assert shared > 2000


def surface_of(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.frombuffer(bytearray(row["surface_points"]), dtype=torch.float32).reshape(SURFACE_POINTS, 2)
    return pixels.double(), torch.frombuffer(bytearray(row["surface_visible"]), dtype=torch.bool)


def test_the_surface_points_of_two_views_are_the_same_points(rows):
    """Rays found which are seen; the depth of one view and both cameras lead to where the other view has them.

    On a surface that a view meets at a low angle, and beside an edge, a depth map of 64 pixels is coarse.
    """
    errors, agreed = [], []
    for views in rows.values():
        for source, target in zip(views, [*views[1:], views[0]], strict=True):
            (pixels, here), (others, there) = surface_of(source), surface_of(target)
            depths = [torch.tensor(decode_depth(row["depth"]), dtype=torch.float64) for row in (source, target)]
            both = here & there & ~depth_at(depths[0], pixels).isnan()
            world = unproject(camera_of(source), pixels, depth_at(depths[0], pixels))
            found, by_depth = visible(camera_of(target), world, depths[1], tolerance=0.002)
            errors.append((found - others)[both].norm(dim=-1))
            agreed.append(by_depth[both])
    error, certain = torch.cat(errors), torch.cat(agreed)
    assert len(error) > 400 and error.median() < 0.05 and (error < 0.5).double().mean() > 0.85
    assert error[certain].median() < 1e-4 and (error[certain] < 0.5).double().mean() > 0.94


def test_a_point_that_rays_show_lies_on_the_object_in_the_image(rows):
    for category, views in rows.items():
        for row in views:
            pixels, shown = surface_of(row)
            assert 60 < shown.sum() < 240 and (pixels[shown] > 0).all() and (pixels[shown] < SIZE).all(), category
            there = ~np.isnan(decode_depth(row["depth"]))
            around = there | np.roll(there, 1, 0) | np.roll(there, -1, 0) | np.roll(there, 1, 1) | np.roll(there, -1, 1)
            column, line = pixels[shown].long().T.numpy()
            assert around[line, column].mean() > 0.9, category  # thin parts pass between pixels' centres


def test_depth_box_and_picture_show_the_same_object(rows):
    for views in rows.values():
        for row in views:
            there = np.isfinite(decode_depth(row["depth"]))
            assert 0.01 < there.mean() < 0.8 and there.shape == (row["height"], row["width"]) == picture(row).shape[:2]
            x, y, width, height = np.frombuffer(row["box"]).astype(int)
            inside = there[y : y + height, x : x + width]
            assert inside.sum() == there.sum() and inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all()
        assert np.std([picture(row).mean((0, 1)) for row in views]) > 5
        assert len({row["azimuth"] // 120 for row in views}) == 3  # from all around


def test_a_view_depends_on_its_name_alone():
    [first, *_] = make_rows(CONFIG, "train", "car", 1)
    assert next(make_rows(CONFIG, "train", "car", 1)) == first
    code = f"""
from d2f_core.correspondence.views.rows import *
[*_, last] = make_rows({CONFIG!r}, "val", "bird", 0)
print(next(make_rows({CONFIG!r}, "train", "car", 1))["image_id"])
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [first["image_id"]]
    fewer = dataclasses.replace(CONFIG, train_meshes=2, categories=("car",))
    assert next(make_rows(fewer, "train", "car", 1)) == first
    for changed in (dataclasses.replace(CONFIG, seed=1), dataclasses.replace(CONFIG, size=32)):
        assert next(make_rows(changed, "train", "car", 1))["image_id"] != first["image_id"]
    assert next(make_rows(CONFIG, "test", "car", 1))["image_id"] != first["image_id"]


def test_splits_share_no_object_and_no_texture(monkeypatch):
    drawn: list[tuple[str, int]] = []
    for module in (categories, render):
        monkeypatch.setattr(
            module,
            "make_texture",
            lambda split, number: drawn.append((split, number)) or np.zeros((64, 64, 3), np.uint8),
        )
    shapes = []
    for split in ("train", "val", "test"):
        for number in range(2):
            model = make_model(0, split, "chair", number)
            shapes.append(model.triangles.tobytes())
            render.draw_look(np.random.default_rng(number), split, 16)
    assert len(set(shapes)) == 6
    for ending in ("train", "val", "test"):
        assert any(split.endswith(ending) for split, _ in drawn)
    assert len({split for split, _ in drawn}) == 6  # objects' and surroundings', of each split its own


def test_a_smooth_surface_has_the_normals_of_what_it_stands_for():
    solid = ellipsoid([0, 0, 0], [1, 1, 1], "body")
    outward = np.abs((solid.normals * solid.corners).sum(1))
    assert outward.min() > 0.95 and np.isfinite(solid.uvs).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ""}, "output is empty"),
        ({"size": 8}, "size=8 is not between 16 and 1024"),
        ({"categories": ("car", "car")}, "each once"),
        ({"categories": ("horse",)}, "one or more of bike, bird"),
        ({"categories": ()}, "one or more of bike, bird"),
        ({"views_per_mesh": 0}, "views_per_mesh=0"),
        ({"train_meshes": -1}, "none may be negative"),
        ({"train_meshes": 0, "val_meshes": 0, "test_meshes": 0}, "one must be above 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MakeViewsConfig(**changes)


def test_without_the_renderer_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    with pytest.raises(ValueError, match=r"Install this project with \[correspondence\]"):
        Scene(box_model())
    monkeypatch.setattr("d2f_core.correspondence.views.table.PACKAGES", ("no-such-renderer",))
    with pytest.raises(ValueError, match=r"Views need no-such-renderer\. Install this project with \[correspondence\]"):
        view_inputs(CONFIG)


def test_array_columns_have_the_shapes_that_a_camera_has():
    shapes = {field.name: array_kind(field)[0] for field in VIEW_SCHEMA if is_array(field)}
    camera = {"intrinsics": (3, 3), "rotation": (3, 3), "translation": (3,)}
    assert shapes == {
        **camera,
        "box": (4,),
        "surface_points": (SURFACE_POINTS, 2),
        "surface_visible": (SURFACE_POINTS,),
    }
