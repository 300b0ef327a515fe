"""The table of noise levels is the one that the network was trained with."""

import json

import diffusers
import pytest
import torch

from d2f_core.objective.schedule import (
    FlowTimes,
    NoiseSchedule,
    ScheduleError,
    flow_shift,
    prediction_type_of,
    read_schedule,
)

BASE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


def saved(scheduler):
    """What a scheduler writes as its scheduler_config.json."""
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_table_equals_the_one_of_diffusers(kind, zero_snr):
    config = {**BASE, "beta_schedule": kind, "rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod
    ours = NoiseSchedule.from_scheduler_config(config).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-5, atol=2e-7)


def test_trained_betas_are_taken_as_they_are():
    schedule = NoiseSchedule.from_scheduler_config({"trained_betas": [0.1, 0.2, 0.3]})
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_timestep_at_inverts_the_table(kind):
    schedule = NoiseSchedule.from_scheduler_config({**BASE, "beta_schedule": kind})
    torch.testing.assert_close(
        schedule.timestep_at(schedule.flow_times), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_timestep_outside_the_trained_range_is_the_nearest_one():
    schedule = NoiseSchedule.from_scheduler_config({**BASE, "beta_schedule": "scaled_linear"})
    assert schedule.timestep_at(torch.tensor([0.0, 1.0])).tolist() == [999, 0]
    assert schedule.trained_range == pytest.approx((0.0640, 0.9717), abs=1e-4)


def test_zero_terminal_snr_reaches_pure_noise():
    config = {
        **BASE,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    assert NoiseSchedule.from_scheduler_config(config).trained_range[0] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BASE, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}, "epsilon.*v_prediction base"),
        ({"beta_schedule": "linear"}, "num_train_timesteps"),
        ({"num_train_timesteps": 10, "beta_schedule": "linear"}, "beta_start"),
        ({**BASE, "beta_schedule": "sigmoid"}, "'sigmoid' is not known"),
        ({"trained_betas": [0.1, 1.5]}, r"in \(0, 1\), got shape \(2,\), and in it 1.5"),
        ({"trained_betas": [0.1, float("nan")]}, "and in it nan"),
        ({"trained_betas": [0.1]}, r"at least two numbers in \(0, 1\), got shape \(1,\)\. Take"),
        ({"trained_betas": ["a", 0.2]}, "trained_betas are no list of numbers"),
        ({**BASE, "beta_schedule": "linear", "beta_start": None}, "beta_start=None must be a number above 0"),
        ({**BASE, "beta_schedule": "linear", "beta_end": "0.1"}, "beta_end='0.1' must be a number above 0"),
        ({**BASE, "beta_schedule": "linear", "beta_end": float("nan")}, "beta_end=nan must be a number above 0"),
        ({**BASE, "beta_schedule": "linear", "num_train_timesteps": None}, "num_train_timesteps=None must be a whole"),
        ({**BASE, "beta_schedule": "linear", "num_train_timesteps": -5}, "num_train_timesteps=-5 must be a whole"),
        ({**BASE, "beta_schedule": "linear", "num_train_timesteps": 99.5}, "num_train_timesteps=99.5 must be a whole"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 1000}, "num_train_timesteps=1000 contradicts the 2"),
        (
            {**BASE, "beta_schedule": "linear", "prediction_type": "flow_prediction"},
            "of a flow model .*nothing to align",
        ),
        ({**BASE, "beta_start": 0.1, "beta_schedule": "linear"}, "beta_start=0.1 is above beta_end=0.012"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(config, message):
    with pytest.raises(ScheduleError, match=message):
        NoiseSchedule.from_scheduler_config(config)


@pytest.mark.parametrize(
    ("config", "timesteps", "shift"),
    [
        (saved(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), 1000, 3.0),
        (saved(diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=500)), 500, 1.0),
        (
            saved(
                diffusers.DPMSolverMultistepScheduler(
                    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5
                )
            ),
            1000,
            2.5,
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 1000, 1.0),
        ({"prediction_type": "flow_prediction"}, 1000, 1.0),
    ],
)
def test_a_flow_models_config_is_known_for_what_it_is(config, timesteps, shift):
    assert prediction_type_of(config) == "flow_prediction"
    assert read_schedule(config) == FlowTimes(timesteps)
    assert flow_shift(config) == shift
    with pytest.raises(ScheduleError, match=r"nothing to align\. Read it by read_schedule"):
        NoiseSchedule.from_scheduler_config(config)


def test_a_diffusion_models_config_gives_its_table():
    config = {**BASE, "beta_schedule": "linear"}
    table = read_schedule(config)
    assert isinstance(table, NoiseSchedule)
    assert torch.equal(table.alphas_cumprod, NoiseSchedule.from_scheduler_config(config).alphas_cumprod)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"},
            "prediction_type='epsilon' contradicts _class_name='FlowMatchEulerDiscreteScheduler'",
        ),
        ({"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "contradicts .*use_flow_sigmas=True"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "EDM's noise levels"),
        ({"prediction_type": "flow_prediction", "num_train_timesteps": 0}, "num_train_timesteps=0 must be a whole"),
        ({"prediction_type": "velocity"}, "'velocity' is not known. Use one of epsilon, v_prediction, sample, flow_p"),
    ],
)
def test_a_config_that_says_two_things_is_refused(config, message):
    with pytest.raises(ScheduleError, match=message):
        read_schedule(config)
