"""When a training's evaluations run: beside it in Ray tasks of their own, or between its steps while the workers pause.

Their checkpoints are protected from deletion until then. An evaluation that fails stays owed: it is repeated at the end
of the training, and by the same command again.
"""

import contextlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch.distributed import distributed_c10d
from torch.nn.modules.module import register_module_forward_pre_hook

from d2f_core.device import reserved_device
from d2f_core.retry import one_line
from d2f_core.train.evaluation import CollapseError, Evaluated, EvaluationJob, evaluate, evaluate_in_place
from d2f_core.train.task import Task

logger = logging.getLogger(__name__)

LEAST_PRIORITY = 19
PAUSE_SECONDS = 5.0
"""Interval at which a pausing worker looks whether the first worker is still there."""


class EvaluationInterruptedError(RuntimeError):
    """An evaluation between steps was given up, so that the training can go on or end."""


class EvaluationQueue(ABC):
    """Evaluations in the order of their steps."""

    def __init__(self, protected: set[str]) -> None:
        """Create an empty queue; it adds the URIs of its checkpoints to `protected`, and removes them afterwards."""
        self._protected = protected
        self._jobs: deque[EvaluationJob] = deque()

    def start(self, job: EvaluationJob) -> None:
        """Queue the job; a step that is already queued is ignored."""
        if any(job.step == other.step for other in self._jobs):
            return
        if job.uri:
            self._protected.add(job.uri)
        self._jobs.append(job)

    def _done(self) -> EvaluationJob:
        """Take the first job from the queue."""
        job = self._jobs.popleft()
        self._protected.discard(job.uri or "")
        return job

    @property
    def waits_for_pause(self) -> bool:
        """Whether an evaluation can only run while all workers pause."""
        return False

    def run_first(self, *, untrained: bool = False) -> None:
        """Run the first evaluation, while all workers pause; called where `waits_for_pause` says so.

        Args:
            untrained: no step was made yet.
        """
        del untrained
        raise RuntimeError(f"{type(self).__name__} waits for no pause.")

    @abstractmethod
    def poll(self, seconds: float = 0.0) -> None:
        """Collect what was found.

        Args:
            seconds: how long each evaluation is waited for.

        Raises:
            CollapseError: an evaluation found a collapsed model.
        """


class EvaluationsBeside(EvaluationQueue):
    """Evaluations in Ray tasks, one at a time, while the training goes on.

    Parallel evaluations would each load libraries and weights, possibly on the training's own nodes, and would pile up
    if an evaluation takes longer than the interval.
    """

    def __init__(self, protected: set[str]) -> None:
        super().__init__(protected)
        self._result: Any = None
        """Ray reference to the first job's result."""

    def start(self, job: EvaluationJob) -> None:
        idle = not self._jobs
        super().start(job)
        if idle:
            self._begin()

    def poll(self, seconds: float = 0.0) -> None:
        while self._jobs and ray.wait([self._result], timeout=seconds)[0]:
            step = self._done().step
            try:
                logger.info("step %d  evaluation %s", step, ray.get(self._result))
            except RayTaskError as error:
                if isinstance(error.cause, CollapseError):
                    raise error.cause from None
                logger.error("step %d  evaluation failed, it is repeated at the end: %s", step, error.cause)
            except RayError as error:
                logger.error("step %d  evaluation failed, it is repeated at the end: %s", step, error)
            self._begin()

    def _begin(self) -> None:
        if self._jobs:
            gpus = self._jobs[0].num_gpus
            remote = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_retries=2)(evaluate_beside)
            self._result = remote.remote(self._jobs[0])


def evaluate_beside(job: EvaluationJob) -> Evaluated:
    """`evaluate` on what the Ray task reserved: a GPU, or a CPU with one thread.

    On a CPU at the lowest priority: otherwise it would double the time of the training's first steps.
    """
    if not job.num_gpus:
        os.setpriority(os.PRIO_PROCESS, 0, LEAST_PRIORITY)
        torch.set_num_threads(1)
    return evaluate(job, reserved_device())


