"""All that a training's workers are given."""

from dataclasses import dataclass
from typing import Any

from d2f_core.data.stream_plan import StreamPlan
from d2f_core.tracking import RunHandle
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import EvaluationJob
from d2f_core.train.task import BuildTask


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """The same for each of them; which it is, a worker learns from Ray Train."""

    config: TrainConfig
    build_task: BuildTask
    plan: StreamPlan
    output: str
    """Where checkpoints go."""
    identity: str
    """Hash of what must not change within a run."""
    attempt: str = ""
    """Names this attempt's checkpoint directories."""
    pulse: Any = None
    """The actor that keeps what each worker said last."""
    tracker: RunHandle | None = None

    def evaluation(self, step: int, uri: str | None) -> EvaluationJob:
        return EvaluationJob(
            build_task=self.build_task, output=self.output, step=step, uri=uri, averaged=bool(self.config.ema.decay),
            num_gpus=self.config.evaluation_gpus, tracker=self.tracker,
        )  # fmt: skip
