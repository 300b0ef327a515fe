"""Solvers converge at their order, run both ways, and Euler equals DDIM."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import beta

from benchmarks.closed_form import gaussian
from benchmarks.comfy_protocol import beta_sigmas
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.guidance import guided
from d2f_core.objective.path import shift_times
from d2f_core.objective.schedule import NoiseSchedule
from d2f_core.objective.solver import ADAPTIVE, TIME_GRIDS, NonFiniteStateError, beta_times, integrate, uniform_times

START = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)[:, None]


def exact_field(x, t):
    """Logistic growth with a clock that runs as t + t^2 / 2: nonlinear, time-dependent, and solved in closed form."""
    return x * (1 - x) * (1 + t[:, None].to(x))


EXACT = 1 / (1 + (1 - START) / START * math.exp(-1.5))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solver_converges_at_its_order_to_the_exact_sample(solver, order, holds):
    error = {}
    for steps in (32, 64):
        end, evaluations = integrate(exact_field, START, uniform_times(steps), solver)
        assert evaluations == steps * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]
        error[steps] = (end - EXACT).abs().max().item()
    found = math.log2(error[32] / error[64])
    holds("euler, midpoint, heun, rk4 converge at orders 1, 2, 2, 4: distance from it", abs(found - order), 0.2)


def test_backward_integration_returns_to_the_start(holds):
    end, _ = integrate(exact_field, START, uniform_times(50), "rk4")
    back, _ = integrate(exact_field, end, uniform_times(50).flip(0), "rk4")
    holds("forward and backward by rk4, 50 steps, logistic growth", (back - START).abs().max(), 1e-8)


SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {**SD, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize("config", [SD, LINEAR, COSINE], ids=["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_in_flow_time_equals_ddim_on_the_mapped_grid(kind, config, steps, holds):
    """diffusers' own DDIM, in float32; where its first level is nearly pure noise, epsilon is divided by alpha."""
    schedule = NoiseSchedule.from_scheduler_config(config)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2

    def network(x, timestep):
        return torch.tanh(x @ weight) * (1 + timestep[:, None] / 1000)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler(**config, prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ddim = x.clone()
    for timestep in scheduler.timesteps:
        ddim = scheduler.step(network(ddim, timestep.expand(3).float()), timestep, ddim).prev_sample
    times = torch.cat([schedule.flow_times[scheduler.timesteps], torch.ones(1, dtype=torch.float64)])
    norm = float(torch.hypot(times[0], 1 - times[0]))
    ours, _ = integrate(VelocityField(network, schedule, kind), x * norm, times, "euler")
    apart, how = (ours - ddim).abs().max(), ""
    if kind == "epsilon":  # this network's samples grow to 25 and to 300
        apart, how = apart / ddim.abs().max(), ", of the largest value"
    holds(f"Euler is diffusers' DDIM on the mapped grid, {kind}{how}", apart, 1e-5)


def test_guidance_in_one_forward_equals_two():
    calls = []

    def field(x, t, *, condition):
        calls.append(len(x))
        return x * condition + t[:, None]

    x, t = torch.randn(2, 3), torch.rand(2)
    with_it, without = torch.full((2, 1), 2.0), torch.zeros(2, 1)
    both = guided(field, 3.0, {"condition": with_it}, {"condition": without})(x, t)
    assert calls == [4]
    expected = field(x, t, condition=without)
    torch.testing.assert_close(both, expected + 3.0 * (field(x, t, condition=with_it) - expected))


@pytest.mark.parametrize(("steps", "solver", "message"), [(0, "euler", "steps=0"), (2, "dopri", "solver='dopri'")])
def test_unknown_solver_or_no_steps_is_refused(steps, solver, message):
    with pytest.raises(ValueError, match=message):
        integrate(exact_field, torch.zeros(1, 1), uniform_times(steps), solver)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("backward", [False, True])
def test_adaptive_solvers_meet_their_tolerance_and_count_evaluations(solver, backward, holds):
    calls = []

    def field(x, t):
        calls.append(t)
        return exact_field(x, t)

    times = uniform_times(1).flip(0) if backward else uniform_times(1)
    start, wanted = (EXACT, START) if backward else (START, EXACT)
    end, evaluations = integrate(field, start, times, solver, rtol=1e-6, atol=1e-6)
    holds("adaptive solvers at tolerance 1e-6, both directions", (end - wanted).abs().max(), 2e-5)
    assert evaluations == len(calls) > 4
    assert min(float(t.min()) for t in calls) >= 0 and max(float(t.max()) for t in calls) <= 1


def test_shifted_times_spend_more_steps_near_noise():
    times = uniform_times(4, shift=3.0)
    assert times.tolist() == pytest.approx([0, 0.1, 0.25, 0.5, 1])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 1000])
