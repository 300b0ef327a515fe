"""Depth maps have the aspect of their images; what was begun as squares goes on as squares."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_core.batch.output import read_index
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import prepare_image
from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.depth.config import PredictDepthConfig
from d2f_core.flow.depth.job import check_predict_depth, predict_depth
from d2f_core.flow.depth.predictor import DepthPredictor, fill_settings
from d2f_core.model.artifact import describe, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import ModelConfig, SamplingDefaults
from d2f_core.model.latent_task import build_network
from tests.depth_tables import picture
from tests.flow.here import here
from tests.flow.tiny_base import write_tiny_base

SIZES = {"wide": (16, 20), "tall": (40, 16), "square": (32, 32), "wide again": (16, 20), "small": (6, 8)}
"""Height and width of the images by name."""
MAPS = {"wide": (12, 16), "tall": (16, 6), "square": (16, 16), "wide again": (12, 16), "small": (12, 16)}
"""The long side is 16, and both are multiples of 2, the autoencoder's downsampling; the tall one has 3 latents across,
which the UNet cannot halve."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    base, target = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("model") / "model"
    write_tiny_base(base)
    resolved = resolve_base(str(base))
    network = build_network(resolved, ModelConfig(base=str(base), task="image_to_depth", method="full"), 0)
    with torch.no_grad():
        network.get_submodule("conv_in").get_parameter("weight")[:, 4:] = 0.5
    about = describe(
        resolved, objective="diff2flow", method="full", sampling=SamplingDefaults(steps=1, guidance=1.0), training={},
        task="image_to_depth", joined_channels=4,
    )  # fmt: skip
    save_artifact(target, network, about)
    return str(target)


@pytest.fixture
def config(tmp_path: Path, model: str) -> PredictDepthConfig:
    (tmp_path / "images").mkdir()
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        (tmp_path / f"images/{name}.png").write_bytes(picture(number, height, width))
    source, output = ImageSource(uri=str(tmp_path / "images")), str(tmp_path / "made")
    return PredictDepthConfig(source=source, model=model, output=output, ensemble=1, batch_size=8, experiment="")


def predicted(config: PredictDepthConfig) -> dict[str, dict]:
    with here():
        predict_depth(check_predict_depth(config))
    return {Path(row["source_uri"]).stem: row for row in read_index(config.output).to_pylist()}


def depth_of(row: dict) -> np.ndarray:
    return np.load(row["depth_uri"])


def test_a_map_has_its_images_aspect_and_is_its_own_among_images_of_other_sizes(
    config: PredictDepthConfig, model: str
) -> None:
    rows = predicted(config)
    assert {name: depth_of(row).shape for name, row in rows.items()} == MAPS
    assert {name: (row["map_height"], row["map_width"]) for name, row in rows.items()} == MAPS
    assert {name: row["crop"] for name, row in rows.items()} == {
        name: [0, 0, width, height] for name, (height, width) in SIZES.items()
    }
    assert Image.open(rows["wide"]["preview_uri"]).size == (32, 12)
    predictor = DepthPredictor(load_model(model))
    settings = fill_settings(predictor.model, ensemble=1)
    for number, name in enumerate(SIZES):
        rules = ImageRules(resolution=16, min_side=1, max_pixels=10_000, fit="whole", multiple=2)
        pixels = prepare_image(picture(number, *SIZES[name]), rules).pixels
        (alone,) = predictor.predict(pixels[None], [rows[name]["sample_id"]], settings)
        assert alone.depth is not None
        np.testing.assert_allclose(depth_of(rows[name]), alone.depth, atol=1e-4)


def test_squares_are_what_they_were(config: PredictDepthConfig) -> None:
    """As every output was before whole images were known: the same plan, and small images are left out."""
    square = predicted(PredictDepthConfig(**{**vars(config), "crop": "square"}))
    assert "too_small: 8x6" in square.pop("small")["error"]
    assert {depth_of(row).shape for row in square.values()} == {(16, 16)}
    assert square["wide"]["crop"] == [2, 0, 18, 16] and square["tall"]["crop"] == [0, 12, 16, 28]
    plan = json.loads(Path(config.output, "plan.json").read_text())
    assert "crop" not in plan and plan["min_side"] == 16
    again = check_predict_depth(config)
    assert again.plan.crop == "square", "the output was begun so"
    Path(config.output, "manifest.json").unlink()
    Path(config.output, "index/part-000000.parquet").unlink()
    assert {depth_of(row).shape for row in predicted(config).values() if not row["error"]} == {(16, 16)}
    with pytest.raises(ValueError, match=r"another job \(min_side was 16, now 1; crop was None, now whole\)"):
        predicted(PredictDepthConfig(**{**vars(config), "crop": "whole"}))


@pytest.mark.parametrize(
    ("size", "multiple", "whole"),
    [
        ((640, 480), 8, (768, 576)),  # NYU in Marigold's evaluation: the long side has 768 pixels
        ((1242, 375), 8, (768, 232)),
        ((375, 1242), 8, (232, 768)),
        ((640, 480), 64, (768, 576)),
        ((10_000, 10), 8, (768, 8)),
    ],
)
def test_the_long_side_has_the_resolution_and_both_are_multiples(size, multiple: int, whole) -> None:
    rules = ImageRules(resolution=768, min_side=1, max_pixels=10**8, fit="whole", multiple=multiple)
    assert rules.whole_size(*size) == whole


def test_a_resolution_that_is_no_multiple_is_refused_and_a_whole_image_of_its_size_is_not_touched() -> None:
    with pytest.raises(ValueError, match=r"resolution=770 must be a multiple of 8 pixels.* Nearest below: 768"):
        ImageRules(resolution=770, min_side=1, max_pixels=1, fit="whole", multiple=8)
    data = picture(0, 12, 16)
    found = prepare_image(data, ImageRules(resolution=16, min_side=1, max_pixels=1000, fit="whole", multiple=2))
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert found.crop == found.box == (0, 0, 16, 12)
    np.testing.assert_array_equal(found.to_pixels(np.array([[3.5, 2.0]])), [[3.5, 2.0]])
