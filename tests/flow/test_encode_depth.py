"""encode_depth: pairs go through the same job as captioned images, and the table holds what training needs."""

import dataclasses
import io
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from d2f_core.batch.chunk_records import read_records, unfinished_shards
from d2f_core.batch.chunks import prepare_chunk, write_row
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import claim_output, finish_table, make_table
from d2f_core.batch.table_spec import TableJobError
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.crops import crop_box
from d2f_core.data.datasets.config import MakeDepthConfig
from d2f_core.data.datasets.depth_table import make_depth_dataset, make_rows
from d2f_core.data.depth import crop_and_resize, normalise_depth
from d2f_core.data.depth_files import decode_depth
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import check_schema, sample_id
from d2f_core.data.sources.config import DepthSource
from d2f_core.data.sources.depth import DepthSample
from d2f_core.flow.encode.actor import LatentEncoder, to_input
from d2f_core.flow.encode.check import check_encode_depth
from d2f_core.flow.encode.config import EncodeDepthConfig, EncodeError
from d2f_core.flow.latents import check_fingerprint, depth_latent_schema
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.storage import join, read_bytes
from infra.local.stack import StackEnv
from tests.data.pictures import file_bytes, pixels, tar_bytes
from tests.data.test_depth import npy_bytes, png_bytes
from tests.flow.here import here, prepared_rows
from tests.flow.tiny_base import write_tiny_base

