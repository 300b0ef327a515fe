"""A finetuning names the version of its tables, and goes on with it when they have grown."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2f_core.data.manifest import Manifest, ManifestError, describe_file, read_manifest, write_manifest
from d2f_core.data.plan_reader import PlanReader, planned_table
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import ModelConfig
from d2f_core.train.checkpoint import CheckpointError
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import TrainConfig
from pipelines import finetune_job
from pipelines.configs import FinetuneConfig
from pipelines.finetune_job import CheckedFinetune, check_finetune
from pipelines.finetune_task import evaluate
from pipelines.latent_versions import chosen_tables
from tests.flow.tiny_base import write_tiny_base
from tests.latent_tables import write_latents


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def config(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    monkeypatch.setattr(finetune_job, "check_tracking", lambda: None)
    for name in ("first", "second"):
        write_latents(
            str(tmp_path / name), autoencoder_fingerprint(resolve_base(base)), rows=40, rows_per_file=20, captions=3
        )
    return FinetuneConfig(
        model=ModelConfig(base=base),
        latents=str(tmp_path / "first"),
        more_latents=(str(tmp_path / "second"),),
        output=str(tmp_path / "run"),
        holdout_rows=4,
        train=TrainConfig(num_steps=20, global_batch_size=4, micro_batch_size=2),
    )


def grow(uri: str) -> Manifest:
    """A further version with a file more."""
    before = read_manifest(uri)
    data = Path(uri, before.files[0].path).read_bytes()
    number = len(before.files)
    Path(uri, f"part-v{number}.parquet").write_bytes(data)
    grown = dataclasses.replace(before, files=(*before.files, describe_file(f"part-v{number}.parquet", data)))
    write_manifest(uri, grown, number)
    return grown


def save_checkpoint(checked: CheckedFinetune) -> None:
    writer = CheckpointWriter(checked.config.output, "a", 0, 1, checked.config.train.retention)
    tensors = {"weights": {"one": torch.ones(1)}}
    writer.save(1, samples=4, identity=checked.identity, tensors=tensors, state={})
    writer.wait()
    writer.close()


def rows_seen(plan: StreamPlan) -> list[list[int]]:
    chunks = pa.concat_tables(PlanReader(plan, 0, 1, 0))
    return [pa.ipc.open_stream(one.as_buffer()).read_all()["row"].to_pylist() for one in chunks["micro_batch"]]


def test_a_training_goes_on_with_the_versions_that_it_began_with_and_a_new_one_takes_the_newest(
    config: FinetuneConfig, caplog: pytest.LogCaptureFixture
) -> None:
    begun = check_finetune(config)
    save_checkpoint(begun)
    order = rows_seen(begun.plan)
    grow(config.more_latents[0])
    caplog.set_level("INFO")
    resumed = check_finetune(config)
    assert (resumed.identity, resumed.plan, resumed.manifests) == (begun.identity, begun.plan, begun.manifests)
    assert rows_seen(begun.plan) == order, "a worker reads the version of its plan, whatever the newest is"
    assert "second has version 2 by now, and this training began with version 1: it goes on with that" in caplog.text
    new = check_finetune(dataclasses.replace(config, output=config.output + "-new"))
    assert new.identity != begun.identity and [each.num_rows for each in new.manifests] == [40, 60]
    assert new.job().tags["d2f.latents_digest"].split() == [each.digest for each in new.manifests]


def test_a_training_that_began_with_the_newest_goes_on_with_that_when_there_is_a_newer_one(
    config: FinetuneConfig,
) -> None:
    for uri in config.tables:
        grow(uri)
    begun = check_finetune(config)
    save_checkpoint(begun)
    for uri in (*config.tables, config.latents):
        grow(uri)
    assert check_finetune(config).manifests == begun.manifests
    with pytest.raises(CheckpointError, match="holds a run with another model, data"):
        check_finetune(dataclasses.replace(config, holdout_rows=5))


def test_a_version_can_be_named(config: FinetuneConfig) -> None:
    first = check_finetune(config).identity
    grow(config.latents)
    named = dataclasses.replace(config, latents_versions=(1, 1))
    assert check_finetune(named).identity == first and [each.num_rows for each in chosen_tables(config)] == [60, 40]
    with pytest.raises(ManifestError, match=r"first' has no version 3; its newest is 2\. Name one that is there"):
        check_finetune(dataclasses.replace(config, latents_versions=(3, 1)))
    with pytest.raises(ValueError, match=r"latents_versions=\(1,\) must be a number .* for each of the 2 tables"):
        dataclasses.replace(config, latents_versions=(1,))


def test_an_evaluation_looks_at_the_rows_that_its_training_held_out(config: FinetuneConfig) -> None:
    seen = []

    class Task:
        base, module = None, None

        def validation_loss(self, module: object, rows: dict[str, np.ndarray]) -> tuple[float, int]:
            seen.extend(rows["row"].tolist())
            return 0.0, len(rows["row"])

        def preview_images(self, *arguments: object) -> list:
            return []

    plan = check_finetune(config).plan
    grow(config.latents)
    preview = dataclasses.replace(config.preview, resolution=16)
    evaluate(dataclasses.replace(config, preview=preview), plan, Task())  # pyright: ignore[reportArgumentType]
    assert seen == [row for source in plan.sources for row in source.holdout().tolist()]


def test_a_replaced_table_is_refused_where_rows_are_read(config: FinetuneConfig, tmp_path: Path) -> None:
    plan = check_finetune(config).plan
    write = dataclasses.replace(read_manifest(config.latents), files=read_manifest(config.latents).files[:1])
    Path(config.latents, "manifest.json").unlink()
    write_manifest(config.latents, write)
    with pytest.raises(ManifestError, match="it was replaced, or this node reads another place"):
        planned_table(plan, config.latents)
