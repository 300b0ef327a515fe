"""Tables: complete or not there, unchanged once there, refused when they do not fit."""

import dataclasses
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data import quarantine
from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    ManifestNotFoundError,
    TableFile,
    bucket_runs,
    manifest_exists,
    read_manifest,
    rows_per_group,
    run_lengths,
    write_manifest,
    write_part,
)
from d2f_core.data.quarantine import BadSample, read_quarantine, reason_counts, write_quarantine
from d2f_core.identity import canonical_json
from d2f_core.storage import join, write_bytes
from tests.data.rows import some_rows


def written(uri: str, *rows: int) -> Manifest:
    files = tuple(write_part(uri, f"part-{n}.parquet", some_rows(count, n)) for n, count in enumerate(rows))
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


def test_a_manifest_is_written_as_by_every_release(tmp_path):
    """Byte by byte: what 67c14c5 wrote, by its hash."""
    files = tuple(
        TableFile(path=path, rows=66, size=3, sha256="x", row_groups=((64, 1), (2, 1))) for path in ("a", "é")
    )
    fields = {"fingerprint": {"a": "é"}, "inputs": {"z": [1, {"b": 2}]}, "counts": {"read": 1}}
    manifest = Manifest(kind="latents", files=files, **fields)
    write_manifest(str(tmp_path), manifest)
    text = (tmp_path / "manifest.json").read_bytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "4cd0179d20819e90"
    assert manifest.digest[:16] == "cc614eff48a69fc4"


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


def test_buckets_are_written_where_there_are_any_and_decide_the_digest(tmp_path):
    plain = written(str(tmp_path / "a"), 5, 4)
    write_manifest(str(tmp_path / "a"), plain)
    assert "buckets" not in json.loads((tmp_path / "a/manifest.json").read_text())
    runs = bucket_runs(["cat"] * 3 + ["dog"] * 5 + ["é"])
    bucketed = dataclasses.replace(plain, buckets=runs)
    write_manifest(str(tmp_path / "b"), bucketed)
    assert read_manifest(str(tmp_path / "b")) == bucketed and runs == (("cat", 3), ("dog", 5), ("é", 1))
    others = [dataclasses.replace(plain, buckets=(("cat", 4), ("dog", 4), ("é", 1))), bucketed, plain]
    assert len({manifest.digest for manifest in others}) == 3


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([["cat", 3], ["dog", 1]], "2 buckets have 4 rows, the files have 5. Every row belongs to one bucket"),
        ([["cat", 2], ["dog", 1], ["cat", 2]], "rows of 'cat' lie apart.*must be consecutive: sort the rows"),
        ([["cat", 5], ["dog", 0]], r"\('dog', 0\) must be a text and a number of rows from 1 on"),
        ([[3, 5]], r"\(3, 5\) must be a text"),
        ([["cat", "5"]], r"\('cat', '5'\) must be a text and a number"),
        ([["cat"]], "is not a table's manifest"),
        (7, "is not a table's manifest"),
    ],
)
def test_buckets_that_do_not_fit_the_rows_are_refused(buckets, message, tmp_path):
    write_manifest(str(tmp_path), written(str(tmp_path), 5))
    content = json.loads((tmp_path / "manifest.json").read_text()) | {"buckets": buckets}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message):
        read_manifest(str(tmp_path))


def test_rows_of_one_bucket_that_lie_apart_are_refused_before_they_are_written():
    with pytest.raises(ManifestError, match="rows of 'a' lie apart"):
        bucket_runs(["a", "b", "a"])


def test_a_system_names_its_own_kind_of_table(tmp_path):
    manifest = dataclasses.replace(written(str(tmp_path), 3), kind="key_points2")
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest


@pytest.mark.parametrize("kind", ["", "Images", "key points", "2d", "key-points", "images\n", "_x", None, 3])
def test_a_malformed_kind_is_refused_with_the_rule(kind, tmp_path):
    message = r"kind=.* does not match \[a-z\]\[a-z0-9_\]\*\. Name the kind of table in lower-case letters"
    with pytest.raises(ManifestError, match=message):
        Manifest(kind=kind, files=())
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 3, "kind": kind, "files": []}))
    with pytest.raises(ManifestError, match=message):
        read_manifest(str(tmp_path))


def test_row_groups_are_as_long_as_the_writer_says(tmp_path):
    rows = some_rows(11)
    file = write_part(str(tmp_path), "a", rows, row_group_rows=4)
    assert file.row_groups == ((4, 2), (3, 1)) and pq.read_table(tmp_path / "a").equals(rows)
    assert write_part(str(tmp_path), "b", rows) == dataclasses.replace(
        write_part(str(tmp_path), "c", rows, row_group_rows=64), path="b"
    )
    with pytest.raises(ValueError, match="row_group_rows=0 must be at least 1"):
        write_part(str(tmp_path), "d", rows, row_group_rows=0)


@pytest.mark.parametrize(
    ("row_bytes", "rows"),
    [(1, 64), (66_000, 64), (2**17, 64), (2**17 + 1, 63), (10**6, 8), (2 * 10**6, 4), (2**23, 1), (10**9, 1)],
)
def test_a_row_group_of_large_rows_is_some_megabytes(row_bytes, rows):
    assert rows_per_group(row_bytes) == rows


def test_rows_without_bytes_have_no_row_groups():
    with pytest.raises(ValueError, match=r"row_bytes=0 must be at least 1\. Give the bytes of a row"):
        rows_per_group(0)


def test_equal_rows_give_equal_bytes_however_they_are_chunked(tmp_path):
    table = some_rows(100)
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


def test_the_ledger_keeps_every_reason(place):
    bad = [BadSample(source_uri=f"f{n}", sample_id=None, reason=f"{'a' if n else 'b'}: {n}") for n in range(3)]
    assert write_quarantine(place, bad) == 3
    assert read_quarantine(place) == bad
    assert reason_counts(bad) == {"a": 2, "b": 1}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_a_long_ledger_is_written_piece_by_piece(count: int, tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "LINES_AT_ONCE", 3)
    bad = [BadSample(source_uri=f"f{n}", sample_id=f"{n}", reason="a: b", rows=n) for n in range(count)]
    assert write_quarantine(str(tmp_path), iter(bad)) == count
    assert read_quarantine(str(tmp_path)) == bad
    assert pq.read_metadata(tmp_path / "quarantine.parquet").num_row_groups == max(1, -(-count // 3))
