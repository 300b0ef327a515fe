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
from d2f_core.data.plan import StreamPlan
from d2f_core.data.schema import SchemaError
from d2f_core.data.table_reader import RowReader
from d2f_core.model.artifact import describe, load_weights, upload_artifact
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.model.image_to_depth import ImageToDepth
from d2f_core.model.latent_task import (
    LatentTask,
    ModelConfig,
    PreviewConfig,
    build_network,
    image_grid,
    joined_channels,
)
from d2f_core.model.text_to_image import TextToImage
from d2f_core.tracking import RunHandle, check_tracking, pin_model, resolve_model, start_run
from d2f_core.train.checkpoint import Checkpoint, read_tensors
from d2f_core.train.launch import run_training
from d2f_core.train.task import Evaluation, Task
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


def carried_edge(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> int | None:
    """Edge in pixels of the images that the model is to make: of those it was trained on; None: the base's own."""
    edge = config.sampling.resolution or manifest.fingerprint.get("resolution")
    return None if edge is None or base.default_size == (edge, edge) else int(edge)


def preview_of(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> PreviewConfig:
    edge = config.preview.resolution or carried_edge(config, base, manifest)
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
    return base, manifests


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


def export(config: FinetuneConfig, base: BaseModel, manifests: list[Manifest], last: Checkpoint) -> str:
    """Write `OUTPUT/model/` from a checkpoint (averaged weights if there are any); needs no GPU and no engine."""
    network = build_network(base, dataclasses.replace(config.model, start=""), config.train.seed)
    load_weights(network, read_tensors(last, "ema" if config.train.ema.decay else "weights"))
    training = {
        "latents": config.latents,
        "step": last.manifest.step,
        "checkpoint": last.uri,
        "identity": last.manifest.identity,
    }
    if noise_columns(manifests, base.content_hash):
        training["teacher"] = manifests[0].inputs["model"]
    model = config.model
    description = describe(
        base,
        objective=model.objective,
        method=model.method,
        sampling=dataclasses.replace(config.sampling, resolution=carried_edge(config, base, manifests[0])),
        training=training,
        task=model.task,
        joined_channels=joined_channels(base, model),
    )
    target = storage.join(config.output, "model")
    upload_artifact(target, network, description)
    return target


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
        identity=config.identity(base.content_hash, manifests),
        tracker=run,
    )
    model = export(config, base, manifests, last)
    run.finish()
    logger.info("model: %s", model)
    return FinetuneResult(run=run, step=last.manifest.step, checkpoint=last.uri, model=model)


if __name__ == "__main__":
    from pipelines.recipes import FINETUNE

    run_job("finetune", FINETUNE, main, check)
