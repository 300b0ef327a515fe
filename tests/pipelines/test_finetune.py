"""A training on real servers (two Ray Train workers with ZeRO, S3, MLflow): stopped, resumed, moved."""

import dataclasses

import mlflow
import pytest
import torch

from d2f_core import storage
from d2f_core.data.schema import SchemaError
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.flow.publish.job import check_register, register
from d2f_core.model.artifact import load_model, read_description
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import local_copy, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.resources import InsufficientResourcesError
from d2f_core.tracking import resolve_model
from d2f_core.train import checkpoint
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.checkpoint_export import export_checkpoint
from pipelines.configs import FinetuneConfig
from pipelines.export_config import CheckpointExportConfig
from pipelines.finetune import check, main
from pipelines.training import TrainingResult
from tests.latent_tables import write_latents
from tests.slow import slow

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
TABLE = {"rows": 24, "rows_per_file": 12, "captions": 24}


@pytest.fixture(scope="module")
def config(base: str) -> FinetuneConfig:
    fingerprint = autoencoder_fingerprint(resolve_base(base))
    write_latents("s3://d2f/test-finetune/latents", fingerprint, **TABLE)
    write_latents("s3://d2f/test-finetune/larger", fingerprint, **TABLE, shape=(4, 12, 12), pixels=24)
    return FinetuneConfig(
        model=ModelConfig(base=base, method="lora", lora=LoraConfig(rank=2), caption_dropout=0.5),
        latents="s3://d2f/test-finetune/latents",
        more_latents=("s3://d2f/test-finetune/larger",),
        output="s3://d2f/test-finetune/unbroken",
        holdout_rows=4,
        preview=PreviewConfig(prompts=("thing 1", "thing 2"), steps=2),
        sampling=SamplingDefaults(steps=4),
        train=TrainConfig(
            num_steps=6, global_batch_size=8, micro_batch_size=2, num_workers=2, threads_per_worker=1, zero_stage=2,
            learning_rate=1e-2, ema=EmaConfig(decay=0.9), log_every=2, checkpoint_every=3, evaluate_every=3,
            evaluate_on="workers",
        ),
        experiment="test-finetune",
    )  # fmt: skip


def changed(config: FinetuneConfig, output: str, **train) -> FinetuneConfig:
    return dataclasses.replace(config, output=output, train=dataclasses.replace(config.train, **train))


@pytest.fixture(scope="module")
def unbroken(config) -> TrainingResult:
    return main(config)


def final(output: str) -> dict[str, dict[str, torch.Tensor]]:
    last = checkpoint.list_checkpoints(output)[-1]
    return {kind: checkpoint.read_tensors(last, kind) for kind in checkpoint.KINDS}


def test_the_run_is_in_mlflow_with_losses_before_and_after(config, unbroken):
    client = mlflow.MlflowClient()
    run = client.get_run(unbroken.run.run_id)
    assert run.info.status == "FINISHED" and run.data.params["model.lora.rank"] == "2"
    assert {"loss", "learning_rate", "grad_norm", "images_per_second", "data_wait_share"} <= run.data.metrics.keys()
    validation = client.get_metric_history(unbroken.run.run_id, "validation_flow_loss")
    assert [point.step for point in validation] == [0, 3, 6]
    assert validation[-1].value < validation[0].value
    costs = client.get_metric_history(unbroken.run.run_id, "evaluation_seconds")
    assert [point.step for point in costs] == [0, 3, 6] and all(point.value > 0 for point in costs)
    assert len(client.list_artifacts(unbroken.run.run_id, "images")) >= 3
    assert storage.read_bytes(f"{config.output}/config.yaml").decode().startswith("model:")
    rows = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{unbroken.run.run_id}'")
    listed = {model.name: {metric.key: metric.value for metric in model.metrics} for model in rows}
    kept = {one.manifest.step for one in checkpoint.list_checkpoints(config.output)}
    assert listed.keys() == {f"step-{step:08d}" for step in kept}
    assert listed["step-00000006"]["validation_flow_loss"] == pytest.approx(validation[-1].value)


