"""Counts what a piece of code allocates for tensors: `with Allocated() as made: ...; assert not made.large`."""

import os
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Allocated(TorchDispatchMode):
    """Bytes of every storage of more than `floor` bytes that an operation made off torch's meta device."""

    def __init__(self, floor: int = 2**20) -> None:
        super().__init__()
        self.floor = floor
        self.large: list[int] = []
        self._seen = WeakIdKeyDictionary()
        # What threads do is not seen, and transformers fills networks in some.
        self._in_this_thread = mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})

    def __enter__(self) -> "Allocated":
        self._in_this_thread.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._in_this_thread.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage.device.type != "meta" and storage not in self._seen:
            self._seen[storage] = True
            if storage.nbytes() > self.floor:
                self.large.append(storage.nbytes())