def test_beta_times_are_quantiles_of_the_published_distribution(steps, holds):
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    wanted = torch.from_numpy(beta.ppf(shares.numpy(), 0.6, 0.6))
    holds("beta times against scipy's quantiles of Beta(0.6, 0.6)", (beta_times(steps) - wanted).abs().max(), 1e-13)
    torch.testing.assert_close(beta_times(steps, 3.0), shift_times(beta_times(steps), 3.0), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_beta_times_are_comfyuis_up_to_its_table_of_a_thousand_sigmas(steps):
    """Its scheduler rounds each quantile to one of the table's entries, from 0.001 on."""
    table = SimpleNamespace(sigmas=torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert (1 - beta_sigmas(table, steps) - beta_times(steps)).abs().max() < 0.0016


KEPT = {
    # deviation 1, 8, 32, 64: which share of it the samples of an exact flow have after 25 Euler steps
    ("uniform", 1.0): (0.950, 0.862, 0.567, 0.344),
    ("uniform", 3.0): (0.930, 0.934, 0.826, 0.688),
    ("uniform", 6.0): (0.889, 0.949, 0.898, 0.826),
    ("beta", 1.0): (0.939, 0.894, 0.795, 0.716),
    ("beta", 3.0): (0.927, 0.930, 0.880, 0.832),
}


@pytest.mark.parametrize(("grid", "shift"), KEPT)
def test_beta_times_keep_the_mean_of_images_and_their_detail(grid, shift):
    """The mean of a channel of 64 x 64 values has up to deviation 64: even steps lose two thirds of it."""
    start = torch.ones(1, 1, dtype=torch.float64)
    ends = [integrate(gaussian(s, 1).velocity, start, TIME_GRIDS[grid](25, shift))[0] / s for s in (1, 8, 32, 64)]
    assert [float(end) for end in ends] == pytest.approx(KEPT[grid, shift], abs=1e-3)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (2, 0.0), (2, math.inf)])
def test_no_steps_or_no_shift_are_refused(grid, steps, shift):
    with pytest.raises(ValueError, match=rf"steps={steps} must be at least 1 and shift={shift} above 0"):
        TIME_GRIDS[grid](steps, shift)


def test_a_network_that_fails_is_named_with_sample_and_time():
    def field(x, t):
        return torch.where((t > 0.4)[:, None] & (torch.arange(3) == 1)[:, None], torch.nan, x)

    with pytest.raises(NonFiniteStateError, match=r"samples \[1\] is not finite at flow time 0.5, evaluation 3"):
        integrate(field, torch.ones(3, 2), uniform_times(4))


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 0.5], [0.0, 1.5]])
def test_times_that_are_no_way_are_refused(times):
    with pytest.raises(ValueError, match=r"times must"):
        integrate(exact_field, START, torch.tensor(times))


def test_guidance_acts_in_its_interval_only():
    calls = []

    def field(x, t, *, condition):
        calls.append(len(x))
        return x * condition

    x = torch.ones(2, 3)
    given = ({"condition": torch.full((2, 1), 2.0)}, {"condition": torch.full((2, 1), 1.0)})
    some = guided(field, 3.0, *given, interval=(0.2, 0.8))
    assert torch.equal(some(x, torch.tensor([0.5, 0.9])), torch.tensor([[4.0] * 3, [2.0] * 3]))
    assert torch.equal(some(x, torch.tensor([0.0, 0.1])), torch.full((2, 3), 2.0))
    assert calls == [4, 2]


def test_guidance_without_an_interval_acts_at_any_time_such_as_a_timestep():
    given = ({"condition": torch.full((2, 1), 2.0)}, {"condition": torch.full((2, 1), 1.0)})
    field = guided(lambda x, t, *, condition: x * condition, 3.0, *given)
    assert torch.equal(field(torch.ones(2, 3), torch.tensor([999.0, 0.0])), torch.full((2, 3), 4.0))


def test_guidance_rescale_brings_back_the_conditional_deviation():
    def field(x, t, *, condition):
        return x * condition

    x, t = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.rand(4)
    given = ({"condition": torch.full((4, 1), 2.0)}, {"condition": torch.full((4, 1), 0.5)})
    conditional = field(x, t, condition=given[0]["condition"])
    torch.testing.assert_close(guided(field, 4.0, *given, rescale=1.0)(x, t).std(1), conditional.std(1))
    half, plain = guided(field, 4.0, *given, rescale=0.5)(x, t), guided(field, 4.0, *given)(x, t)
    torch.testing.assert_close(half.std(1), (conditional.std(1) + plain.std(1)) / 2)


@pytest.mark.parametrize(
    ("options", "null", "message"),
    [
        ({"rescale": 1.5}, {"condition": torch.zeros(2, 1)}, "rescale=1.5"),
        ({"interval": (0.8, 0.2)}, {"condition": torch.zeros(2, 1)}, "interval="),
        ({}, {"condition": torch.zeros(2, 3)}, "Give both alike"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(options, null, message):
    with pytest.raises(ValueError, match=message):
        guided(exact_field, 2.0, {"condition": torch.zeros(2, 1)}, null, **options)
