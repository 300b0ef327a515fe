"""diffusers' own pipelines sample a Diff2Flow model as this project's sampler does."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from d2f_core.model.artifact import load_model
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler, SchedulerUseError
from d2f_core.model.sampling import sample_latents
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import ScheduleError
from d2f_core.objective.solver import NonFiniteStateError
from tests.flow.tiny_base import write_tiny_base

GENERATOR = torch.Generator().manual_seed(0)
NOISE, DATA = torch.randn(2, 2, 4, 8, 8, generator=GENERATOR)
STATES, NULL = torch.randn(2, 2, 8, 384, generator=GENERATOR)
TERMINAL = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def with_schedule(base, tmp_path):
    """The tiny base with other fields in its scheduler config."""

    def change(**fields) -> Path:
        for part in ("unet", "vae"):
            (tmp_path / part).symlink_to(base / part)
        config = json.loads((base / "scheduler/scheduler_config.json").read_text())
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({**config, **fields}))
        return tmp_path

    return change


def scheduler_of(directory: Path, **fields) -> Diff2FlowScheduler:
    return Diff2FlowScheduler.from_config(DDIMScheduler.load_config(directory / "scheduler"), **fields)


def pipeline_of(directory: Path, kind: type, **fields):
    pipeline = kind(
        vae=AutoencoderKL.from_pretrained(directory / "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(directory / "unet"),
        scheduler=scheduler_of(directory, **fields),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, *, steps: int, guidance: float, output_type: str = "latent", **inputs) -> torch.Tensor:
    inputs = {"latents": NOISE, **inputs} if "image" not in inputs else inputs
    return pipeline(
        prompt_embeds=STATES,
        negative_prompt_embeds=NULL,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type=output_type,
        **inputs,
    ).images


@pytest.mark.parametrize(
    ("fields", "steps", "guidance"),
    [
        ({}, 1, 1.0),
        ({}, 40, 2.0),
        ({"prediction_type": "v_prediction"}, 10, 3.0),
        ({"prediction_type": "sample"}, 4, 3.0),
        (TERMINAL, 10, 1.0),
    ],
)
def test_an_unmodified_pipeline_gives_the_latents_of_our_own_sampler(with_schedule, fields, steps, guidance):
    directory = with_schedule(**fields)
    ours, _ = sample_latents(
        load_model(str(directory)), NOISE, STATES, NULL, solver="euler", steps=steps, guidance=guidance
    )
    theirs = run(pipeline_of(directory, StableDiffusionPipeline), steps=steps, guidance=guidance)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)  # they reach 144
    assert (ours - NOISE).abs().max() > 0.1


def test_its_images_are_those_of_our_own_sampler_and_decoder(base):
    model = load_model(str(base))
    latents, _ = sample_latents(model, NOISE, STATES, NULL, solver="euler", steps=10, guidance=3.0)
    ours = (load_autoencoder(model.base).decode(latents) / 2 + 0.5).clamp(0, 1)
    theirs = run(pipeline_of(base, StableDiffusionPipeline), steps=10, guidance=3.0, output_type="pt")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.01


def test_a_second_run_of_the_same_pipeline_starts_anew(base):
    pipeline = pipeline_of(base, StableDiffusionPipeline)
    first = run(pipeline, steps=3, guidance=2.0)
    assert torch.equal(run(pipeline, steps=3, guidance=2.0), first)


@pytest.mark.parametrize("grid", ["uniform", "beta"])
def test_shift_and_grid_place_the_flow_times_as_our_own_sampler_does(base, grid):
    model, fields = load_model(str(base)), {"shift": 3.0, "time_grid": grid}
    ours, _ = sample_latents(model, NOISE, STATES, NULL, solver="euler", steps=6, guidance=2.0, **fields)
    theirs = run(pipeline_of(base, StableDiffusionPipeline, **fields), steps=6, guidance=2.0)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_timesteps_are_fractional_float32_and_fall(base):
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.dtype == torch.float32 and len(scheduler.timesteps) == 7
    assert all(a > b for a, b in itertools.pairwise(scheduler.timesteps.tolist()))
    assert any(timestep != round(timestep) for timestep in scheduler.timesteps.tolist())
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


def test_a_scheduler_survives_a_round_trip_and_reads_any_scheduler_config_of_diffusers(base, tmp_path):
    scheduler = scheduler_of(base, shift=2.0)
    scheduler.save_pretrained(tmp_path)
    again = Diff2FlowScheduler.from_pretrained(tmp_path)
    assert all(again.config[field] == value for field, value in scheduler.config.items() if field[0] != "_")
    assert (again.config.shift, again.config.start) == (2.0, "noise")
    back = DDIMScheduler.from_config(again.config)
    assert back.config.clip_sample is False and back.config.beta_end == 0.012
    for either in (scheduler, again):
        either.set_timesteps(9)
    assert torch.equal(scheduler.timesteps, again.timesteps)
    trained = Diff2FlowScheduler(num_train_timesteps=3, trained_betas=[0.01, 0.02, 0.03])
    assert len(trained) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_keep_their_type_and_are_moved_in_float32_or_wider(base, dtype):
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(4)
    state, prediction = NOISE.to(dtype), DATA.to(dtype)
    scaled = scheduler.scale_model_input(state, scheduler.timesteps[0])
    (moved,) = scheduler.step(prediction, scheduler.timesteps[0], state, return_dict=False)
    assert scaled.dtype == moved.dtype == dtype
    exact = scheduler_of(base)
    exact.set_timesteps(4)
    exact.scale_model_input(state.double(), exact.timesteps[0])
    expected = exact.step(prediction.double(), exact.timesteps[0], state.double()).prev_sample
    torch.testing.assert_close(moved, expected.to(dtype), rtol=0, atol=0 if dtype == torch.float64 else 0.02)


def test_noise_is_added_at_the_flow_time_of_a_trained_level(base):
    scheduler = scheduler_of(base)
    levels = torch.tensor([0, 999])
    t = scheduler._schedule.flow_times[levels]
    expected = interpolate(NOISE, DATA, t)
    assert torch.equal(scheduler.add_noise(DATA, NOISE, levels), expected)
    between = scheduler.add_noise(DATA[:1], NOISE[:1], torch.tensor([0.5]))
    middle = scheduler._schedule.flow_times[:2].mean()
    torch.testing.assert_close(between, interpolate(NOISE[:1], DATA[:1], middle.reshape(1)))


def test_noise_is_added_where_the_run_stands(base):
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(4)
    scheduler.scale_model_input(NOISE, scheduler.timesteps[0])
    scheduler.step(DATA, scheduler.timesteps[0], NOISE)
    added = scheduler.add_noise(DATA, NOISE, scheduler.timesteps[1:2])
    torch.testing.assert_close(added, 0.75 * NOISE + 0.25 * DATA)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None])
def test_an_impossible_number_of_steps_is_refused(base, steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be (a whole number|at least 1). Use 4 to 50"):
        scheduler_of(base).set_timesteps(steps)


def test_numpys_integers_count_steps(base):
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(np.int64(4))
    scheduler.set_begin_index(np.int32(3))
    assert (scheduler.num_inference_steps, scheduler.begin_index) == (4, 3)
    assert type(scheduler.num_inference_steps) is type(scheduler.begin_index) is int


@pytest.mark.parametrize("begin", [2, -1, 1.0, True, None])
def test_an_impossible_begin_is_refused(base, begin):
    scheduler = scheduler_of(base)
    with pytest.raises(SchedulerUseError, match="was set before a run"):
        scheduler.set_begin_index(0)
    scheduler.set_timesteps(2)
    with pytest.raises(SchedulerUseError, match=f"begin_index={begin} must"):
        scheduler.set_begin_index(begin)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_shift_is_refused(base, shift):
    with pytest.raises(ScheduleError, match="shift="):
        scheduler_of(base, shift=shift)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rescale_betas_zero_snr": True}, "zero_snr"),
        ({"prediction_type": "velocity"}, "prediction_type='velocity'"),
        ({"start": "level"}, "start='level' must be 'noise'"),
        ({"time_grid": "even"}, "time_grid='even' is not known. Use one of uniform, beta"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"trained_betas": [0.1, 0.2]}, "contradicts the 2 trained_betas"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(base, fields, reason):
    with pytest.raises(ScheduleError, match=reason):
        scheduler_of(base, **fields)


def test_calls_out_of_order_are_refused(base):
    scheduler = scheduler_of(base)
    with pytest.raises(SchedulerUseError, match="Call set_timesteps"):
        scheduler.scale_model_input(NOISE, 999)
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps
    with pytest.raises(SchedulerUseError, match="scale_model_input"):
        scheduler.step(DATA, first, NOISE)
    for unknown in (math.nan, 700):
        with pytest.raises(SchedulerUseError, match="the run of 2 steps has none like it"):
            scheduler.scale_model_input(NOISE, unknown)
    scheduler.scale_model_input(NOISE, first)
    with pytest.raises(SchedulerUseError, match="shapes must be equal"):
        scheduler.step(DATA[:, :2], first, NOISE)
    with pytest.raises(NonFiniteStateError, match="output is not finite at step 0, timestep 999"):
        scheduler.step(DATA / 0, first, NOISE)
    with pytest.raises(SchedulerUseError, match=r"is not the next one: the run of 2 steps has 999 at step 0"):
        scheduler.scale_model_input(NOISE, second)
    for timestep in (first, second):
        scheduler.scale_model_input(NOISE, timestep)
        scheduler.step(DATA, timestep, NOISE)
    with pytest.raises(SchedulerUseError, match="all 2 steps of this run are done"):
        scheduler.scale_model_input(NOISE, second)
    with pytest.raises(SchedulerUseError, match="timestep 1000 is none of this run and must lie in 0"):
        scheduler_of(base).add_noise(DATA, NOISE, torch.tensor([1000]))
