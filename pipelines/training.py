"""Common part of all trainings: train a checked job to its last step, and export the result."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from d2f_core import storage
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.tracking import RunHandle, ending, start_run
from d2f_core.train.checkpoint import Checkpoint
from d2f_core.train.config import TrainConfig
from d2f_core.train.launch import run_training
from d2f_core.train.task import BuildTask
from pipelines.cli import UnfinishedError, to_yaml
from pipelines.cluster import connect

logger = logging.getLogger(__name__)


class TrainingConfig(Protocol):
    """Config fields common to all trainings; the config must be a dataclass."""

    @property
    def output(self) -> str:
        """Where checkpoints and the resolved config are written; the same output resumes the training."""
        ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def experiment(self) -> str:
        """MLflow experiment."""
        ...

    @property
    def name(self) -> str:
        """MLflow run name."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingJob(ABC):
    """A checked training that is ready to start."""

    config: TrainingConfig
    build_task: BuildTask
    plan: StreamPlan
    """Plan of the training rows and their order."""
    identity: str
    """Hash of everything that a checkpoint and this run must have in common."""

    @property
    def reads(self) -> Mapping[str, str]:
        """Field of the config -> URI or path that the workers read; a local one must be shared by all nodes."""
        return {}

    @property
    def tags(self) -> Mapping[str, str] | None:
        """Tags of the MLflow run; None: no run."""
        return None

    def worker_bytes(self, train: TrainConfig) -> int:
        """Estimate of the host's memory that a worker takes, in bytes; 0: not known."""
        return 0

    @abstractmethod
    def export(self, last: Checkpoint) -> str:
        """Export the result from the last checkpoint; returns its directory."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    run: RunHandle | None
    step: int
    """Optimizer steps done."""
    checkpoint: str
    model: str
    """Directory of the result."""
    owed: tuple[int, ...] = ()
    """Steps whose evaluation was due and is missing."""

    def complete(self) -> "TrainingResult":
        """Itself, when nothing is missing.

        Raises:
            UnfinishedError: evaluations are owed.
        """
        if self.owed:
            steps = ", ".join(map(str, self.owed))
            raise UnfinishedError(
                f"trained to step {self.step} and wrote {self.model}, but the evaluation of step {steps} failed or did "
                "not end in time: the log says why. The same command again makes it up."
            )
        return self


def train(job: TrainingJob) -> TrainingResult:
    """Train to the last step, from the newest undamaged checkpoint if there is one, and export the result.

    The MLflow run ends with it: FINISHED, KILLED by SIGTERM, or FAILED; the reason is its tag `d2f.end_reason`.

    Raises:
        NotSharedError: a local path that not all nodes share; and the errors of `run_training`.
    """
    config, text = job.config, to_yaml(job.config)
    connect(reads=job.reads, writes={"output": config.output})
    storage.write_bytes(storage.join(config.output, "config.yaml"), text.encode())
    run = None
    if job.tags is not None:
        params = dataclasses.asdict(cast(Any, config))
        about = {"name": config.name, "config_yaml": text, "params": params, "tags": dict(job.tags)}
        run = start_run(experiment=config.experiment, run_key=config.output, **about)
        logger.info("MLflow run: %s", run.url)
    with ending(run):
        trained = run_training(
            config=config.train,
            build_task=job.build_task,
            plan=job.plan,
            output=config.output,
            identity=job.identity,
            tracker=run,
            worker_bytes=job.worker_bytes,
        )
        last = trained.last
        made = job.export(last)
    logger.info("wrote %s", made)
    if trained.owed:
        logger.warning("the evaluation of step %s is missing", ", ".join(map(str, trained.owed)))
    return TrainingResult(run=run, step=last.manifest.step, checkpoint=last.uri, model=made, owed=trained.owed)
