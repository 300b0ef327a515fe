"""The conversion is exact: a perfect diffusion network becomes the straight velocity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_core.objective.alignment import NaiveVelocityField, VelocityField, align, alpha_sigma
from d2f_core.objective.guidance import guided
from d2f_core.objective.path import expand
from d2f_core.objective.schedule import DIFFUSION_PREDICTIONS, NoiseSchedule

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULE = NoiseSchedule.from_scheduler_config(SD)

finite = st.floats(-3, 3)


def predictions(kind: str, alpha: torch.Tensor, sigma: torch.Tensor, data: torch.Tensor, noise: torch.Tensor):
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[kind]


@pytest.mark.parametrize("kind", DIFFUSION_PREDICTIONS)
@given(t=st.floats(*SCHEDULE.trained_range), data=finite, noise=finite)
def test_a_perfect_prediction_gives_the_straight_velocity(kind, t, data, noise):
    t, data, noise = (torch.tensor([value], dtype=torch.float64) for value in (t, data, noise))
    alpha, sigma = alpha_sigma(t)
    at = align(SCHEDULE, kind, t)
    x_dm = alpha * data + sigma * noise
    velocity = at.from_x * x_dm + at.from_prediction * predictions(kind, alpha, sigma, data, noise)
    torch.testing.assert_close(velocity, data - noise, rtol=0, atol=1e-11)


# Epsilon with zero terminal SNR is refused when the config is read: test_schedule.
@pytest.mark.parametrize(
    ("config", "kind"),
    [*((SD, kind) for kind in DIFFUSION_PREDICTIONS), (ZERO_SNR, "v_prediction"), (ZERO_SNR, "sample")],
)
def test_coefficients_are_finite_at_both_ends(kind, config):
    schedule = NoiseSchedule.from_scheduler_config(config)
    at = align(schedule, kind, torch.tensor([0.0, 1e-9, 0.03, 0.98, 1 - 1e-9, 1.0]))
    for coefficient in (at.scale, at.from_x, at.from_prediction):
        assert coefficient.isfinite().all() and coefficient.abs().max() < 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2", "zero_snr", "trained_betas"])
def test_ten_thousand_drawn_cases(beta_schedule, dtype, holds):
    """500 draws for each schedule, dtype and prediction type that fit: a perfect answer is the straight velocity.

    A network's answer is as exact as its dtype, and the conversion divides it by alpha or sigma.
    """
    config = {
        "zero_snr": ZERO_SNR,
        "trained_betas": {"trained_betas": torch.linspace(0.001, 0.3, 50).tolist()},
    }.get(beta_schedule, {**SD, "beta_schedule": beta_schedule})
    schedule = NoiseSchedule.from_scheduler_config(config)
    generator = torch.Generator().manual_seed(1)
    low, high = schedule.trained_range
    t = low + (high - low) * torch.rand(500, generator=generator, dtype=torch.float64)
    data = 3 * torch.randn(500, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in alpha_sigma(t))
    x_t = (1 - t[:, None]) * noise + t[:, None] * data
    for kind in DIFFUSION_PREDICTIONS:
        if kind == "epsilon" and low == 0:
            continue
        answer = predictions(kind, alpha, sigma, data, noise).to(dtype)
        velocity = VelocityField(lambda x, timestep, answer=answer: answer, schedule, kind)(x_t, t)
        divisor = {"epsilon": alpha, "v_prediction": 1.0, "sample": sigma}[kind]
        error = (velocity.double() - (data - noise)) * divisor / (1 + data.abs() + noise.abs())
        units = error.abs().max() / torch.finfo(dtype).eps
        holds(
            "28,000 drawn cases: 5 schedules, 4 dtypes, 3 prediction types; units in the dtype's last place", units, 4
        )


def test_the_three_prediction_types_agree(holds):
    generator = torch.Generator().manual_seed(2)
    t = torch.linspace(*SCHEDULE.trained_range, 200, dtype=torch.float64)
    data, noise = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in alpha_sigma(t))
    x_t = (1 - t[:, None]) * noise + t[:, None] * data
    velocities = []
    for kind in DIFFUSION_PREDICTIONS:
        answer = predictions(kind, alpha, sigma, data, noise)
        velocities.append(VelocityField(lambda x, timestep, a=answer: a, SCHEDULE, kind)(x_t, t))
    for velocity in velocities[1:]:
        holds("the three prediction types give the same velocity", (velocity - velocities[0]).abs().max(), 1e-11)


@pytest.mark.parametrize("kind", DIFFUSION_PREDICTIONS)
def test_guiding_the_velocity_equals_guiding_the_prediction(kind, holds):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def network(x, timestep, *, condition):
        return torch.tanh(x @ weight + condition) * (1 + timestep[:, None].double() / 1000)

    x, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    with_it, without = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    ours = guided(VelocityField(network, SCHEDULE, kind), 5.0, {"condition": with_it}, {"condition": without})(x, t)

    def guided_network(x, timestep):
        null = network(x, timestep, condition=without)
        return null + 5.0 * (network(x, timestep, condition=with_it) - null)

    apart = (ours - VelocityField(guided_network, SCHEDULE, kind)(x, t)).abs().max()
    holds("guidance commutes with the conversion, at scale 5", apart, 1e-9)


@pytest.mark.parametrize("kind", DIFFUSION_PREDICTIONS)
def test_a_velocity_gives_back_the_prediction(kind, holds):
    """The conversion loses nothing inside the trained range: it can be undone."""
    t = torch.linspace(0.07, 0.97, 50, dtype=torch.float64)
    x_dm, prediction = torch.randn(2, 50, 4, dtype=torch.float64)
    at = align(SCHEDULE, kind, t)
    velocity = expand(at.from_x, x_dm) * x_dm + expand(at.from_prediction, x_dm) * prediction
    back = (velocity - expand(at.from_x, x_dm) * x_dm) / expand(at.from_prediction, x_dm)
    holds("the conversion can be undone", (back - prediction).abs().max(), 1e-10)


@pytest.mark.parametrize("state_dtype", ["float32", "the network's"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFUSION_PREDICTIONS)
def test_coefficients_stay_wide_under_networks_of_half_precision(kind, dtype, state_dtype, holds):
    """Of a rounded answer the velocity is what float64 makes of it: the conversion adds no half-precision rounding."""
    generator = torch.Generator().manual_seed(4)
    t = torch.linspace(*SCHEDULE.trained_range, 200, dtype=torch.float64)
    x_t = torch.randn(200, 5, generator=generator)
    x_t = x_t.to(dtype) if state_dtype != "float32" else x_t
    answer = torch.randn(200, 5, generator=generator).to(dtype)
    velocity = VelocityField(lambda x, timestep: answer, SCHEDULE, kind)(x_t, t)
    at = align(SCHEDULE, kind, t)
    from_x, from_prediction = (c[:, None] for c in (at.from_x * at.scale, at.from_prediction))
    wanted = from_x * x_t.double() + from_prediction * answer.double()
    size = (from_x * x_t.double()).abs() + (from_prediction * answer.double()).abs() + 1
    assert velocity.dtype == torch.float32
    apart = ((velocity.double() - wanted) / size).abs().max()
    holds("bf16 and fp16 networks: the conversion adds no rounding of theirs, against float64", apart, 5e-7)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"prediction_type='eps'.*Use one of epsilon"):
        VelocityField(lambda x, timestep: x, SCHEDULE, "eps")


def test_epsilon_is_refused_where_a_trained_level_has_no_signal():
    schedule = NoiseSchedule.from_scheduler_config(ZERO_SNR)
    VelocityField(lambda x, timestep: x, schedule, "sample")
    with pytest.raises(ValueError, match=r"'epsilon' with zero terminal SNR.*Use a v_prediction base"):
        VelocityField(lambda x, timestep: x, schedule, "epsilon")


@pytest.mark.parametrize(
    "field",
    [
        VelocityField(lambda x, timestep: torch.cat([x, x], 1), SCHEDULE, "epsilon"),
        NaiveVelocityField(lambda x, timestep: torch.cat([x, x], 1), SCHEDULE),
    ],
)
def test_a_network_that_changes_the_shape_is_refused(field):
    with pytest.raises(ValueError, match="predicts variances"):
        field(torch.zeros(1, 4, 2, 2), torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0.5, 1.2], r"must lie in \[0, 1\].*1.2.*NoiseSchedule.flow_times"),
        ([0.5, -0.1], r"must lie in \[0, 1\]"),
        ([0.5, float("nan")], r"must lie in \[0, 1\]"),
        ([0.5], r"shape \(1,\).*One flow time per sample|Give one flow time per sample"),
    ],
)
def test_times_that_are_no_flow_times_are_refused(t, message):
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match=message):
        field(torch.zeros(2, 4), torch.tensor(t))
