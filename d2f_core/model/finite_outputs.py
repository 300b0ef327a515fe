"""Refuses network outputs that are not finite, without waiting for a device in every step."""

import torch
from torch import Tensor

from d2f_core.objective.solver import NonFiniteStateError


class FiniteOutputs:
    """The outputs of one run, checked on the CPU at once and on other devices together in the run's last step.

    Reading a result makes the program wait for the device, so a check in every step would cost all the time by which
    the program is ahead. What is not finite stays so until the last step: states are only added to and scaled.
    """

    def __init__(self) -> None:
        self._finite: list[tuple[int, float, Tensor]] = []

    def add(self, output: Tensor, step: int, timestep: float, *, last: bool) -> None:
        """Take the output of a step.

        Raises:
            NonFiniteStateError: this output is not finite, or one since the last check; names the first such step.
        """
        self._finite.append((step, timestep, output.isfinite().all()))
        if output.device.type != "cpu" and not last:
            return
        taken, self._finite = self._finite, []
        if bool(torch.stack([finite for _, _, finite in taken]).all()):
            return
        step, timestep = next((step, timestep) for step, timestep, finite in taken if not bool(finite))
        raise NonFiniteStateError(
            f"the network's output is not finite at step {step}, timestep {timestep:g}. Check the weights, or compute "
            "in float32 or bfloat16 instead of float16."
        )
