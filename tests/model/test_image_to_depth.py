"""Image to depth: what is joined, masked and refused, and that a saved model computes what the trained one did."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2f_core.model.artifact import ArtifactError, describe, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.model.image_to_depth import ImageToDepth
from d2f_core.model.latent_task import build_network
from tests.flow.tiny_base import write_tiny_base

ROWS, SHAPE = 6, (4, 8, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


def config(base: str, preset: Any = "small", **changes: Any) -> ModelConfig:
    return ModelConfig(base=base, task="image_to_depth", lora=LoraConfig(preset=preset), **changes)


def make(base: str, **changes: Any) -> ImageToDepth:
    return ImageToDepth(resolve_base(base), config(base, **changes), seed=0, dtype=torch.float32, device="cpu")


def arrays(rows: int = ROWS) -> dict[str, Any]:
    """Rows of a depth latent table; the left half of each mask is 0."""
    generator = np.random.default_rng(0)
    mask = np.ones((rows, 1, *SHAPE[1:]), np.uint8)
    mask[..., :4] = 0
    return {
        "caption": np.array([""] * rows, dtype=object),
        "latent_mean": generator.normal(size=(rows, *SHAPE)).astype(np.float16),
        "latent_std": np.full((rows, *SHAPE), 0.1, np.float16),
        "joined_mean": generator.normal(size=(rows, *SHAPE)).astype(np.float16),
        "mask": mask,
        "bucket": np.array(["16x16"] * rows, dtype=object),
        "width": np.full(rows, 16),
        "height": np.full(rows, 16),
        "crop": np.tile([0, 0, 16, 16], (rows, 1)),
        "row": np.arange(rows),
        "epoch": np.zeros(rows, int),
    }


@torch.no_grad()
def moved(network: torch.nn.Module) -> torch.nn.Module:
    """With everything that is trained moved at random, the new input channels too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


@torch.no_grad()
def output(network: Any, batch: dict[str, torch.Tensor], joined: torch.Tensor) -> torch.Tensor:
    timestep = torch.linspace(10.5, 700.25, len(joined))
    return as_denoiser(network)(batch["noise"], timestep, text_states=batch["text_states"], joined_latents=joined)


def test_the_untrained_model_is_the_base_where_there_is_no_image(base: str) -> None:
    task = make(base)
    batch = task.to_batch(arrays())
    with torch.no_grad():
        plain = as_denoiser(load_unet(task.base))(
            batch["noise"], torch.linspace(10.5, 700.25, ROWS), text_states=batch["text_states"]
        )
    task.module.eval()
    empty = torch.zeros_like(batch["joined_latents"])
    torch.testing.assert_close(output(task.module, batch, empty), plain, rtol=0, atol=1e-5)


def test_a_row_has_the_same_batch_wherever_it_stands(base: str) -> None:
    task, table = make(base), arrays()
    whole = task.to_batch(table)
    part = task.to_batch({name: values[2:4] for name, values in table.items()})
    assert whole.keys() == {"data", "noise", "uniform", "text_states", "joined_latents", "mask"}
    for name, values in whole.items():
        assert torch.equal(values[2:4], part[name]), name


def test_text_is_empty_whatever_the_table_says(base: str) -> None:
    table = {**arrays(), "caption": np.array(["a red apple"] * ROWS, dtype=object)}
    task = make(base, caption_dropout=0.0)
    assert torch.equal(task.to_batch(table)["text_states"], task.text_states([""] * ROWS))


@pytest.mark.parametrize("objective", ["diff2flow", "flow_matching", "diffusion"])
def test_what_is_masked_changes_neither_loss_nor_validation(base: str, objective: Any) -> None:
    task = make(base, objective=objective)
    # One pixel's output depends on one pixel's input, so that a masked latent has no other way into the loss.
    pointwise = as_pointwise(task)
    clean, spoilt = arrays(), arrays()
    spoilt["latent_mean"][..., :4] += 3
    counted = arrays()
    counted["latent_mean"][..., 4:] += 3
    losses = [task.loss(pointwise, task.to_batch(table)) for table in (clean, spoilt, counted)]
    assert torch.equal(losses[0], losses[1]) and not torch.allclose(losses[0], losses[2])
    validations = [task.validation_loss(pointwise, table) for table in (clean, spoilt, counted)]
    assert validations[0] == validations[1] != validations[2]
    assert validations[0][1] == 10 * ROWS


