"""The ComfyUI node samples as this project's solver does, by a stand-in for ComfyUI's calls."""

import json
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import comfy_protocol
from benchmarks.closed_form import corners
from benchmarks.comfy_protocol import CONST, NODE, Diffusion, Patcher, beta_sigmas, load_node, normal, sample, simple
from benchmarks.plain_sampler import closed_form, trained_last_level
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.alignment import align as align_here
from d2f_core.objective.guidance import guided
from d2f_core.objective.loss import diff2flow
from d2f_core.objective.schedule import NoiseSchedule
from d2f_core.objective.solver import integrate, uniform_times

ROOT = Path(__file__).parents[2]
SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}
SCHEDULES = {"scaled_linear": SD, "scaled_linear, zero terminal SNR": ZERO_SNR}
CASES = [
    ("epsilon", "scaled_linear"),
    ("v_prediction", "scaled_linear"),
    ("v_prediction", "scaled_linear, zero terminal SNR"),
    ("sample", "scaled_linear, zero terminal SNR"),
]
NOISE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
LATENT = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
MIXTURE = corners()
NONE = "(none)"


@pytest.fixture
def files() -> dict[str, dict[str, str]]:
    return {"checkpoints": {}, "loras": {}}


@pytest.fixture
def node(files: dict[str, dict[str, str]]) -> Iterator[ModuleType]:
    with comfy_protocol.stand_in(files):
        yield load_node()


def patched(node: ModuleType, network, kind: str, schedule: str, shift: float = 1.0, file: str = NONE) -> Patcher:
    model = Patcher(network, Diffusion(NoiseSchedule.from_scheduler_config(SD), "epsilon"))
    made, _ = node.NODE_CLASS_MAPPINGS["Diff2FlowSampling"]().patch(model, file, kind, schedule, shift)
    assert not model.patches  # the loaded model is shared by all that use it
    return made


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_noise_becomes_what_our_solver_makes_of_it(node, kind, schedule, shift, steps):
    ours = NoiseSchedule.from_scheduler_config({**SCHEDULES[schedule], "prediction_type": kind})
    network = MIXTURE.denoiser(ours, kind)
    model = patched(node, network, kind, schedule, shift)
    sigmas = simple(model.get_model_object("model_sampling"), steps)
    wanted, _ = integrate(VelocityField(network, ours, kind), NOISE, uniform_times(steps, shift))
    assert apart(sample(model, NOISE, sigmas), wanted) < 1e-6
    plain = Patcher(network, Diffusion(ours, kind))
    if kind == "epsilon":
        assert apart(sample(plain, NOISE, simple(plain.sampling, steps).float()), wanted) > 0.02  # without the node


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_an_image_is_changed_from_an_intermediate_sigma_on(node, kind, schedule):
    ours = NoiseSchedule.from_scheduler_config({**SCHEDULES[schedule], "prediction_type": kind})
    network = MIXTURE.denoiser(ours, kind)
    model = patched(node, network, kind, schedule, 3.0)
    sigmas = simple(model.get_model_object("model_sampling"), 20)[8:]
    times = uniform_times(20, 3.0)[8:]
    start = (1 - times[0].float()) * NOISE + times[0].float() * LATENT
    wanted, _ = integrate(VelocityField(network, ours, kind), start, times)
    assert apart(sample(model, NOISE, sigmas, latent=LATENT), wanted) < 1e-6


def prompted(x: torch.Tensor, timestep: torch.Tensor, *, prompt: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + prompt) * (1 + timestep[:, None] / 1000)


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_guidance_is_ours(node, kind, schedule):
    ours = NoiseSchedule.from_scheduler_config({**SCHEDULES[schedule], "prediction_type": kind})
    model = patched(node, prompted, kind, schedule)
    given, null = {"prompt": torch.full((64, 1), 0.7)}, {"prompt": torch.zeros(64, 1)}
    sigmas = simple(model.get_model_object("model_sampling"), 10)
    field = guided(VelocityField(prompted, ours, kind), 5.0, given, null)
    wanted, _ = integrate(field, NOISE, uniform_times(10))
    assert apart(sample(model, NOISE, sigmas, guidance=5.0, condition=given, null=null), wanted) < 2e-6


