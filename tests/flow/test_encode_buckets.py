"""Aspect-ratio buckets: one job writes a table per image size, and one training takes them all."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2f_core.batch import table_job
from d2f_core.batch.chunk_records import PROGRESS, read_records
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import make_table
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import SchemaError
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig, EncodeError
from d2f_core.flow.evaluate.held_out import held_out_ids
from d2f_core.flow.generate.prompts import table_captions
from d2f_core.flow.latents import check_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig
from d2f_core.model.image_sizes import sizes_of_rows
from d2f_core.train.config import TrainConfig
from d2f_core.train.task import Task
from pipelines.configs import FinetuneConfig
from pipelines.finetune_task import build_task, make_plan
from tests.data.pictures import file_bytes, pixels, write_folder
from tests.flow.here import here
from tests.flow.tiny_base import write_tiny_base

SIZES = ("12x24", "16x16", "24x12", "28x12")
SHAPES = {"tall": (50, 26), "square": (30, 31), "wide": (25, 52)}
"""Height and width of pictures for the first three sizes; none is for the last."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def config(base, tmp_path_factory) -> EncodeConfig:
    """22 pictures: 9 tall, 10 square and 3 wide, mixed; one is there twice, and one is too small for its bucket."""
    home, kinds = tmp_path_factory.mktemp("bucketed"), ["tall", "square"] * 9 + ["wide"] * 3 + ["square"]
    items = [(f"{n:02d}.png", file_bytes(pixels(n, *SHAPES[kind])), f"{kind} {n}") for n, kind in enumerate(kinds)]
    items += [("50.png", *items[0][1:]), ("51.png", file_bytes(pixels(51, 30, 11)), "small")]
    source = ImageSource(uri=write_folder(str(home / "images"), items))
    return EncodeConfig(
        source=source, base=base, output=str(home / "latents"), resolution=16, buckets=SIZES, rows_per_part=6,
        batch_size=3, max_quarantined_share=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(config) -> Manifest:
    with here():
        return make_table(check_encode(config))


def rows_of(uri: str) -> dict[str, np.ndarray]:
    manifest = read_manifest(uri)
    names = ("sample_id", "caption", "latent_mean", "bucket", "width", "height", "crop")
    return table_to_arrays(RowReader(uri, manifest, names).read(np.arange(manifest.num_rows)))


def test_each_image_is_in_the_table_of_its_size_and_none_is_lost(config, made):
    assert made.counts == {"read": 24, "written": 22, "quarantined": 2, "duplicates": 1}
    assert made.buckets == (("12x24", 9), ("16x16", 10), ("24x12", 3)) and made.num_rows == 22
    assert sorted(path.name for path in Path(config.output).iterdir()) == [
        "12x24", "16x16", "24x12", "manifest.json", "quarantine.parquet",
    ], "none without an image"  # fmt: skip
    for (name, rows), kind, shape in zip(made.buckets, SHAPES, ((12, 6), (8, 8), (6, 12)), strict=True):
        table = rows_of(f"{config.output}/{name}")
        width, height = name.split("x")
        assert table["latent_mean"].shape == (rows, 4, *shape) and set(table["bucket"]) == {f"{height}x{width}"}
        assert {caption.split()[0] for caption in table["caption"]} == {kind}
    reasons = {bad.source_uri[-6:]: bad.reason for bad in read_quarantine(config.output)}
    assert reasons["51.png"] == "too_small: 11x30 px would be enlarged to 12x24"
    assert reasons["50.png"].startswith("duplicate: of ") and reasons["50.png"].endswith("00.png")
    assert len(table_captions(config.output)) == 22, "captions of all sizes are read by the one folder"


def test_the_crop_and_the_sizes_that_sdxl_is_told_are_those_of_the_bucket(config, made):
    table = rows_of(f"{config.output}/12x24")  # of 26x50: 25 columns are kept
    assert table["crop"].tolist() == [[0, 0, 25, 50]] * 9
    assert sizes_of_rows(table).tolist() == [[50, 26, 0, 0, 24, 12]] * 9


def test_a_job_that_stopped_within_a_chunk_goes_on_to_the_same_bytes(config, made):
    again = dataclasses.replace(config, output=f"{config.output}-again")
    job = check_encode(again)
    with here(), pytest.MonkeyPatch.context() as patch:
        run, seen = table_job._rows, []

        def killed(*given):
            for row in run(*given):
                seen.append(row)
                yield row
                if len(seen) == 3:
                    raise KeyboardInterrupt

        patch.setattr(table_job, "_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            make_table(job)
        patch.setattr(table_job, "_rows", run)
        there = len(list((Path(again.output) / PROGRESS).glob("0*")))
        assert len(read_records(again.output)) == 2 and there == 3, "part of a chunk does not count"
        assert make_table(job).digest == made.digest
        with pytest.raises(OutputError, match=r"is a complete table of another job: .*sizes was .*, now "):
            make_table(check_encode(dataclasses.replace(again, buckets=SIZES[:3])))
    for name, _ in made.buckets:
        assert read_manifest(f"{again.output}/{name}").digest == read_manifest(f"{config.output}/{name}").digest


def test_chunks_of_another_size_and_batches_leave_the_same_rows(config, made):
    other = dataclasses.replace(config, output=f"{config.output}-other", rows_per_part=50, min_side=10)
    with here():
        found = make_table(check_encode(other))
    assert dict(found.buckets) == {**dict(made.buckets), "12x24": 10}, "with min_side, small images are enlarged"
    for name in ("16x16", "24x12"):
        ids = [rows_of(f"{output}/{name}")["sample_id"].tolist() for output in (other.output, config.output)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": ("16x17",)}, r"buckets 16x17: sides are not multiples of the autoencoder's 2 pixels per latent"),
        ({"buckets": ("auto",), "bucket_step": 16}, "bucket_step=16 leaves a single size at resolution=16"),
        ({"buckets": ("64x64",)}, "64x64 has not about the area of resolution=16"),
    ],
)
def test_buckets_that_cannot_work_are_refused_at_the_prompt(config, changes, message):
    with pytest.raises(EncodeError, match=message):
        check_encode(dataclasses.replace(config, **changes))


# Training on them.


@pytest.fixture(scope="module")
def training(base, config, made, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    return FinetuneConfig(
        model=ModelConfig(base=base, lora=LoraConfig(rank=2), caption_dropout=0),
        latents=config.output, output=str(tmp_path_factory.mktemp("training") / "run"), holdout_rows=5,
        preview=PreviewConfig(prompts=("a",), steps=1),
        train=TrainConfig(
            num_steps=16, global_batch_size=4, micro_batch_size=1, num_workers=1, seed=3, window_rows=4, lanes=2
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan(base, training, made) -> StreamPlan:
    return make_plan(training, resolve_base(base), [made])


def test_the_order_is_equal_on_one_two_and_four_workers_and_no_batch_mixes_sizes(plan):
    told = []
    for workers in (1, 2, 4):
        per_step = plan.per_step(workers)
        places = [(part, rank) for rank in range(workers) for part in range(per_step)]
        steps = [
            [plan.micro_batch(step * per_step + part, rank, workers) for part, rank in places]
            for step in range(plan.num_steps)
        ]
        assert all(len({one.source for one in step}) == 1 for step in steps), "a batch is of one size"
        told.append([[(one.source, one.epochs.tolist(), one.rows.tolist()) for one in step] for step in steps])
    assert told[0] == told[1] == told[2]
    sources = Counter(step[0][0] for step in told[0])
    # 17 rows are trained on, 2 of them wide: 16 batches of 4 are 3.8 epochs, of which those rows are 7.5 samples.
    assert sources.keys() == {0, 1, 2} and abs(sources[2] - 64 / 17 * 2 / 4) < 1.5


@pytest.fixture(scope="module")
def task(training, base, plan) -> Task:
    return build_task(training, resolve_base(base).content_hash, plan, "cpu")


def test_what_is_read_is_that_order_in_latents_of_each_size(plan, task):
    seen = set()
    for chunk in PlanReader(plan, 0, 1, 0):
        for data in chunk["micro_batch"]:
            batch = task.to_batch(pa.ipc.open_stream(data.as_py()).read_all())
            seen.add(tuple(batch["data"].shape[1:]))
            if len(seen) <= 3:
                assert torch.isfinite(task.loss_fn(task.module, batch)).all()
    assert seen == {(4, 12, 6), (4, 8, 8), (4, 6, 12)}


def test_held_out_rows_are_of_all_sizes_together_and_an_evaluation_knows_them(plan, task, made, config):
    assert [source.order.holdout_rows for source in plan.sources] == [2, 2, 1]
    assert task.evaluate is not None and "validation_flow_loss" in task.evaluate().metrics
    told = {"latents": config.output, "latents_digest": made.digest, "holdout_rows": 5}
    ids = held_out_ids(told)
    expected = [
        rows_of(source.uri)["sample_id"][row] for source in plan.sources for row in source.order.holdout().tolist()
    ]
    assert ids is not None and ids.to_pylist() == expected


def test_the_identity_is_that_of_the_folder_and_its_table_of_one_size_is_one_of_its_own(training, made, config):
    whole = training.identity("b", [made])
    parts = [read_manifest(f"{config.output}/{name}") for name, _ in made.buckets]
    assert whole != training.identity("b", parts), "rows are held out otherwise"
    for manifest in (made, *parts):
        check_fingerprint(manifest, made.fingerprint["autoencoder"])
    with pytest.raises(SchemaError, match="holds images_by_size, not latents"):
        check_fingerprint(dataclasses.replace(made, kind="images_by_size"), "x")