def test_steps_took_turns_between_two_image_sizes(config):
    plan = check(config).plan
    sizes = [{plan.micro_batch(step * 4 + part, 0, 1).source for part in range(4)} for step in range(plan.num_steps)]
    assert {0} in sizes and {1} in sizes and {0, 1} not in sizes


def test_the_exported_model_loads_and_says_how_to_sample_it(config, unbroken):
    model = load_model(unbroken.model)
    assert model.sampling.steps == 4 and model.objective == "diff2flow"
    description = read_description(local_copy(unbroken.model))
    assert description["base"]["sha256"] == resolve_base(config.model.base).content_hash


def test_an_earlier_checkpoint_becomes_a_registered_model(config, unbroken):
    target = "s3://d2f/test-finetune/model-of-step-3"
    export_checkpoint(CheckpointExportConfig(run=config.output, step=3, output=target))
    wanted = RegisterConfig(run=config.output, model=target, name="test-step-3", experiment=config.experiment)
    registered = register(check_register(wanted))
    model = load_model(resolve_model(registered.uri))
    assert registered.tags["training.step"] == "3" and model.content_hash == load_model(target).content_hash
    assert model.content_hash != load_model(unbroken.model).content_hash
    export_checkpoint(CheckpointExportConfig(run=config.output, output=target))
    assert load_model(target).content_hash == load_model(unbroken.model).content_hash, "one way of making a model"


def test_the_same_command_again_does_nothing(config, unbroken):
    before = checkpoint.list_checkpoints(config.output)
    fs, path = storage.filesystem(f"{config.output}/ray")
    assert set(fs.find(path)) <= {path}, "what Ray kept of the attempts is gone (some servers list an empty directory)"
    assert main(config).checkpoint == unbroken.checkpoint
    assert checkpoint.list_checkpoints(config.output) == before


@slow("20 s: tests/train/test_portability.py goes on from the same files on other numbers of workers and stages")
def test_a_run_goes_on_with_the_one_worker_that_fits_and_another_zero_stage(config, unbroken, caplog, tmp_path):
    output = "s3://d2f/test-finetune/moved"
    (stopped,) = (one for one in checkpoint.list_checkpoints(config.output) if one.manifest.step == 3)
    storage.download_tree(stopped.uri, tmp_path / "step")
    storage.upload_tree(tmp_path / "step", f"{output}/checkpoints/{stopped.uri.rsplit('/', 1)[1]}")
    with caplog.at_level("WARNING", logger="d2f_core.train"):
        main(changed(config, output, min_workers=1, cpus_per_worker=5, zero_stage=0, node_wait_seconds=1))
    assert "room for 1 of 2 workers" in caplog.text
    assert checkpoint.list_checkpoints(output)[-1].manifest.num_workers == 1
    expected, moved = final(config.output)["weights"], final(output)["weights"]
    for name, tensor in expected.items():
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=2e-5)


def test_too_many_workers_say_what_is_missing(config):
    with pytest.raises(InsufficientResourcesError, match=r"num_workers=8 needs 16 CPU .* the cluster has 8 CPU"):
        main(
            changed(
                config,
                "s3://d2f/test-finetune/large",
                num_workers=8,
                micro_batch_size=1,
                cpus_per_worker=2,
                node_wait_seconds=1,
            )
        )
    with pytest.raises(InsufficientResourcesError, match=r"min_workers=1 needs 9 CPU .* Lower --train\.min-workers"):
        main(changed(config, "s3://d2f/test-finetune/large", min_workers=1, cpus_per_worker=9, node_wait_seconds=0))


def test_latents_of_another_autoencoder_are_refused(config):
    write_latents("s3://d2f/test-finetune/other", "f" * 64, **TABLE)
    with pytest.raises(SchemaError, match=r"f{64}"):
        check(dataclasses.replace(config, latents="s3://d2f/test-finetune/other"))
