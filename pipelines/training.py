"""What all trainings share: a job that was checked is trained to its last step, and its result is written."""

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
from pipelines.cli import to_yaml

logger = logging.getLogger(__name__)


class TrainingConfig(Protocol):
    """The fields of a config that every training has; it is a dataclass."""

    @property
    def output(self) -> str:
        """Where checkpoints and the resolved config go; the same output again resumes."""
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
    """A training that was checked, and is ready to start."""

    config: TrainingConfig
    build_task: BuildTask
    plan: StreamPlan
    """Which rows are trained on when."""
    identity: str
    """Hash of what must stay the same for a checkpoint to belong to this run."""

    @property
    def tags(self) -> Mapping[str, str] | None:
        """Of the MLflow run; None: there is no run."""
        return None

    @abstractmethod
    def export(self, last: Checkpoint) -> str:
        """Write the result of the last checkpoint; returns its directory."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    run: RunHandle | None
    step: int
    """Optimizer steps done."""
    checkpoint: str
    model: str
    """Directory of the result."""


def train(job: TrainingJob) -> TrainingResult:
    """Train to the last step, from the newest whole checkpoint if there is one, and export.

    The MLflow run ends with it: FINISHED, KILLED by SIGTERM, or FAILED; the reason is its tag `d2f.end_reason`.

    Raises:
        see `run_training`.
    """
    import ray  # a dry run needs none

    ray.init(ignore_reinit_error=True)
    config, text = job.config, to_yaml(job.config)
    storage.write_bytes(storage.join(config.output, "config.yaml"), text.encode())
    run = None
    if job.tags is not None:
        params = dataclasses.asdict(cast(Any, config))
        about = {"name": config.name, "config_yaml": text, "params": params, "tags": dict(job.tags)}
        run = start_run(experiment=config.experiment, run_key=config.output, **about)
        logger.info("MLflow run: %s", run.url)
    with ending(run):
        last = run_training(
            config=config.train,
            build_task=job.build_task,
            plan=job.plan,
            output=config.output,
            identity=job.identity,
            tracker=run,
        )
        made = job.export(last)
    logger.info("wrote %s", made)
    return TrainingResult(run=run, step=last.manifest.step, checkpoint=last.uri, model=made)
