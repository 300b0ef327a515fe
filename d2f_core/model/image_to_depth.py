"""Image to depth on latents: the network reads the image's latents and the noisy depth latents, but no text.

Depth is affine-invariant, and encoded by the autoencoder as a picture of three equal channels. Source: Ke et al.,
"Repurposing Diffusion-Based Image Generators for Monocular Depth Estimation", CVPR 2024, arXiv:2312.02145.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

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


class ImageToDepth(LatentTask):
    """The image-to-depth task: predicts depth up to scale and shift."""

    columns: ClassVar[tuple[str, ...]] = (*LatentTask.columns, "joined_mean", "mask")

    def row_conditions(self, arrays: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Tensor]:
        """Empty text, the image's latents [batch, C, h, w], and the mask of valid depth latents [batch, 1, h, w]."""
        mask = torch.from_numpy(np.asarray(arrays["mask"], dtype=np.float32)).to(self.device)
        return {**self._condition_of(arrays, len(captions)), "mask": mask}

    def _condition_of(self, arrays: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        joined = torch.from_numpy(np.asarray(arrays["joined_mean"], dtype=np.float32)).to(self.device)
        return {**self.text_of_rows([""] * count, arrays), "joined_latents": joined}

    def preview_images(
        self, network: Callable[..., Any], config: PreviewConfig, held: Mapping[str, Any] | None, micro_batch: int
    ) -> list[Image.Image]:
        """The preview of the first held-out rows."""
        if held is None or not config.rows:
            return []
        rows = min(config.rows, len(held["row"]))
        parts = [slice(start, min(start + micro_batch, rows)) for start in range(0, rows, micro_batch)]
        return [
            image
            for part in parts
            for image in self.preview(network, config, {name: values[part] for name, values in held.items()})
        ]

    def preview(
        self, network: Callable[..., Any], config: PreviewConfig, arrays: Mapping[str, Any]
    ) -> list[Image.Image]:
        """Image, prediction and ground truth side by side, a picture per row of a latent table; noise is keyed by the
        row.

        In depth pictures white is far.
        """
        autoencoder = load_autoencoder(self.base, device=self.device)
        truth = torch.from_numpy(np.asarray(arrays["latent_mean"], dtype=np.float32)).to(self.device)
        rows = [int(row) for row in arrays["row"]]
        noise = torch.from_numpy(keyed_normal(0, rows, tuple(truth.shape[1:]), "preview")).to(self.device)
        condition = self._condition_of(arrays, len(rows))
        latents, _ = sample_latents(
            self.model(network),
            noise,
            condition,
            condition,
            solver="ddim" if self.config.objective == "diffusion" else "euler",
            steps=config.steps,
            guidance=1.0,
        )
        # One at a time: a decoder takes GBs an image.
        triples = zip(condition["joined_latents"].split(1), latents.split(1), truth.split(1), strict=True)
        return [self._strip(*(autoencoder.decode(one) for one in triple)) for triple in triples]

    def _strip(self, image: Tensor, *depths: Tensor) -> Image.Image:
        grey = [depth.mean(1, keepdim=True).expand(-1, 3, -1, -1) for depth in depths]
        return Image.fromarray(to_uint8(torch.cat([image, *grey], dim=3))[0].numpy())