@pytest.mark.parametrize("steps", [7, 20])
def test_normal_begins_at_pure_noise_and_takes_even_steps(node, steps):
    sampling = patched(node, prompted, "epsilon", "scaled_linear", 3.0).get_model_object("model_sampling")
    start, end = sampling.timestep(sampling.sigma_max), sampling.timestep(sampling.sigma_min)
    sigmas = sampling.sigma(torch.linspace(float(start), float(end), steps + 1))
    torch.testing.assert_close(1 - sigmas.double(), uniform_times(steps, 3.0), rtol=0, atol=1e-6)


def test_samplers_see_a_flow_and_its_ends(node):
    sampling = patched(node, prompted, "epsilon", "scaled_linear", 3.0).get_model_object("model_sampling")
    assert isinstance(sampling, CONST) and len(sampling.sigmas) == 1000
    assert float(sampling.sigma_max) == 1 and float(sampling.sigma_min) == pytest.approx(0.003 / 1.002)
    assert [sampling.percent_to_sigma(part) for part in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.75, 0, 0])


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_every_time_is_read_as_by_our_alignment_also_outside_the_trained_levels(node, kind, schedule):
    t = torch.cat([torch.linspace(0, 1, 4001, dtype=torch.float64), torch.tensor([1e-9, 0.0639, 0.0641, 0.9717])])
    ours = NoiseSchedule.from_scheduler_config({**SCHEDULES[schedule], "prediction_type": kind})
    at = align_here(ours, kind, t)
    alignment = node.node.read
    found = alignment(node.settings.flow_times(SCHEDULES[schedule]), kind, 1 - t)
    sigma = 1 - t
    for name, got, wanted in (
        ("timestep", found.timestep, at.timestep),
        ("scale", found.scale, at.scale),
        ("from_x", found.from_x, 1 + sigma * at.from_x * at.scale),
        ("from_output", found.from_output, sigma * at.from_prediction),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_rectified_flow_network_is_asked_at_its_own_times(node, shift):
    def flow(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return -MIXTURE.velocity(x.double(), 1 - timestep.double() / 1000).float()

    model = patched(node, flow, "flow", "from file", shift)
    sigmas = simple(model.get_model_object("model_sampling"), 10)
    wanted, _ = integrate(lambda x, t: -flow(x, 1000 * (1 - t)), NOISE, uniform_times(10, shift))
    assert apart(sample(model, NOISE, sigmas), wanted) < 1e-6


METADATA = {
    "d2f_objective": "diff2flow",
    "d2f_prediction_type": "v_prediction",
    "d2f_schedule": json.dumps({**ZERO_SNR, "prediction_type": "v_prediction"}),
    "d2f_shift": "3.0",
    "d2f_steps": "12",
    "d2f_guidance": "4.5",
    "d2f_time_grid": "beta",
}


def with_file(tmp_path: Path, files: dict[str, dict[str, str]], metadata: dict[str, str]) -> str:
    path = tmp_path / "style.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata=metadata)
    files["loras"]["style.safetensors"] = str(path)
    return "loras/style.safetensors"


def test_a_file_says_how_its_model_is_sampled(node, files, tmp_path):
    file = with_file(tmp_path, files, METADATA)
    inputs = node.node.Diff2FlowSampling.INPUT_TYPES()["required"]
    assert inputs["file"][0] == [NONE, file]
    model = Patcher(prompted, Diffusion(NoiseSchedule.from_scheduler_config(SD), "epsilon"))
    made, advice = node.node.Diff2FlowSampling().patch(model, file, "from file", "from file", 0.0)
    assert advice == "sampler euler, scheduler beta, steps 12, cfg 4.5, shift 3"
    sampling = made.get_model_object("model_sampling")
    assert (sampling.prediction_type, sampling.shift) == ("v_prediction", 3.0)
    assert float(sampling.timestep(torch.ones(1))) == 999 and float(sampling._times[-1]) == 0


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"d2f_prediction_type": "flow_prediction"}, "flow"),
        ({"d2f_objective": "flow_matching", "d2f_prediction_type": "epsilon"}, "flow"),
        ({"d2f_prediction_type": "sample"}, "sample"),
    ],
)
def test_a_file_names_its_prediction_type(node, files, tmp_path, change, kind):
    file = with_file(tmp_path, files, METADATA | change)
    made = patched(node, prompted, "from file", "from file", 0.0, file)
    assert made.get_model_object("model_sampling").prediction_type == kind


