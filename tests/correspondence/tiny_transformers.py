"""Vision transformers with random weights, small enough for tests, in transformers' layout."""

from pathlib import Path

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from tests.flow.tiny_vision import write_processor

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
KINDS = {
    "dinov2": (Dinov2Config, Dinov2Model, {}, 1),
    "dinov2-with-registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, {"num_register_tokens": 4}, 5),
    "vit": (ViTConfig, ViTModel, {"intermediate_size": 48}, 1),
}


def write(path: Path, kind: str) -> Path:
    """Write a network of a kind in `KINDS`, the same at every call."""
    config, model, more, _ = KINDS[kind]
    torch.manual_seed(0)
    network = (
        model(config(**SMALL, **more)) if kind != "vit" else model(config(**SMALL, **more), add_pooling_layer=False)
    )
    network.save_pretrained(path)
    write_processor(path)
    return path
