"""Data whose best denoiser is known in closed form: what the conversion's error is measured against.

For data from a mixture of Gaussians every posterior mean is a formula, so a `denoiser` here is a perfect network and
`velocity` the exact marginal velocity of the straight path. What differs between the two is the conversion's error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f_core.objective.alignment import Denoiser, alpha_sigma
from d2f_core.objective.schedule import NoiseSchedule


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one deviation around `means` [components, dims], equally likely; float64."""

    means: Tensor
    std: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, dims]."""
        which = torch.randint(len(self.means), (count,), generator=generator)
        spread = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.std * spread

    def ends(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means of data and noise [batch, dims] at `x = alpha * data + sigma * noise`."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha**2 * self.std**2 + sigma**2
        apart = x[:, None, :] - alpha[..., None] * self.means
        weights = torch.softmax(-(apart**2).sum(-1) / (2 * variance), dim=1)[..., None]
        data = self.means + (alpha * self.std**2 / variance)[..., None] * apart
        return (weights * data).sum(1), (weights * (sigma / variance)[..., None] * apart).sum(1)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The exact velocity [batch, dims] of the straight path from noise to this data."""
        data, noise = self.ends(x_t, t, 1 - t)
        return data - noise

    def denoiser(self, schedule: NoiseSchedule, prediction_type: str, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The best network for this data: right at every timestep, fractional ones included; answers in `dtype`."""

        def denoise(x_dm: Tensor, timestep: Tensor) -> Tensor:
            low = timestep.double().floor().long().clamp(0, schedule.num_timesteps - 2)
            times = schedule.flow_times
            level = times[low] + (times[low + 1] - times[low]) * (timestep.double() - low)
            alpha, sigma = alpha_sigma(level)
            data, noise = self.ends(x_dm.double(), alpha, sigma)
            v = alpha[:, None] * noise - sigma[:, None] * data
            return {"epsilon": noise, "v_prediction": v, "sample": data}[prediction_type].to(dtype)

        return denoise


def gaussian(std: float, dims: int = 4) -> Mixture:
    return Mixture(torch.zeros(1, dims, dtype=torch.float64), std)


def corners(std: float = 0.3) -> Mixture:
    """Eight Gaussians at (+-1, +-1, +-1): far enough apart that paths bend."""
    return Mixture(torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3), std)
