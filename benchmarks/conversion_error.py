"""How exact is the conversion? A perfect diffusion network, converted, against the exact velocity.

python -m benchmarks.conversion_error [--json FILE]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.closed_form import Mixture, corners, gaussian
from d2f_core.objective.alignment import VelocityField, alpha_sigma
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import DIFFUSION_PREDICTIONS, NoiseSchedule
from d2f_core.objective.solver import integrate, uniform_times

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES: dict[str, dict[str, Any]] = {
    "scaled_linear (Stable Diffusion)": {**SD, "beta_schedule": "scaled_linear"},
    "linear": {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "squaredcos_cap_v2": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear, zero terminal SNR": {**SD, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
DATA: dict[str, Mixture] = {
    "Gaussian, deviation 0.7": gaussian(0.7),
    "Gaussian, deviation 1": gaussian(1.0),
    "Gaussian, deviation 2": gaussian(2.0),
    "8 Gaussians": corners(),
}
TIMES, SAMPLES = 25, 1000
TRANSPORTED, STEPS = 20_000, 50


def error_at(
    field: VelocityField, data: Mixture, times: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """RMS velocity error over samples at each of `times`, divided by the RMS of `data - noise`; float64."""
    generator = torch.Generator().manual_seed(0)
    ends = data.draw(SAMPLES, generator)
    noise = torch.randn(ends.shape, generator=generator, dtype=torch.float64)
    unit = (ends - noise).square().mean().sqrt()
    errors = []
    for time in times:
        t = time.expand(SAMPLES)
        x_t = interpolate(noise, ends, t).to(dtype)
        difference = field(x_t, t).double() - data.velocity(x_t.double(), t)
        errors.append(difference.square().mean().sqrt() / unit)
    return torch.stack(errors)


def rounding(prediction_type: str, t: torch.Tensor) -> torch.Tensor:
    """What the conversion divides a float32 answer by: alpha for epsilon, sigma for sample, nothing for v."""
    alpha, sigma = alpha_sigma(t)
    return {"epsilon": alpha, "sample": sigma, "v_prediction": torch.ones_like(t)}[prediction_type]


def cases() -> Iterator[tuple[str, str, str, NoiseSchedule, Mixture]]:
    for name, config in SCHEDULES.items():
        for kind in DIFFUSION_PREDICTIONS:
            if kind == "epsilon" and config.get("rescale_betas_zero_snr"):
                continue  # refused when the config is read
            schedule = NoiseSchedule.from_scheduler_config({**config, "prediction_type": kind})
            for data_name, data in DATA.items():
                yield name, kind, data_name, schedule, data


def measure(schedule: NoiseSchedule, kind: str, data: Mixture, *, paper_compat: bool = False) -> dict[str, float]:
    """Normalised error: at the worst time inside the trained range, RMS over the times above it and below it."""
    low, high = schedule.trained_range
    field = VelocityField(data.denoiser(schedule, kind), schedule, kind, paper_compat)
    inside = torch.linspace(low, high, TIMES, dtype=torch.float64)
    top = 0.999 if paper_compat else 1.0  # the published map ends before 1
    above = torch.linspace(high, top, TIMES, dtype=torch.float64)[1:]
    within = error_at(field, data, inside)
    result = {
        "inside": float(within.max()),
        "inside_scaled": float((within * rounding(kind, inside)).max()),
        "above": float(error_at(field, data, above).square().mean().sqrt()),
    }
    if low > 0:
        below = torch.linspace(0, low, TIMES, dtype=torch.float64)[:-1]
        result["below"] = float(error_at(field, data, below).square().mean().sqrt())
    return result


def sample_statistics(schedule: NoiseSchedule, kind: str, data: Mixture) -> dict[str, dict[str, float]]:
    """Deviation of drawn samples, of the data's own, and RMS distance from the samples of the exact velocity.

    The same noises are carried by 50 Euler steps to t = 0.999, where the published map ends, through the exact velocity
    and through a perfect network read by each map; the distance is divided by the data's deviation.
    """
    noise = torch.randn(TRANSPORTED, data.means.shape[1], generator=torch.Generator().manual_seed(2)).double()
    times = 0.999 * uniform_times(STEPS)
    whole = data.draw(TRANSPORTED, torch.Generator().manual_seed(3)).std()
    fields = {"exact velocity": data.velocity} | {
        name: VelocityField(data.denoiser(schedule, kind), schedule, kind, compat)
        for name, compat in (("converted", False), ("published map", True))
    }
    ends = {name: integrate(field, noise, times)[0] for name, field in fields.items()}
    return {
        name: {
            "deviation": float(end.std() / whole),
            "distance": float((end - ends["exact velocity"]).square().mean().sqrt() / whole),
        }
        for name, end in ends.items()
    }


def print_statistics() -> list[dict[str, Any]]:
    rows = []
    print(
        "\n| prediction | data | deviation: exact | converted | published map | distance: converted | published map |"
    )
    print("|---|---|---|---|---|---|---|")
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULES["scaled_linear (Stable Diffusion)"])
    for kind in DIFFUSION_PREDICTIONS:
        for data_name, data in DATA.items():
            found = sample_statistics(schedule, kind, data)
            rows.append({"prediction_type": kind, "data": data_name, **found})
            deviations = " | ".join(f"{one['deviation']:.4f}" for one in found.values())
            distances = " | ".join(f"{found[name]['distance']:.4f}" for name in ("converted", "published map"))
            print(f"| {kind} | {data_name} | {deviations} | {distances} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| schedule | prediction | data | inside | inside x alpha or sigma | above | below | published map, inside |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind, data_name, schedule, data in cases():
        exact, published = measure(schedule, kind, data), measure(schedule, kind, data, paper_compat=True)
        rows.append({"schedule": name, "prediction_type": kind, "data": data_name, **exact, "published": published})
        below = f"{exact['below']:.1e}" if "below" in exact else "-"
        print(
            f"| {name} | {kind} | {data_name} | {exact['inside']:.1e} | {exact['inside_scaled']:.1e} | "
            f"{exact['above']:.1e} | {below} | {published['inside']:.1e} |"
        )
    statistics = print_statistics()
    if arguments.json:
        arguments.json.write_text(json.dumps({"velocity": rows, "samples": statistics}, indent=1) + "\n")


if __name__ == "__main__":
    main()
