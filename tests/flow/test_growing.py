"""A latent table whose source changes: new images are encoded, gone ones left out, and each version stays as it was."""

import dataclasses
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2f_core.batch import table_job
from d2f_core.batch.growth import GROWING
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import make_table
from d2f_core.batch.table_spec import TableJobError
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.table_history import read_version, read_versions
from d2f_core.data.table_reader import read_columns
from d2f_core.flow.encode import actor
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig, EncodeError
from d2f_core.storage import join, list_names, read_bytes
from infra.local.stack import StackEnv
from tests.data.pictures import pictures, tar_bytes, write_folder, write_parquet
from tests.flow.here import here
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def config(base, tmp_path) -> EncodeConfig:
    source = ImageSource(uri=write_folder(str(tmp_path / "images"), pictures(13)))
    output = str(tmp_path / "latents")
    return EncodeConfig(source=source, base=base, output=output, resolution=16, rows_per_part=4, batch_size=3)


@pytest.fixture(autouse=True)
def encoded(monkeypatch) -> list[int]:
    """Numbers of pictures that the autoencoder got, call by call."""
    calls, encode = [], actor.LatentEncoder._encode

    def counting(self, pictures: np.ndarray, *more: Any):
        calls.append(len(pictures))
        return encode(self, pictures, *more)

    monkeypatch.setattr(actor.LatentEncoder, "_encode", counting)
    return calls


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    with here():
        yield


def make(config: EncodeConfig) -> Manifest:
    return make_table(check_encode(config))


