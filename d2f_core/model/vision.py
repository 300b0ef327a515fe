"""A vision model by directory: dense tokens and pooled features of images."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from d2f_core.file_systems import read_or_map
from d2f_core.model.base import described_copy, local_copy
from d2f_core.model.fit import automatic_on_meta, silent_transformers
from d2f_core.model.model_files import ModelFiles
from d2f_core.model.weight_files import TRANSFORMERS_NAME, variant_argument


class VisionModelError(ValueError):
    """A vision model that cannot be used, with the reason and the fix."""


class VisionModel:
    """A vision model in transformers' layout; one with a text tower (CLIP, SigLIP) also scores captions.

    Images are preprocessed as the directory's preprocessor_config.json says, always with Pillow, because torchvision
    resizes slightly differently and is not installed everywhere.

    Args:
        device: where it computes; "meta": no weights are loaded (of a model on S3, only the headers are copied), and
            features have a shape without values.

    Raises:
        VisionModelError: the directory holds no vision model, or its weights are missing or damaged.
    """

    def __init__(self, uri: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor

        described = str(device) == "meta"
        self.uri, self.device = uri, device
        self.files = described_copy(uri) if described else ModelFiles(path=local_copy(uri))
        self.path = self.files.path
        for needed in ("config.json", "preprocessor_config.json"):
            if not (self.path / needed).is_file():
                raise VisionModelError(
                    f"{uri!r} has no {needed}. Give a vision model's directory as transformers saves it, with its "
                    "image processor."
                )
        try:
            self.network, missing = (_described if described else _loaded)(self.path)
            self._processor = AutoImageProcessor.from_pretrained(
                self.path, backend="pil", trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:  # one of them for tensors of other shapes
            reason = " ".join(str(error).split())[:300]
            raise VisionModelError(f"{uri!r} cannot be loaded as a vision model in safetensors: {reason}") from None
        self.network.eval().requires_grad_(False)
        if not described:
            self.network.to(device)
        self._has_pooler = self._check_weights(sorted(missing))

    def _check_weights(self, missing: Sequence[str]) -> bool:
        """Whether the files hold the pooler's weights; if not, transformers draws random ones on every load."""
        if any(not key.startswith("pooler.") for key in missing):
            raise VisionModelError(f"{self.uri!r} lacks weights: {', '.join(missing[:3])}. Save the model again.")
        return not missing

    @property
    def reads_text(self) -> bool:
        return hasattr(self.network, "get_text_features")

    def pooled(self, images: np.ndarray) -> Tensor:
        """Features [n, width] of uint8 images [n, h, w, 3]: the projected ones of an image-text model, else the
        pooler's, or else the class token."""
        pixels = self._pixels(images)
        if self.reads_text:
            return projected(self.network.get_image_features(pixel_values=pixels))
        out = self.network(pixel_values=pixels)
        if self._has_pooler and getattr(out, "pooler_output", None) is not None:
            return out.pooler_output.flatten(1)
        return out.last_hidden_state[:, 0]  # the class token

    def tokens(self, images: np.ndarray) -> Tensor:
        """Dense features [n, height, width, channels] of uint8 images [n, h, w, 3]: the last layer's patch tokens, on
        the grid of patches of the prepared images; class and register tokens are left out.

        Raises:
            VisionModelError: the network has no patch tokens, such as a convolutional one.
        """
        config = getattr(self.network.config, "vision_config", self.network.config)
        patch = getattr(config, "patch_size", None)
        pixels = self._pixels(images)
        tower = self.network.vision_model if self.reads_text else self.network
        found = tower(pixel_values=pixels).last_hidden_state
        if not isinstance(patch, int) or found.ndim != 3:  # a convolutional network may name a patch size too
            raise VisionModelError(f"{self.uri!r} cuts images into no patches. Give a vision transformer.")
        rows, columns = (size // patch for size in pixels.shape[2:])
        return found[:, found.shape[1] - rows * columns :].unflatten(1, (rows, columns))

    def _pixels(self, images: np.ndarray) -> Tensor:
        """Images as preprocessed by the directory's processor, [n, 3, height, width]."""
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)


def _loaded(directory: Path) -> tuple[Any, Iterable[str]]:
    """The network in a directory, and the names of the weights that its files lack."""
    from transformers import AutoModel

    _described(directory)  # the library takes quantised weights as they are
    with silent_transformers():
        network, info = cast(Any, AutoModel).from_pretrained(
            directory,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            variant=variant_argument(directory, TRANSFORMERS_NAME),
            **read_or_map(directory),
        )
    return network, info["missing_keys"]


def _described(directory: Path) -> tuple[Any, Iterable[str]]:
    """`_loaded` on torch's meta device."""
    network, misfit = automatic_on_meta(directory)
    if wrong := replace(misfit, missing=(), unexpected=()):
        raise ValueError(str(wrong))
    return network, misfit.missing


def projected(found: Any) -> Tensor:
    """transformers 5 gives the whole output where earlier releases gave the projected features alone."""
    return found if isinstance(found, Tensor) else found.pooler_output
