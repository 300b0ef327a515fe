"""Euler steps in flow time behind diffusers' scheduler interface, so that its own pipelines sample a Diff2Flow model.

    import d2f_core.model.diffusers_scheduler  # diffusers looks the class up among imported modules
    pipeline = DiffusionPipeline.from_pretrained("an exported model")

or, for a pipeline that is already loaded:

    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)

The pipeline's latents are the flow state `x_t`: noise at flow time 0, data at 1. `scale_model_input` turns it into the
diffusion state that the network was trained on, `timesteps` are the network's own, fractional, and `step` reads the
prediction as a velocity and moves by one Euler step. Classifier-free guidance of the pipeline acts on the prediction,
which is linear in the same way as the velocity, so it equals guidance of the velocity; the pipeline's
`guidance_rescale` does not.
"""

import math
from typing import Any, cast

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor

from d2f_core.objective.alignment import Alignment, align
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import NoiseSchedule, ScheduleError
from d2f_core.objective.solver import NonFiniteStateError, uniform_times

SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Fields of a diffusers scheduler config that determine the noise levels a network was trained on."""

TIMESTEP_TOLERANCE = 0.5
"""Largest rounding of a timestep by a pipeline that still counts as the same timestep."""


class SchedulerUseError(ValueError):
    """A method was called out of order, or with a timestep that is not the run's next one."""


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return x if x.dtype.itemsize >= 4 else x.float()


