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

A run begins at flow time 0, pure noise, where no noise level was trained: the noisiest level of Stable Diffusion holds
6.4 % of the way to the data. Every stock scheduler that takes this one's place (`DDIMScheduler.from_config`) begins at
that level and calls the same noise its state, so the two draw different images from one noise however many steps they
take. From that level on they agree: an Euler step is a DDIM step. `start="trained"` begins where stock schedulers do.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor

from d2f_core.model.finite_outputs import FiniteOutputs
from d2f_core.model.run_timesteps import RunTimesteps, SchedulerUseError, whole_number
from d2f_core.objective.alignment import Alignment, align
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import (
    FLOW_PREDICTION,
    FlowTimes,
    ScheduleError,
    flow_shift,
    prediction_type_of,
    read_schedule,
)
from d2f_core.objective.solver import TIME_GRIDS

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

BETAS = ("beta_schedule", "trained_betas")
"""Fields of which one is in the config of every scheduler that has the noise levels of a diffusion network."""


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return x if x.dtype.itemsize >= 4 else x.float()


class Diff2FlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow times from 0 to 1 in equal steps, moved towards noise by `shift`; one network evaluation per step.

    All fields except `shift`, `start` and `time_grid` are the base model's, with the same meaning as in its scheduler
    config. The `prediction_type` of a rectified-flow network, which puts out noise - data, is `flow_prediction`; it is
    called with the flow state itself at the timestep `num_train_timesteps * (1 - t)`, and the betas are not used.

    Args:
        start: `noise` begins at flow time 0, as the models are trained; `trained` at the flow time of the noisiest
            trained level, where DDIM and other stock schedulers begin.
        time_grid: `uniform`, or `beta` for steps that are short at both ends (quantiles of Beta(0.6, 0.6)).

    Raises:
        ScheduleError: a config that cannot be used, such as `epsilon` with zero terminal SNR, or one of a scheduler
            without a diffusion network's noise levels.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers if not kind.name.startswith("EDM")]  # noqa: RUF012
    order = 1

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
        start: Literal["noise", "trained"] = "noise",
        time_grid: Literal["uniform", "beta"] = "uniform",
    ) -> None:
        if not 0 < shift < math.inf:
            raise ScheduleError(
                f"shift={shift} must be a number above 0. 1 keeps the steps equal, 3 suits larger images."
            )
        if start not in ("noise", "trained"):
            raise ScheduleError(f"start={start!r} must be 'noise' (flow time 0) or 'trained' (DDIM's start).")
        if time_grid not in TIME_GRIDS:
            raise ScheduleError(f"time_grid={time_grid!r} is not known. Use one of {', '.join(TIME_GRIDS)}.")
        self._schedule = read_schedule(cast(Any, self.config))
        self._prediction_type, self._shift, self._grid = prediction_type, shift, TIME_GRIDS[time_grid]
        self._first_time = self._schedule.trained_range[0] if start == "trained" else 0.0
        self.init_noise_sigma = math.hypot(self._first_time, 1 - self._first_time)
        self._at: Alignment | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._scaled_index: int | None = None
        self._outputs = FiniteOutputs()
        self._run = RunTimesteps([], [])
        self.num_inference_steps: int | None = None
        self.flow_times = torch.empty(0, dtype=torch.float64)
        self.timesteps = torch.arange(self._schedule.num_timesteps - 1, -1, -1, dtype=torch.float32)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Read another scheduler's config for diffusers' `from_config` and `from_pretrained`.

        One that samples flow models (FlowMatch, `use_flow_sigmas`) gives `flow_prediction` and its shift.

        Raises:
            ScheduleError: a flow model's shift depends on the image size, or it is of a scheduler without the noise
                levels of either (EDM).
        """
        config, name = {**config_dict, **kwargs}, config_dict.get("_class_name")
        if name != cls.__name__ and prediction_type_of(config) == FLOW_PREDICTION:
            if config.get("use_dynamic_shifting") and "shift" not in kwargs:
                raise ScheduleError(f"{name} shifts by the size of each image (use_dynamic_shifting). Give shift=3.0.")
            kwargs = {"shift": flow_shift(config_dict), **kwargs, "prediction_type": FLOW_PREDICTION}
        elif not any(field in config for field in BETAS):
            raise ScheduleError(
                f"a scheduler config ({name or 'of no named class'}) has neither {' nor '.join(BETAS)}: what noise its "
                "network was trained at is not known. Take the scheduler config of the base model, or keep the "
                "pipeline's own scheduler."
            )
        return cast(Any, super()).extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        return self._schedule.num_timesteps

    @property
    def step_index(self) -> int | None:
        """Steps taken so far, counted from the start of the flow times; None before the first call of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step at which the run starts, when a pipeline has set one."""
        return self._begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Start a run: `flow_times` (float64 [steps + 1], up to 1) and `timesteps` (float32 [steps], on `device`).

        Raises:
            ValueError: `num_inference_steps` is no whole number above 0.
        """
        steps = whole_number("num_inference_steps", num_inference_steps, "Use 4 to 50.")
        if steps < 1:
            raise SchedulerUseError(f"num_inference_steps={steps} must be at least 1. Use 4 to 50.")
        self.flow_times = self._first_time + (1 - self._first_time) * self._grid(steps, self._shift)
        self._at = align(self._schedule, self._prediction_type, self.flow_times[:-1])
        self.num_inference_steps = steps
        self._run = RunTimesteps.of(self._at.timestep, len(self))
        self.timesteps = torch.tensor(self._run.given, dtype=torch.float32).to(device)
        self._step_index = self._begin_index = self._scaled_index = None
        self._outputs = FiniteOutputs()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at a later step, as image-to-image pipelines do.

        Raises:
            SchedulerUseError: there is no run yet, it has fewer steps, or this is no whole number.
        """
        if self.num_inference_steps is None:
            raise SchedulerUseError(
                f"begin_index={begin_index!r} was set before a run. Call set_timesteps first: it starts one."
            )
        begin_index = whole_number("begin_index", begin_index, "It counts steps of the run.")
        if not 0 <= begin_index < self.num_inference_steps:
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
            NonFiniteStateError: the network's output is not finite; on a GPU it is raised in the run's last step.
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
        last = index + 1 == len(self._run.given)
        self._outputs.add(model_output, index, self._run.given[index], last=last)
        x_t, prediction = _wide(sample), _wide(model_output)
        from_x_t, from_prediction = float(at.from_x[index] * at.scale[index]), float(at.from_prediction[index])
        velocity = from_x_t * x_t + from_prediction * prediction
        moved = (x_t + float(self.flow_times[index + 1] - self.flow_times[index]) * velocity).to(sample.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow state [batch, *dims] between `noise` and `original_samples` at `timesteps` [1] or [batch].

        A timestep of the present run stands for the flow time of its step: pure noise for the first one. Any other is
        the flow time of that trained noise level, 0..T-1, as all are before `set_timesteps`.

        Raises:
            SchedulerUseError: a timestep is neither.
        """
        times = [self._flow_time(timestep) for timestep in timesteps.reshape(-1).tolist()]
        data = _wide(original_samples)
        t = torch.tensor(times, dtype=data.dtype).to(data.device)  # not through float64, which Apple's GPUs lack
        state = interpolate(_wide(noise.to(data.device)), data, t)
        return state.to(original_samples.dtype)

    def _flow_time(self, timestep: float) -> float:
        if (index := self._run.step_of(timestep, self._position())) is not None:
            return float(self.flow_times[index])
        last = len(self) - 1
        if not 0 <= timestep <= last:
            raise SchedulerUseError(
                f"timestep {timestep:g} is none of this run and must lie in 0..{last}, the levels that the network was "
                "trained at. For a flow time t, compute (1 - t) * noise + t * original_samples."
            )
        if isinstance(self._schedule, FlowTimes):
            return 1 - timestep / len(self)
        table, low = self._schedule.flow_times, min(int(timestep), last - 1)
        return float(table[low] + (table[low + 1] - table[low]) * (timestep - low))

    def _position(self) -> int | None:
        """The run's next step, if it is known."""
        return self._begin_index if self._step_index is None else self._step_index

    def _next(self, timestep: float | Tensor) -> tuple[Alignment, int]:
        """The run's alignment and the index of its next step.

        A run starts at its begin index, or without one at the step of its first timestep. From then on steps are
        counted, and the timestep is only checked; not on a GPU, which would have to synchronise.
        """
        if self._at is None:
            raise SchedulerUseError("there are no flow times yet. Call set_timesteps(num_inference_steps) first.")
        index, steps = self._position(), len(self._run.given)
        if index is not None and index >= steps:
            raise SchedulerUseError(
                f"all {index} steps of this run are done. Call set_timesteps(num_inference_steps) before another run."
            )
        on_gpu = isinstance(timestep, Tensor) and timestep.device.type != "cpu"
        if on_gpu and self._step_index is not None:
            return self._at, self._step_index
        given = timestep.item() if isinstance(timestep, Tensor) else timestep
        index = self._run.step_of(given) if index is None else index
        if index is None or not self._run.is_near(index, given):
            expected = "has none like it" if index is None else f"has {self._run.given[index]:g} at step {index}"
            raise SchedulerUseError(
                f"timestep {given:g} is not the next one: the run of {steps} steps {expected}. Go through `timesteps` "
                "in order; to start later, leave out the first ones, or call set_begin_index."
            )
        return self._at, index
