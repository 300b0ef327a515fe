"""Photos in a bucket to image tables, on real servers; the tables are what encoding and evaluation read."""

from pathlib import Path

import pytest
import ray

from d2f_core.data.manifest import read_manifest
from d2f_core.data.sources.config import ImageSource
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.storage import list_tree, read_bytes, upload_tree
from pipelines.import_images import check, main
from tests.import_images.photos import write_photos

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]
HOME = "s3://d2f/test-import-images"


def test_photos_in_a_bucket_become_two_tables_and_a_page(tmp_path: Path) -> None:
    upload_tree(write_photos(tmp_path / "photos", 24), f"{HOME}/photos")
    config = ImportImagesConfig(
        source=ImageSource(uri=f"{HOME}/photos"), output=f"{HOME}/out", resolution=64, min_side=32, rows_per_part=8,
        held_out_share=0.2,
    )  # fmt: skip
    check(config)
    ray.init(ignore_reinit_error=True)
    main(config)
    tables = {side: read_manifest(f"{config.output}/{side}") for side in ("train", "test")}
    assert sum(table.num_rows for table in tables.values()) == 24
    assert {table.kind for table in tables.values()} == {"images"}
    assert b"24</b>read" in read_bytes(f"{config.output}/report.html")
    files = {path.partition("/out/")[2].partition("/")[0] for path in list_tree(config.output)}
    assert files == {"duplicates.jsonl", "quarantine.parquet", "report.html", "summary.json", "test", "train"}
    main(config)
    assert {side: read_manifest(f"{config.output}/{side}") for side in tables} == tables
