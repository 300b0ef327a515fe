"""The conversion is exact: a perfect diffusion network becomes the straight velocity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_core.objective.alignment import PREDICTION_TYPES, VelocityField, alpha_sigma, velocity_coefficients
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import NoiseSchedule

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULE = NoiseSchedule.from_scheduler_config(SD)

finite = st.floats(-3, 3)


def predictions(kind: str, alpha: torch.Tensor, sigma: torch.Tensor, data: torch.Tensor, noise: torch.Tensor):
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[kind]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@given(t=st.floats(*SCHEDULE.trained_range), data=finite, noise=finite)
def test_a_perfect_prediction_gives_the_straight_velocity(kind, t, data, noise):
    t, data, noise = (torch.tensor([value], dtype=torch.float64) for value in (t, data, noise))
    alpha, sigma = alpha_sigma(t)
    from_x, from_prediction = velocity_coefficients(SCHEDULE, kind, t)
    velocity = from_x * (alpha * data + sigma * noise) + from_prediction * predictions(kind, alpha, sigma, data, noise)
    torch.testing.assert_close(velocity, data - noise, rtol=0, atol=1e-11)


# Epsilon with zero terminal SNR is refused when the config is read: test_schedule.
@pytest.mark.parametrize(
    ("config", "kind"), [*((SD, kind) for kind in PREDICTION_TYPES), (ZERO_SNR, "v_prediction"), (ZERO_SNR, "sample")]
)
def test_coefficients_are_finite_at_both_ends(kind, config):
    schedule = NoiseSchedule.from_scheduler_config(config)
    for coefficient in velocity_coefficients(schedule, kind, torch.tensor([0.0, 1e-9, 0.03, 0.98, 1 - 1e-9, 1.0])):
        assert coefficient.isfinite().all() and coefficient.abs().max() < 40


def gaussian_denoiser(kind: str, schedule: NoiseSchedule, std: float):
    """The best possible network for data ~ N(0, std^2), at the integer or fractional level that it is asked at."""

    def denoise(x_dm, timestep):
        low = timestep.double().floor().long().clamp(0, schedule.num_timesteps - 1)
        high = (low + 1).clamp(max=schedule.num_timesteps - 1)
        times = schedule.flow_times
        t = times[low] + (times[high] - times[low]) * (timestep.double() - low)
        alpha, sigma = (c[:, None] for c in alpha_sigma(t))
        data = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_dm
        return predictions(kind, alpha, sigma, data, (x_dm - alpha * data) / sigma)

    return denoise


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("low", "high", "tolerance"), [(0.0645, 0.9715, 2e-6), (0.9717, 1.0, 0.005), (0.0, 0.064, 0.04)]
)
def test_velocity_error_on_gaussian_data(kind, low, high, tolerance):
    """Normalised by the RMS velocity; the network is exact, so the error is the conversion's."""
    std, n = 0.7, 4000
    generator = torch.Generator().manual_seed(0)
    data = std * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    t = torch.linspace(low, high, n, dtype=torch.float64)
    x_t = interpolate(noise, data, t)
    time = t[:, None]
    gain = (time * std**2 - (1 - time)) / (time**2 * std**2 + (1 - time) ** 2)
    velocity = VelocityField(gaussian_denoiser(kind, SCHEDULE, std), SCHEDULE, kind)(x_t, t)
    error = (velocity - gain * x_t).square().mean().sqrt() / (1 + std**2) ** 0.5
    assert error < tolerance


def test_bfloat16_predictions_keep_float32_coefficients():
    field = VelocityField(lambda x, timestep: x.bfloat16(), SCHEDULE, "v_prediction")
    assert field(torch.zeros(2, 4), torch.tensor([0.1, 0.9])).dtype == torch.float32


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"prediction_type='eps'.*Use one of epsilon"):
        VelocityField(lambda x, timestep: x, SCHEDULE, "eps")


def test_a_network_that_changes_the_shape_is_refused():
    field = VelocityField(lambda x, timestep: torch.cat([x, x], 1), SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match="predicts variances"):
        field(torch.zeros(1, 4, 2, 2), torch.tensor([0.5]))
