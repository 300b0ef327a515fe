"""A file is written as what its network predicts, whatever a scheduler config says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from d2f_core.model.artifact import describe, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.base_probe import Reading
from d2f_core.model.config import SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.single_file.write import write_checkpoint_file
from d2f_core.objective.schedule import NoiseSchedule
from tests.model.single_file.files import metadata_of, put_configs_beside, write_file
from tests.model.tiny_sd import write_tiny


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "base", "sd15")


def test_an_unchanged_base_is_asked_before_it_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = {"epsilon": 1.0, "v_prediction": 1.5, "sample": 2.0, "flow_prediction": 0.1}
    monkeypatch.setattr("d2f_core.model.base_probe.probe_network", lambda *_: Reading(left=flow))
    file = tmp_path / "one.safetensors"
    with pytest.raises(ValueError, match="network of flow_prediction does"):
        write_checkpoint_file(str(base), str(file))
    assert not file.exists()
    done = write_checkpoint_file(str(base), str(file), base_prediction="flow_prediction")
    assert done.prediction == metadata_of(file)["modelspec.prediction_type"] == "sd3"


def test_a_model_is_written_as_it_reads_its_base(base: Path, tmp_path: Path) -> None:
    config = base / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    told = resolve_base(str(base)).read_as("epsilon")
    described = describe(told, objective="diff2flow", method="full", sampling=SamplingDefaults(), training={})
    save_artifact(tmp_path / "model", load_unet(told), described)
    file = tmp_path / "one.safetensors"
    assert write_checkpoint_file(str(tmp_path / "model"), str(file)).prediction == "epsilon"
    assert metadata_of(file)["d2f_prediction_type"] == "epsilon"


def test_a_file_that_says_flow_can_be_read_as_diffusion(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    write_checkpoint_file(str(base), str(file), base_prediction="flow_prediction", dtype="float32")
    put_configs_beside(base, file, scheduler=False)
    read, original = resolve_base(str(file)), resolve_base(str(base)).schedule
    told = read.read_as("epsilon").schedule
    assert read.is_flow and isinstance(told, NoiseSchedule) and isinstance(original, NoiseSchedule)
    assert torch.equal(told.alphas_cumprod, original.alphas_cumprod)


def test_what_a_killed_conversion_left_is_taken_away(base: Path, tmp_path: Path) -> None:
    file = write_file(base, tmp_path / "one.safetensors")
    made = resolve_base(str(file)).path
    left = made.with_name(f"{made.name}.partial") / "unet"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    shutil.rmtree(made)
    assert resolve_base(str(file)).path == made and not left.exists()
    assert not (made / "unet/half.safetensors").exists()