def as_pointwise(task: ImageToDepth) -> Any:
    class Pointwise(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
            del timestep
            return dataclasses.make_dataclass("Output", ["sample"])(self.mix(x))

    torch.manual_seed(0)
    return Pointwise()


@pytest.mark.parametrize("preset", ["", "small", "full"])
def test_training_teaches_the_network_to_read_the_image(base: str, preset: str) -> None:
    task = make(base, method="full" if preset == "full" else "lora", preset="" if preset == "full" else preset)
    batch = task.to_batch(arrays())
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(task.module, batch).mean().backward()
        optimizer.step()
    task.module.eval()
    with torch.no_grad():
        own, others = (
            task.loss(task.module, {**batch, "joined_latents": batch["joined_latents"].roll(by, 0)}).mean()
            for by in (0, 1)
        )
    assert own < 0.5 * others


@pytest.mark.parametrize("preset", ["", "small", "base", "full"])
def test_a_saved_model_computes_what_the_trained_one_did(base: str, preset: str, tmp_path: Path) -> None:
    method: Any = "full" if preset == "full" else "lora"
    chosen = config(base, preset=preset if method == "lora" else "", method=method)
    resolved = resolve_base(base)
    network = moved(build_network(resolved, chosen, 0)).eval()
    task = make(base)
    batch = task.to_batch(arrays())
    expected = output(network, batch, batch["joined_latents"])
    save_artifact(tmp_path, network, description(base, method))
    model = load_model(str(tmp_path))
    assert model.task == "image_to_depth"
    found = output(model.network, batch, batch["joined_latents"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - output(model.network, batch, torch.zeros_like(batch["joined_latents"]))).abs().max() > 1e-3
    again = build_network(resolved, dataclasses.replace(chosen, start=str(tmp_path)), 7).eval()
    torch.testing.assert_close(output(again, batch, batch["joined_latents"]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="was trained for task='image_to_depth', not 'text_to_image'"):
        build_network(resolved, dataclasses.replace(chosen, task="text_to_image", start=str(tmp_path)), 7)


def description(base: str, method: str, **changes: Any) -> dict[str, Any]:
    values = {"task": "image_to_depth", "joined_channels": 4, **changes}
    sampling = SamplingDefaults(guidance=1.0)
    return describe(resolve_base(base), objective="diff2flow", method=method, sampling=sampling, training={}, **values)


def test_a_description_that_does_not_fit_its_network_is_refused(base: str, tmp_path: Path) -> None:
    plain = load_unet(resolve_base(base))
    save_artifact(tmp_path, plain, description(base, "full"))
    with pytest.raises(ArtifactError, match=r"has 4 input channels, but .* joined_channels=4 needs 8"):
        load_model(str(tmp_path))
    for values in ({"task": "text_to_image"}, {"joined_channels": 0}, {"joined_channels": 10**9}):
        save_artifact(tmp_path, plain, description(base, "full", **values))
        with pytest.raises(ArtifactError, match=r"joined_channels=.* with task="):
            load_model(str(tmp_path))
    save_artifact(tmp_path, plain, description(base, "full", task="colourise"))
    with pytest.raises(ArtifactError, match="task"):
        load_model(str(tmp_path))


def test_a_description_without_a_task_is_of_text_to_image(base: str, tmp_path: Path) -> None:
    save_artifact(
        tmp_path,
        load_unet(resolve_base(base)),
        description(base, "full", task="text_to_image", joined_channels=0),
    )
    file = tmp_path / "diff2flow.json"
    older = {name: value for name, value in json.loads(file.read_text()).items()}
    for name in ("task", "joined_channels"):
        del older[name]
    file.write_text(json.dumps(older))
    assert load_model(str(tmp_path)).task == "text_to_image"


@pytest.mark.parametrize("lora", [LoraConfig(preset="attention"), LoraConfig(targets="attention")])
def test_a_lora_that_cannot_read_the_image_is_refused(base: str, lora: LoraConfig) -> None:
    with pytest.raises(ValueError, match=r"first convolution.* is not trained. Use lora.preset 'small' or 'base'"):
        ModelConfig(base=base, task="image_to_depth", lora=lora)
    ModelConfig(base=base, task="image_to_depth", method="full", lora=lora)


def test_a_preview_shows_image_prediction_and_truth_of_the_same_rows_always(base: str) -> None:
    task, table = make(base), arrays()
    pictures = task.preview_images(task.module, PreviewConfig(rows=2, steps=1), table, 2)
    assert [picture.size for picture in pictures] == [(48, 16)] * 2
    again = task.preview_images(task.module, PreviewConfig(rows=1, steps=1), table, 2)
    difference = np.asarray(again[0], float) - np.asarray(pictures[0], float)
    assert np.abs(difference).max() <= 1, "rounding at most: a row's noise is its own"
    truth = np.asarray(pictures[0])[:, 32:]
    assert np.ptp(truth.astype(int), axis=2).max() == 0, "depth is grey"
    assert (
        task.preview_images(task.module, PreviewConfig(rows=0), table, 2)
        == task.preview_images(task.module, PreviewConfig(), None, 2)
        == []
    )
