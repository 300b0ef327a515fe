"""Batch jobs without their cluster: the actors' work in this process, one piece after the other.

Planning, claiming, resuming and finishing stay what they are; only Ray Data's transport is left out. Each job runs on
the real cluster in its own test file too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2f_core.batch import table_job
from d2f_core.batch.chunks import prepare_shards, work_item, write_row
from d2f_core.data.datasets import generated_table
from d2f_core.data.datasets.generated_table import GeneratedTable, make_or_keep
from d2f_core.data.manifest import TableFile
from d2f_core.flow.depth import evaluation as depth_evaluation
from d2f_core.flow.depth import job as depth_job
from d2f_core.flow.depth.actor import DepthActor
from d2f_core.flow.depth.actor import work_item as depth_item
from d2f_core.flow.depth.job import DepthJob
from d2f_core.flow.evaluate import extract_features, metrics, straightness
from d2f_core.flow.evaluate.config import ScoreConfig
from d2f_core.flow.evaluate.extract_features import FeatureExtractor
from d2f_core.flow.generate import job as generate
from d2f_core.flow.generate.actor import JobsSampler
from d2f_core.flow.generate.job import GenerateJob
from d2f_core.storage import list_names


def draw_here(jobs: Sequence[GenerateJob], chunks: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """As `generate._run`."""
    sampler = JobsSampler([(job.plan, job.config.output) for job in jobs], jobs[0].config.cpus_per_actor)
    for job, chunk in chunks:
        made = sampler({"job": np.array([job]), "chunk": np.array([chunk])})
        yield {name: values[0] for name, values in made.items()}


def score_here(config: ScoreConfig, items: list[dict[str, Any]]) -> Iterator[Any]:
    """As `extract_features._run`."""
    scorer = FeatureExtractor(config)
    for item in items:
        yield scorer({name: np.array([value]) for name, value in item.items()})


def prepared_rows(job: table_job.TableJob, todo: Mapping[int, Mapping[int, int]]) -> Iterator[pa.Table]:
    """The chunks of unfinished shards as they come to an encoder, one after the other."""
    for number, done in todo.items():
        items = pa.Table.from_pylist([work_item(number, job.source.shards[number], done)])
        yield from prepare_shards(items, spec=job.spec, known=job.known)


def encode_here(job: table_job.TableJob, todo: Mapping[int, Mapping[int, int]]) -> Iterator[dict[str, Any]]:
    """As `table_job._rows`."""
    actor = job.actor(job.spec)
    for row in prepared_rows(job, todo):
        yield from write_row(actor(row), output=job.spec.config.output).to_pylist()


def predict_here(job: DepthJob, shards: list[int]) -> Iterator[dict[str, Any]]:
    """As `depth_job._run`."""
    predictor = DepthActor(job.plan, job.config.output, job.config.cpus_per_actor)
    for number in shards:
        item = depth_item(number, job.source.shards[number])
        made = predictor({name: np.array([value], dtype=object) for name, value in item.items()})
        yield {name: values[0] for name, values in made.items()}


def measure_here(
    config: Any, actor: type, items: Sequence[dict[str, int]], arguments: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """As `depth_evaluation._results_of`."""
    del config
    measuring = actor(*arguments)
    for item in items:
        yield measuring({name: np.array([value]) for name, value in item.items()})


def make_here(table: GeneratedTable) -> Iterator[tuple[int, TableFile]]:
    """As `generated_table._make_parts`."""
    there = frozenset(list_names(table.output))
    for number in range(table.num_parts):
        yield number, make_or_keep(table, number, there)


class TasksHere:
    """What `metrics` and `straightness` ask of Ray; a task is done at once, and its result is its own reference."""

    def remote(self, function: Callable[..., Any]) -> "TaskHere":
        return TaskHere(function)

    def get(self, references: Any) -> Any:
        return references

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]


class TaskHere:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function

    def options(self, **resources: Any) -> "TaskHere":
        del resources
        return self


@contextlib.contextmanager
def measured_here() -> Iterator[None]:
    """Depth is measured in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth_evaluation, "_results_of", measure_here)
        patch.setattr(depth_evaluation, "shared", tuple)
        yield


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Scenes are rendered, images encoded, drawn and scored, depth is seen and measured in this process; it keeps
    its threads."""
    threads = torch.get_num_threads()
    with measured_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated_table, "_make_parts", make_here)
        patch.setattr(table_job, "_rows", encode_here)
        patch.setattr(generate, "_run", draw_here)
        patch.setattr(extract_features, "_run", score_here)
        patch.setattr(depth_job, "_run", predict_here)
        for module in (metrics, straightness):
            patch.setattr(module, "ray", TasksHere())
        try:
            yield
        finally:
            torch.set_num_threads(threads)
