"""The switches by which torch, cuDNN and cuBLAS compute the same bits each time."""

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""What of it makes cuBLAS deterministic: eight buffers of 4 MiB, or of 16 KiB (slower)."""


def use_deterministic_algorithms() -> None:
    """Set them in this process, before it first computes on a GPU. An operator that has none raises torch's error.

    Raises:
        ValueError: the environment asks for another workspace of cuBLAS.
    """
    asked = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if asked not in WORKSPACES:
        raise ValueError(
            f"deterministic=True, but {WORKSPACE}={asked!r} lets cuBLAS add up in any order. Unset it on the workers, "
            f"or set {WORKSPACES[0]!r}."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
