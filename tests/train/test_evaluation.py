"""An evaluation writes what it found once, and stops a model that has collapsed."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from d2f_core.train import evaluation
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError, EvaluationJob, evaluation_due
from d2f_core.train.task import Evaluation, Task
from d2f_core.train.worker_job import WorkerJob
from tests.devices import OnlyOn

LIVELY = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
FLAT = Image.new("RGB", (8, 8), "gray")


def build(device: str, *, metrics: dict[str, float], images: list[Image.Image]) -> Task:
    del device
    return Task(
        module=nn.Linear(1, 1),
        to_batch=lambda table: {},
        loss_fn=lambda network, batch: torch.zeros(1),
        evaluate=lambda: Evaluation(metrics=metrics, images=images),
    )


def job(output, metrics=None, images=()) -> EvaluationJob:
    task = functools.partial(build, metrics=metrics or {"validation_flow_loss": 0.5}, images=list(images))
    return EvaluationJob(
        build_task=task, output=str(output), step=0, uri=None, averaged=False, num_gpus=0, tracker=None
    )  # fmt: skip


def test_what_was_found_is_written_and_known_to_be_done(tmp_path):
    one = job(tmp_path, images=[FLAT, LIVELY])
    assert not one.done()
    assert evaluation.evaluate(one, "cpu").metrics == {"validation_flow_loss": 0.5}
    assert one.done()


@pytest.mark.parametrize(
    ("metrics", "images", "verdict"),
    [
        ({"validation_flow_loss": 0.5}, [FLAT, FLAT], "step 0: all 2 images drawn are flat"),
        ({"validation_flow_loss": float("nan")}, [LIVELY], "step 0: the evaluation found .*nan"),
    ],
)
def test_a_collapsed_model_is_named_and_counts_as_not_evaluated(tmp_path, metrics, images, verdict):
    one = job(tmp_path, metrics, images)
    with pytest.raises(CollapseError, match=verdict):
        evaluation.evaluate(one, "cpu")
    assert not one.done()


def build_without_evaluation(device: str) -> Task:
    return replace(build(device, metrics={}, images=[]), evaluate=None)


def test_a_task_that_has_nothing_to_look_at_is_done_at_once(tmp_path):
    one = replace(job(tmp_path), build_task=build_without_evaluation)
    assert evaluation.evaluate(one, "cpu").metrics == {} and one.done()


def test_evaluations_are_due_before_at_every_nth_and_after_the_last_step():
    config = TrainConfig(num_steps=25, evaluate_every=10, checkpoint_every=5)
    assert [step for step in range(26) if evaluation_due(config, step)] == [0, 10, 20, 25]
    assert not evaluation_due(TrainConfig(num_steps=25, evaluate_every=0), 25)


def test_the_model_is_where_the_evaluation_was_asked_to_compute(tmp_path, monkeypatch):
    module, seen = nn.Linear(2, 1), OnlyOn("meta")

    def build(device: str) -> Task:
        def evaluate() -> Evaluation:
            with seen:
                module(torch.ones(3, 2, device=device))
            return Evaluation(metrics={})

        return Task(module=module, to_batch=lambda table: {}, loss_fn=lambda *_: torch.zeros(1), evaluate=evaluate)

    evaluation.evaluate(replace(job(tmp_path), build_task=build), "meta")
    assert seen.operations


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_model_computes_in_the_trainings_precision(tmp_path, precision, dtype):
    seen = []

    def build(device: str) -> Task:
        module = nn.Linear(2, 1)

        def evaluate() -> Evaluation:
            seen.append(module(torch.ones(1, 2, dtype=dtype)).dtype)
            return Evaluation(metrics={})

        return Task(module=module, to_batch=lambda table: {}, loss_fn=lambda *_: torch.zeros(1), evaluate=evaluate)

    config = TrainConfig(precision=precision)
    one = WorkerJob(config=config, build_task=build, plan=Any, output=str(tmp_path), identity="").evaluation(0, None)  # type: ignore[arg-type]
    evaluation.evaluate(one, "cpu")
    assert seen == [dtype]


@pytest.mark.parametrize(
    ("settings", "place", "gpus"),
    [
        ({}, "cpu", 0),
        ({"use_gpu": True}, "workers", 1),
        ({"use_gpu": True, "evaluation_gpus": 0.5}, "spare", 0.5),
        ({"use_gpu": True, "evaluate_on": "spare"}, "spare", 1),
        ({"use_gpu": True, "evaluate_on": "cpu"}, "cpu", 0),
        ({"evaluate_on": "workers"}, "workers", 0),
    ],
)
def test_a_training_on_gpus_is_evaluated_on_a_gpu(settings, place, gpus):
    config = TrainConfig(**settings)
    assert config.evaluation_place == place
    assert config.evaluation_task_gpus == gpus, "what an ended training owes is made up on such a device"


def test_an_evaluation_on_a_cpu_takes_no_precision_that_cpus_lack():
    config = TrainConfig(precision="fp16", use_gpu=True, evaluate_on="cpu")
    job = WorkerJob(config=config, build_task=Any, plan=Any, output="", identity="")  # type: ignore[arg-type]
    assert job.evaluation(0, None).precision == "fp32"


def test_gpus_that_no_evaluation_would_use_are_refused():
    with pytest.raises(
        ValueError, match=r"evaluation_gpus=1 with evaluate_on='cpu' would stay unused. Use evaluate_on"
    ):
        TrainConfig(use_gpu=True, evaluate_on="cpu", evaluation_gpus=1)
