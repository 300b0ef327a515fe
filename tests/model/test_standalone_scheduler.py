"""The scheduler as one file opens and samples an export in a program that has no d2f_core, to the same bits."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from d2f_core.model import standalone_scheduler as module
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.model.export import export_diffusers
from d2f_core.model.standalone_scheduler import standalone_scheduler
from pipelines.export import main
from pipelines.export_config import SchedulerExportConfig
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import NOISE, NULL, STATES, trained

PROGRAM = """
import sys
sys.path.append(sys.argv[1])  # -S: neither the project's own finder nor any other is at work
import torch
from diffusers import DiffusionPipeline
import diff2flow_scheduler
try:
    import d2f_core
except ModuleNotFoundError as error:
    print(error)
given = torch.load(sys.argv[2] + "/given.pt")
parts = {"text_encoder": None, "tokenizer": None}
pipeline = DiffusionPipeline.from_pretrained(sys.argv[2] + "/exported", **parts)
latents = pipeline(**given, num_inference_steps=4, output_type="latent").images
print(type(pipeline.scheduler) is diff2flow_scheduler.Diff2FlowScheduler)
rf = {"prediction_type": "flow_prediction", "beta_schedule": "linear"}
made = {}
for name, fields in (("v", {"prediction_type": "v_prediction", "beta_schedule": "linear"}), ("rf", rf)):
    scheduler = diff2flow_scheduler.Diff2FlowScheduler.from_config(fields, shift=3.0, start="trained")
    scheduler.set_timesteps(30)
    made[name] = (scheduler.timesteps, scheduler.flow_times, scheduler.add_noise(
        given["latents"], given["latents"].flip(0), torch.tensor([999])))
torch.save([latents, made], sys.argv[2] + "/made.pt")
"""


def test_a_program_without_this_project_samples_an_export_to_the_same_bits(tmp_path: Path) -> None:
    main(SchedulerExportConfig(output=str(tmp_path / "diff2flow_scheduler.py")))
    export_diffusers(trained(write_tiny_base(tmp_path / "base"), tmp_path / "artifact"), str(tmp_path / "exported"))
    given = {"prompt_embeds": STATES, "negative_prompt_embeds": NULL, "latents": NOISE, "guidance_scale": 3.0}
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-S", str(tmp_path / "program.py"), sysconfig.get_path("purelib"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["No module named 'd2f_core'", "True"], done.stderr
    latents, made = torch.load(tmp_path / "made.pt")
    parts = {"text_encoder": None, "tokenizer": None}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", **parts)
    assert torch.equal(pipeline(**given, num_inference_steps=4, output_type="latent").images, latents)
    for name, prediction in (("v", "v_prediction"), ("rf", "flow_prediction")):
        fields = {"prediction_type": prediction, "beta_schedule": "linear"}
        scheduler = Diff2FlowScheduler.from_config(fields, shift=3.0, start="trained")
        scheduler.set_timesteps(30)
        noised = scheduler.add_noise(NOISE, NOISE.flip(0), torch.tensor([999]))
        for ours, theirs in zip((scheduler.timesteps, scheduler.flow_times, noised), made[name], strict=True):
            assert torch.equal(ours, theirs)


def test_it_is_refused_when_a_definition_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "d2f_core." not in standalone_scheduler().replace('"d2f_core.model.diffusers_scheduler"', "")
    monkeypatch.setattr(module, "MODULES", [name for name in module.MODULES if not name.endswith(".path")])
    with pytest.raises(ValueError, match="'interpolate' is defined in 0 of"):
        standalone_scheduler()


@pytest.mark.parametrize("output", ["", "scheduler", "out/my-scheduler.py", "s3://bucket/1.py"])
def test_a_file_that_no_program_can_import_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="must name a Python module"):
        SchedulerExportConfig(output=output)
