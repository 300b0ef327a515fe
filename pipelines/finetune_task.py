"""The task of a finetuning: what each worker trains, and the evaluation on the held-out rows."""

import dataclasses
import functools
import json

from d2f_core import storage
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest
from d2f_core.data.plan_reader import planned_table
from d2f_core.data.schema import SchemaError
from d2f_core.data.size_tables import tables_of
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.latents import image_columns, noise_columns
from d2f_core.model.base import BaseModel, BaseModelError, resolve_base
from d2f_core.model.base_probe import kept_reading
from d2f_core.model.config import ModelConfig, PreviewConfig
from d2f_core.model.image_to_depth import ImageToDepth
from d2f_core.model.latent_task import LatentTask, image_grid
from d2f_core.model.text_to_image import TextToImage
from d2f_core.tracking import resolve_model
from d2f_core.train.precision import DTYPES
from d2f_core.train.task import Evaluation, Task
from pipelines.checkpoint_export import BASE_READING, trained_resolution
from pipelines.configs import FinetuneConfig

COLUMNS = TextToImage.columns
TASKS: dict[str, type[LatentTask]] = {"text_to_image": TextToImage, "image_to_depth": ImageToDepth}


def build_task(config: FinetuneConfig, base_hash: str, plan: StreamPlan, device: str) -> Task:
    """What a worker trains; called once on each.

    Args:
        base_hash: content hash of the base model where the training started.
        plan: of the training; it names the versions of the tables.

    Raises:
        BaseModelError: this node has another base model.
    """
    base, model = resolve_base(config.model.base).read_as(config.model.base_prediction), on_this_node(config.model)
    base = base.read_captions(model.captions)
    if base.content_hash != base_hash:
        raise BaseModelError(
            f"{config.model.base!r} has the hash {base.content_hash} on this node, and {base_hash} where the training "
            "started: it was replaced, or is another directory here. Give a URI that all nodes share."
        )
    task = TASKS[model.task](base, model, seed=config.train.seed, dtype=DTYPES[config.train.precision], device=device)
    _keep_reading(config.output, base)
    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(table_to_arrays(table)),
        loss_fn=task.loss,
        evaluate=functools.partial(evaluate, config, plan, task),
        make_grid=functools.partial(image_grid, columns=config.preview.columns),
    )


def _keep_reading(output: str, base: BaseModel) -> None:
    """Write down what was found of the base where its weights were loaded; the trained model says it."""
    place = storage.join(output, BASE_READING)
    if (reading := kept_reading(base)) and not storage.exists(place):
        storage.write_bytes(place, json.dumps(dict(reading.left)).encode())


def on_this_node(model: ModelConfig) -> ModelConfig:
    """The model config with models:/ URIs replaced by local directories."""
    return dataclasses.replace(model, start=resolve_model(model.start))


def evaluate(config: FinetuneConfig, plan: StreamPlan, task: LatentTask) -> Evaluation:
    """The validation loss of the held-out rows, and the preview's images."""
    manifests = [planned_table(plan, uri) for uri in config.tables]
    total, count, shown, at_once = 0.0, 0, None, config.train.micro_batch_size  # what training has room for
    tables = [table for given in zip(config.tables, manifests, strict=True) for table in tables_of(*given)]
    for source, (_, manifest) in zip(plan.sources, tables, strict=True):
        if len(held := source.order.holdout()):
            arrays = {**table_to_arrays(RowReader(source.uri, manifest, plan.columns).read(held)), "row": held}
            shown = shown or arrays
            for start in range(0, len(held), at_once):
                rows = {name: values[start : start + at_once] for name, values in arrays.items()}
                part, size = task.validation_loss(task.module, rows)
                total, count = total + part, count + size
    return Evaluation(
        metrics={"validation_flow_loss": total / count} if count else {},
        images=task.preview_images(task.module, preview_of(config, task.base, manifests[0]), shown, at_once),
    )


def preview_of(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> PreviewConfig:
    edge = config.preview.resolution or trained_resolution(config, base, manifest)
    return dataclasses.replace(config.preview, resolution=edge)


def make_plan(config: FinetuneConfig, base: BaseModel, manifests: list[Manifest]) -> StreamPlan:
    """Plan the rows and columns to read, and their order."""
    columns = TASKS[config.model.task].columns
    columns += noise_columns(manifests, lambda: base.content_hash) + image_columns(manifests)
    return config.plan(manifests, columns)


def check_task(manifest: Manifest, task: str) -> None:
    """Raise SchemaError for latents that were made for another task."""
    made_for = manifest.fingerprint.get("task", "text_to_image")
    if made_for != task:
        raise SchemaError(
            f"The latents were made for task={made_for!r}, the model is to learn task={task!r}. Give --model.task "
            f"{made_for}, or the latents of {task}."
        )
