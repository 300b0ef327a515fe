"""The noise levels that a network was trained on, and the level that corresponds to a flow time.

A diffusion network trained at timestep k saw `alphas_cumprod[k]`, k = 0..T-1. Flow time holds the same data-to-noise
ratio when `t == alpha / (alpha + sigma)`, which falls with k; `timestep_at` inverts exactly that table. `FlowTimes` are
the levels of a rectified-flow network, which needs no table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LINEAR = {"linear": 1, "scaled_linear": 2}
"""Schedules whose betas are a power of evenly spaced numbers."""
DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTION = "flow_prediction"
"""diffusers' name of what a rectified-flow network puts out: noise - data."""
PREDICTION_TYPES = (*DIFFUSION_PREDICTIONS, FLOW_PREDICTION)


class ScheduleError(ValueError):
    """A scheduler config cannot be used as it is."""


def check_prediction_type(kind: str, lowest_time: float = 1.0) -> None:
    """Refuse unknown prediction types, and epsilon if the noisiest level (at `lowest_time`) contains no signal."""
    if kind not in PREDICTION_TYPES:
        known = f"one of {', '.join(PREDICTION_TYPES)}, as the base model's scheduler config says"
        raise ScheduleError(f"prediction_type={kind!r} is not known. Use {known}.")
    if kind == "epsilon" and lowest_time == 0:
        raise ScheduleError(
            "prediction_type 'epsilon' with zero terminal SNR (rescale_betas_zero_snr): at zero signal, noise says "
            "nothing about the data. Use a v_prediction base, or set rescale_betas_zero_snr to false."
        )


def _number(config: Mapping[str, Any], name: str, kind: type = float) -> Any:
    """The value of a field; raises ScheduleError unless it is a finite number above 0, whole if `kind` is int."""
    value = config.get(name)
    if value is None or type(value) not in (int, kind) or not 0 < value < math.inf:
        kinds = "a whole number" if kind is int else "a number"
        raise ScheduleError(f"{name}={value!r} must be {kinds} above 0. Take scheduler_config.json from the base.")
    return value


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Float64 betas [T] from a diffusers scheduler config."""
    trained, kind = config.get("trained_betas"), config.get("beta_schedule")
    if trained is not None:
        try:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScheduleError(f"trained_betas are no list of numbers ({error}). Take them from the base.") from error
        if (given := config.get("num_train_timesteps")) not in (None, count := betas.numel()):
            raise ScheduleError(f"num_train_timesteps={given!r} contradicts the {count} trained_betas. Leave it out.")
        return betas
    count = _number(config, "num_train_timesteps", int)
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((k / count + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(count + 1)]
        return torch.tensor([min(1 - bars[k + 1] / bars[k], 0.999) for k in range(count)], dtype=torch.float64)
    if kind not in LINEAR:
        known = f"{', '.join(LINEAR)}, squaredcos_cap_v2, or trained_betas"
        raise ScheduleError(f"beta_schedule={kind!r} is not known. Use one of {known}.")
    start, end = _number(config, "beta_start"), _number(config, "beta_end")
    if start > end:
        raise ScheduleError(f"beta_start={start} is above beta_end={end}: noise must grow. Exchange the two.")
    power = LINEAR[kind]
    return torch.linspace(start ** (1 / power), end ** (1 / power), count, dtype=torch.float64) ** power


def _to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha bar) so that the last level is pure noise (Lin et al. 2024, arXiv:2305.08891)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclass(frozen=True)
class NoiseSchedule:
    """The table of trained noise levels."""

    alphas_cumprod: Tensor
    """Float64 [T]; entry k is what the network saw at timestep k. Falls with k."""
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read a diffusers scheduler config.

        Raises:
            ScheduleError: a field is missing, unknown or contradicts another, betas leave (0, 1), `epsilon` meets zero
                terminal SNR, or the config is a flow model's.
        """
        kind = prediction_type_of(config)
        if kind == FLOW_PREDICTION:
            raise ScheduleError(
                f"a scheduler config of a flow model ({_named(config)}) has no table of noise levels, and nothing to "
                "align. Read it by read_schedule, or give the config of a diffusion model."
            )
        betas = _betas(config)
        wrong = [beta for beta in betas.flatten().tolist() if not 0 < beta < 1]
        if betas.ndim != 1 or len(betas) < 2 or wrong:
            got = f"got shape {tuple(betas.shape)}" + (f", and in it {wrong[0]:g}" if wrong else "")
            raise ScheduleError(f"betas must be at least two numbers in (0, 1), {got}. Take them from the base model.")
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _to_zero_terminal_snr(alphas_cumprod)
        schedule = cls(alphas_cumprod)
        check_prediction_type(kind, schedule.trained_range[0])
        return schedule

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def flow_times(self) -> Tensor:
        """Float64 [T]: the flow time with the data-to-noise ratio of each timestep; falls with the timestep."""
        alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return alpha / (alpha + sigma)

    @cached_property
    def trained_range(self) -> tuple[float, float]:
        """Lowest and highest flow time that the network was trained at."""
        return float(self.flow_times[-1]), float(self.flow_times[0])

    def timestep_at(self, t: Tensor) -> Tensor:
        """Float64 [batch], fractional: linear in `t` between neighbours in the table, outside it the nearest."""
        if t.device not in self._on_device:  # cached: a copy to the GPU in every step would synchronise
            self._on_device[t.device] = self.flow_times.flip(0).to(t.device)
        rising = self._on_device[t.device]
        t = t.double().clamp(rising[0], rising[-1])
        right = torch.searchsorted(rising, t).clamp(1, len(rising) - 1)
        low, high = rising[right - 1], rising[right]
        return (len(rising) - 1) - (right - 1 + (t - low) / (high - low))


