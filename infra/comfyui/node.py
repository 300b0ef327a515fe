"""The node "Diff2Flow sampling": a model whose denoiser ComfyUI samples as the flow that Diff2Flow trained."""

import os

import comfy.model_sampling  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from .alignment import FLOW, SettingError, read, shift_sigma
from .settings import (
    FROM_FILE,
    NO_FILE,
    PREDICTION_CHOICES,
    SCHEDULE_CHOICES,
    Settings,
    read_metadata,
    settings,
)

FOLDERS = ("checkpoints", "loras", "diffusion_models")
"""ComfyUI's folders with files that carry metadata of Diff2Flow."""
LEVELS = 1000
"""Sigmas in the table that schedulers choose from."""


class Diff2FlowModelSampling(torch.nn.Module, comfy.model_sampling.CONST):
    """What ComfyUI's samplers ask of a model: its sigmas (1 - flow time), and how to read its output.

    It is a `CONST`, as rectified flow models are, so that samplers with noise of their own take the formulas of flows,
    and noise is added to latents as `sigma * noise + (1 - sigma) * latent`.
    """

    def __init__(self, chosen: Settings) -> None:
        super().__init__()
        self.prediction_type, self.shift = chosen.prediction_type, chosen.shift
        self._times = chosen.times  # stays on the CPU: float64, which not every device has
        self.register_buffer("sigmas", shift_sigma(torch.arange(1, LEVELS + 1) / LEVELS, chosen.shift))

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def _read(self, sigma: Tensor, like: Tensor) -> list[Tensor]:
        """Scale, and the coefficients of `x` and of the output, on the device of `like` and shaped to broadcast."""
        found = read(self._times, self.prediction_type, sigma.detach().cpu().reshape(-1))
        shape = (-1, *(1,) * (like.ndim - 1))
        return [part.float().to(like.device).view(shape) for part in (found.scale, found.from_x, found.from_output)]

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        scale, _, _ = self._read(sigma, noise)
        return scale.to(noise.dtype) * noise

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        _, from_x, from_output = self._read(sigma, model_output)
        return from_x * model_input + from_output * model_output

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep at each sigma, fractional; ComfyUI gives it to the network, and to ControlNets."""
        found = read(self._times, self.prediction_type, sigma.detach().cpu().reshape(-1)).timestep
        return found.float().to(sigma.device).view(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Sigmas of the grid of schedulers that count timesteps, such as `normal`: their first one is pure noise."""
        last = len(self._times) - (self.prediction_type != FLOW)
        return shift_sigma(timestep / last, self.shift)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma after a share of the sampling, as ranges of conditions are given."""
        return shift_sigma(1 - min(max(percent, 0.0), 1.0), self.shift)


def _files() -> list[str]:
    """Names of safetensors files as FOLDER/NAME."""
    listed = [f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
    return [NO_FILE, *(name for name in listed if name.endswith(".safetensors"))]


def _path(file: str) -> str:
    folder, _, name = file.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS else None
    if path is None:
        raise SettingError(f"file={file!r} is not in ComfyUI's folders {', '.join(FOLDERS)}. Choose one of the list.")
    return path


class Diff2FlowSampling:
    """Put it between the loader (or the last LoRA) and the sampler."""

    DESCRIPTION = "Samples a model or LoRA that Diff2Flow trained as the flow that it is, in any sampler of flows."
    CATEGORY = "advanced/model"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "advice")
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL",),
                "file": (_files(), {"tooltip": "Checkpoint or LoRA whose metadata (d2f_...) fill the settings below."}),
                "prediction_type": (list(PREDICTION_CHOICES), {"default": FROM_FILE}),
                "schedule": (list(SCHEDULE_CHOICES), {"default": FROM_FILE}),
                "shift": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": "0: the file's, else 1."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **_: object) -> float:
        return 0.0 if file == NO_FILE else os.path.getmtime(_path(file))

    def patch(self, model, file: str, prediction_type: str, schedule: str, shift: float) -> tuple:
        metadata = {} if file == NO_FILE else read_metadata(_path(file))
        chosen = settings(prediction_type, schedule, shift, file, metadata)
        now = model.get_model_object("model_sampling")
        already = isinstance(now, comfy.model_sampling.CONST) and not isinstance(now, Diff2FlowModelSampling)
        if already and chosen.prediction_type != FLOW:
            raise SettingError(
                f"The model is sampled as a rectified flow already ({type(now).__name__}), and prediction_type="
                f"{chosen.prediction_type!r} is one of diffusion. Remove ModelSamplingSD3 before this node, or choose "
                "flow."
            )
        patched = model.clone()
        patched.add_object_patch("model_sampling", Diff2FlowModelSampling(chosen))
        return (patched, chosen.advice)
