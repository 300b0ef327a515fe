"""One safetensors file of a checkpoint, put together and written without keeping other threads from running.

Whatever copies, hashes, sends or frees much memory here lets go of the interpreter's lock meanwhile, or takes a small
piece at a time: the training goes on beside it.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.safetensors_layout import layout

PART_BYTES = 6 * 2**20
"""Bytes that are copied at a time with the interpreter's lock held, a few milliseconds, and of one part of an upload.
S3 takes 5 MiB at least, and 10,000 parts: 60 GB in one file."""


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


class _Parts:
    """Bytes that are cut into parts, of which only those under way are copied."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._content[part])


def write_file(uri: str, content: bytes | memoryview, *, exclusive: bool = False) -> None:
    """`storage.write_bytes`, which sends an image to S3 in parts of `PART_BYTES`."""
    if isinstance(content, memoryview) and storage.is_s3(uri) and not exclusive:
        if len(content) >= 2 * PART_BYTES:
            fs, path = storage.filesystem(uri)  # which repeats a part that fails, alone
            return storage.retried(f"write {uri}", lambda: fs.pipe_file(path, _Parts(content), chunksize=PART_BYTES))
        content = bytes(content)
    storage.write_bytes(uri, content, exclusive=exclusive)  # type: ignore[arg-type]  # files take any buffer
