"""Networks that put out velocities: rectified-flow bases, and naively trained ones with either sign."""

import pytest
import torch

from benchmarks.closed_form import gaussian
from d2f_core.objective.alignment import NaiveVelocityField, VelocityField, align
from d2f_core.objective.loss import LOSSES, flow_validation_loss
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import FlowTimes, NoiseSchedule, ScheduleError
from d2f_core.objective.solver import integrate, uniform_times
from d2f_core.objective.time_sampling import NaiveTarget, TimeSampling

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = FlowTimes(1000)
DATA, NOISE = torch.randn(2, 6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
UNIFORM = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])


def test_a_flow_network_is_asked_at_the_state_itself_and_its_output_turned_round():
    seen = {}

    def network(x, timestep):
        seen.update(x=x, timestep=timestep)
        return NOISE - DATA

    x_t = interpolate(NOISE, DATA, UNIFORM)
    velocity = VelocityField(network, FLOW, "flow_prediction")(x_t, UNIFORM)
    torch.testing.assert_close(velocity, DATA - NOISE)
    torch.testing.assert_close(seen["x"], x_t)
    torch.testing.assert_close(seen["timestep"], 1000 * (1 - UNIFORM))


def test_diff2flow_on_a_flow_network_is_plain_flow_matching():
    field = VelocityField(lambda x, timestep: torch.sin(x), FLOW, "flow_prediction")
    times = TimeSampling(shift=2.5)
    torch.testing.assert_close(
        LOSSES["diff2flow"](field, DATA, NOISE, UNIFORM, times=times),
        LOSSES["flow_matching"](field, DATA, NOISE, UNIFORM, times=times),
    )
    perfect = VelocityField(lambda x, timestep: NOISE - DATA, FLOW, "flow_prediction")
    assert LOSSES["diff2flow"](perfect, DATA, NOISE, UNIFORM).max() < 1e-12


@pytest.mark.parametrize(("target", "sign"), [("noise_minus_data", -1), ("data_minus_noise", 1)])
def test_a_naive_network_is_read_by_the_sign_that_it_was_trained_with(target: NaiveTarget, sign: int):
    def network(x, timestep):
        return sign * (DATA - NOISE)

    naive = NaiveVelocityField(network, FLOW, target)
    torch.testing.assert_close(naive(interpolate(NOISE, DATA, UNIFORM), UNIFORM), DATA - NOISE)
    field = VelocityField(network, NoiseSchedule.from_scheduler_config(SD), "epsilon")
    assert LOSSES["flow_matching"](field, DATA, NOISE, UNIFORM, target=target).max() == 0
    other: NaiveTarget = "data_minus_noise" if sign < 0 else "noise_minus_data"
    assert LOSSES["flow_matching"](field, DATA, NOISE, UNIFORM, target=other).min() > 0.1


def test_a_perfect_epsilon_network_begins_near_noise_minus_data_and_at_the_best_by_alignment():
    """Gaussian data of deviation 0.5: mean squared velocity error over uniform times, before any training."""
    schedule, data = NoiseSchedule.from_scheduler_config(SD), gaussian(0.5)
    denoiser = data.denoiser(schedule, "epsilon", torch.float64)
    generator = torch.Generator().manual_seed(0)
    ends = data.draw(20_000, generator), torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    times = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    fields = {
        "diff2flow": VelocityField(denoiser, schedule, "epsilon"),
        "noise - data": NaiveVelocityField(denoiser, schedule),
        "data - noise": NaiveVelocityField(denoiser, schedule, "data_minus_noise"),
        "exact": data.velocity,
    }
    found = {name: float(flow_validation_loss(field, *ends, times).mean()) for name, field in fields.items()}
    for name, wanted in (("diff2flow", 0.785), ("noise - data", 0.904), ("data - noise", 2.460), ("exact", 0.785)):
        assert found[name] == pytest.approx(wanted, abs=0.01), found


def test_a_flow_network_is_integrated_to_both_ends():
    """The exact network of Gaussian data, by Euler and back by rk4."""
    data = gaussian(0.5)
    field = VelocityField(lambda x, s: -data.velocity(x.double(), 1 - s.double() / 1000), FLOW, "flow_prediction")
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made, _ = integrate(field, noise, uniform_times(50), "rk4")
    torch.testing.assert_close(made, 0.5 * noise, rtol=1e-4, atol=1e-5)
    back, _ = integrate(field, made, uniform_times(50).flip(0), "rk4")
    torch.testing.assert_close(back, noise, rtol=1e-4, atol=1e-5)


def test_what_cannot_belong_together_is_refused():
    schedule = NoiseSchedule.from_scheduler_config(SD)
    for table, kind in ((schedule, "flow_prediction"), (FLOW, "epsilon")):
        with pytest.raises(ScheduleError, match=f"prediction_type='{kind}' does not go with {type(table).__name__}"):
            VelocityField(lambda x, timestep: x, table, kind)
    with pytest.raises(ScheduleError, match="the diffusion loss needs a diffusion model"):
        LOSSES["diffusion"](VelocityField(lambda x, timestep: x, FLOW, "flow_prediction"), DATA, NOISE, UNIFORM)


def test_there_is_nothing_to_align_at_any_time():
    at = align(FLOW, "flow_prediction", UNIFORM)
    assert at.scale.tolist() == [1] * 6 and at.from_x.tolist() == [0] * 6 and at.from_prediction.tolist() == [-1] * 6
