"""The table of views on a real cluster and a real S3 server: complete, in order, and the same however it was made."""

import dataclasses
import hashlib
import io
import sys

import pyarrow.parquet as pq
import pytest

from d2f_core.correspondence.views import table as views
from d2f_core.correspondence.views.config import MakeViewsConfig
from d2f_core.correspondence.views.rows import VIEW_SCHEMA, make_rows
from d2f_core.correspondence.views.table import make_part, make_views
from d2f_core.data.datasets.generated_table import PROGRESS
from d2f_core.data.manifest import ManifestError, manifest_exists, read_file, read_manifest
from d2f_core.storage import list_names
from pipelines import make_views as job
from pipelines.cli import run_job
from tests.flow.here import here

SMALL = {"size": 32, "categories": ("chair", "teapot"), "train_meshes": 2, "val_meshes": 0, "test_meshes": 1,
         "views_per_mesh": 2, "meshes_per_part": 2}  # fmt: skip


@pytest.fixture
def config(cluster, request) -> MakeViewsConfig:
    del cluster
    return MakeViewsConfig(output=f"s3://d2f/{request.node.name}", num_tasks=3, **SMALL)


def test_the_table_is_complete_in_order_and_left_alone_afterwards(config):
    manifest, written = make_views(config)
    assert written and [file.rows for file in manifest.files] == [4, 4, 4] and manifest.kind == "views"
    rows = [row for file in manifest.files
            for row in pq.read_table(io.BytesIO(read_file(config.output, file))).to_pylist()]  # fmt: skip
    assert [row["mesh"] for row in rows[::2]] == [
        "chair/train/0000", "chair/train/0001", "teapot/train/0000", "teapot/train/0001", "chair/test/0000",
        "teapot/test/0000",
    ]  # fmt: skip
    assert [row["split"] for row in rows] == ["train"] * 8 + ["test"] * 4
    assert all(row["image_id"] == hashlib.sha256(row["image"]).hexdigest() for row in rows)
    assert len({row["image_id"] for row in rows}) == 12 and rows[0].keys() == set(VIEW_SCHEMA.names)
    [expected, _] = make_rows(config, "train", "teapot", 0)
    compared = ("image", "depth", "keypoint_names", "visible", "source_uri", "intrinsics", "azimuth")
    assert {name: rows[4][name] for name in compared} == {name: expected[name] for name in compared}
    assert set(list_names(config.output)) - {PROGRESS} == {*(file.path for file in manifest.files), "manifest.json"}
    assert make_views(config) == (manifest, False)
    assert make_views(dataclasses.replace(config, num_tasks=1)) == (manifest, False)
    with pytest.raises(ManifestError, match="is a complete table of"):
        make_views(dataclasses.replace(config, seed=1))


def test_a_job_that_ended_midway_goes_on_to_the_same_bytes_on_other_processes(config, tmp_path, monkeypatch):
    made = []

    def fails_in_the_third(config: MakeViewsConfig, number: int):
        if len(made) == 2:
            raise MemoryError("the node is gone")
        made.append(number)
        return make_part(config, number)

    with here(), monkeypatch.context() as patch:
        patch.setattr(views, "make_part", fails_in_the_third)
        with pytest.raises(MemoryError):
            make_views(config)
    assert not manifest_exists(config.output) and len(made) == 2
    with pytest.raises(ManifestError, match="is an unfinished table of"):
        make_views(dataclasses.replace(config, size=48))
    resumed, _ = make_views(config)
    with here():
        alone, _ = make_views(dataclasses.replace(config, output=str(tmp_path / "views")))
    assert resumed == alone == read_manifest(config.output)


def test_the_command_checks_its_output_and_prints_its_config(tmp_path, monkeypatch, capsys):
    arguments = ["make_views", "views-few", "--output", str(tmp_path / "views"), "--categories", "car", "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_job("make_views", job.MAKE_VIEWS, job.main, job.check)
    printed = capsys.readouterr().out
    assert "- car\n" in printed and "views_per_mesh: 2" in printed and "nothing was done" in printed
