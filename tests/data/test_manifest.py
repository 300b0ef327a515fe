"""Tables: complete or not there, unchanged once there, refused when they do not fit."""

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.latents import arrays_to_table, check_fingerprint, table_to_arrays
from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    ManifestNotFoundError,
    manifest_exists,
    read_manifest,
    run_lengths,
    write_manifest,
    write_part,
)
from d2f_core.data.quarantine import BadSample, read_quarantine, reason_counts, write_quarantine
from d2f_core.data.schema import SchemaError, array_field, array_kind, check_schema, latent_schema, sample_id
from d2f_core.identity import canonical_json
from d2f_core.storage import join, write_bytes

SHAPE = (4, 3, 2)


def latent_table(rows: int, seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    columns = {
        "sample_id": [f"{seed}-{row}" for row in range(rows)],
        "caption": [f"caption {row}" for row in range(rows)],
        "latent_mean": draw.standard_normal((rows, *SHAPE)),
        "latent_std": draw.random((rows, *SHAPE)),
        "bucket": ["6x4"] * rows,
        "source_uri": [f"file{row}" for row in range(rows)],
        "width": [7] * rows,
        "height": [8] * rows,
        "crop": np.arange(rows * 4).reshape(rows, 4),
    }
    return arrays_to_table(columns, latent_schema(SHAPE))


def written(uri: str, *rows: int) -> Manifest:
    files = tuple(write_part(uri, f"part-{n}.parquet", latent_table(count, n)) for n, count in enumerate(rows))
    return Manifest(kind="latents", files=files, fingerprint={"autoencoder": "aa"}, inputs={"source": "here"})


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> str:
    return str(tmp_path / "table") if request.param == "disk" else join(request.getfixturevalue("bucket"), "table")


def test_a_table_without_a_manifest_does_not_exist(place):
    written(place, 3)
    assert not manifest_exists(place)
    with pytest.raises(ManifestNotFoundError, match="no table, or one that was not finished"):
        read_manifest(place)


def test_what_is_written_is_read(place):
    manifest = written(place, 130, 5)
    write_manifest(place, manifest)
    assert read_manifest(place) == manifest and manifest.num_rows == 135
    assert manifest.files[0].row_groups == ((64, 2), (2, 1))


def test_a_manifest_has_a_line_per_file_however_many_row_groups_there_are(tmp_path):
    write_manifest(str(tmp_path), written(str(tmp_path), 1000, 130))
    lines = [line for line in (tmp_path / "manifest.json").read_text().splitlines() if "part-" in line]
    assert [json.loads(line.rstrip(","))["row_groups"] for line in lines] == [[[64, 15], [40, 1]], [[64, 2], [2, 1]]]


def test_a_manifest_of_schema_version_2_is_the_same_table(tmp_path):
    """It listed the rows of every row group, and its digest, which other jobs noted, was a hash of that."""
    manifest = written(str(tmp_path), 130, 5)
    content = dataclasses.asdict(manifest) | {"schema_version": 2}
    for file, groups in zip(content["files"], ([64, 64, 2], [5]), strict=True):
        file["row_groups"] = groups
    write_bytes(str(tmp_path / "manifest.json"), json.dumps(content, indent=1, sort_keys=True).encode())
    assert read_manifest(str(tmp_path)) == manifest
    hashed = canonical_json({name: content[name] for name in ("kind", "files", "fingerprint")})
    assert read_manifest(str(tmp_path)).digest == hashlib.sha256(hashed).hexdigest()


def test_a_complete_table_never_changes(place):
    manifest = written(place, 3)
    write_manifest(place, manifest)
    write_manifest(place, manifest)
    with pytest.raises(ManifestError, match="already a complete table with other content"):
        write_manifest(place, dataclasses.replace(manifest, fingerprint={"autoencoder": "bb"}))
    assert read_manifest(place) == manifest


def test_parts_are_what_their_entry_says(tmp_path):
    (file,) = written(str(tmp_path), 130).files
    data = (tmp_path / file.path).read_bytes()
    metadata = pq.read_metadata(tmp_path / file.path)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
    assert run_lengths(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)) == file.row_groups
    assert metadata.row_group(0).column(0).compression == "UNCOMPRESSED"


def test_equal_rows_give_equal_bytes_however_they_are_chunked(tmp_path):
    table = latent_table(100)
    pieces = pa.concat_tables([table.slice(0, 33), table.slice(33)])
    assert write_part(str(tmp_path), "a", table).sha256 == write_part(str(tmp_path), "b", pieces).sha256


