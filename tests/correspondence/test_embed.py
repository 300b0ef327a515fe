"""Teachers' features of views and images, as a table: exact, resumable, with bad images in the ledger."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from d2f_core.batch.table_job import make_table
from d2f_core.correspondence.embed.check import check_embed
from d2f_core.correspondence.embed.config import EmbedConfig, EmbedError, TeacherConfig
from d2f_core.correspondence.embed.source import category_of
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import Picture, TransformerTeacher
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.images import decode_image
from d2f_core.data.manifest import read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import array_kind
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.sample import Sample
from d2f_core.data.table_reader import RowReader
from d2f_core.identity import identity_values, stage_key
from tests.correspondence.evaluate.test_view_pairs import rows_of
from tests.correspondence.made_views import POINTS, SIDE, local_views
from tests.correspondence.tiny_transformers import write
from tests.data.pictures import pictures, write_folder

LITE0 = TeacherConfig(name="lite0", kind="efficientnet-lite0", size=64, normalisation="efficientnet-lite")


def config(tmp_path: Path, source: str, **fields) -> EmbedConfig:
    dino = TeacherConfig(name="dino", uri=str(write(tmp_path / "dino", "dinov2")), size=42, layers=2)
    return EmbedConfig(
        source=ImageSource(uri=source), output=str(tmp_path / "features"), teachers=(LITE0, dino), size=28,
        rows_per_part=10, **fields,
    )  # fmt: skip


def test_a_check_knows_shapes_without_weights(tmp_path: Path) -> None:
    job = check_embed(config(tmp_path, local_views(tmp_path / "views"), split="train"))
    assert job.spec.shapes == {"features_lite0": (16, 304), "features_dino": (9, 24)}
    schema = job.spec.schema()
    assert schema.names == [
        "sample_id", "source_uri", "category", "mesh", "surface_points", "surface_visible", "pixels",
        "features_lite0", "features_dino",
    ]  # fmt: skip


def test_the_uri_of_a_teacher_is_free_and_its_reading_is_not(tmp_path: Path) -> None:
    first = config(tmp_path, local_views(tmp_path / "views"))
    (tmp_path / "copy").symlink_to(tmp_path / "dino")
    lite0, dino = first.teachers
    moved = replace(first, teachers=(lite0, replace(dino, uri=str(tmp_path / "copy"), block="up_blocks.2")))
    deeper = replace(first, teachers=(lite0, replace(dino, layers=3)))
    identities = [check_embed(each).spec.identity() for each in (first, moved, deeper)]
    assert identities[0] == identities[1] != identities[2]


def test_an_embedding_is_a_column_more_and_a_job_without_one_is_what_it_was(tmp_path: Path) -> None:
    first = config(tmp_path, local_views(tmp_path / "views"))
    plain, by_class, by_mean = (
        check_embed(replace(first, **fields)).spec
        for fields in ({}, {"embedding": "dino"}, {"embedding": "lite0", "pooling": "mean"})
    )
    assert by_class.schema().names == [*plain.schema().names, "embedding"]
    assert [array_kind(spec.schema().field("embedding"))[0] for spec in (by_class, by_mean)] == [(24,), (304,)]
    told = by_class.identity()["fingerprint"]
    assert told.pop("embedding") == {"of": "features_dino", "pooling": "class"}
    assert plain.identity()["fingerprint"] == told and stage_key(first, {}) == stage_key(
        replace(first, pooling="class"), {}
    )
    assert not {"embedding", "pooling"} & identity_values(first).keys()


def test_a_network_without_a_class_token_has_no_embedding_of_that_kind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TransformerTeacher, "has_class_token", False)
    with pytest.raises(EmbedError, match="of teacher 'dino' has no class token"):
        check_embed(config(tmp_path, local_views(tmp_path / "views"), embedding="dino"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "train"}, "is no table of views"),
        ({"embedding": "clip"}, "embedding='clip' is no teacher's name. Use one of lite0, dino"),
        ({"embedding": "lite0"}, "has no class token"),
        ({"categories": ("cats",)}, "is no table of views"),
        ({"size": 5}, "from 14 to 2048"),
        ({"teachers": (LITE0, LITE0)}, "a name of its own"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_jobs_that_cannot_run_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    source = write_folder(str(tmp_path / "images"), pictures(3))
    with pytest.raises(EmbedError, match=message):
        check_embed(replace(config(tmp_path, source), **fields))


def test_only_an_image_file_has_a_directory_for_its_category() -> None:
    places = {
        "s3://photos/cats/1.jpg": "cats", "/d/c#1/x.jpg": "c#1", "s3://b/train-1.tar#cat/0001.jpg": "",
        "/images/part-0.parquet#row=7": "",
    }  # fmt: skip
    for place, wanted in places.items():
        assert category_of(Sample(source_uri=place, image=b"", caption=None)) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "DINO"}, "small letters"),
        ({"name": "a", "kind": "diffusion"}, "needs a uri"),
        ({"name": "a", "kind": "efficientnet-lite0", "uri": "x"}, "leave uri out"),
    ],
)
def test_teachers_that_mean_nothing_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(EmbedError, match=message):
        TeacherConfig(**fields)


def test_views_become_rows_with_features_and_points(cluster: None, tmp_path: Path) -> None:
    job = check_embed(config(tmp_path, local_views(tmp_path / "views"), split="train", embedding="dino"))
    manifest = make_table(job)
    views = [row for row in rows_of(str(tmp_path / "views")) if row["split"] == "train"]
    assert manifest.kind == "features" and manifest.num_rows == len(views) == 32
    output = job.spec.config.output
    found = table_to_arrays(RowReader(output, manifest, job.spec.schema().names).read(np.arange(32)))
    assert found["category"].tolist() == [row["category"] for row in views]
    assert found["mesh"].tolist() == [row["mesh"] for row in views]
    points = np.frombuffer(views[5]["surface_points"], np.float32).reshape(POINTS, 2)
    np.testing.assert_allclose(found["surface_points"][5], points * 28 / SIDE, rtol=1e-6)
    image = np.asarray(decode_image(views[5]["image"], job.spec.config.rules))
    pixels = Preparation(size=28, normalisation="none").pixels([image])[0].permute(1, 2, 0)
    np.testing.assert_array_equal(found["pixels"][5], (pixels * 255).round().numpy())
    teacher = TransformerTeacher("dino", str(tmp_path / "dino"), Preparation(size=42), layers=2)
    wanted = teacher.features([Picture(pixels=image)])[0]
    torch.testing.assert_close(torch.tensor(found["features_dino"][5]).float(), wanted, rtol=1e-3, atol=2e-3)
    network = AutoModel.from_pretrained(tmp_path / "dino", num_hidden_layers=2).eval()
    with torch.inference_mode():
        seen = network(pixel_values=Preparation(size=42).pixels([image]))
    torch.testing.assert_close(torch.tensor(found["embedding"][5]).float(), seen.pooler_output[0], rtol=1e-3, atol=2e-3)
    assert make_table(job) == manifest, "nothing is left to do"


def test_a_folders_images_have_their_directory_as_category(cluster: None, tmp_path: Path) -> None:
    named = [(f"{'cats' if number % 2 else 'dogs'}/{name}", *rest) for number, (name, *rest) in enumerate(pictures(6))]
    source = write_folder(str(tmp_path / "images"), [*named, ("cats/broken.png", b"no image", "x")])
    job = check_embed(config(tmp_path, source, max_quarantined_share=0.5, embedding="lite0", pooling="mean"))
    manifest = make_table(job)
    found = RowReader(job.spec.config.output, manifest, ("category", "mesh")).read(np.arange(6)).to_pydict()
    whole = table_to_arrays(
        RowReader(job.spec.config.output, manifest, ("features_lite0", "embedding")).read(np.arange(6))
    )
    tokens = whole["features_lite0"].astype(np.float32)
    mean = (tokens / np.linalg.norm(tokens, axis=2, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(whole["embedding"].astype(np.float32), mean, atol=2e-3)
    assert found == {"category": ["cats"] * 3 + ["dogs"] * 3, "mesh": [""] * 6}
    assert [bad.code for bad in read_quarantine(job.spec.config.output)] == ["undecodable"]
    assert read_manifest(job.spec.config.output).fingerprint["points"] == 0