SHAPE = (4, 8, 8)
EMOJI_SD = "infra/models/emoji-sd"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def a_depth(number: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(number).uniform(1, 9, (height, width)).astype(np.float32)


def pair(number: int) -> tuple[bytes, np.ndarray]:
    return file_bytes(pixels(number, 20, 24)), a_depth(number)


def turned_upside_down(values: np.ndarray) -> bytes:
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(sink, "JPEG", exif=exif)
    return sink.getvalue()


def with_hole(depth: np.ndarray, value: float) -> np.ndarray:
    depth = depth.copy()
    depth[4:9, 10:15] = value
    return depth


def bad_members() -> dict[str, bytes]:
    """One sample for each way in which a pair is bad; the reason's code is its key."""
    image, depth = pair(90)
    members = {
        "undecodable.png": b"no image",
        "undecodable.depth.npy": npy_bytes(depth),
        "bad_depth.png": file_bytes(pixels(91, 20, 24)),
        "bad_depth.depth.npy": b"no depth",
        "depth_size.png": file_bytes(pixels(92, 20, 24)),
        "depth_size.depth.npy": npy_bytes(a_depth(92, 24, 20)),
        "mask_size.png": file_bytes(pixels(93, 20, 24)),
        "mask_size.depth.npy": npy_bytes(depth),
        "mask_size.mask.png": png_bytes(np.ones((20, 20), np.uint8)),
        "no_valid_depth.png": file_bytes(pixels(94, 20, 24)),
        "no_valid_depth.depth.npy": npy_bytes(np.tile(np.float32([0, -1, np.inf, np.nan]), (20, 6))),
        "flat_depth.png": file_bytes(pixels(95, 20, 24)),
        "flat_depth.depth.npy": npy_bytes(np.full((20, 24), 3, "f4")),
        "no_depth.png": image,
        "orientation.jpg": turned_upside_down(pixels(96, 20, 24)),
        "orientation.depth.npy": npy_bytes(depth),
        "mask_only.png": file_bytes(pixels(97, 20, 24)),
        "mask_only.depth.npy": npy_bytes(depth),
        "mask_only.mask.png": png_bytes(np.zeros((20, 24), np.uint8)),
    }
    return members


@pytest.fixture
def config(base, tmp_path) -> EncodeDepthConfig:
    members = {}
    for number in range(7):
        image, depth = pair(number)
        hole = [np.nan, np.inf, 0, -1][number % 4]
        members[f"{number:03d}.png"] = image
        members[f"{number:03d}.depth.npy"] = npy_bytes(with_hole(depth, hole))
    members["100.png"], members["100.depth.npy"] = members["003.png"], npy_bytes(a_depth(100))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/a.tar").write_bytes(tar_bytes({**members, **bad_members()}))
    source = DepthSource(uri=str(tmp_path / "pairs"))
    output = str(tmp_path / "latents")
    return EncodeDepthConfig(
        source=source, base=base, output=output, resolution=16, rows_per_part=4, batch_size=3, max_quarantined_share=0.6
    )


def encode_here(config: EncodeDepthConfig, chunks: int | None = None) -> Manifest | None:
    """The stages of the job one after another in this process; a number of chunks stops it before its end."""
    job = check_encode_depth(config)
    claim_output(job.spec)
    encoder, written = LatentEncoder(job.spec), 0
    todo = unfinished_shards(len(job.source.shards), read_records(config.output))
    for row in prepared_rows(job, todo):
        if written == chunks:
            return None
        write_row(encoder(row), output=config.output)
        written += 1
    return finish_table(job.spec, read_records(config.output))


def rows_of(uri: str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(io.BytesIO(read_bytes(join(uri, file.path)))) for file in read_manifest(uri).files]
    return table_to_arrays(pa.concat_tables(tables))


def test_every_pair_is_written_or_in_the_ledger(config):
    manifest = encode_here(config)
    assert manifest is not None
    assert manifest.counts == {"read": 17, "written": 7, "quarantined": 10, "duplicates": 1}
    ledger = {bad.source_uri.partition("#")[2].partition(".")[0]: bad.reason.partition(":")[0]
              for bad in read_quarantine(config.output)}  # fmt: skip
    assert ledger.pop("100") == "duplicate"
    assert ledger == {code: code for code in ledger if code != "mask_only"} | {"mask_only": "no_valid_depth"}
    assert len(ledger) == 9


def test_an_image_whose_first_depth_is_broken_is_not_lost_when_it_comes_again(config, tmp_path):
    image, depth = pair(0)
    members = {"a.png": image, "a.depth.npy": b"no depth", "b.png": image, "b.depth.npy": npy_bytes(depth)}
    (tmp_path / "again.tar").write_bytes(tar_bytes(members))
    source = DepthSource(uri=str(tmp_path / "again.tar"))
    manifest = encode_here(dataclasses.replace(config, source=source))
    assert manifest is not None and manifest.counts == {"read": 2, "written": 1, "quarantined": 1, "duplicates": 0}
    assert [bad.reason.partition(":")[0] for bad in read_quarantine(config.output)] == ["bad_depth"]


def test_too_many_unusable_pairs_stop_the_job(config):
    with pytest.raises(TableJobError, match=r"9 of the 17 samples .* more than max_quarantined_share=0\.5 allows"):
        encode_here(dataclasses.replace(config, max_quarantined_share=0.5))
    assert not manifest_exists(config.output) and len(read_quarantine(config.output)) == 10


def test_a_row_holds_the_latents_of_depth_and_image_and_the_mask_of_what_counts(config):
    encode_here(config)
    rows, (image, depth) = rows_of(config.output), pair(1)
    autoencoder = load_autoencoder(resolve_base(config.base))
    prepared = prepare_image(image, config.rules)
    joined, _ = autoencoder.encode(to_input(prepared.pixels[None], "cpu"))
    depth = crop_and_resize(with_hole(depth, np.nan), prepared.crop, 16)
    picture, *_ = normalise_depth(depth, np.isfinite(depth))
    mean, std = autoencoder.encode(torch.from_numpy(picture)[None, None].repeat(1, 3, 1, 1))
    for name, expected in (("latent_mean", mean), ("latent_std", std), ("joined_mean", joined)):
        np.testing.assert_allclose(rows[name][1], expected[0], atol=2e-3)
    valid = np.isfinite(depth).reshape(8, 2, 8, 2).all(axis=(1, 3))
    np.testing.assert_array_equal(rows["mask"][1, 0], valid)
    assert 0 < valid.sum() < 64 and rows["mask"].dtype == np.uint8
    assert rows["caption"][1] == "" and rows["sample_id"][1] == sample_id(image, "")
    assert (rows["width"][1], rows["height"][1], *rows["crop"][1]) == (24, 20, 2, 0, 22, 20)


def test_the_table_is_one_of_latents_that_names_its_task(config):
    manifest = encode_here(config)
    assert manifest is not None and manifest.kind == "latents" and manifest.fingerprint["task"] == "image_to_depth"
    check_fingerprint(manifest, load_autoencoder(resolve_base(config.base)).fingerprint)
    schema = pq.read_schema(io.BytesIO(read_bytes(join(config.output, manifest.files[0].path))))
    check_schema(schema, depth_latent_schema(SHAPE), where="table")


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_job_resumed_after_any_chunk_ends_with_the_same_bytes(chunks, config):
    broken = dataclasses.replace(config, output=f"{config.output}-broken")
    unbroken = encode_here(config)
    assert encode_here(broken, chunks) is None and not manifest_exists(broken.output)
    resumed = encode_here(broken)
    assert unbroken is not None and resumed is not None and resumed.digest == unbroken.digest


def test_another_way_of_reading_the_depth_is_another_job(config):
    encode_here(config, 1)
    source = dataclasses.replace(config.source, distances="radial")
    with pytest.raises(OutputError, match=r"'distances': 'planar'.*'distances': 'radial'"):
        make_table(check_encode_depth(dataclasses.replace(config, source=source)))


def test_image_and_depth_are_cropped_alike_wherever_the_crop_lies(config):
    job = check_encode_depth(dataclasses.replace(config, crop="random"))
    (image, depth), size = pair(3), config.resolution
    row = job.spec.prepare(DepthSample(source_uri="a", image=image, depth=npy_bytes(depth)))
    left = row["crop"][0]
    assert row["crop"] == crop_box((24, 20), (size, size), "random", sample_id(image, "")) and left != 2
    expected, _, _ = normalise_depth(crop_and_resize(depth, row["crop"], size), np.ones((size, size), bool))
    np.testing.assert_array_equal(row["depth_picture"], expected)
    latents = dataclasses.replace(config, crop="random", source=dataclasses.replace(config.source, latents=True))
    with pytest.raises(EncodeError, match=r"crop='pad' is for captioned images.* Use center, top, random\."):
        check_encode_depth(dataclasses.replace(config, crop="pad"))
    with pytest.raises(EncodeError, match="crop='random' says nothing about latents that were encoded elsewhere"):
        check_encode_depth(latents)


def test_latents_that_come_with_the_source_are_taken_as_they_are(config, tmp_path):
    joined, latent = (np.random.default_rng(n).normal(size=SHAPE).astype(np.float16) for n in range(2))
    wrong = {"size": np.ones((4, 4, 4), "f4"), "number": np.full(SHAPE, 1e9)}
    half = np.zeros((64, 64), np.uint8)
    half[:32] = 255
    members = {
        "a.latent.npy": npy_bytes(joined),
        "a.depth_latent.npy": npy_bytes(latent),
        "a.depth.npy": npy_bytes(with_hole(a_depth(0), 0)),
        "b.latent.npy": npy_bytes(joined[::-1]),
        "b.depth_latent.npy": npy_bytes(latent),
        "c.latent.npy": npy_bytes(joined * 2),
        "c.depth_latent.npy": npy_bytes(latent),
        "c.mask.png": png_bytes(half),
        "empty.latent.npy": npy_bytes(joined * 3),
        "empty.depth_latent.npy": npy_bytes(latent),
        "empty.mask.png": png_bytes(np.zeros_like(half)),
        **{f"{name}.latent.npy": npy_bytes(latent) for name in wrong},
        **{f"{name}.depth_latent.npy": npy_bytes(value) for name, value in wrong.items()},
    }
    members = dict(sorted(members.items()))
    (tmp_path / "given.tar").write_bytes(tar_bytes(members))
    source = DepthSource(uri=str(tmp_path / "given.tar"), latents=True)
    manifest = encode_here(dataclasses.replace(config, source=source))
    assert manifest is not None and manifest.counts["written"] == 3
    rows = rows_of(config.output)
    np.testing.assert_array_equal(rows["latent_mean"], [latent] * 3)
    np.testing.assert_array_equal(rows["joined_mean"], [joined, joined[::-1], joined * 2])
    assert not rows["latent_std"].any() and rows["mask"][1].all() and 0 < rows["mask"][0].sum() < 64
    upper = np.reshape(rows["mask"][2], SHAPE[1:])
    assert upper[: len(upper) // 2].all() and not upper[len(upper) // 2 :].any(), "a mask alone counts too"
    assert {bad.reason.partition(":")[0] for bad in read_quarantine(config.output)} == {
        "latent_size", "no_valid_pixels", "not_finite",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("latents", "parts", "reason"),
    [
        (False, ("depth",), "no_image: none found"),
        (False, ("image",), "no_depth: none found"),
        (True, ("depth_latent",), "no_latent: none found"),
        (True, ("latent",), "no_latent: none found"),
    ],
)
def test_half_a_pair_of_a_users_own_source_is_left_out_with_the_reason(config, latents, parts, reason):
    image, depth = pair(0)
    whole = {"image": image, "depth": npy_bytes(depth)}
    if latents:
        whole = dict.fromkeys(("latent", "depth_latent"), npy_bytes(np.zeros(SHAPE, np.float32)))
    samples = [
        DepthSample(source_uri=f"own#{number}", **{"image": None, **{name: whole[name] for name in there}})
        for number, there in enumerate((parts, whole))
    ]
    spec = check_encode_depth(
        dataclasses.replace(config, source=dataclasses.replace(config.source, latents=latents))
    ).spec
    ((record, prepared),) = prepare_chunk(samples, spec, shard=0, number=0, last=True)
    assert [(bad.source_uri, bad.reason) for bad in record.bad] == [("own#0", reason)]
    assert prepared["source_uri"].to_pylist() == ["own#1"]


def test_pictures_of_a_chunk_are_limited_with_their_depth():
    with pytest.raises(EncodeError, match=r"rows_per_part=256 images of 768 pixels .* Most that fits: 130"):
        EncodeDepthConfig(resolution=768)
    with pytest.raises(EncodeError, match=r"source\.uri is empty"):
        check_encode_depth(EncodeDepthConfig())


# On a real S3 server; the cluster runs it in tests/pipelines/depth_workflow.py.


def test_rendered_scenes_become_latents_with_the_right_masks(stack: StackEnv):
    import ray

    ray.init(ignore_reinit_error=True)
    prefix = f"s3://d2f/tests/{uuid.uuid4().hex}"
    scenes = MakeDepthConfig(output=f"{prefix}/depth", num_scenes=12, rows_per_part=5)
    with here():
        make_depth_dataset(scenes)
    config = EncodeDepthConfig(
        source=DepthSource(uri=scenes.output), base=EMOJI_SD, output=f"{prefix}/latents", rows_per_part=5
    )
    with here():
        manifest = make_table(check_encode_depth(config))
    assert manifest.counts == {"read": 12, "written": 12, "quarantined": 0, "duplicates": 0}
    assert make_table(check_encode_depth(config)) == manifest
    rows = rows_of(config.output)
    assert rows["latent_mean"].shape == rows["joined_mean"].shape == (12, 4, 16, 16)
    assert list(rows["source_uri"]) == [f"rendered:train/0/64/{number}" for number in range(12)]
    for number in range(12):
        valid = np.isfinite(decode_depth(make_rows(scenes, number)[0]["depth"]))
        np.testing.assert_array_equal(rows["mask"][number, 0], valid.reshape(16, 4, 16, 4).all(axis=(1, 3)))
    apart = dataclasses.replace(config, output=f"{prefix}/here")
    alone = encode_here(apart)
    assert alone is not None and alone.digest == manifest.digest
