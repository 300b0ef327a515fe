"""Shows that a computation stays on the device that was asked for, without having such a device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRANSFERS = ("aten._to_copy", "aten.copy_", "aten._copy_from", "aten.detach", "aten.lift_fresh", "aten.alias")

READS = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero")


class OnlyOn(TorchDispatchMode):
    """Fails when an operation mixes tensors of the device with others; moving between devices is not computing.

    With the `meta` device a module or tensor that stayed behind is found on any machine.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = torch.device(device).type, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith(READS) and args[0].device.type == "meta":
            return args[0].dtype == torch.bool or 0  # it has no numbers
        if not str(func).startswith(TRANSFERS):
            self._check(str(func), tree_leaves((args, kwargs)))
        return func(*args, **kwargs)

    def _check(self, name: str, values: Iterable[Any]) -> None:
        places = {value.device.type for value in values if isinstance(value, Tensor) and value.dim()}
        self.operations += self.device in places
        assert len(places) < 2, f"{name} mixes {sorted(places)}"
