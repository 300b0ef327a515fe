"""An evaluation writes what it found once, and stops a model that has collapsed."""

import functools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ray.exceptions import RayTaskError, WorkerCrashedError
from torch import nn

from d2f_core.train import evaluation
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError, EvaluationJob, Evaluations, evaluation_due
from d2f_core.train.task import Evaluation, Task
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
    assert evaluation.evaluate(one) == {"validation_flow_loss": 0.5}
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
        evaluation.evaluate(one)
    assert not one.done()


def build_without_evaluation(device: str) -> Task:
    return replace(build(device, metrics={}, images=[]), evaluate=None)


def test_a_task_that_has_nothing_to_look_at_is_done_at_once(tmp_path):
    one = replace(job(tmp_path), build_task=build_without_evaluation)
    assert evaluation.evaluate(one) == {} and one.done()


class FakeRay(SimpleNamespace):
    """Tasks that end as `ends` says, one after the other, by step; a missing one does not end."""

    def __init__(self, ends: dict[int, Any]) -> None:
        super().__init__(ends=ends, begun=[])

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self._begin)

    def _begin(self, one: EvaluationJob) -> int:
        self.begun.append(one.step)
        return one.step

    def wait(self, results: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [step for step in results if step in self.ends], []

    def get(self, step: int) -> Any:
        if isinstance(self.ends[step], Exception):
            raise self.ends[step]
        return self.ends[step]


def test_an_evaluation_that_breaks_is_said_and_the_next_begins(tmp_path, monkeypatch, caplog):
    full = RayTaskError("evaluate", "", OSError("no space left"))
    fake = FakeRay({0: full, 1: WorkerCrashedError(), 2: {"loss": 0.5}})
    monkeypatch.setattr(evaluation, "ray", fake)
    caplog.set_level("INFO")
    protected: set[str] = set()
    evaluations = Evaluations(protected)
    for step in range(4):
        evaluations.start(replace(job(tmp_path), step=step, uri=f"step-{step}"))
    assert fake.begun == [0] and len(protected) == 4
    evaluations.poll()
    assert fake.begun == [0, 1, 2, 3] and protected == {"step-3"}, "a checkpoint is kept until it was looked at"
    assert "step 0  evaluation failed, it is repeated at the end: no space left" in caplog.text
    assert "step 1  evaluation failed, it is repeated at the end: The worker died unexpectedly" in caplog.text
    assert "step 2  evaluation loss 0.5" in caplog.text


def test_a_collapse_that_a_task_finds_stops_the_training(tmp_path, monkeypatch):
    collapse = CollapseError("step 7: all 2 images drawn are flat", 7)
    monkeypatch.setattr(evaluation, "ray", FakeRay({7: RayTaskError("evaluate", "", collapse)}))
    evaluations = Evaluations(set())
    evaluations.start(replace(job(tmp_path), step=7))
    with pytest.raises(CollapseError, match="step 7: all 2 images drawn are flat") as caught:
        evaluations.poll()
    assert caught.value.step == 7


def build_slow(device: str, *, log: Path) -> Task:
    def evaluate() -> Evaluation:
        with log.open("a") as file:
            print("begin", file=file, flush=True)
            time.sleep(0.5)
            print("end", file=file, flush=True)
        return Evaluation(metrics={})

    return replace(build(device, metrics={}, images=[]), evaluate=evaluate)


@pytest.mark.usefixtures("cluster")
def test_evaluations_take_turns_and_none_is_made_twice(tmp_path):
    evaluations = Evaluations(set())
    slow = replace(job(tmp_path), build_task=functools.partial(build_slow, log=tmp_path / "log"))
    for step in (0, 1, 2, 1):
        evaluations.start(replace(slow, step=step))
    evaluations.poll(60)
    assert (tmp_path / "log").read_text().split() == ["begin", "end"] * 3


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

    monkeypatch.setattr(evaluation, "reserved_device", lambda: "meta")
    evaluation.evaluate(replace(job(tmp_path), build_task=build))
    assert seen.operations
