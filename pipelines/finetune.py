"""Train a latent model: `python -m pipelines.finetune emoji-lora --train.num-steps 200`.

The same command again resumes.
"""

import dataclasses
import functools
import logging

import torch

from d2f_core import storage
from d2f_core.data.latents import check_fingerprint, noise_columns, table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.schema import SchemaError
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_reader import RowReader
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.model.image_to_depth import ImageToDepth
from d2f_core.model.latent_task import LatentTask, ModelConfig, PreviewConfig, image_grid
from d2f_core.model.text_to_image import TextToImage
from d2f_core.tracking import RunHandle, check_tracking, pin_model, resolve_model, start_run
from d2f_core.train.checkpoint import candidates
from d2f_core.train.launch import run_training
from d2f_core.train.task import Evaluation, Task
from pipelines.checkpoint_export import default_weights, trained_resolution, write_model
from pipelines.cli import run_job, to_yaml
from pipelines.configs import FinetuneConfig

logger = logging.getLogger(__name__)

COLUMNS = TextToImage.columns
TASKS: dict[str, type[LatentTask]] = {"text_to_image": TextToImage, "image_to_depth": ImageToDepth}


def build_task(config: FinetuneConfig, device: str) -> Task:
    """What a worker trains; called once on each."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    base, model = resolve_base(config.model.base), on_this_node(config.model)
    task = TASKS[model.task](base, model, seed=config.train.seed, dtype=dtype, device=device)
    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(table_to_arrays(table)),
        loss_fn=task.loss,
        evaluate=functools.partial(evaluate, config, task),
        make_grid=functools.partial(image_grid, columns=config.preview.columns),
    )


def on_this_node(model: ModelConfig) -> ModelConfig:
    """With a directory in place of a models:/ URI."""
    return dataclasses.replace(model, start=resolve_model(model.start))


def evaluate(config: FinetuneConfig, task: LatentTask) -> Evaluation:
    """The validation loss of the held-out rows, and the preview's images."""
    manifests = [read_manifest(uri) for uri in config.tables]
    plan = make_plan(config, task.base, manifests)
    total, count, shown = 0.0, 0, None
    for source, manifest in zip(plan.sources, manifests, strict=True):
        if len(held := source.order.holdout()):
            arrays = {**table_to_arrays(RowReader(source.uri, manifest, plan.columns).read(held)), "row": held}
            part, size = task.validation_loss(task.module, arrays)
            total, count, shown = total + part, count + size, shown or arrays
    return Evaluation(
        metrics={"validation_flow_loss": total / count} if count else {},
        images=task.look(task.module, preview_of(config, task.base, manifests[0]), shown),
    )


def preview_of(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> PreviewConfig:
    edge = config.preview.resolution or trained_resolution(config, base, manifest)
    return dataclasses.replace(config.preview, resolution=edge)


def make_plan(config: FinetuneConfig, base: BaseModel, manifests: list[Manifest]) -> StreamPlan:
    """Which rows and columns are read when."""
    columns = TASKS[config.model.task].columns
    return config.plan(manifests, columns + noise_columns(manifests, base.content_hash))


def check(config: FinetuneConfig) -> tuple[BaseModel, list[Manifest]]:
    """Refuse what cannot work, before anything is started."""
    storage.check_reachable(config.latents)
    storage.check_reachable(config.output, write=True)
    base, manifests = resolve_base(config.model.base), [read_manifest(uri) for uri in config.tables]
    for manifest in manifests:
        check_fingerprint(manifest, autoencoder_fingerprint(base))
        check_task(manifest, config.model.task)
    make_plan(config, base, manifests)
    check_tracking()
    candidates(config.output, identity_of(config, base, manifests))  # refuses the output of another training
    return base, manifests


def identity_of(config: FinetuneConfig, base: BaseModel, manifests: list[Manifest]) -> str:
    """What a checkpoint must have to belong to this training."""
    pinned = dataclasses.replace(config, model=dataclasses.replace(config.model, start=pin_model(config.model.start)))
    return pinned.identity(base.content_hash, manifests)


def check_task(manifest: Manifest, task: str) -> None:
    """Refuse latents that were made for another task. Raises SchemaError."""
    made_for = manifest.fingerprint.get("task", "text_to_image")
    if made_for != task:
        raise SchemaError(
            f"The latents were made for task={made_for!r}, the model is to learn task={task!r}. Give --model.task "
            f"{made_for}, or the latents of {task}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    run: RunHandle
    step: int
    """Optimizer steps done."""
    checkpoint: str
    model: str
    """The trained model's directory."""


def main(config: FinetuneConfig) -> FinetuneResult:
    """Train to the end and export the model."""
    import ray

    check_tracking()
    # An alias that moves must not change a training that is resumed.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, start=pin_model(config.model.start)))
    base, manifests = check(config)
    ray.init(ignore_reinit_error=True)
    text = to_yaml(config)
    storage.write_bytes(storage.join(config.output, "config.yaml"), text.encode())
    run = start_run(
        experiment=config.experiment,
        run_key=config.output,
        name=config.name,
        config_yaml=text,
        params=dataclasses.asdict(config),
        tags={
            "d2f.base": base.uri,
            "d2f.base_sha256": base.content_hash,
            "d2f.latents_digest": " ".join(manifest.digest for manifest in manifests),
        },
    )
    logger.info("MLflow run: %s", run.url)
    last = run_training(
        config=config.train,
        build_task=functools.partial(build_task, config),
        plan=make_plan(config, base, manifests),
        output=config.output,
        identity=identity_of(config, base, manifests),
        tracker=run,
    )
    target = storage.join(config.output, "model")
    model = write_model(config, base, manifests, last, target, weights=default_weights(config))
    run.finish()
    logger.info("model: %s", model)
    return FinetuneResult(run=run, step=last.manifest.step, checkpoint=last.uri, model=model)


if __name__ == "__main__":
    from pipelines.recipes import FINETUNE

    run_job("finetune", FINETUNE, main, check)
