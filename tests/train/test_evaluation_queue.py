"""Evaluations run beside the training or between its steps; one that fails is said, and the training goes on."""

import functools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError
from torch import nn

from d2f_core.train import evaluation_queue, retention
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.evaluation import CollapseError, Evaluated, EvaluationJob
from d2f_core.train.evaluation_queue import EvaluationsBeside, EvaluationsBetweenSteps, Pause
from d2f_core.train.retention_rules import Retention
from d2f_core.train.task import Evaluation, Task
from tests.train.processes import Workers
from tests.train.test_evaluation import FLAT, build, job

FOUND = Evaluated(metrics={"loss": 0.5}, load_seconds=1.0, seconds=3.0)


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
    fake = FakeRay({0: full, 1: WorkerCrashedError(), 2: FOUND})
    monkeypatch.setattr(evaluation_queue, "ray", fake)
    caplog.set_level("INFO")
    protected: set[str] = set()
    evaluations = EvaluationsBeside(protected)
    for step in range(4):
        evaluations.start(replace(job(tmp_path), step=step, uri=f"step-{step}"))
    assert fake.begun == [0] and len(protected) == 4
    evaluations.poll()
    assert fake.begun == [0, 1, 2, 3] and protected == {"step-3"}, "a checkpoint is kept until it was looked at"
    assert "step 0  evaluation failed, it is repeated at the end: no space left" in caplog.text
    assert "step 1  evaluation failed, it is repeated at the end: The worker died unexpectedly" in caplog.text
    assert "step 2  evaluation loss 0.5  (3.0 s, of which 1.0 s to load the model)" in caplog.text


def test_a_collapse_that_a_task_finds_stops_the_training(tmp_path, monkeypatch):
    collapse = CollapseError("step 7: all 2 images drawn are flat", 7)
    monkeypatch.setattr(evaluation_queue, "ray", FakeRay({7: RayTaskError("evaluate", "", collapse)}))
    evaluations = EvaluationsBeside(set())
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
    evaluations = EvaluationsBeside(set())
    slow = replace(job(tmp_path), build_task=functools.partial(build_slow, log=tmp_path / "log"))
    for step in (0, 1, 2, 1):
        evaluations.start(replace(slow, step=step))
    evaluations.poll(60)
    assert (tmp_path / "log").read_text().split() == ["begin", "end"] * 3


def built(device: str, *, look: Any) -> Task:
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    return Task(
        module=module,
        to_batch=lambda table: {},
        loss_fn=lambda network, batch: torch.zeros(1),
        evaluate=lambda: look(module),
    )


def looking(output: Path, look: Any, step: int = 0) -> EvaluationJob:
    return replace(job(output), build_task=functools.partial(built, look=look), step=step)


def between(protected: set[str] | None = None, task: Task | None = None, **more: Any) -> EvaluationsBetweenSteps:
    settings = {"whole": task is not None, "seconds": 60, **more}
    return EvaluationsBetweenSteps(set() if protected is None else protected, task or Any, "cpu", **settings)  # type: ignore[arg-type]


def loss_of(module: nn.Module) -> Evaluation:
    return Evaluation(metrics={"loss": float(module(torch.rand(4, 1)).square().mean())})


def test_between_steps_the_training_draws_and_computes_as_without_it(tmp_path):
    queue, threads = between(), torch.get_num_threads()
    first, second = looking(tmp_path / "a", loss_of), looking(tmp_path / "b", loss_of, step=1)
    assert not queue.waits_for_pause
    for one in (first, second):
        queue.start(one)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    queue.poll()
    assert queue.waits_for_pause and not first.done(), "it waits until the workers pause"
    queue.run_first()
    assert first.done() and not second.done() and queue.waits_for_pause
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    queue.poll(60)
    assert second.done() and not queue.waits_for_pause, "the end of the training makes what is left"


