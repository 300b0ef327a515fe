"""A model as the jobs know it: its base, what its network puts out, how it is sampled; and with its network."""

from dataclasses import dataclass

import torch
from torch import nn

from d2f_core.model.base import BaseModel
from d2f_core.model.config import SamplingDefaults, TaskName
from d2f_core.model.denoiser import as_denoiser, network_dtype
from d2f_core.objective.alignment import Denoiser, NaiveVelocityField, VelocityField
from d2f_core.objective.schedule import Schedule
from d2f_core.objective.time_sampling import NaiveTarget


@dataclass(frozen=True, kw_only=True)
class DescribedModel:
    """All of a model but its weights: of an unchanged base model, or of a finetuned one."""

    base: BaseModel
    objective: str
    """diff2flow, flow_matching or diffusion: the loss that the weights were last trained with."""
    naive_target: NaiveTarget = "noise_minus_data"
    """What the network puts out, if the objective is flow_matching."""
    sampling: SamplingDefaults
    task: TaskName = "text_to_image"
    method: str = ""
    """full or lora; empty for an unchanged base model."""
    own_hash: str = ""
    """Content hash of what was trained; empty for an unchanged base model."""

    @property
    def content_hash(self) -> str:
        """Content hash of the model; that of a base model takes reading all of it."""
        return self.own_hash or self.base.content_hash

    @property
    def puts_out_velocity(self) -> bool:
        """Whether the network is a rectified-flow one, which no sampler of diffusion models can read."""
        return self.objective == "flow_matching" or self.base.is_flow

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the model's images when no size is given."""
        edge = self.sampling.resolution
        return (edge, edge) if edge else self.base.default_size


@dataclass(frozen=True, kw_only=True)
class TrainedModel(DescribedModel):
    """A model that is ready to sample."""

    network: nn.Module

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    @property
    def prediction_type(self) -> str:
        return self.base.prediction_type

    @property
    def denoiser(self) -> Denoiser:
        return as_denoiser(self.network, network_dtype(self.network))

    @property
    def velocity_field(self) -> VelocityField | NaiveVelocityField:
        """(x_t, t, **condition) -> velocity; the condition is given by the denoiser's argument names, at least
        `text_states`.
        """
        if self.objective == "flow_matching":
            return NaiveVelocityField(self.denoiser, self.schedule, self.naive_target)
        return VelocityField(self.denoiser, self.schedule, self.prediction_type)

    def to(self, device: str | torch.device) -> "TrainedModel":
        self.network.to(device)
        return self
