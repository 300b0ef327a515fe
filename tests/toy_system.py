"""A whole system in a hundred lines: it learns how bright an image is from its mean colour.

docs/adding_a_system.md shows it piece by piece; a test runs it. What it does not write: reading sources, the ledger,
resuming, waiting for nodes, the data order, checkpoints, restarts, the run in MLflow, the version in the registry.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import nn

from d2f_core import storage
from d2f_core.batch.chunks import TableActor
from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.batch.table_job import TableJob
from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import read_manifest
from d2f_core.data.schema import array_field, sample_id
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import Sample
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_plan import plan_tables
from d2f_core.data.table_reader import RowReader
from d2f_core.identity import identity_hash
from d2f_core.tracking import ModelVersionInfo
from d2f_core.tracking.publish import ModelCard, TrainingRecord, publish, training_run
from d2f_core.train.checkpoint import Checkpoint, read_tensors
from d2f_core.train.config import TrainConfig
from d2f_core.train.task import Evaluation, Task
from pipelines.configs import order_of
from pipelines.training import TrainingJob, TrainingResult

SIZE, HELD_OUT = 16, 4
NAME, PLACE = pa.field("sample_id", pa.string()), pa.field("source_uri", pa.string())
PIXELS, COLOUR = array_field("pixels", "uint8", (SIZE, SIZE, 3)), array_field("colour", "float32", (3,))
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


# 1. A table job: what a sample is called, what the reading tasks make of it, what the actors make of that.
@dataclass(frozen=True, kw_only=True)
class ColourConfig(AwaitedPoolConfig):
    source: str
    output: str
    rows_per_part: int = 4
    max_quarantined_share: float = 0.5
    num_readers: int = 1


@dataclass(frozen=True, kw_only=True)
class ColourSpec(TableSpec):
    NAME: ClassVar[str] = "mean_colours"
    KIND: ClassVar[str] = "colours"

    def prepared_schema(self) -> pa.Schema:
        return pa.schema([NAME, PLACE, PIXELS])

    def identify(self, sample: Sample) -> str:
        return sample_id(sample.image or b"", "")

    def prepare(self, sample: Sample) -> dict[str, Any]:
        rules = ImageRules(resolution=SIZE, min_side=1, max_pixels=10**6)
        return {"pixels": prepare_image(sample.image or b"", rules).pixels}


class ColourActor(TableActor):
    def __init__(self, spec: ColourSpec) -> None:
        del spec  # a real one loads its network here

    def make(self, prepared: pa.Table) -> pa.Table:
        columns: dict[str, Any] = table_to_arrays(prepared)
        columns["colour"] = columns.pop("pixels").mean((1, 2), dtype=np.float64) / 255
        return arrays_to_table(columns, pa.schema([NAME, PLACE, COLOUR]))


def check_colours(config: ColourConfig) -> TableJob:
    source = plan_images(ImageSource(uri=config.source), rows_per_shard=config.rows_per_part, captions=False)
    inputs = {"source": config.source, "source_digest": source.digest, "rows_per_part": config.rows_per_part}
    spec = ColourSpec(config=config, fingerprint={"size": SIZE}, inputs=inputs)
    return TableJob(spec=spec, source=source, actor=ColourActor)


# 2. A training: a task, the rows' order, what the result is.
@dataclass(frozen=True, kw_only=True)
class BrightnessConfig:
    colours: str
    output: str
    train: TrainConfig
    experiment: str = "toy"
    name: str = "brightness"


def loss(network: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (network(batch["colour"])[:, 0] - batch["colour"] @ torch.from_numpy(LUMA)).square()


def evaluate(config: BrightnessConfig, module: nn.Module) -> Evaluation:
    manifest = read_manifest(config.colours)
    held_out = plan(config).sources[0].order.holdout()
    colours = table_to_arrays(RowReader(config.colours, manifest, ("colour",)).read(held_out))["colour"]
    with torch.no_grad():
        errors = module(torch.tensor(colours))[:, 0].numpy() - colours @ LUMA
    return Evaluation(metrics={"within@0.05": float((np.abs(errors) < 0.05).mean())})


def build_task(config: BrightnessConfig, device: str) -> Task:
    torch.manual_seed(config.train.seed)
    module = nn.Linear(3, 1).to(device)
    to_batch = lambda table: {"colour": torch.tensor(table_to_arrays(table, ["colour"])["colour"])}  # noqa: E731
    return Task(module=module, to_batch=to_batch, loss_fn=loss, evaluate=lambda: evaluate(config, module))


def plan(config: BrightnessConfig) -> StreamPlan:
    order, manifest = order_of(config.train), read_manifest(config.colours)
    tables = {"uris": [config.colours], "manifests": [manifest], "columns": ("colour",)}
    return plan_tables(**tables, order=order, holdout_rows=HELD_OUT, num_steps=config.train.num_steps)


@dataclass(frozen=True, kw_only=True)
class BrightnessJob(TrainingJob):
    config: BrightnessConfig

    @property
    def tags(self) -> Mapping[str, str]:
        return {"toy.colours": self.config.colours}

    def export(self, last: Checkpoint) -> str:
        target = storage.join(self.config.output, "model")
        storage.write_bytes(storage.join(target, "brightness.safetensors"), save(dict(read_tensors(last, "weights"))))
        return target


def check_brightness(config: BrightnessConfig) -> BrightnessJob:
    fixed = {"colours": read_manifest(config.colours).digest, **order_of(config.train).identity()}
    build = functools.partial(build_task, config)
    return BrightnessJob(config=config, build_task=build, plan=plan(config), identity=identity_hash(fixed))


# 3. A version: the card, and what opens it.
def card(record: TrainingRecord) -> ModelCard:
    text = f"Brightness from a mean colour; {record.metrics['within@0.05']:.0%} of the held-out images within 0.05."
    return ModelCard(text=text, description=text, tags={"task": "brightness"})


def register(config: BrightnessConfig, result: TrainingResult, directory: Path) -> ModelVersionInfo:
    storage.download_tree(result.model, directory)
    training = {"step": result.step, "checkpoint": result.checkpoint}
    run = training_run(config.output, config.experiment)
    names = {"run": config.output, "name": "toy-brightness", "alias": "candidate"}
    return publish(directory, run, **names, training=training, card=card, loader=None, model_type="toy")