@dataclass(frozen=True)
class FlowTimes:
    """The noise levels of a rectified-flow network, which is called with `x_t` itself at the timestep `T * (1 - t)`."""

    num_timesteps: int = 1000

    @property
    def trained_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def timestep_at(self, t: Tensor) -> Tensor:
        """Float64 [batch], fractional."""
        return self.num_timesteps * (1 - t.double())


Schedule = NoiseSchedule | FlowTimes


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network of a diffusers scheduler config predicts, one of `PREDICTION_TYPES`.

    Raises:
        ScheduleError: an unknown prediction type, fields that contradict each other, or a scheduler of another kind of
            model (EDM).
    """
    name, given = str(config.get("_class_name", "")), config.get("prediction_type")
    if name.startswith("EDM"):
        raise ScheduleError(f"{name} belongs to models with EDM's noise levels, which are not known here.")
    flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    if flow and given not in (None, FLOW_PREDICTION):
        raise ScheduleError(
            f"prediction_type={given!r} contradicts {_named(config)}, which samples flow models. Set prediction_type "
            f"to {FLOW_PREDICTION!r}, or take the scheduler config of the model's own kind."
        )
    kind = FLOW_PREDICTION if flow else given or "epsilon"
    check_prediction_type(kind)
    return kind


def _named(config: Mapping[str, Any]) -> str:
    """What of a config says that it is a flow model's, for messages."""
    fields = ("_class_name", "prediction_type", "use_flow_sigmas")
    return ", ".join(f"{name}={config[name]!r}" for name in fields if name in config)


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The noise levels of a diffusers scheduler config, of a diffusion or a flow model.

    Raises:
        ScheduleError: see `prediction_type_of` and `NoiseSchedule.from_scheduler_config`.
    """
    if prediction_type_of(config) != FLOW_PREDICTION:
        return NoiseSchedule.from_scheduler_config(config)
    return FlowTimes(_number({"num_train_timesteps": 1000, **config}, "num_train_timesteps", int))


def flow_shift(config: Mapping[str, Any]) -> float:
    """The shift towards noise that a flow model's scheduler config samples with; 1 if it says none, or is dynamic."""
    given = config.get("flow_shift", config.get("shift"))
    return float(_number({"shift": given}, "shift")) if given and not config.get("use_dynamic_shifting") else 1.0
