"""Text to image on latents: the network reads the caption, and a preview is one picture per prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_core.model.artifact import to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.config import PreviewConfig
from d2f_core.model.latent_task import LatentTask
from d2f_core.model.sampling import sample_latents
from d2f_core.randomness import keyed_normal


class TextToImage(LatentTask):
    """The text-to-image task: generates images from captions."""

    def row_conditions(self, arrays: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Tensor]:
        """The captions' condition, and of padded images the mask [batch, 1, h, w] of what is image."""
        given = self.text_of_rows(captions, arrays)
        if "mask" in arrays:
            given["mask"] = torch.from_numpy(np.array(arrays["mask"], np.float32)).to(self.device)
        return given

    def preview_images(
        self, network: Callable[..., Any], config: PreviewConfig, held: Mapping[str, Any] | None, micro_batch: int
    ) -> list[Image.Image]:
        """The preview of the config's prompts."""
        del held
        parts = [config.prompts[start : start + micro_batch] for start in range(0, len(config.prompts), micro_batch)]
        return [image for prompts in parts for image in self.preview(network, config, prompts)]

    def preview(self, network: Callable[..., Any], config: PreviewConfig, prompts: Sequence[str]) -> list[Image.Image]:
        """One image per prompt; noise is keyed by the prompt."""
        autoencoder = load_autoencoder(self.base, device=self.device)
        height, width = (config.resolution, config.resolution) if config.resolution else self.base.default_size
        shape = self.base.latent_shape(height, width)
        noise = torch.from_numpy(keyed_normal(0, prompts, shape, "preview")).to(self.device)
        latents, _ = sample_latents(
            self.model(network),
            noise,
            self.condition(prompts),
            self.condition([""] * len(prompts)),
            solver="ddim" if self.config.objective == "diffusion" else "euler",
            steps=config.steps,
            guidance=config.guidance,
        )
        images = [to_uint8(autoencoder.decode(one))[0] for one in latents.split(1)]  # a decoder takes GBs an image
        return [Image.fromarray(image.numpy()) for image in images]