def test_between_steps_the_network_that_trains_is_evaluated_and_has_its_weights_again(tmp_path):
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).to(torch.bfloat16)
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    writer = CheckpointWriter(str(tmp_path), "one", 0, 1, Retention())
    averages = {name: torch.full(tensor.shape, 1 / 3) for name, tensor in before.items()}
    writer.save(5, samples=5, identity="", tensors={"weights": before, "ema": averages}, state={})
    writer.wait()
    writer.close()
    assert writer.last_complete is not None

    def look(module: nn.Module) -> Evaluation:
        assert not any(part.training for part in module.modules())
        return Evaluation(metrics={name: float(tensor) for name, tensor in module.named_parameters()})

    task = built("cpu", look=lambda _: look(module))
    one = replace(job(tmp_path), step=5, uri=writer.last_complete[1], averaged=True)
    queue = between(task=replace(task, module=module))
    queue.start(one)
    queue.run_first()
    assert retention.read_evaluation(writer.last_complete[1]) == dict.fromkeys(
        ("0.weight", "0.bias"), float(torch.tensor(1 / 3, dtype=torch.bfloat16))
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes


def test_between_steps_a_trained_network_is_not_taken_for_the_untrained_one(tmp_path):
    looked: list[nn.Module] = []

    def look(module: nn.Module) -> Evaluation:
        looked.append(module)
        return Evaluation(metrics={})

    task = built("cpu", look=look)
    for number, untrained in enumerate((True, False)):
        queue = between(task=task)
        queue.start(looking(tmp_path / str(number), look))
        queue.run_first(untrained=untrained)
    assert looked[0] is task.module and looked[1] is not task.module


def out_of_memory(module: nn.Module) -> Evaluation:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def broken(module: nn.Module) -> Evaluation:
    raise OSError("no space left")


LITTLE = "too little of the device's memory between its steps (tried to allocate 2 GiB)"


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (out_of_memory, f"{LITTLE}. Lower --train.micro-batch-size, or evaluate elsewhere"),
        (broken, "evaluation failed, it is repeated at the end: OSError: no space left"),
    ],
)
def test_between_steps_a_failure_is_said_and_does_not_end_the_training(tmp_path, caplog, look, said):
    protected: set[str] = set()
    queue, one = between(protected), looking(tmp_path, look)
    queue.start(one)
    queue.run_first()
    assert said in caplog.text and not one.done() and not queue.waits_for_pause and not protected


def test_between_steps_a_collapse_ends_the_training(tmp_path):
    queue = between()
    queue.start(looking(tmp_path, lambda module: Evaluation(images=[FLAT])))
    with pytest.raises(CollapseError, match="all 1 images drawn are flat"):
        queue.run_first()


def for_ever(module: nn.Module) -> Evaluation:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        module(torch.zeros(1, 1))
        time.sleep(0.01)
    raise AssertionError("was not interrupted")


@pytest.mark.parametrize(
    ("seconds", "stop", "said"),
    [
        (0.1, False, "took more than 0.1 s. Raise --train.evaluation-seconds"),
        (60, True, "the training was told to end"),
    ],
)
def test_between_steps_an_evaluation_gives_way(tmp_path, caplog, seconds, stop, said):
    asked = iter([False, False, False])
    queue = between(seconds=seconds, stop_asked=lambda: next(asked, True) if stop else False)
    one = looking(tmp_path, for_ever)
    queue.start(one)
    queue.run_first()
    assert said in caplog.text and not one.done()
    nn.Linear(1, 1)(torch.zeros(1, 1))  # no hook is left


def paused(rank: int, seconds: float, fails: bool) -> float:
    """Seconds that a worker waited for the first one, which works for `seconds`, and fails if it is to."""
    pause, began = Pause(str(fails), first=rank == 0), time.monotonic()
    evaluation_queue.PAUSE_SECONDS = 0.2
    for _ in range(2):
        try:
            with pause.until_first_is_done():
                if rank == 0:
                    time.sleep(seconds)
                    if fails:
                        raise OSError("broken")
        except OSError:
            pass
    return time.monotonic() - began


@pytest.mark.parametrize("fails", [False, True])
def test_all_workers_pause_until_the_first_is_done(pair: Workers, fails: bool):
    waited = pair.run(paused, 0.7, fails)
    # A worker that comes to the pause later, as on a busy machine, waits so much less.
    assert min(waited) > 1.0 and max(waited) < 60, "no limit of a collective ends it"
