"""Rendered scenes: depth is what geometry says, a scene depends on its number alone, and the splits share nothing."""

import dataclasses
import io
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d2f_core.data.datasets.config import MakeDepthConfig
from d2f_core.data.datasets.depth_table import make_depth_dataset, make_part, make_rows
from d2f_core.data.datasets.generated_table import PROGRESS
from d2f_core.data.datasets.meshes import Mesh, make_mesh, make_object, make_quad, object_numbers
from d2f_core.data.datasets.scenes import NUM_TEXTURES, Body, Camera, Light, Scene, make_scene, render
from d2f_core.data.datasets.textures import make_texture
from d2f_core.data.depth_files import decode_depth
from d2f_core.data.manifest import ManifestError, manifest_exists, read_manifest
from d2f_core.data.schema import sample_id
from d2f_core.storage import join, list_names, read_bytes
from tests.flow.here import here

pytest.importorskip("pybullet")

SIZE = 64
GREY = np.full((8, 8, 3), 128, np.uint8)
CAMERA = Camera(eye=(2.0, 0.5, 1.5), target=(0.0, 0.0, 0.4), view_degrees=60)


def rays(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera is, and the direction of each pixel's centre, whose component along the axis is 1."""
    eye = np.array(camera.eye)
    axis = np.array(camera.target) - eye
    axis /= np.linalg.norm(axis)
    right = np.cross(axis, camera.up)
    right /= np.linalg.norm(right)
    slopes = (2 * (np.arange(SIZE) + 0.5) / SIZE - 1) * np.tan(np.radians(camera.view_degrees) / 2)
    return eye, axis + slopes[None, :, None] * right - slopes[:, None, None] * np.cross(right, axis)


def depth_of(*meshes: Mesh) -> np.ndarray:
    bodies = tuple(Body(mesh=mesh, texture=GREY) for mesh in meshes)
    sky = np.zeros((3 * SIZE, 3 * SIZE, 3))
    return render(Scene(bodies=bodies, camera=CAMERA, light=Light(), sky=sky, text=""), SIZE)[1]


def a_floor(half: float) -> Mesh:
    return make_quad(half * np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]), 1.0)


def a_sphere() -> Mesh:
    """Of diameter 1; its facets lie at most 0.001 below the surface."""
    latitude, longitude = np.linspace(0, np.pi, 49)[:, None], np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x, y = np.sin(latitude) * np.cos(longitude), np.sin(latitude) * np.sin(longitude)
    points = np.stack([x, y, np.broadcast_to(np.cos(latitude), x.shape)], -1).reshape(-1, 3)
    row, column = (grid.ravel() for grid in np.meshgrid(np.arange(48), np.arange(96), indexing="ij"))
    here, beside = row * 96 + column, row * 96 + (column + 1) % 96
    triangles = np.concatenate([np.stack([here, here + 96, beside + 96], 1), np.stack([here, beside + 96, beside], 1)])
    return make_mesh(points, triangles)


def test_the_depth_of_a_plane_is_exact_also_where_it_passes_below_the_camera():
    eye, direction = rays(CAMERA)
    expected = -eye[2] / direction[..., 2]
    hit = eye + expected[..., None] * direction
    inside = (expected > 0) & (np.abs(hit[..., :2]) < 5).all(-1)
    depth = depth_of(a_floor(5))
    np.testing.assert_array_equal(np.isfinite(depth), inside)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(depth[inside], expected[inside], rtol=1e-4)


def test_the_depth_of_a_sphere_is_along_the_axis_and_not_the_distance():
    eye, direction = rays(CAMERA)
    a, b, c = (direction**2).sum(-1), 2 * direction @ eye, eye @ eye - 0.25
    discriminant = b**2 - 4 * a * c
    depth = depth_of(a_sphere())
    well_inside = discriminant > 0.3
    expected = (-b - np.sqrt(np.where(well_inside, discriminant, 0))) / (2 * a)
    assert well_inside.sum() > 100 and not np.isfinite(depth[discriminant < -0.3]).any()
    np.testing.assert_allclose(depth[well_inside], expected[well_inside], atol=2e-3)
    distance = expected * np.sqrt(a)
    assert np.abs(distance - expected)[well_inside].max() > 0.05  # the test can tell


def test_every_mesh_is_closed_towards_the_outside():
    for number in (*object_numbers("train"), *object_numbers("test")):
        mesh = make_object(number)
        corners = mesh.vertices.reshape(-1, 3, 3)
        volume = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
        assert 0 < volume <= 1, number
        assert np.isclose(np.ptp(mesh.vertices, axis=0).max(), 1)
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-6)


def test_a_scene_depends_on_its_number_alone():
    config = MakeDepthConfig(output="nowhere", size=32)
    [alone], first = make_rows(config, 7), make_rows(config, 3)
    assert make_rows(config, 7) == [alone] != first
    code = "from d2f_core.data.datasets.scenes import *; print(render(make_scene(0, 'train', 7, 32), 32)[0].sum())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout.split()[-1]) == np.asarray(Image.open(io.BytesIO(alone["image"]))).sum()
    assert alone["sample_id"] == sample_id(alone["image"], "")
    changed = [dataclasses.replace(config, seed=1), dataclasses.replace(config, split="test")]
    assert all(make_rows(each, 7)[0]["image"] != alone["image"] for each in changed)


