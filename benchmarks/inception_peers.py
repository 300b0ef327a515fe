"""Inception-v3 and its resize filters beside torch-fidelity's and clean-fid's, with equal random weights.

    python -m venv --system-site-packages /tmp/peers
    /tmp/peers/bin/pip install --no-deps torch-fidelity==0.4.0 clean-fid==0.1.35
    /tmp/peers/bin/python -m benchmarks.inception_peers --results docs/results/inception_peers.json \
        --expected tests/model/inception_expected.json

Prints the largest difference between any two features, relative to the largest feature, and of the scaled pixels; and
writes what the peers gave for the images and weights of tests.model.seeded_inception, to which a test holds this
project's network. Both packages import torchvision, which neither network uses: it is replaced by an empty module.
"""

import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import tyro

from d2f_core.flow.evaluate.feature_networks import load_features
from d2f_core.flow.evaluate.resize_filters import CLEAN_FID, TORCH_FIDELITY, scaled_images
from d2f_core.model.inception import INPUT_SIZE
from tests.model.seeded_inception import SIZES, seeded_images, seeded_weights

FIRST = 8
"""Features of each image that are written."""


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    results: Path | None = None
    expected: Path | None = None


def peer_modules() -> tuple[ModuleType, ModuleType]:
    """torch-fidelity's module of the network, and clean-fid's of filters."""
    names = ("torchvision", *(f"torchvision.{name}" for name in ("datasets", "transforms", "transforms.functional")))
    with patch.dict("sys.modules", {name: MagicMock() for name in names}):
        return (
            importlib.import_module("torch_fidelity.feature_extractor_inceptionv3"),
            importlib.import_module("cleanfid.resize"),
        )


def peer_scaled(images: np.ndarray, resize: str, fidelity: Any, clean: Any) -> torch.Tensor:
    """The peers' pixels, float32 [n, 3, 299, 299]."""
    size = (INPUT_SIZE, INPUT_SIZE)
    if resize == TORCH_FIDELITY:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return fidelity.interpolate_bilinear_2d_like_tensorflow1x(pixels, size=size, align_corners=False)
    scale = clean.make_resizer("PIL", False, "bicubic", size)
    return torch.from_numpy(np.stack([scale(image) for image in images])).permute(0, 3, 1, 2)


def difference(ours: torch.Tensor | np.ndarray, theirs: torch.Tensor | np.ndarray) -> float:
    """The largest difference of two elements, relative to the largest element."""
    first, second = (np.asarray(each, np.float64) for each in (ours, theirs))
    return float(np.abs(first - second).max() / np.abs(second).max())


@torch.inference_mode()
def main() -> None:
    config = tyro.cli(PeersConfig)
    fidelity, clean = peer_modules()
    results: dict[str, Any] = {"torch": torch.__version__, "pixels": {}, "features": {}}
    expected: dict[str, Any] = {"peer": "torch-fidelity 0.4.0, clean-fid 0.1.35", "features": {}}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "weights.pth")
        torch.save(seeded_weights(), file)
        peer = fidelity.FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(file))
        for resize in (CLEAN_FID, TORCH_FIDELITY):
            features = load_features(str(file), resize=resize)
            for height, width in SIZES:
                images = seeded_images(height, width)
                pixels = peer_scaled(images, resize, fidelity, clean)
                with patch.object(fidelity, "vassert", lambda *_: None):  # it asks for uint8, which it scales itself
                    theirs = peer(pixels)[0]
                if resize == TORCH_FIDELITY:
                    whole = peer(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
                    assert torch.equal(whole, theirs), "scaling a scaled image changed it"
                key = f"{resize} {height}x{width}"
                results["pixels"][key] = difference(scaled_images(images, resize, INPUT_SIZE), pixels)
                results["features"][key] = difference(features(images), theirs)
                expected["features"][key] = {
                    "first": theirs[:, :FIRST].tolist(), "mean": theirs.mean(1).tolist(),
                    "deviation": theirs.std(1).tolist(),
                }  # fmt: skip
    print(json.dumps(results, indent=1))
    for target, value in ((config.results, results), (config.expected, expected)):
        if target:
            target.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
