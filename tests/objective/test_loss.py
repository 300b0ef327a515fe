"""The three losses are zero for a perfect network, and per sample."""

import pytest
import torch

from d2f_core.objective.alignment import VelocityField, alpha_sigma
from d2f_core.objective.loss import LOSSES, flow_validation_loss
from d2f_core.objective.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.from_scheduler_config(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
DATA, NOISE = torch.randn(6, 4, 2, 2), torch.randn(6, 4, 2, 2)
UNIFORM = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diff2flow_is_zero_for_a_network_that_knows_the_answer(kind):
    alpha, sigma = (c[:, None, None, None] for c in alpha_sigma(UNIFORM))
    answer = {"epsilon": NOISE, "v_prediction": alpha * NOISE - sigma * DATA, "sample": DATA}[kind]
    loss = LOSSES["diff2flow"](VelocityField(lambda x, timestep: answer, SCHEDULE, kind), DATA, NOISE, UNIFORM)
    assert loss.shape == (6,) and loss.max() < 1e-9


def test_flow_matching_feeds_the_flow_state_and_a_reversed_clock():
    seen = {}

    def network(x, timestep):
        seen.update(x=x, timestep=timestep)
        return DATA - NOISE

    loss = LOSSES["flow_matching"](VelocityField(network, SCHEDULE, "epsilon"), DATA, NOISE, UNIFORM)
    assert loss.max() == 0
    torch.testing.assert_close(seen["timestep"], 1000 * (1 - UNIFORM))
    time = UNIFORM[:, None, None, None]
    torch.testing.assert_close(seen["x"], (1 - time) * NOISE + time * DATA)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_uses_integer_timesteps_of_the_table(kind):
    def network(x, timestep):
        assert torch.equal(timestep, torch.tensor([100.0, 300, 500, 700, 900, 950]))
        alpha_bar = SCHEDULE.alphas_cumprod[timestep.long()].float()[:, None, None, None]
        torch.testing.assert_close(x, alpha_bar.sqrt() * DATA + (1 - alpha_bar).sqrt() * NOISE)
        v = alpha_bar.sqrt() * NOISE - (1 - alpha_bar).sqrt() * DATA
        return {"epsilon": NOISE, "v_prediction": v, "sample": DATA}[kind]

    uniform = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.95]) + 1e-4
    assert LOSSES["diffusion"](VelocityField(network, SCHEDULE, kind), DATA, NOISE, uniform).max() < 1e-11


def test_losses_of_samples_do_not_mix():
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "epsilon")
    whole = LOSSES["diff2flow"](field, DATA, NOISE, UNIFORM)
    alone = LOSSES["diff2flow"](field, DATA[2:3], NOISE[2:3], UNIFORM[2:3])
    torch.testing.assert_close(whole[2:3], alone)


def test_validation_loss_has_one_number_per_time_and_sample():
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "epsilon")
    assert flow_validation_loss(field, DATA, NOISE, torch.tensor([0.1, 0.5, 0.9])).shape == (3, 6)
