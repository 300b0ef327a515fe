"""The export job: a trained model in each layout, by the command's own entry."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f_core.model.artifact import load_model
from d2f_core.model.config import LoraConfig
from d2f_core.storage import exists, write_bytes
from infra.local.stack import StackEnv
from pipelines.export import RECIPES, check, main
from pipelines.export_config import CheckpointFileExportConfig, ExportConfig
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import output, trained
from tests.model.tiny_sd import write_tiny

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("export")
    return trained(write_tiny_base(home / "base"), home / "model", LoraConfig(rank=2))


def test_every_recipe_writes_its_layout(model: str, tmp_path: Path, s3: StackEnv):
    del s3
    main(ExportConfig(model=model, layout="diffusers", output=str(tmp_path / "pipeline")))
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["scheduler"][1] == "Diff2FlowScheduler"
    exported = load_model(str(tmp_path / "pipeline"), base_uri=load_model(model).base.uri)
    torch.testing.assert_close(output(exported.network), output(load_model(model).network), rtol=0, atol=1e-6)
    main(ExportConfig(model=model, layout="peft", output="s3://d2f/test-export/adapter"))
    assert exists("s3://d2f/test-export/adapter/adapter_config.json")
    main(ExportConfig(model=model, layout="single-file", output=str(tmp_path / "lora.safetensors")))
    assert any(name.endswith(".lora_down.weight") for name in load_file(tmp_path / "lora.safetensors"))
    assert set(RECIPES) == {"diffusers", "peft", "single-file", "ldm", "transformers", "scheduler", "checkpoint"}


def test_the_command_says_which_files_it_wrote_and_what_each_program_leaves_out(tmp_path: Path, caplog):
    model = trained(write_tiny_base(tmp_path / "base"), tmp_path / "model", LoraConfig(preset="small"))
    first, second = tmp_path / "lora.safetensors", tmp_path / "lora-ends.safetensors"
    with caplog.at_level("INFO", logger="pipelines.export"):
        main(ExportConfig(model=model, layout="single-file", output=str(first)))
    assert load_file(first) and load_file(second)
    said = [record.getMessage() for record in caplog.records]
    assert f"wrote {second}: conv_in, conv_out; load it beside the first" in said
    assert not any("sd-scripts" in line for line in said), "it reads all of the first"
    caplog.clear()
    with caplog.at_level("INFO", logger="pipelines.export"):
        main(ExportConfig(model=model, layout="single-file", output=str(first), ends="inside"))
    assert "diffusers refuses this file" in caplog.text and not second.exists()
    assert "sd-scripts has no place for conv_in, conv_out; the rest it reads" in caplog.text


def test_a_whole_checkpoint_is_written_for_other_programs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    base, file = write_tiny(tmp_path / "base", "sdxl"), tmp_path / "one.safetensors"
    config = CheckpointFileExportConfig(model=str(base), output=str(file), dtype="bfloat16")
    check(config)
    with caplog.at_level("INFO"):
        main(config)
    assert "SDXL, 684 tensors, 0.00 GB, epsilon" in caplog.text
    assert load_file(file)["conditioner.embedders.1.model.ln_final.bias"].dtype == torch.bfloat16


def test_what_cannot_be_exported_is_refused(model: str, tmp_path: Path):
    with pytest.raises(ValueError, match="output is empty"):
        check(ExportConfig(model=model))
    with pytest.raises(ValueError, match="not used by layout='peft'"):
        ExportConfig(model=model, layout="peft", base=model)
    with pytest.raises(ValueError, match="ends='inside' is not used by layout='diffusers'"):
        ExportConfig(model=model, ends="inside")
    write_bytes(str(tmp_path / "unet/config.json"), b"{}")
    with pytest.raises(ValueError, match=r"has no diff2flow.json"):
        main(ExportConfig(model=str(tmp_path), output=str(tmp_path / "out")))