def test_a_mirrored_row_is_the_scene_with_left_and_right_exchanged():
    rows = make_rows(MakeDepthConfig(output="nowhere", size=32, mirrored=True), 7)
    assert rows[:1] == make_rows(MakeDepthConfig(output="nowhere", size=32), 7)
    images = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows]
    np.testing.assert_array_equal(images[1], images[0][:, ::-1])
    np.testing.assert_array_equal(decode_depth(rows[1]["depth"]), decode_depth(rows[0]["depth"])[:, ::-1])
    assert rows[1]["sample_id"] != rows[0]["sample_id"] and rows[1]["source_uri"] == "rendered:train/0/32/7/mirrored"


def test_train_and_test_share_no_object_and_no_texture():
    train, test = (set(object_numbers(split)) for split in ("train", "test"))
    assert not train & test and len(train) == 1799 and len(test) == 200
    shapes = {make_object(number).vertices.tobytes() for number in range(1000, 2000, 17)}
    assert len(shapes) == len(range(1000, 2000, 17))
    textures = [
        make_texture(split, number).tobytes() for split, count in NUM_TEXTURES.items() for number in range(0, count, 5)
    ]
    assert len(set(textures)) == len(textures)
    for split in ("train", "test"):
        named = {part.strip() for n in range(8) for part in make_scene(0, split, n, 32).text.split(",")[:-1]}
        families = {"body": 0, "turned": 1000}
        assert {families[name.split()[0]] + int(name.split()[1]) for name in named} <= set(object_numbers(split))


def test_pictures_vary_and_most_pixels_have_a_depth():
    rows = [make_rows(MakeDepthConfig(output="nowhere"), number)[0] for number in range(10)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    depths = np.stack([decode_depth(row["depth"]) for row in rows])
    assert images.shape == (10, 64, 64, 3) and depths.shape == (10, 64, 64)
    valid = np.isfinite(depths)
    assert valid.mean() > 0.6 and valid.mean(axis=(1, 2)).min() > 0.05
    assert np.nanmin(depths) > 0.2 and np.nanmax(depths) < 60
    assert images.reshape(10, -1).std(axis=1).min() > 10 and images.mean(axis=(1, 2)).std(axis=0).min() > 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "size=8 is not between 16 and 512"),
        ({"num_scenes": 0}, "num_scenes=0"),
        ({"output": ""}, "output"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MakeDepthConfig(**changes)


# On a real cluster and a real S3 server.


@pytest.fixture
def config(cluster, bucket) -> MakeDepthConfig:
    del cluster
    return MakeDepthConfig(output=join(bucket, "depth"), num_scenes=11, size=16, rows_per_part=4)


def test_the_table_is_complete_in_order_and_left_alone_afterwards(config):
    with here():
        manifest, written = make_depth_dataset(config)
    assert written and [file.rows for file in manifest.files] == [4, 4, 3] and manifest.kind == "depth"
    tables = [pq.read_table(io.BytesIO(read_bytes(join(config.output, file.path)))) for file in manifest.files]
    uris = [uri for table in tables for uri in table["source_uri"].to_pylist()]
    assert uris == [f"rendered:train/0/16/{number}" for number in range(11)]
    assert tables[1].to_pylist()[2] == make_rows(config, 6)[0]
    assert set(list_names(config.output)) - {PROGRESS} == {*(file.path for file in manifest.files), "manifest.json"}
    assert list_names(join(config.output, PROGRESS)) == []
    assert make_depth_dataset(config) == (manifest, False)
    for other in ({"seed": 1}, {"mirrored": True}):
        with pytest.raises(ManifestError, match="is a complete table of"):
            make_depth_dataset(dataclasses.replace(config, **other))


def test_a_mirrored_table_has_twice_the_rows(config):
    with here():
        manifest, _ = make_depth_dataset(dataclasses.replace(config, num_scenes=3, mirrored=True))
    assert [file.rows for file in manifest.files] == [6] and manifest.counts["written"] == 6


def test_a_job_that_was_killed_goes_on_to_the_same_bytes(config, tmp_path):
    longer = dataclasses.replace(config, num_scenes=100)
    code = f"import ray; from d2f_core.data.datasets.depth_table import *\nray.init()\nmake_depth_dataset({longer!r})"
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([sys.executable, "-c", code], stderr=log, stdout=log)
    deadline = time.monotonic() + 120
    while len(list_names(config.output)) < 3 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    there = list_names(config.output)
    assert PROGRESS in there and not manifest_exists(config.output), (tmp_path / "log").read_text()[-2000:]
    assert 2 < len(there) < 25
    with pytest.raises(ManifestError, match="is an unfinished table of"):
        make_depth_dataset(config)
    resumed, _ = make_depth_dataset(longer)
    here = dataclasses.replace(longer, output=str(tmp_path))
    for number in (0, 1, 2, 12, 24):
        assert make_part(here, number) == resumed.files[number]
    assert read_manifest(config.output) == resumed
