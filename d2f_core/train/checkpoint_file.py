"""One safetensors file of a checkpoint, put together without keeping other threads from running.

Whatever copies, hashes or frees much memory here lets go of the interpreter's lock meanwhile, or takes a small piece at
a time, as `storage.write_bytes` does when it sends the file: the training goes on beside it.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from d2f_core.safetensors_layout import layout


class FileImage:
    """The bytes of a safetensors file in the host's memory: a copy of tensors, as their file will hold them.

    Attributes:
        tensors: name -> view into the image.
        content: the whole file's bytes, not copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, from any device. Raises ValueError for a dtype that the format does not have."""
        sources = {name: tensor.detach() for name, tensor in tensors.items()}
        plan = layout({name: (str(found.dtype).removeprefix("torch."), found.shape) for name, found in sources.items()})
        whole = torch.empty(plan.size, dtype=torch.uint8)
        whole[: len(plan.header)] = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, source in sources.items():
            piece = whole[plan.starts[name] :][: source.nbytes]
            self.tensors[name] = piece.view(source.dtype).view(source.shape).copy_(source)
        self.content: memoryview = whole.numpy().data

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()
