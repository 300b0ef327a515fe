"""What ComfyUI asks of a model while it samples, written anew for tests and measurements without ComfyUI.

A `Patcher` holds a network and its `model_sampling`, which a node can replace. Per step the sampler calls the network
with `calculate_input` and `timestep` of a sigma, reads the answer by `calculate_denoised`, mixes the estimates of both
prompts by the guidance scale, and takes an Euler step in sigma. Nothing here is ComfyUI's code: formulas alone agree.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from d2f_core.objective.schedule import NoiseSchedule

Network = Callable[..., Tensor]
NODE = Path(__file__).parents[1] / "infra/comfyui"


def shaped(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.reshape(-1, *(1,) * (like.ndim - 1)).to(like.dtype)


class CONST:
    """A straight path: what the node derives from, and what samplers recognise a flow by."""

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - shaped(sigma, model_output) * model_output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return shaped(sigma, noise) * noise + (1 - shaped(sigma, noise)) * latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - shaped(sigma, latent))


class Diffusion:
    """How an epsilon or v network is sampled without the node: sigma is noise over signal, timesteps are whole."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        self.prediction_type, bars = prediction_type, schedule.alphas_cumprod
        self.sigmas = ((1 - bars) / bars).sqrt()

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        apart = sigma.reshape(-1, 1).double().log() - self.sigmas.log()
        return apart.abs().argmin(1).reshape(sigma.shape)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise / torch.hypot(shaped(sigma, noise), torch.ones((), dtype=noise.dtype))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        sigma = shaped(sigma, model_output)
        if self.prediction_type == "epsilon":
            return model_input - sigma * model_output
        return (model_input - sigma * (1 + sigma**2).sqrt() * model_output) / (1 + sigma**2)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = shaped(sigma, noise)
        return noise * ((1 + sigma**2).sqrt() if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


@dataclass(frozen=True)
class Patcher:
    """A loaded model: the network, its own sampling, and what nodes have replaced."""

    network: Network
    sampling: Any
    patches: Mapping[str, Any] = field(default_factory=dict)

    def clone(self) -> "Patcher":
        return replace(self, patches=dict(self.patches))

    def add_object_patch(self, name: str, value: Any) -> None:
        self.patches[name] = value  # type: ignore[index]

    def get_model_object(self, name: str) -> Any:
        return self.patches.get(name, getattr(self, name.removeprefix("model_")))

    def denoised(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The estimate of the data at `x` [batch, *dims] and one sigma."""
        sampling, sigma = self.get_model_object("model_sampling"), sigma.expand(len(x))
        output = self.network(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float(), **condition)
        return sampling.calculate_denoised(sigma, output, x)


def simple(sampling: Any, steps: int) -> Tensor:
    """The scheduler `simple`: every so many-th entry of the table of sigmas, from the last one on, and 0."""
    table = sampling.sigmas
    picked = [table[len(table) - 1 - int(number * len(table) / steps)] for number in range(steps)]
    return torch.stack([*picked, torch.zeros_like(table[0])])


def normal(sampling: Diffusion, steps: int) -> Tensor:
    """The scheduler `normal` of a diffusion model: evenly spaced timesteps down to the first, and 0."""
    places = torch.linspace(len(sampling.sigmas) - 1, 0, steps, dtype=torch.float64)
    low = places.floor().long()
    logs = sampling.sigmas.log()
    between = logs[low] + (logs[places.ceil().long()] - logs[low]) * places.frac()
    return torch.cat([between.exp(), torch.zeros(1, dtype=torch.float64)]).to(sampling.sigmas.dtype)


def beta_sigmas(sampling: Any, steps: int) -> Tensor:
    """The scheduler `beta`: entries of the table at quantiles of Beta(0.6, 0.6), rounded, each once, and 0."""
    last = len(sampling.sigmas) - 1
    quantiles = beta.ppf(1 - torch.arange(steps, dtype=torch.float64).numpy() / steps, 0.6, 0.6)
    places = list(dict.fromkeys(round(float(one) * last) for one in quantiles))
    return torch.cat([sampling.sigmas[places], torch.zeros_like(sampling.sigmas[:1])])


def sample(
    model: Patcher,
    noise: Tensor,
    sigmas: Tensor,
    *,
    latent: Tensor | None = None,
    guidance: float = 1.0,
    condition: Mapping[str, Tensor] | None = None,
    null: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Latents by Euler steps over falling `sigmas` [steps + 1], which begin below the largest for image to image."""
    sampling = model.get_model_object("model_sampling")
    full = bool(sigmas[0] >= sampling.sigma_max * (1 - 1e-5))
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise) if latent is None else latent, full)
    for sigma, after in itertools.pairwise(sigmas):
        data = model.denoised(x, sigma, **(condition or {}))
        if guidance != 1:
            without = model.denoised(x, sigma, **(null or {}))
            data = without + guidance * (data - without)
        x = x + (after - sigma).to(x.dtype) * ((x - data) / sigma.to(x.dtype))
    return sampling.inverse_noise_scaling(sigmas[-1], x)


@contextmanager
def stand_in(files: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
    """ComfyUI's modules that the node imports, for as long as the block lasts.

    Args:
        files: folder -> file name -> path.
    """
    comfy, sampling, folders = ModuleType("comfy"), ModuleType("comfy.model_sampling"), ModuleType("folder_paths")
    comfy.model_sampling, sampling.CONST = sampling, CONST  # type: ignore[attr-defined]
    folders.get_filename_list = lambda folder: list(files.get(folder, {}))  # type: ignore[attr-defined]
    folders.get_full_path = lambda folder, name: files.get(folder, {}).get(name)  # type: ignore[attr-defined]
    made = {"comfy": comfy, "comfy.model_sampling": sampling, "folder_paths": folders}
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_node(folder: Path = NODE) -> ModuleType:
    """The folder as a package, as ComfyUI loads what lies in `custom_nodes`; its modules must be there to import."""
    spec = importlib.util.spec_from_file_location(
        "d2f_node", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    for name in [name for name in sys.modules if name == "d2f_node" or name.startswith("d2f_node.")]:
        del sys.modules[name]
    sys.modules["d2f_node"] = module
    spec.loader.exec_module(module)
    return module
