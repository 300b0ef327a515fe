"""A model trained on images of another size than its base's draws that size, in training and afterwards."""

import dataclasses
from pathlib import Path

import pytest
import torch

from d2f_core.data.manifest import Manifest
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.model.text_to_image import TextToImage
from pipelines.checkpoint_export import trained_resolution
from pipelines.configs import FinetuneConfig
from pipelines.finetune_task import preview_of
from pipelines.workflow_recipes import WORKFLOW
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return resolve_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))


def config(base: BaseModel, sampling: SamplingDefaults | None = None) -> FinetuneConfig:
    model = ModelConfig(base=str(base.path), lora=LoraConfig(rank=2))
    return FinetuneConfig(model=model, latents="s3://x/y", output="s3://x/z", sampling=sampling or SamplingDefaults())


def latents(resolution: int | None) -> Manifest:
    return Manifest(kind="latents", files=(), fingerprint={"resolution": resolution})


def test_a_model_carries_the_size_of_the_images_it_was_trained_on(tiny: BaseModel):
    own, _ = tiny.default_size
    assert trained_resolution(config(tiny), tiny, latents(own + 8)) == own + 8
    assert trained_resolution(config(tiny), tiny, latents(own)) is None, "the base says it already"
    assert trained_resolution(config(tiny), tiny, latents(None)) is None
    assert trained_resolution(config(tiny, SamplingDefaults(resolution=own + 16)), tiny, latents(own)) == own + 16


def test_previews_are_drawn_at_that_size(tiny: BaseModel):
    edge = tiny.default_size[0] + 8
    chosen = config(tiny)
    preview = preview_of(chosen, tiny, latents(edge))
    assert preview == dataclasses.replace(PreviewConfig(), resolution=edge)
    task = TextToImage(tiny, chosen.model, seed=0, dtype=torch.float32, device="cpu")
    (image,) = task.preview(task.module, dataclasses.replace(preview, steps=1), ["a"])
    assert image.size == (edge, edge)


@pytest.mark.parametrize("edge", [32, 96])
def test_a_workflow_for_a_new_resolution_draws_with_both_models_at_it(edge: int):
    recipe = WORKFLOW[f"emoji-{edge}"]
    assert {recipe.dataset.size, recipe.encode.resolution, recipe.wired_generate("m", "o").resolution} == {edge}
    assert Path(recipe.finetune.output).name == recipe.register.name == f"emoji-{edge}"
