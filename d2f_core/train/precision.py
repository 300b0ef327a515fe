"""The dtypes in which networks compute, by the names that a training's config has for them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