def test_the_digest_is_of_content_not_of_origin(tmp_path):
    manifest = written(str(tmp_path), 3)
    other_origin = dataclasses.replace(manifest, inputs={"source": "elsewhere"}, counts={"read": 9})
    other_encoder = dataclasses.replace(manifest, fingerprint={"autoencoder": "bb"})
    assert manifest.digest == other_origin.digest != other_encoder.digest
    assert manifest.digest != dataclasses.replace(manifest, kind="images").digest


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"schema_version": 99}',
        '{"schema_version": 1, "kind": "latents"}',
        '{"schema_version": 3, "kind": "latents"}',
        '{"schema_version": 3, "kind": "latents", "files": [{"row_groups": [[64]]}]}',
        '{"schema_version": 3, "kind": "latents", "files": [{"row_groups": [[64, 1]], "rows": 64}]}',
    ],
)
def test_a_bad_manifest_is_refused(text, tmp_path):
    write_bytes(str(tmp_path / "manifest.json"), text.encode())
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path):
    write_manifest(str(tmp_path), written(str(tmp_path), 3))
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["files"][0]["rows"] = 4
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="do not add up to 4 rows"):
        read_manifest(str(tmp_path))


def test_arrays_survive_a_table_in_shape_and_value(tmp_path):
    table = latent_table(10)
    file = write_part(str(tmp_path), "a.parquet", table)
    read = pq.ParquetFile(tmp_path / file.path).read_row_group(0, columns=["caption", "latent_mean", "crop"])
    arrays = table_to_arrays(read)
    assert arrays["latent_mean"].shape == (10, *SHAPE) and arrays["latent_mean"].dtype == np.float16
    np.testing.assert_array_equal(
        arrays["latent_mean"], np.random.default_rng(0).standard_normal((10, *SHAPE)).astype("f2")
    )
    np.testing.assert_array_equal(arrays["crop"], np.arange(40).reshape(10, 4))
    assert list(arrays["caption"][:2]) == ["caption 0", "caption 1"]


@pytest.mark.parametrize("pieces", [[(3, 4)], [(0, 2), (7, 3)], [(9, 1), (0, 1), (0, 0)], []])
def test_arrays_of_slices_and_chunks_are_the_rows_of_those_slices(pieces):
    table = latent_table(10)
    expected = table_to_arrays(table)["latent_std"]
    taken = pa.concat_tables([table.slice(0, 0), *(table.slice(*piece) for piece in pieces)])
    rows = [row for start, count in pieces for row in range(start, start + count)]
    np.testing.assert_array_equal(table_to_arrays(taken, ["latent_std"])["latent_std"], expected[rows])


def test_arrays_of_another_shape_are_refused():
    columns = table_to_arrays(latent_table(2))
    columns["latent_mean"] = columns["latent_mean"].transpose(0, 2, 1, 3)
    with pytest.raises(SchemaError, match=r"'latent_mean' got arrays of shape \(3, 4, 2\); its rows are \(4, 3, 2\)"):
        arrays_to_table(columns, latent_schema(SHAPE))


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    manifest = written(str(tmp_path), 1)
    check_fingerprint(manifest, "aa")
    with pytest.raises(SchemaError, match=r"autoencoder aa, the base model has bb. Run encode_latents again"):
        check_fingerprint(manifest, "bb")
    with pytest.raises(SchemaError, match="holds images, not latents"):
        check_fingerprint(dataclasses.replace(manifest, kind="images"), "aa")


def test_a_schema_that_does_not_fit_names_the_column():
    table, expected = latent_table(1), latent_schema(SHAPE)
    check_schema(table.append_column("more", [[1]]).schema, expected, where="t")
    with pytest.raises(SchemaError, match="t has no column 'caption'"):
        check_schema(table.drop_columns("caption").schema, expected, where="t")
    with pytest.raises(SchemaError, match=r"t: column 'latent_mean' is float16 \(4, 3, 2\), expected .* \(4, 2, 3\)"):
        check_schema(table.schema, latent_schema((4, 2, 3)), where="t")
    with pytest.raises(SchemaError, match="t: column 'latent_mean' is fixed_size_binary"):
        check_schema(table.schema, latent_schema((4, 2, 2)), where="t")


def test_a_shape_is_read_from_the_field_alone():
    assert array_kind(array_field("x", "float16", (2, 3))) == ((2, 3), np.dtype("float16"))
    with pytest.raises(SchemaError, match="without shape and dtype"):
        array_kind(pa.field("x", pa.binary(12)))
    with pytest.raises(SchemaError, match="holds 12 bytes a row"):
        array_kind(array_field("x", "float16", (2, 3)).with_metadata({"shape": "2,4", "dtype": "float16"}))


def test_a_sample_id_depends_on_image_and_caption():
    assert sample_id(b"image", "caption") == hashlib.sha256(b"image\0caption").hexdigest()[:32]
    assert len({sample_id(b"a", "b"), sample_id(b"a", "c"), sample_id(b"ab", "")}) == 3


def test_the_ledger_keeps_every_reason(place):
    bad = [BadSample(source_uri=f"f{n}", sample_id=None, reason=f"{'a' if n else 'b'}: {n}") for n in range(3)]
    write_quarantine(place, bad)
    assert read_quarantine(place) == bad
    assert reason_counts(bad) == {"a": 2, "b": 1}
