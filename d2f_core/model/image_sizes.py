"""The six size numbers that SDXL reads: (height, width, crop top, crop left, target height, target width), in pixels.

They give the size of the original image, the upper left corner of the crop after resizing, and the size of the image
shown. Source: Podell et al., "SDXL", 2023, arXiv:2307.01952, section 2.2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_core.model.denoiser import ConditionError

SIZE_COLUMNS = ("bucket", "width", "height", "crop")
"""Columns of a latent table from which the sizes are computed."""


def sizes_of_rows(arrays: Mapping[str, Any]) -> Tensor:
    """The size numbers, float32 [rows, 6], of the rows of a latent table.

    The table's `crop` is a box (left, top, right, bottom) in pixels of the original, which was resized to `bucket`
    (height x width): the crop's corner is scaled alike.

    Raises:
        ConditionError: a column is missing, a `bucket` is not a valid size, or a crop is empty.
    """
    if missing := [name for name in SIZE_COLUMNS if name not in arrays]:
        raise ConditionError(
            f"the batch has no column {', '.join(missing)}, but SDXL reads the sizes of its images. Read the columns "
            f"{', '.join(SIZE_COLUMNS)} of the latent table too."
        )
    target = np.array([_bucket_size(str(bucket)) for bucket in arrays["bucket"]], np.float64).reshape(-1, 2)
    original = np.stack([arrays["height"], arrays["width"]], 1).astype(np.float64)
    left, top, right, bottom = np.asarray(arrays["crop"], np.float64).T
    kept = np.stack([bottom - top, right - left], 1)
    if (kept < 1).any():
        row = int(np.flatnonzero((kept < 1).any(1))[0])
        raise ConditionError(
            f"crop={list(arrays['crop'][row])} must be left, top, right, bottom of at least one pixel. "
            "Write the latent table again."
        )
    corner = np.rint(np.stack([top, left], 1) * target / kept)
    return torch.from_numpy(np.concatenate([original, corner, target], 1).astype(np.float32))


def _bucket_size(bucket: str) -> tuple[int, int]:
    height, _, width = bucket.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConditionError(f"bucket={bucket!r} must be HEIGHTxWIDTH in pixels. Write the latent table again.")
    return int(height), int(width)


def sizes_of_new_images(count: int, height: int, width: int) -> Tensor:
    """The size numbers, float32 [count, 6], of generated images: originals of height x width pixels, not cropped."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(count, 1)
