"""The three losses are zero for a perfect network, and per sample."""

import pytest
import torch

from d2f_core.objective.alignment import VelocityField, alpha_sigma
from d2f_core.objective.loss import LOSSES, flow_validation_loss
from d2f_core.objective.path import draw_times, interpolate
from d2f_core.objective.schedule import NoiseSchedule
from d2f_core.objective.time_sampling import TimeSampling

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
        return NOISE - DATA

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


def test_validation_loss_is_the_flow_loss_at_each_of_the_times():
    field = VelocityField(lambda x, timestep: torch.sin(x), SCHEDULE, "v_prediction")
    times = torch.tensor([0.1, 0.5, 0.9])
    expected = torch.stack([LOSSES["diff2flow"](field, DATA, NOISE, t.expand(6)) for t in times])
    torch.testing.assert_close(flow_validation_loss(field, DATA, NOISE, times), expected)
    assert flow_validation_loss(lambda x, t: DATA - NOISE, DATA, NOISE, times).max() == 0
    with pytest.raises(ValueError, match=r"noise \(1, 4, 2, 2\). Give both ends alike"):
        flow_validation_loss(field, DATA, NOISE[:1], times)


@pytest.mark.parametrize("name", LOSSES)
def test_a_network_that_changes_the_shape_is_refused(name):
    field = VelocityField(lambda x, timestep: x[:, :1], SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match=r"maps \(6, 4, 2, 2\) to \(6, 1, 2, 2\)"):
        LOSSES[name](field, DATA, NOISE, UNIFORM)


@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_a_min_snr_gamma_that_is_no_bound_is_refused(gamma):
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match=r"min_snr_gamma=.* must be 0"):
        LOSSES["diffusion"](field, DATA, NOISE, UNIFORM, min_snr_gamma=gamma)


def test_validation_loss_has_one_number_per_time_and_sample():
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "epsilon")
    times = torch.tensor([0.1, 0.5, 0.9])
    whole = flow_validation_loss(field, DATA, NOISE, times)
    assert whole.shape == (3, 6)
    mask = torch.ones_like(DATA)
    mask[..., 0] = 0
    masked = flow_validation_loss(field, DATA, NOISE, times, mask)
    other = torch.where(mask == 1, DATA, 7.0)
    assert not torch.equal(masked, whole)
    torch.testing.assert_close(flow_validation_loss(field, other, NOISE, times, mask), masked)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("compat", [False, True])
def test_diff2flow_is_the_squared_error_of_the_velocity_field(kind, compat):
    """The loss mixes the network's state at once; it must be what the field and its target give, at both ends too."""
    field = VelocityField(lambda x, timestep: torch.sin(3 * x), SCHEDULE, kind, compat)
    t = torch.tensor([0.0, 0.03, 0.4, 0.6, 0.98, 0.999 if compat else 1.0], dtype=torch.float64)
    data, noise = DATA.double(), NOISE.double()
    expected = (field(interpolate(noise, data, t), t) - (data - noise)).square().flatten(1).mean(1).float()
    torch.testing.assert_close(LOSSES["diff2flow"](field, data, noise, t), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_leaves_only_what_it_marks(name):
    mask = torch.zeros(6, 1, 2, 2)
    mask[:, :, 0] = 1
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "v_prediction")
    masked = LOSSES[name](field, DATA, NOISE, UNIFORM, mask=mask)
    torch.testing.assert_close(masked, LOSSES[name](field, DATA[:, :, :1], NOISE[:, :, :1], UNIFORM))
    torch.testing.assert_close(
        LOSSES[name](field, DATA, NOISE, UNIFORM, mask=torch.ones(6, 1, 2, 2)),
        LOSSES[name](field, DATA, NOISE, UNIFORM),
    )
    mask[2] = 0
    assert LOSSES[name](field, DATA, NOISE, UNIFORM, mask=mask).isnan().tolist() == [i == 2 for i in range(6)]
    with pytest.raises(ValueError, match=r"mask of shape \(6, 2\).*does not fit"):
        LOSSES[name](field, DATA, NOISE, UNIFORM, mask=torch.ones(6, 2))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise": NOISE[:1]}, r"data has shape \(6, 4, 2, 2\), noise \(1, 4, 2, 2\)"),
        ({"noise": NOISE[:, :1]}, r"noise \(6, 1, 2, 2\). Give both ends alike"),
        ({"uniform": UNIFORM[:1]}, r"t has shape \(1,\).*one flow time per sample"),
        ({"uniform": UNIFORM[:, None]}, r"t has shape \(6, 1\)"),
        ({"uniform": UNIFORM + 0.5}, r"must lie in \[0, 1\].*to 1.45"),
        ({"uniform": UNIFORM - 0.2}, r"must lie in \[0, 1\].*got -0.1"),
        ({"uniform": UNIFORM * torch.nan}, r"must lie in \[0, 1\]"),
        ({"mask": torch.ones(6, 1, 3, 2)}, r"mask of shape \(6, 1, 3, 2\) does not fit"),
    ],
)
def test_what_broadcasting_or_clamping_would_hide_is_refused(name, changed, message):
    field = VelocityField(lambda x, timestep: x, SCHEDULE, "v_prediction")
    with pytest.raises(ValueError, match=message):
        LOSSES[name](field, **{"data": DATA, "noise": NOISE, "uniform": UNIFORM} | changed)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_data_error_alike_in_every_prediction_type(kind):
    """An error in the data estimate of size 1 costs min(snr, gamma), whatever the network predicts."""
    timestep = (UNIFORM.double() * 1000).long()
    alpha_bar = SCHEDULE.alphas_cumprod[timestep].float()[:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    data = DATA + 1
    noise = (alpha * DATA + sigma * NOISE - alpha * data) / sigma
    wrong = {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[kind]
    field = VelocityField(lambda x, step: wrong, SCHEDULE, kind)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    torch.testing.assert_close(
        LOSSES["diffusion"](field, DATA, NOISE, UNIFORM, min_snr_gamma=5.0), snr.clamp(max=5.0), rtol=1e-3, atol=1e-4
    )


def test_flow_times_of_the_flow_losses_can_be_chosen():
    seen = {}

    def network(x, timestep):
        seen["timestep"] = timestep
        return x

    times = TimeSampling(distribution="logit_normal", mean=0.5, shift=2.0)
    LOSSES["flow_matching"](VelocityField(network, SCHEDULE, "epsilon"), DATA, NOISE, UNIFORM, times=times)
    torch.testing.assert_close(seen["timestep"], 1000 * (1 - draw_times(times, UNIFORM)))
    LOSSES["diff2flow"](VelocityField(network, SCHEDULE, "epsilon"), DATA, NOISE, UNIFORM, times=times)
    torch.testing.assert_close(seen["timestep"], SCHEDULE.timestep_at(draw_times(times, UNIFORM)).float())
