"""Runs of the diffusers scheduler that start late, or at the last trained level, and other schedulers' configs."""

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2f_core.model.artifact import load_model
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.objective.guidance import guided
from d2f_core.objective.path import interpolate
from d2f_core.objective.schedule import ScheduleError
from d2f_core.objective.solver import NonFiniteStateError, integrate, uniform_times
from tests.devices import READS
from tests.model.test_diffusers_scheduler import (  # noqa: F401
    DATA,
    NOISE,
    NULL,
    STATES,
    base,
    pipeline_of,
    run,
    scheduler_of,
)


class OlderImageToImage(StableDiffusionImg2ImgPipeline):
    """Tells the scheduler nothing of its start, as pipelines for video and those of older releases do not."""

    def get_timesteps(self, num_inference_steps, strength, device):
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        return self.scheduler.timesteps[num_inference_steps - steps :], steps


@pytest.mark.parametrize("pipeline", [StableDiffusionImg2ImgPipeline, OlderImageToImage])
@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.975, 1), (0.95, 2), (0.5, 20)])
def test_image_to_image_starts_on_the_path_even_where_flow_times_share_a_timestep(base, pipeline, strength, first):  # noqa: F811
    """Of 40 steps the first three are asked at the last trained timestep."""
    pipeline = pipeline_of(base, pipeline)
    generator = torch.Generator().manual_seed(3)
    theirs = run(pipeline, steps=40, guidance=2.0, image=DATA, strength=strength, generator=generator)
    assert [round(timestep, 3) for timestep in pipeline.scheduler.timesteps[:3].tolist()] == [999.0] * 3
    noise = torch.randn(DATA.shape, generator=torch.Generator().manual_seed(3))
    times = uniform_times(40)[first:]
    field = guided(load_model(str(base)).velocity_field, 2.0, {"text_states": STATES}, {"text_states": NULL})
    with torch.inference_mode():
        ours, _ = integrate(field, interpolate(noise, DATA, times[:1].expand(2)), times)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [4, 40, 1000])
def test_every_timestep_tells_its_step_and_a_whole_one_the_first_like_it(base, steps):  # noqa: F811
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(steps)
    noised = scheduler.add_noise(DATA[:1], NOISE[:1], scheduler.timesteps[-1:])
    torch.testing.assert_close(noised, interpolate(NOISE[:1], DATA[:1], scheduler.flow_times[-2:-1]))
    states = torch.cat([scheduler.add_noise(DATA[:1], NOISE[:1], t[None]) for t in scheduler.timesteps[:50]])
    torch.testing.assert_close(states, interpolate(NOISE[:1], DATA[:1], scheduler.flow_times[: len(states)]))
    assert (scheduler.timesteps - scheduler._at.timestep).abs().max() < 0.01, "the network would notice"
    assert torch.equal(scheduler.add_noise(DATA, NOISE, torch.tensor([999])), NOISE)


def test_noise_can_be_added_again_after_a_run(base):  # noqa: F811
    """As FreeInit does: it takes the last trained timestep for pure noise."""
    pipeline = pipeline_of(base, StableDiffusionPipeline)
    run(pipeline, steps=3, guidance=2.0)
    again = pipeline.scheduler.add_noise(DATA, NOISE, torch.full((2,), 999))
    assert torch.equal(again, NOISE)


