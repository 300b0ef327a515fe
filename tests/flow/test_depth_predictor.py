"""A depth map belongs to its image and settings; what cannot be a map comes with its reason."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from d2f_core.flow.depth.config import PredictDepthConfig, PredictDepthError
from d2f_core.flow.depth.predictor import DepthPredictor, fill_settings
from d2f_core.model.artifact import TrainedModel, load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.config import ModelConfig, SamplingDefaults
from d2f_core.model.latent_task import build_network
from tests.flow.tiny_base import write_tiny_base

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> TrainedModel:
    resolved = resolve_base(str(base))
    network = build_network(resolved, ModelConfig(base=str(base), task="image_to_depth", method="full"), 0)
    with torch.no_grad():
        network.get_submodule("conv_in").get_parameter("weight")[:, 4:] = 0.5
    return TrainedModel(
        base=resolved,
        network=network.eval().requires_grad_(False),
        objective="diff2flow",
        sampling=SamplingDefaults(steps=2, guidance=7.0),
        task="image_to_depth",
    )


def test_a_map_is_its_images_own_in_any_batch(model: TrainedModel) -> None:
    predictor, settings = DepthPredictor(model), fill_settings(model, ensemble=2)
    together = predictor.predict(PIXELS, NAMES, settings)
    alone = predictor.predict(PIXELS[1:2], ["b"], settings)
    assert together[1].depth is not None and alone[0].depth is not None
    np.testing.assert_allclose(together[1].depth, alone[0].depth, atol=1e-4)
    assert together[1].num_evaluations == 2 and together[1].depth.shape == (16, 16)
    assert 0 <= together[1].depth.min() and together[1].depth.max() <= 1
    other = predictor.predict(PIXELS[:1], ["b"], settings)[0].depth
    assert other is not None and np.abs(other - alone[0].depth).max() > 1e-3, "it reads the image"


def test_members_come_from_seeds_of_their_own(model: TrainedModel) -> None:
    predictor = DepthPredictor(model)
    maps, _ = predictor._members(PIXELS, NAMES, fill_settings(model, ensemble=3, seed=5))
    again, _ = predictor._members(PIXELS, NAMES, fill_settings(model, ensemble=1, seed=6))
    np.testing.assert_allclose(maps[1], again[0], atol=1e-5)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3


def test_an_image_whose_map_is_not_finite_does_not_cost_the_others_theirs(model: TrainedModel) -> None:
    predictor = DepthPredictor(model)

    def spoilt(joined: torch.Tensor) -> dict[str, torch.Tensor]:
        condition = DepthPredictor._condition(predictor, joined)
        bad = (joined - marked).flatten(1).abs().max(1).values < 1e-3
        condition["joined_latents"] = torch.where(bad[:, None, None, None], torch.inf, joined)
        return condition

    images = torch.tensor(PIXELS[1:2]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    marked = predictor._autoencoder.encode(images)[0]
    predictor._condition = spoilt  # type: ignore[method-assign]
    made = predictor.predict(PIXELS, NAMES, fill_settings(model, ensemble=1))
    assert [one.error is None for one in made] == [True, False, True]
    assert made[1].depth is None and "not finite" in str(made[1].error)


def test_a_text_to_image_model_is_refused(base: Path, model: TrainedModel) -> None:
    with pytest.raises(PredictDepthError, match="is a model of task='text_to_image': it reads no image"):
        DepthPredictor(load_model(str(base)))
    with pytest.raises(ValueError, match="solver='eulr' is not known"):
        fill_settings(model, solver="eulr")
    with pytest.raises(PredictDepthError, match="ensemble=0 must be at least 1"):
        fill_settings(model, ensemble=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": 0}, "ensemble=0 must be at least 1"),
        ({"steps": (2, 2)}, "must be different numbers"),
        ({"max_pixels": 0}, "max_pixels=0 must be between"),
        ({"min_side": 0}, "min_side=0 must be at least 1 pixel"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(PredictDepthError, match=message):
        dataclasses.replace(PredictDepthConfig(), **change)
