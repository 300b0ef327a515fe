"""A training in one process, in fp32, without Ray and DeepSpeed: what the comparisons of losses train with."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.latent_task import LatentTask
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.ema import update

EMA = EmaConfig(decay=0.99)


class PlainTraining:
    """AdamW without decay, clipping at 1 and averaged weights, over rows in memory in the order of any training.

    Args:
        rows: gives the columns of these rows.
        settings: number of steps, learning rate and its course.
        state: file that is written at every look; a training whose file is there goes on from it.
    """

    def __init__(
        self,
        task: LatentTask,
        rows: Callable[[np.ndarray], dict[str, Any]],
        order: SampleOrder,
        settings: TrainConfig,
        state: Path | None = None,
    ) -> None:
        self.task, self.rows, self.order, self.settings, self.state = task, rows, order, settings, state
        self.trained = [p for p in task.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.averages = [p.detach().clone() for p in self.trained]
        self.step = 0
        self.curve: list[dict[str, float]] = []
        """Step, and mean loss since the last one, of every look."""
        if state and state.exists():
            self._resume(torch.load(state, weights_only=True))

    def run(self, looks: Collection[int]) -> Iterator[dict[str, float]]:
        """Train to the end; yields what is added to the curve at these steps and at the last one.

        Then, and at the end, the averaged weights are in the task's module.
        """
        losses: list[float] = []
        while self.step < self.settings.num_steps:
            losses.append(self._advance())
            if self.step in looks or self.step == self.settings.num_steps:
                self.curve.append({"step": self.step, "loss": float(np.mean(losses))})
                losses = []
                self._save()
                kept = [p.detach().clone() for p in self.trained]
                _put(self.trained, self.averages)
                yield self.curve[-1]
                _put(self.trained, kept)
        _put(self.trained, self.averages)

    def _advance(self) -> float:
        batch = self.order.batch
        epochs, chosen = self.order.at(np.arange(self.step * batch, (self.step + 1) * batch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        arrays = {**self.rows(chosen), "row": chosen, "epoch": epochs}
        loss = self.task.loss(self.task.module, self.task.to_batch(arrays)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        for average, parameter in zip(self.averages, self.trained, strict=True):
            update(average, parameter.detach(), EMA.decay_at(self.step))
        return loss.item()

    def _save(self) -> None:
        if self.state:
            parts = {"module": self.task.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            rest = {"step": self.step, "averages": self.averages, "curve": self.curve}
            torch.save({**parts, **rest}, self.state.with_suffix(".new"))
            self.state.with_suffix(".new").replace(self.state)

    def _resume(self, state: dict[str, Any]) -> None:
        self.task.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        _put(self.averages, state["averages"])
        self.step, self.curve = state["step"], state["curve"]
        print(f"  going on after step {self.step}", flush=True)


@torch.no_grad()
def _put(parameters: list[Any], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
