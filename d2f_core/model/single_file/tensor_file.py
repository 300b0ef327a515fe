"""Safetensors files read and written one tensor at a time, so that memory does not grow with the model."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from torch import Tensor

from d2f_core.model.single_file.keys import LayoutError
from d2f_core.safetensors_layout import Layout, layout

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Name -> torch's name of the dtype, such as "float32", and shape."""


class TensorWriter:
    """A safetensors file of full size whose tensors are put in their places as they come, in any order."""

    def __init__(self, handle: IO[bytes], plan: Layout, shapes: Shapes) -> None:
        self._handle, self._plan, self._left = handle, plan, dict(shapes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the announced dtype and shape, once."""
        dtype, shape = self._left.pop(name)
        if tensor.dtype != getattr(torch, dtype) or list(tensor.shape) != list(shape):
            raise RuntimeError(f"{name!r} is of {tensor.dtype} and {list(tensor.shape)}, not {dtype} and {list(shape)}")
        self._handle.seek(self._plan.starts[name])
        # As bytes: numpy has no bfloat16.
        self._handle.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def check_complete(self) -> None:
        """Raise RuntimeError if an announced tensor was not written."""
        if self._left:
            raise RuntimeError(f"{len(self._left)} tensors were not written, such as {min(self._left)!r}")


@contextmanager
def writing(file: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Iterator[TensorWriter]:
    """A file to write tensors to; at the end of the context all of them must have been written.

    Raises:
        LayoutError: the disk has no room for the file.
    """
    plan, free = layout(shapes, metadata), shutil.disk_usage(file.parent).free
    if plan.size > free:
        raise LayoutError(
            f"{str(file)!r} needs {plan.size:,} bytes, and {free:,} are free there. Free space, or set TMPDIR or "
            "D2F_CACHE to a larger disk."
        )
    with file.open("wb") as handle:
        handle.write(plan.header)
        handle.truncate(plan.size)
        writer = TensorWriter(handle, plan, shapes)
        yield writer
        writer.check_complete()


class TensorReader:
    """The tensors of some safetensors files, by name; each is read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self.metadata |= opened.metadata() or {}
            self._places |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def __call__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)