class EvaluationsBetweenSteps(EvaluationQueue):
    """Evaluations by the first worker on its own device, each while all workers pause between two steps.

    The network that trains takes the evaluated weights meanwhile. Where it cannot, at ZeRO stage 3, and for the
    untrained model of a resumed run, a second one is built beside it.
    """

    def __init__(
        self,
        protected: set[str],
        task: Task,
        device: str,
        *,
        whole: bool,
        seconds: float,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Create an empty queue.

        Args:
            task: what is trained in this process.
            whole: whether its module holds its weights whole.
            seconds: after how long an evaluation is given up.
            stop_asked: whether the training must end, so that the evaluation has to be given up.
        """
        super().__init__(protected)
        self._task, self._device, self._whole = task, device, whole
        self._seconds, self._stop_asked = seconds, stop_asked

    @property
    def waits_for_pause(self) -> bool:
        return bool(self._jobs)

    def poll(self, seconds: float = 0.0) -> None:
        """At the end of a training, when `seconds` is given: run all that are queued."""
        while seconds and self._jobs and not self._stop_asked():
            self.run_first()

    def run_first(self, *, untrained: bool = False) -> None:
        """Run the first evaluation; weights, and what torch draws at random afterwards, are as without it.

        Args:
            untrained: no step was made yet.

        Raises:
            CollapseError: it found a collapsed model.
        """
        job = self._jobs[0]
        in_place = self._whole and (job.uri is not None or untrained)
        try:
            with self._interruptible(), _as_before(self._device):
                found = evaluate_in_place(job, self._task) if in_place else evaluate(job, self._device)
            logger.info("step %d  evaluation %s", job.step, found)
        except CollapseError:
            raise
        except torch.OutOfMemoryError as error:
            logger.error(
                "step %d  evaluation failed: the training leaves too little of the device's memory between its steps "
                "(%s). Lower --train.micro-batch-size, or evaluate elsewhere with --train.evaluate-on spare or cpu.",
                job.step, one_line(error),
            )  # fmt: skip
        except Exception as error:  # whatever a task's evaluation raises must not end the training
            what = type(error).__name__, one_line(error)
            logger.error("step %d  evaluation failed, it is repeated at the end: %s: %s", job.step, *what)
        finally:
            self._done()

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Look before each of the modules' forward passes whether the evaluation has to be given up."""
        end = time.monotonic() + self._seconds

        def look(*_: Any) -> None:
            if self._stop_asked():
                raise EvaluationInterruptedError("the training was told to end")
            if time.monotonic() > end:
                raise EvaluationInterruptedError(
                    f"it took more than {self._seconds:g} s. Raise --train.evaluation-seconds, hold out fewer rows, or "
                    "evaluate elsewhere with --train.evaluate-on spare or cpu"
                )

        hook = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def _as_before(device: str) -> Iterator[None]:
    """Undo what an evaluation changes in the process: the generators' states, and the memory kept for its tensors."""
    cuda = device.startswith("cuda")
    with torch.random.fork_rng(devices=[device] if cuda else []):
        yield
    if cuda:
        torch.cuda.empty_cache()


class Pause:
    """Lets all workers wait until the first has finished something, however long it takes.

    A collective would end the training when it waits for longer than `worker_timeout_seconds`.
    """

    def __init__(self, name: str, *, first: bool) -> None:
        """Create it; `name` must differ from those of others in this process group."""
        self._name, self._first, self._count = name, first, 0

    @contextlib.contextmanager
    def until_first_is_done(self) -> Iterator[None]:
        """Every worker must enter it; the first one works in it, the others wait at its end.

        Raises:
            torch.distributed.DistNetworkError: the first worker is lost.
        """
        self._count += 1
        key, store = f"pause-{self._name}-{self._count}", distributed_c10d._get_default_store()
        try:
            yield
        finally:
            if self._first:
                store.set(key, "over")
        while not self._first and not store.check([key]):
            with contextlib.suppress(torch.distributed.DistStoreError):  # not yet
                store.wait([key], timedelta(seconds=PAUSE_SECONDS))