class NoWaiting(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are, that counts how often a program waits for its results."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(READS) and args[0].device.type == "meta":
            self.reads += 1
            return args[0].dtype == torch.bool or 999.0
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            assert not (isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float64), f"{func}"
        return result


def test_a_run_on_another_device_needs_no_float64_and_waits_for_it_only_at_its_ends(base):  # noqa: F811
    scheduler = scheduler_of(base)
    with NoWaiting() as device:
        scheduler.set_timesteps(10, device="meta")
        state = scheduler.add_noise(DATA.to("meta"), NOISE, torch.tensor([999]))
        reads = []
        for timestep in scheduler.timesteps:
            prediction = scheduler.scale_model_input(state, timestep)
            state = scheduler.step(prediction, timestep, state).prev_sample
            reads.append(device.reads)
    assert reads == [1] * 9 + [2], "the first timestep, and in the last step whether all outputs were finite"


def test_what_was_not_finite_on_a_device_is_named_at_the_end_of_the_run(base):  # noqa: F811
    scheduler = scheduler_of(base)
    scheduler.set_timesteps(3)
    flags = iter([torch.tensor(True), torch.tensor(False), torch.tensor(True)])

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

        def isfinite(self):
            return next(flags)

    state = NOISE
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(state, timestep)
        output = DATA.as_subclass(OnDevice)
        if step == 2:
            with pytest.raises(NonFiniteStateError, match="not finite at step 1, timestep "):
                scheduler.step(output, timestep, state)
        else:
            state = scheduler.step(output, timestep, state).prev_sample.as_subclass(torch.Tensor)


def saved(scheduler) -> dict:
    """Its config as a file has it, with the class's name."""
    return json.loads(scheduler.to_json_string())


def ends(scheduler, steps: int, mean: float = 1.5, deviation: float = 0.5) -> Tensor:
    """Where the scheduler takes eleven noises by the perfect epsilon network of Gaussian data."""
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 11, dtype=torch.float64) * scheduler.init_noise_sigma
    bars = DDIMScheduler.from_config(scheduler.config).alphas_cumprod.double()
    for timestep in scheduler.timesteps:
        level = float(timestep.clamp(0, 999))
        bar = torch.lerp(bars[int(level)], bars[math.ceil(level)], level % 1)
        scaled = scheduler.scale_model_input(x, timestep)
        epsilon = (1 - bar).sqrt() * (scaled - bar.sqrt() * mean) / (bar * deviation**2 + 1 - bar)
        x = scheduler.step(epsilon, timestep, x).prev_sample
    return x


def test_a_run_from_the_last_trained_level_is_ddims_and_one_from_noise_is_not(base):  # noqa: F811
    config = DDIMScheduler.load_config(base / "scheduler")
    ddim = DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)
    trained, noise = (Diff2FlowScheduler.from_config(config, start=start) for start in ("trained", "noise"))
    torch.testing.assert_close(ends(trained, 1), ends(ddim, 1), rtol=0, atol=1e-5)
    apart = {(s.config.start, n): float((ends(s, n) - ends(ddim, n)).abs().max())
             for s in (trained, noise) for n in (50, 500)}  # fmt: skip
    assert apart["trained", 500] < 0.2 * apart["trained", 50] and apart["trained", 500] < 0.01, "it comes ever nearer"
    assert apart["noise", 500] > 0.05 > 5 * apart["trained", 500], apart


def test_what_samples_a_flow_model_is_read_as_such(base, tmp_path):  # noqa: F811
    for config in (
        saved(FlowMatchEulerDiscreteScheduler(shift=3.0)),
        saved(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
    ):
        scheduler = Diff2FlowScheduler.from_config(config)
        assert (scheduler.config.prediction_type, scheduler.config.shift) == ("flow_prediction", 3.0)
        Diff2FlowScheduler.from_config(config, shift=2.0).save_pretrained(tmp_path)
        assert Diff2FlowScheduler.from_pretrained(tmp_path).config.shift == 2.0
        scheduler.set_timesteps(4)
        assert torch.equal(scheduler.timesteps, (1000 * (1 - uniform_times(4, 3.0)[:-1])).float())
        state = NOISE
        for timestep in scheduler.timesteps:
            assert torch.equal(scheduler.scale_model_input(state, timestep), state)
            state = scheduler.step(NOISE - DATA, timestep, state).prev_sample
        torch.testing.assert_close(state, DATA)
        torch.testing.assert_close(
            Diff2FlowScheduler.from_config(config).add_noise(DATA, NOISE, torch.tensor([250])),
            0.25 * NOISE + 0.75 * DATA,
        )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (saved(EDMEulerScheduler()), "EDM"),
        (EDMEulerScheduler().config, "neither beta_schedule nor trained_betas"),
        (FlowMatchEulerDiscreteScheduler().config, "neither beta_schedule nor trained_betas"),
        (saved(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), "Give shift=3.0"),
        ({**saved(FlowMatchEulerDiscreteScheduler()), "prediction_type": "epsilon"}, "contradicts"),
    ],
)
def test_a_config_without_known_noise_levels_does_not_become_epsilon(config, reason):
    with pytest.raises(ScheduleError, match=reason):
        Diff2FlowScheduler.from_config(config)
