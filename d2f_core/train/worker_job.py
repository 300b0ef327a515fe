"""Everything that a training's workers receive."""

from dataclasses import dataclass
from typing import Any

from d2f_core.data.stream_plan import StreamPlan
from d2f_core.tracking import RunHandle
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import EvaluationJob
from d2f_core.train.task import BuildTask


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """The same job for every worker; a worker learns its rank from Ray Train."""

    config: TrainConfig
    build_task: BuildTask
    plan: StreamPlan
    output: str
    """Output directory, for checkpoints."""
    identity: str
    """Hash of everything that must not change within a run."""
    attempt: str = ""
    """Part of the names of this attempt's checkpoint directories."""
    pulse: Any = None
    """The heartbeat actor (`heartbeat.HeartbeatMonitor`)."""
    tracker: RunHandle | None = None

    def evaluation(self, step: int, uri: str | None) -> EvaluationJob:
        config = self.config
        # Most CPUs cannot compute in fp16.
        on_cpu_in_fp16 = config.precision == "fp16" and config.evaluation_place == "cpu"
        return EvaluationJob(
            build_task=self.build_task, output=self.output, step=step, uri=uri, averaged=bool(config.ema.decay),
            precision="fp32" if on_cpu_in_fp16 else config.precision, num_gpus=config.evaluation_task_gpus,
            tracker=self.tracker,
        )  # fmt: skip
