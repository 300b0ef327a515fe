"""Numbers over a window of steps, read off the device only when they are logged."""

import logging
import time
from dataclasses import dataclass, field

from torch import Tensor

from d2f_core.train.steps import StepResult

logger = logging.getLogger(__name__)


@dataclass
class Window:
    """Sums over the steps since metrics were last logged."""

    losses: list[Tensor] = field(default_factory=list)
    samples: int = 0
    waited: float = 0.0
    """Seconds spent waiting for data."""
    began: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, samples: int) -> None:
        self.losses.append(result.loss)
        self.samples += samples
        self.waited += result.waited

    def summary(self) -> dict[str, float]:
        """Mean loss of this worker, samples per second of all workers, and share of time spent waiting for data."""
        seconds = time.perf_counter() - self.began
        return {
            "loss": sum(float(loss) for loss in self.losses) / max(1, len(self.losses)),
            "images_per_second": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
        }


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def log_progress(step: int, num_steps: int, metrics: dict[str, float], samples_per_step: int) -> None:
    """Log one line: step, metrics, speed and remaining time."""
    rate = metrics["images_per_second"]
    remaining = (num_steps - step) * samples_per_step / rate
    logger.info(
        "step %d/%d (%.0f%%)  loss %.4f  %.1f images/s  data wait %.1f%%  ETA %s",
        step,
        num_steps,
        100 * step / num_steps,
        metrics["loss"],
        rate,
        100 * metrics["data_wait_share"],
        duration(remaining),
    )