class Diff2FlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow times from 0 to 1 in equal steps, moved towards noise by `shift`; one network evaluation per step.

    All fields except `shift` are the base model's, with the same meaning as in its scheduler config. Weights that were
    finetuned by the naive `flow_matching` loss output velocities, not one of the three prediction types, and cannot be
    sampled with this scheduler.

    Raises:
        ScheduleError: a config that cannot be used, such as `epsilon` with zero terminal SNR.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        shift: float = 1.0,
    ) -> None:
        if not 0 < shift < math.inf:
            raise ScheduleError(
                f"shift={shift} must be a number above 0. 1 keeps the steps equal, 3 suits larger images."
            )
        self._schedule = NoiseSchedule.from_scheduler_config(cast(Any, self.config))
        self._prediction_type, self._shift = prediction_type, shift
        self._at: Alignment | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._scaled_index: int | None = None
        self.num_inference_steps: int | None = None
        self.flow_times = torch.empty(0, dtype=torch.float64)
        self.timesteps = torch.arange(self._schedule.num_timesteps - 1, -1, -1, dtype=torch.float32)

    def __len__(self) -> int:
        return self._schedule.num_timesteps

    @property
    def step_index(self) -> int | None:
        """Steps taken so far, counted from flow time 0; None before the first call of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step at which the run starts, when a pipeline has set one."""
        return self._begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Start a run: `flow_times` (float64 [steps + 1], 0 to 1) and `timesteps` (float32 [steps], on `device`).

        Raises:
            ValueError: `num_inference_steps` is no whole number above 0.
        """
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
            raise SchedulerUseError(f"num_inference_steps={num_inference_steps!r} must be a whole number. Use 4 to 50.")
        self.flow_times = uniform_times(num_inference_steps, self._shift)
        self._at = align(self._schedule, self._prediction_type, self.flow_times[:-1])
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._at.timestep.float().to(device)
        self._step_index = self._begin_index = self._scaled_index = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at a later step, as image-to-image pipelines do.

        Raises:
            SchedulerUseError: the run has fewer steps.
        """
        if self.num_inference_steps is not None and not 0 <= begin_index < self.num_inference_steps:
            raise SchedulerUseError(
                f"begin_index={begin_index} must lie in 0..{self.num_inference_steps - 1}, the steps of this run. "
                "Raise the strength, or num_inference_steps."
            )
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input `x_dm` [batch, *dims] of the flow state `sample` at the run's next timestep.

        Raises:
            SchedulerUseError: `timestep` is not the run's next one.
        """
        at, index = self._next(timestep)
        self._step_index = self._scaled_index = index
        return (float(at.scale[index]) * _wide(sample)).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One Euler step from the flow state `sample` [batch, *dims] with the network's `model_output`.

        Computed in float32 or wider, returned in the dtype of `sample`.

        Raises:
            SchedulerUseError: `timestep` is not the run's next one, the network's input was not scaled by
                `scale_model_input`, or the shapes differ.
            NonFiniteStateError: the network's output is not finite.
        """
        at, index = self._next(timestep)
        if self._scaled_index != index:
            raise SchedulerUseError(
                f"step {index} was not preceded by scale_model_input: the network reads a scaled state, not the flow "
                "state itself. Call scale_model_input(sample, timestep) and give its result to the network."
            )
        if model_output.shape != sample.shape:
            raise SchedulerUseError(
                f"model_output of shape {tuple(model_output.shape)} does not fit sample {tuple(sample.shape)}: shapes "
                "must be equal. A network that also predicts variances needs its first half split off."
            )
        if not bool(model_output.isfinite().all()):
            raise NonFiniteStateError(
                f"the network's output is not finite at step {index}, timestep {float(self.timesteps[index]):g}. Check "
                "the weights, or compute in float32 or bfloat16 instead of float16."
            )
        x_t, prediction = _wide(sample), _wide(model_output)
        from_x_t, from_prediction = float(at.from_x[index] * at.scale[index]), float(at.from_prediction[index])
        velocity = from_x_t * x_t + from_prediction * prediction
        moved = (x_t + float(self.flow_times[index + 1] - self.flow_times[index]) * velocity).to(sample.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow state [batch, *dims] between `noise` and `original_samples` at the run's present flow time.

        During a run (after `set_begin_index` or a step), `timesteps` [1] or [batch] must be its next timestep.
        Otherwise the state is at the flow time of each trained noise level `timesteps` [batch], 0..T-1.

        Raises:
            SchedulerUseError: `timesteps` are neither.
        """
        t = self._flow_times_at(timesteps.reshape(-1).cpu()).to(original_samples.device)
        state = interpolate(_wide(noise.to(original_samples.device)), _wide(original_samples), t)
        return state.to(original_samples.dtype)

    def _flow_times_at(self, timesteps: Tensor) -> Tensor:
        """Flow times, float64 [len(timesteps)], as `add_noise` describes."""
        if self._at is not None and (self._step_index is not None or self._begin_index is not None):
            for timestep in timesteps.tolist():
                self._next(timestep)
            return self.flow_times[self._position()].expand(len(timesteps))
        table, at = self._schedule.flow_times, timesteps.double()
        if not bool(((at >= 0) & (at <= len(table) - 1)).all()):
            raise SchedulerUseError(
                f"timesteps from {at.min().item():g} to {at.max().item():g} must lie in 0..{len(table) - 1}, the "
                "levels that the network was trained at. For flow times, use d2f_core.objective.path.interpolate."
            )
        low = at.floor().long().clamp(max=len(table) - 2)
        return table[low] + (table[low + 1] - table[low]) * (at - low)

    def _position(self) -> int:
        return (self._begin_index or 0) if self._step_index is None else self._step_index

    def _next(self, timestep: float | Tensor) -> tuple[Alignment, int]:
        """The run's alignment and the index of its next step.

        The step is known by counting: below and above the trained range several flow times share one timestep. The
        timestep is only checked, and after the first step not on a GPU, which would have to synchronise.
        """
        if self._at is None:
            raise SchedulerUseError("there are no flow times yet. Call set_timesteps(num_inference_steps) first.")
        index = self._position()
        if index >= len(self._at.timestep):
            raise SchedulerUseError(
                f"all {index} steps of this run are done. Call set_timesteps(num_inference_steps) before another run."
            )
        on_gpu = isinstance(timestep, Tensor) and timestep.device.type != "cpu"
        if not on_gpu or self._step_index is None:
            given, expected = float(timestep), float(self._at.timestep[index])
            if not abs(given - expected) <= TIMESTEP_TOLERANCE:
                raise SchedulerUseError(
                    f"timestep {given:g} is not the next one of this run: step {index} of {len(self._at.timestep)} is "
                    f"at {expected:g}. Go through `timesteps` in order; to start later, call set_begin_index first."
                )
        return self._at, index