@pytest.mark.parametrize(
    ("metadata", "chosen", "message"),
    [
        (None, ("from file", "scaled_linear", 1.0), "prediction_type='from file', but no file is chosen"),
        (None, ("epsilon", "from file", 1.0), "schedule='from file', but no file is chosen"),
        ({"ss_output_name": "x"}, ("from file", "scaled_linear", 1.0), "has no metadata d2f_prediction_type"),
        (METADATA | {"d2f_schedule": "[]"}, ("from file", "from file", 0.0), "d2f_schedule of .* cannot be read"),
        (METADATA | {"d2f_schedule": "{}"}, ("from file", "from file", 0.0), "num_train_timesteps=None"),
        (
            METADATA | {"d2f_schedule": '{"num_train_timesteps": 1e300}'},
            ("v_prediction", "from file", 0.0),
            "must have",
        ),
        (METADATA | {"d2f_shift": "nan"}, ("from file", "from file", 0.0), "shift=nan must be a number above 0"),
        (METADATA | {"d2f_shift": "x"}, ("from file", "from file", 0.0), "d2f_shift of .* is no number"),
        (METADATA | {"d2f_prediction_type": "eps"}, ("from file", "from file", 0.0), "prediction_type='eps' is not"),
        (None, ("epsilon", "scaled_linear, zero terminal SNR", 1.0), "'epsilon' with zero terminal SNR"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_sampled(node, files, tmp_path, metadata, chosen, message):
    file = NONE if metadata is None else with_file(tmp_path, files, metadata)
    with pytest.raises(node.settings.SettingError, match=message):
        patched(node, prompted, *chosen, file)


def test_a_file_that_is_no_safetensors_file_is_refused(node, files, tmp_path):
    for contents, message in ((b"PK" * 40, "no safetensors file"), (b"\x04" + bytes(7) + b"{{{{", "broken header")):
        (tmp_path / "x.safetensors").write_bytes(contents)
        files["checkpoints"]["x.safetensors"] = str(tmp_path / "x.safetensors")
        with pytest.raises(node.settings.SettingError, match=message):
            patched(node, prompted, "from file", "from file", 0.0, "checkpoints/x.safetensors")


def test_a_model_of_rectified_flow_is_not_read_as_diffusion(node):
    flow = patched(node, prompted, "flow", "from file")
    again = node.node.Diff2FlowSampling().patch(flow, NONE, "epsilon", "scaled_linear", 1.0)[0]
    assert again.get_model_object("model_sampling").prediction_type == "epsilon"  # the node's own patch is replaced

    class Flow(CONST):
        pass

    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(node.settings.SettingError, match=r"already \(Flow\), .* Remove ModelSamplingSD3"):
        node.node.Diff2FlowSampling().patch(flow, NONE, "epsilon", "scaled_linear", 1.0)


def test_the_workflow_gives_the_node_what_it_asks_for(node):
    graph = json.loads((NODE / "example_workflows/diff2flow.json").read_text())
    nodes, links = {one["id"]: one for one in graph["nodes"]}, {link[0]: link for link in graph["links"]}
    (ours,) = [one for one in nodes.values() if one["type"] == "Diff2FlowSampling"]
    asked = node.NODE_CLASS_MAPPINGS["Diff2FlowSampling"].INPUT_TYPES()["required"]
    widgets = [name for name, kind in asked.items() if kind[0] != "MODEL"]
    assert len(ours["widgets_values"]) == len(widgets)
    for name, value in zip(widgets, ours["widgets_values"], strict=True):
        choices = asked[name][0]
        assert name == "file" or choices == "FLOAT" or value in choices
    for number, source, slot, target, into, kind in links.values():
        assert number in nodes[source]["outputs"][slot]["links"] and nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][into]["link"] == number
    assert [nodes[links[entry["link"]][1]]["type"] for entry in ours["inputs"]] == ["LoraLoaderModelOnly"]
    (sampler,) = [one for one in nodes.values() if one["type"] == "KSampler"]
    assert nodes[links[sampler["inputs"][0]["link"]][1]] == ours
    assert sampler["widgets_values"][4:6] == ["euler", "simple"]


def test_the_node_is_apart_from_the_project():
    """It is GPL-3.0, since it imports ComfyUI: not in the wheel, and nothing of the project is in it."""
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["exclude"]
    assert any(fnmatch("infra.comfyui", pattern) for pattern in excluded)
    assert "GNU GENERAL PUBLIC LICENSE" in (NODE / "LICENSE").read_text() and "GPL" in (ROOT / "NOTICE").read_text()
    for file in NODE.glob("*.py"):
        assert "d2f_core" not in file.read_text() and "infra." not in file.read_text()


def test_the_stand_in_for_plain_sampling_keeps_what_plain_sampling_keeps():
    """What is measured against it: benchmarks/plain_sampler.py."""
    plain = Diffusion(NoiseSchedule.from_scheduler_config(SD), "epsilon")
    assert float(plain.sigma_max) == pytest.approx(14.61, abs=0.01)
    assert normal(plain, 10)[[0, -1]].tolist() == pytest.approx([14.61, 0], abs=0.01)
    assert beta_sigmas(plain, 10)[[0, -1]].tolist() == pytest.approx([14.61, 0], abs=0.01)


@pytest.mark.parametrize("deviation", [1.0, 8.0, 64.0])
def test_what_plain_sampling_is_measured_on_is_what_the_loss_trains(deviation):
    """On data and noise that have the second moments of Gaussians, any other slope of the last level has more loss."""
    schedule = NoiseSchedule.from_scheduler_config(SD)
    times = (torch.arange(500, dtype=torch.float64) + 0.5) / 500 * schedule.trained_range[0]
    data = deviation * torch.tensor([1.0, 1, -1, -1], dtype=torch.float64).repeat(500)[:, None]
    noise = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).repeat(500)[:, None]

    def loss(slope: float) -> float:
        field = VelocityField(lambda x, timestep: slope * x, schedule, "epsilon")
        return float(diff2flow(field, data, noise, times.repeat_interleave(4)).mean())

    slope = trained_last_level(schedule, deviation)
    assert loss(slope) < min(loss(slope * 0.99), loss(slope * 1.01), loss(float(1 - schedule.trained_range[0])))


def test_a_plain_sampler_loses_the_mean_that_the_node_keeps():
    """The figures of docs/comfyui.md, at deviation 64 and 25 evaluations."""
    kept = {(row["network"], row["sampler"]): row["kept"] for row in closed_form((25,)) if row["deviation"] == 64}
    assert kept["trained", "plain"] == pytest.approx(0.239, abs=2e-3)
    flows = [kept["trained", f"flow, shift {shift}"] for shift in (1, 3, 6)]
    assert flows == pytest.approx([0.587, 0.725, 0.760], abs=2e-3)
