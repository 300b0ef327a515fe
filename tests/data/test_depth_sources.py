"""Images with depth in tars and tables: both layouts give metres along the axis, and nothing is lost or believed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d2f_core.data.depth import BadDepthError, planar_depth
from d2f_core.data.depth_files import encode_depth
from d2f_core.data.sources.config import DepthSource, ImageSource
from d2f_core.data.sources.depth import DepthSample, plan_depth, read_depth
from d2f_core.data.sources.images import plan_images, read_images
from d2f_core.data.sources.sample import SourceError
from tests.data.pictures import file_bytes, pictures, pixels, tar_bytes, write_folder, write_parquet, write_tars
from tests.data.test_depth import npy_bytes, png_bytes

WIDTH, HEIGHT = 24, 20


def a_depth(number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).uniform(1, 50, (HEIGHT, WIDTH)).astype(np.float32)


def hypersim_tar(count: int = 3) -> bytes:
    members = {}
    for number in range(count):
        members[f"ai_001_{number:03d}.rgb.jpg"] = file_bytes(pixels(number, HEIGHT, WIDTH), "JPEG")
        members[f"ai_001_{number:03d}.depth.npy"] = npy_bytes(a_depth(number))
        members[f"ai_001_{number:03d}.mask.png"] = png_bytes(np.uint8(255) * (a_depth(number) < 40))
        members[f"ai_001_{number:03d}.json"] = b'{"scene": "ai_001"}'
    return tar_bytes(members)


def vkitti_tar(count: int = 3) -> bytes:
    members = {}
    for number in range(count):
        levels = (100 * a_depth(number)).astype(np.uint16)
        levels[0] = 65535
        members[f"Scene01/clone/{number:05d}.png"] = file_bytes(pixels(number, HEIGHT, WIDTH))
        members[f"Scene01/clone/{number:05d}.depth.png"] = png_bytes(levels)
    return tar_bytes(members)


def samples_of(source: DepthSource) -> list[Any]:
    return [sample for shard in plan_depth(source).shards for sample in shard.read()]


def source_of(tmp_path: Path, data: bytes, **how) -> DepthSource:
    (tmp_path / "a.tar").write_bytes(data)
    return DepthSource(uri=str(tmp_path), **how)


def depth_in(sample: DepthSample, source: DepthSource) -> np.ndarray:
    depth = read_depth(sample, source, 10**6)
    assert depth is not None
    return depth


def test_hypersims_distances_become_depth_with_its_focal_length_and_mask(tmp_path):
    source = source_of(tmp_path, hypersim_tar(), distances="radial")
    samples = samples_of(source)
    assert [sample.source_uri.partition("#")[2] for sample in samples] == [f"ai_001_{n:03d}.rgb.jpg" for n in range(3)]
    assert all(sample.problem is None and sample.caption is None for sample in samples)
    distance = a_depth(1)
    expected = np.where(distance < 40, planar_depth(distance, 886.81 / 1024 * WIDTH), np.nan)
    np.testing.assert_allclose(depth_in(samples[1], source), expected, rtol=1e-5)
    # The authors' own formula, at the size of their images.
    centre, corner = planar_depth(np.ones((768, 1024)), 886.81)[[383, 0], [511, 0]]
    assert centre == pytest.approx(1, abs=1e-6)
    assert corner == pytest.approx(886.81 / np.linalg.norm([511.5, 383.5, 886.81]), rel=1e-6)


def test_vkittis_centimetres_become_metres_without_the_sky(tmp_path):
    source = source_of(tmp_path, vkitti_tar(), max_depth=30.0)
    depth = depth_in(samples_of(source)[2], source)
    expected = a_depth(2)
    expected[0] = np.nan
    expected[expected > 30] = np.nan
    np.testing.assert_allclose(depth, expected, atol=0.011)
    assert np.isnan(depth[0]).all() and np.isfinite(depth).sum() > 50


def test_a_depth_table_is_a_source_and_names_where_its_rows_came_from(tmp_path):
    items = pictures(3)
    columns = {
        "image": [image for _, image, _ in items],
        "depth": [encode_depth(a_depth(number)) for number in range(3)],
        "source_uri": ["a", "b", "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = DepthSource(uri=str(tmp_path))
    samples = samples_of(source)
    assert [sample.source_uri for sample in samples] == ["a", "b", "c"]
    assert [sample.image for sample in samples] == columns["image"]
    np.testing.assert_array_equal(depth_in(samples[2], source), a_depth(2))


def test_what_lacks_a_part_is_delivered_with_the_problem(tmp_path):
    image, depth = file_bytes(pixels(0, HEIGHT, WIDTH)), npy_bytes(a_depth())
    members = {"a.png": image, "b.depth.npy": depth, "c.png": image, "c.depth.npy": depth, "../d.png": image}
    found = [(sample.problem or "").partition(":")[0] for sample in samples_of(source_of(tmp_path, tar_bytes(members)))]
    assert found == ["no_depth", "no_image", "", "bad_name"]
    pq.write_table(
        pa.table({"image": [None, image], "depth": [depth, pa.scalar(None, pa.binary())]}), tmp_path / "x.parquet"
    )
    table = DepthSource(uri=str(tmp_path / "x.parquet"))
    assert [sample.problem for sample in samples_of(table)] == [
        "no_image: null in the table",
        "no_depth: null in the table",
    ]


def test_a_damaged_tar_delivers_what_is_whole_and_names_itself(tmp_path):
    data = vkitti_tar()
    first, *others, last = samples_of(source_of(tmp_path, data[: len(data) // 2]))
    assert first.problem is None
    assert last.problem.startswith(f"damaged_archive: nothing can be read after {len(others) + 1} samples")


def test_latents_are_read_when_asked_for_and_the_pictures_are_not(tmp_path):
    latent = npy_bytes(np.ones((4, 8, 8), np.float16))
    members = {"a.latent.npy": latent, "a.depth_latent.npy": latent[:-1], "a.png": b"x", "b.latent.npy": latent}
    first, second = samples_of(source_of(tmp_path, tar_bytes(members), latents=True))
    assert (first.latent, first.depth_latent, first.image, first.problem) == (latent, latent[:-1], None, None)
    assert second.problem == "no_depth_latent: only .latent.npy under this key"


def test_a_mask_of_another_size_is_refused():
    sample = DepthSample(
        source_uri="a", image=b"", depth=npy_bytes(a_depth()), mask=png_bytes(np.ones((4, 6), np.uint8))
    )
    with pytest.raises(BadDepthError, match=f"^mask_size: the mask is 6x4 px, the depth {WIDTH}x{HEIGHT}"):
        read_depth(sample, DepthSource(), 10**6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metres_per_level": 0.0}, r"metres_per_level=0\.0 must be above 0"),
        ({"focal": float("nan")}, "focal=nan must be above 0"),
        ({"max_depth": -1.0}, "max_depth=-1"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(how, message):
    with pytest.raises(SourceError, match=message):
        DepthSource(**how)


def test_what_holds_no_depth_is_refused_by_its_listing(tmp_path):
    folder, table = str(tmp_path / "folder"), str(tmp_path / "table")
    with pytest.raises(SourceError, match=r"is a folder of images\. Depth is read from tars and depth tables"):
        plan_depth(DepthSource(uri=write_folder(folder, pictures(1))))
    with pytest.raises(SourceError, match="no column 'depth' of depth bytes"):
        plan_depth(DepthSource(uri=write_parquet(table, pictures(1))))
    pq.write_table(pa.table({"image": [b"x"], "depth": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="holds no latents"):
        plan_depth(DepthSource(uri=str(tmp_path / "x.parquet"), latents=True))


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet])
def test_images_are_read_without_captions_where_the_caller_says_so(write, tmp_path):
    items = pictures(7)
    source = ImageSource(uri=write(str(tmp_path), items))
    plan = plan_images(source, rows_per_shard=4, captions=False)
    samples = [sample for shard in plan.shards for sample in shard.read()]
    assert [sample.image for sample in samples] == [image for _, image, _ in items]
    assert all(sample.caption is None and sample.problem is None for sample in samples)
    assert plan.digest != plan_images(source, rows_per_shard=4).digest


def test_a_depth_table_is_a_source_of_images_without_captions(tmp_path):
    sink = io.BytesIO()
    Image.fromarray(pixels(0)).save(sink, "PNG")
    pq.write_table(pa.table({"image": [sink.getvalue()], "depth": [b"x"], "source_uri": ["a"]}), tmp_path / "x.parquet")
    (shard,) = plan_images(ImageSource(uri=str(tmp_path)), captions=False).shards
    (sample,) = shard.read()
    assert (sample.image, sample.source_uri) == (sink.getvalue(), "a")
    with pytest.raises(SourceError, match="no text column caption or text"):
        plan_images(ImageSource(uri=str(tmp_path)))


def test_images_without_captions_are_a_ray_dataset_too(cluster, tmp_path):
    items = pictures(5)
    rows = read_images(ImageSource(uri=write_folder(str(tmp_path), items)), captions=False).take_all()
    assert sorted(row["image"] for row in rows) == sorted(image for _, image, _ in items)