def rows_of(uri: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """All rows, read as a training reads them."""
    names = pq.read_schema(Path(uri, manifest.files[0].path)).names
    return table_to_arrays(read_columns(uri, manifest, names))


def names_of(uri: str, manifest: Manifest) -> list[str]:
    return [Path(place).stem for place in rows_of(uri, manifest)["source_uri"]]


def remove(config: EncodeConfig, *names: str) -> None:
    for name in names:
        for file in Path(config.source.uri).glob(f"{name}.*"):
            file.unlink()


def test_new_images_alone_are_encoded_and_the_table_gets_a_version(config, encoded, caplog):
    first = make(config)
    before = {path: path.read_bytes() for path in Path(config.output).iterdir() if path.is_file()}
    write_folder(config.source.uri, pictures(3, first=50))
    encoded.clear()
    caplog.set_level("INFO")
    job = check_encode(config)
    assert "by their places 3 samples are new, 0 removed, 13 unchanged; version 2" in caplog.text
    assert not list_names(join(config.output, "_versions")), "a check writes nothing"
    second = make_table(job)
    assert sum(encoded) == 3 and "3 new, 0 removed, 13 unchanged: version 2" in caplog.text
    assert second.files[: len(first.files)] == first.files
    assert [file.path for file in second.files[len(first.files) :]] == ["part-v2-000000.parquet"]
    assert second.counts == {
        "read": 16, "written": 16, "quarantined": 0, "duplicates": 0, "new": 3, "removed": 0, "unchanged": 13,
    }  # fmt: skip
    assert read_manifest(config.output) == second and read_manifest(config.output, 1) == first
    assert before == {path: path.read_bytes() for path in before} and GROWING not in list_names(config.output)
    assert make(config) == second and "complete with 16 rows, nothing to do" in caplog.text


def test_a_grown_table_holds_the_rows_that_one_made_at_once_holds(config, tmp_path):
    make(config)
    write_folder(config.source.uri, pictures(9, first=50))
    remove(config, "002", "007")
    grown, at_once = make(config), make(dataclasses.replace(config, output=str(tmp_path / "at_once")))
    found, wanted = rows_of(config.output, grown), rows_of(str(tmp_path / "at_once"), at_once)
    places = [np.argsort(rows["sample_id"]) for rows in (found, wanted)]
    for name in found:
        if name.startswith("latent"):
            left, right = (rows[name][place].astype("f4") for rows, place in zip((found, wanted), places, strict=True))
            np.testing.assert_allclose(left, right, atol=2e-3)  # batches hold other images
        else:
            np.testing.assert_array_equal(found[name][places[0]], wanted[name][places[1]])


def test_removed_images_are_left_out_and_changed_ones_are_removed_and_new(config, encoded):
    first = make(config)
    remove(config, "000", "001", "002", "003", "006")
    Path(config.source.uri, "009.txt").write_text("another caption")
    encoded.clear()
    second = make(config)
    assert (second.counts["new"], second.counts["removed"], second.counts["unchanged"]) == (1, 6, 7)
    assert sum(encoded) == 1
    assert names_of(config.output, second) == ["004", "005", "007", "008", "010", "011", "012", "009"]
    assert [file.path for file in second.files] == [
        "part-v2-of-000001.parquet", "part-v2-of-000002.parquet", "part-000003-00000.parquet", "part-v2-000000.parquet",
    ]  # fmt: skip
    assert names_of(config.output, first) == [f"{number:03d}" for number in range(13)], "version 1 is there"


def test_versions_follow_on_each_other_and_equal_content_has_one_digest(config):
    first = make(config)
    write_folder(config.source.uri, pictures(1, first=50))
    second = make(config)
    remove(config, "050")
    third = make(config)
    assert third.digest == first.digest and third.files == first.files and third.counts["removed"] == 1
    assert [number for number, _ in read_versions(config.output)] == [3, 2, 1]
    assert read_version(config.output, second.digest) == second and read_version(config.output, "other") is None


def test_a_file_that_was_only_written_anew_or_renamed_is_not_encoded_again(config, encoded):
    first = make(config)
    for file in list(Path(config.source.uri).glob("004.*")):
        file.rename(file.with_stem("zzz"))
    encoded.clear()
    second = make(config)
    assert sum(encoded) == 0 and second.digest == first.digest and second.counts["unchanged"] == 13
    assert make(config) == second


def test_repeated_images_are_in_the_ledger_of_their_version_with_the_place_of_the_first(config):
    make(config)
    again = [(f"1{n}.png", *item[1:]) for n, item in enumerate([*pictures(2), *pictures(1), *pictures(2, first=80)])]
    new = [(f"2{n}.png", *item[1:]) for n, item in enumerate([*pictures(2, first=80), *pictures(1)])]
    write_folder(config.source.uri, [*again, *new, ("bad.png", b"no image", "bad")])
    second = make(dataclasses.replace(config, max_quarantined_share=0.1))
    places = {
        bad.source_uri.rpartition("/")[2]: bad.reason.rpartition("/")[2] for bad in read_quarantine(config.output)
    }
    places["bad.png"] = places["bad.png"].partition(":")[0]
    assert places == {
        "10.png": "000.png", "11.png": "001.jpg", "12.png": "000.png", "20.png": "13.png", "21.png": "14.png",
        "22.png": "000.png", "bad.png": "undecodable",
    }  # fmt: skip
    assert second.counts == {
        "read": 22, "written": 15, "quarantined": 7, "duplicates": 6, "new": 2, "removed": 0, "unchanged": 13,
    }  # fmt: skip
    assert set(list_names(join(config.output, "_versions"))) == {"manifest-2.json", "quarantine-2.parquet"}


@pytest.mark.parametrize("chunks", [0, 1, 3, 5])
def test_a_growth_killed_after_any_chunk_or_while_it_ends_goes_on_to_the_same_table(
    chunks, config, tmp_path, monkeypatch, encoded
):
    wanted_config = dataclasses.replace(config, output=str(tmp_path / "unbroken"))
    for each in (config, wanted_config):
        make(each)
    write_folder(config.source.uri, [*pictures(5, first=50), ("zz.png", *pictures(1)[0][1:])])
    remove(config, "003")
    wanted = make(wanted_config)
    written = []

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    rows = table_job._rows

    def some(job, todo) -> Iterator[dict]:
        for row in rows(job, todo):
            if len(written) == chunks:
                raise KeyboardInterrupt
            written.append(row)
            yield row

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(table_job, "_rows", some)
        patch.setattr(table_job, "write_manifest", killed)
        make(config)
    assert read_manifest(config.output).num_rows == 13 and len(written) == min(chunks, 5)
    encoded.clear()
    assert make(config).digest == wanted.digest and sum(encoded) <= 5
    ledgers = [read_bytes(join(each.output, "_versions/quarantine-2.parquet")) for each in (config, wanted_config)]
    names = [ledger.replace(b"unbroken", b"latents") for ledger in ledgers]
    assert names[0] == names[1] and GROWING not in list_names(config.output)


def test_what_a_killed_growth_left_behind_its_version_is_removed(config, monkeypatch):
    make(config)
    write_folder(config.source.uri, pictures(1, first=50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_job, "remove_tree", lambda uri: None)
        second = make(config)
    assert GROWING in list_names(config.output)
    write_folder(config.source.uri, pictures(1, first=60))
    assert make(config).files[: len(second.files)] == second.files and GROWING not in list_names(config.output)


def test_an_unfinished_growth_of_another_state_of_the_source_is_refused_at_the_prompt(config):
    make(config)
    write_folder(config.source.uri, [*pictures(1, first=50), ("bad.png", b"no image", "bad")])
    with pytest.raises(TableJobError, match=r"more than max_quarantined_share=0\.01 allows.*_growing/quarantine"):
        make(config)
    write_folder(config.source.uri, pictures(1, first=60))
    with pytest.raises(OutputError, match=r"_growing' is an unfinished version of another job: source_digest was"):
        check_encode(config)
    assert read_manifest(config.output).num_rows == 13


def test_a_source_that_lost_most_of_its_images_makes_no_version_unless_that_is_asked_for(config, encoded):
    make(config)
    remove(config, *(f"{number:03d}" for number in range(8)))
    write_folder(config.source.uri, pictures(1, first=50))
    with pytest.raises(TableJobError, match=r"8 of the 13 samples in .* not in .*images' any more, and max_removed_sh"):
        make(config)
    assert read_manifest(config.output).num_rows == 13
    encoded.clear()
    assert make(dataclasses.replace(config, max_removed_share=0.7)).num_rows == 6 and sum(encoded) == 0
    with pytest.raises(EncodeError, match=r"max_removed_share=1\.5 must lie in \[0, 1\]"):
        dataclasses.replace(config, max_removed_share=1.5)


def test_another_change_beside_the_source_is_refused_as_before(config):
    make(config)
    write_folder(config.source.uri, pictures(1, first=50))
    with pytest.raises(OutputError, match=r"rows_per_part was 4, now 5"):
        check_encode(dataclasses.replace(config, rows_per_part=5))


def test_each_of_several_captions_grows_as_a_sample_and_what_is_not_known_before_is_not_said(
    config, tmp_path, encoded, caplog
):
    def put(*captions: str) -> None:
        lines = [json.dumps({"file_name": "000.png", "text": text}) for text in captions]
        Path(source.uri, "metadata.jsonl").write_text("\n".join(lines))

    folder = write_folder(str(tmp_path / "several"), pictures(1), table="metadata.jsonl")
    source = ImageSource(uri=folder, captions="all")
    config = dataclasses.replace(config, source=source)
    put("one", "two")
    make(config)
    put("one", "three", "four")
    Path(config.output, "quarantine.parquet").unlink()
    encoded.clear()
    caplog.set_level("INFO")
    second = make(config)
    assert sum(encoded) == 2 and rows_of(config.output, second)["caption"].tolist() == ["one", "three", "four"]
    assert "it holds an unknown number of samples now, and held 2; version 2" in caplog.text


@pytest.mark.parametrize("write", [write_parquet, "tar"])
def test_tars_and_parquet_grow_by_what_is_in_them(write, config, tmp_path, encoded, caplog):
    def put(count: int) -> str:
        if write != "tar":
            return write(str(tmp_path / "other"), pictures(count))
        members = {}
        for name, image, caption in pictures(count):
            members |= {name: image, f"{Path(name).stem}.txt": caption.encode()}
        (tmp_path / "other.tar").write_bytes(tar_bytes(members))
        return str(tmp_path / "other.tar")

    config = dataclasses.replace(config, source=ImageSource(uri=put(9)))
    make(config)
    put(11)
    encoded.clear()
    caplog.set_level("INFO")
    assert make(config).counts["new"] == 2 and sum(encoded) == 2
    assert f"it holds {'an unknown number of' if write == 'tar' else 11} samples now, and held 9" in caplog.text


def test_a_table_on_s3_grows(s3: StackEnv, config, encoded):
    prefix = f"s3://d2f/tests/{uuid.uuid4().hex}"
    source = ImageSource(uri=write_folder(join(prefix, "images"), pictures(9)))
    config = dataclasses.replace(config, source=source, output=join(prefix, "latents"))
    first = make(config)
    write_folder(source.uri, pictures(2, first=50))
    encoded.clear()
    second = make(config)
    assert sum(encoded) == 2 and second.num_rows == 11 and second.files[: len(first.files)] == first.files
    assert read_manifest(config.output) == second and make(config) == second
