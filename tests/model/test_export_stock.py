"""Exports that diffusers samples with its own schedulers: diffusion and rectified-flow models, and README's ways."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from d2f_core.model.artifact import describe, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.model.export import export_diffusers
from d2f_core.model.sampling import SCHEDULERS, sample_latents
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import NOISE, NULL, STATES, output, trained
from tests.model.complete_base import latents_of
from tests.model.test_flow_base import write_flow_base

PARTS = {"text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def naive(base: Path, target: Path, objective: str, naive_target: str, shift: float) -> str:
    model, sampling = resolve_base(str(base)), SamplingDefaults(shift=shift)
    fields = {"naive_target": naive_target, "method": "full", "sampling": sampling, "training": {}}
    save_artifact(target, load_unet(model), describe(model, objective=objective, **fields))  # pyright: ignore
    return str(target)


def ours(artifact: str, steps: int, **more: str) -> torch.Tensor:
    model = load_model(artifact, **more)
    solver, shift = model.sampling.solver, model.sampling.shift
    return sample_latents(model, NOISE, STATES, NULL, solver=solver, steps=steps, guidance=3.0, shift=shift)[0]


@pytest.mark.parametrize("solver", [*SCHEDULERS, "euler"])
def test_a_diffusion_model_is_sampled_as_its_own_settings_say(base: Path, tmp_path: Path, solver: str) -> None:
    artifact = trained(base, tmp_path / "artifact", objective="diffusion", solver=solver, steps=25)
    export_diffusers(artifact, str(tmp_path / "exported"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", **PARTS)
    assert type(pipeline.scheduler) is (Diff2FlowScheduler if solver == "euler" else SCHEDULERS[solver][0])
    for steps in (4, 10):
        torch.testing.assert_close(latents_of(pipeline, steps, 3.0), ours(artifact, steps), rtol=0, atol=1e-4)
    assert ("d2f_core" in (tmp_path / "exported/README.md").read_text()) == (solver == "euler")
    load_model(str(tmp_path / "exported"), base_uri=str(base))


@pytest.mark.parametrize(
    ("objective", "target", "shift", "flow_base"),
    [
        ("flow_matching", "data_minus_noise", 3.0, False),
        ("flow_matching", "noise_minus_data", 1.0, False),
        ("diff2flow", "noise_minus_data", 3.0, True),
    ],
)
def test_a_rectified_flow_model_is_sampled_by_diffusers_alone(
    base: Path, tmp_path: Path, objective: str, target: str, shift: float, flow_base: bool
) -> None:
    own_base = write_flow_base(tmp_path / "base") if flow_base else base
    artifact = naive(own_base, tmp_path / "artifact", objective, target, shift)
    export_diffusers(artifact, str(tmp_path / "exported"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", **PARTS)
    assert "d2f_core" not in (tmp_path / "exported/model_index.json").read_text()
    flow = pipeline.scheduler
    for steps, bound in ((4, 0.007), (10, 0.0035), (25, 0.0035)):
        expected = ours(artifact, steps)
        assert (latents_of(pipeline, steps, 3.0) - expected).norm() / expected.norm() < bound, "README.md says these"
        pipeline.scheduler = Diff2FlowScheduler.from_config(flow.config)
        torch.testing.assert_close(latents_of(pipeline, steps, 3.0), expected, rtol=0, atol=1e-5)
        pipeline.scheduler = flow
    sign = -1 if target == "data_minus_noise" else 1
    torch.testing.assert_close(output(pipeline.unet), sign * output(load_model(artifact).network), rtol=0, atol=1e-5)
    again = ours(str(tmp_path / "exported"), 4, base_uri=str(own_base))
    torch.testing.assert_close(again, ours(artifact, 4), rtol=0, atol=1e-5)


def programs(readme: str, place: Path) -> list[str]:
    """The README's Python, for an export at `place` and latents instead of images."""
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return [block.replace("this directory", str(place)).replace("empty_states", "null") for block in blocks]


def test_what_the_readme_says_for_diffusers_alone_samples_by_ddim(base: Path, tmp_path: Path) -> None:
    artifact = trained(base, tmp_path / "artifact", LoraConfig(rank=2))
    export_diffusers(artifact, str(tmp_path / "exported"))
    text = (tmp_path / "exported/README.md").read_text()
    _, without_package = programs(text, tmp_path / "exported")
    names: dict = {}
    exec(without_package, names)
    assert type(names["pipeline"].scheduler) is DDIMScheduler and "d2f_core" not in without_package
    model = load_model(artifact)
    expected, _ = sample_latents(model, NOISE, STATES, NULL, solver="ddim-clean", steps=6, guidance=3.0)
    torch.testing.assert_close(latents_of(names["pipeline"], 6, 3.0), expected, rtol=0, atol=1e-4)
    assert "would count\ntwice" in text, "the adapter is in the UNet"


def test_the_readmes_first_program_runs(base: Path, tmp_path: Path) -> None:
    export_diffusers(trained(base, tmp_path / "artifact", steps=2), str(tmp_path / "exported"))
    text = (tmp_path / "exported/README.md").read_text()
    program = programs(text, tmp_path / "exported")[0]
    exec(program, {"states": STATES, "null": NULL})
    assert "num_inference_steps=2, guidance_scale=3.0" in program and "would count" not in text
    described = json.loads((tmp_path / "exported/diff2flow.json").read_text())
    assert described["base"]["uri"] == base.name and f"Trained from {base.name}, whose files have sha256" in text
