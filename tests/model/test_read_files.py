"""What nobody reads of a base neither parts it from its trained models, nor is missed by its export."""

import json
import shutil
from pathlib import Path

import pytest

from d2f_core.model.artifact import ArtifactError, describe_model
from d2f_core.model.base import resolve_base
from d2f_core.model.diffusers_layout import copy_base_parts
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained
from tests.model.tiny_sd import write_tiny

UNET = "unet/diffusion_pytorch_model.safetensors"


def add_unread(base: Path) -> None:
    """A second variant, and notes in two places."""
    shutil.copy(base / UNET, base / UNET.replace(".safetensors", ".fp16.safetensors"))
    (base / "vae/notes.txt").write_text("mine")
    (base / "unet/training.json").write_text("{}")


@pytest.mark.parametrize("first", [False, True])
def test_files_that_nobody_reads_may_come_and_go(tmp_path: Path, first: bool) -> None:
    base = write_tiny_base(tmp_path / "base")
    plain = resolve_base(str(base))
    before = plain.content_hash
    assert plain.read_hash == before, "nothing is unread"
    if first:
        add_unread(base)
    artifact = trained(base, tmp_path / "artifact")
    if first:
        for file in (base / "vae/notes.txt", base / "unet/training.json"):
            file.unlink()
    else:
        add_unread(base)
    now = resolve_base(str(base))
    assert now.read_hash == before != now.content_hash
    assert describe_model(artifact).base.read_hash == before


def test_the_hash_that_was_recorded_so_far_keeps_working_and_another_base_is_refused(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    add_unread(base)
    artifact = Path(trained(base, tmp_path / "artifact"))
    file = artifact / "diff2flow.json"
    description = json.loads(file.read_text())
    description["base"]["sha256"] = resolve_base(str(base)).content_hash
    file.write_text(json.dumps(description))
    describe_model(str(artifact))
    (base / "scheduler/scheduler_config.json").write_text(
        json.dumps({**json.loads((base / "scheduler/scheduler_config.json").read_text()), "steps_offset": 1})
    )
    with pytest.raises(ArtifactError, match=r"was trained on a base with sha256"):
        describe_model(str(artifact))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_file_of_a_saved_base_is_read(tmp_path: Path, name: str) -> None:
    base = resolve_base(str(write_tiny(tmp_path, name)))  # pyright: ignore[reportArgumentType]
    assert base.read_hash == base.content_hash


def test_an_sdxl_base_without_an_index_is_exported_with_both_encoders(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "sdxl")
    (base / "model_index.json").unlink()
    index, missing = copy_base_parts(base, tmp_path / "copied")
    assert index["_class_name"] == "StableDiffusionXLPipeline" and not missing
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]
    assert (tmp_path / "copied/text_encoder_2/model.safetensors").is_file()
