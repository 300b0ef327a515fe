"""Lets workers and actors that reserved a made-up GPU compute on the CPU; everything around them is as on a real one.

Python imports it when it starts, for the fake cluster names its directory in PYTHONPATH.
"""

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def compute_on_cpu(module: ModuleType) -> None:
    vars(module)["reserved_device"] = lambda: "cpu"


def exchange_by_gloo(module: ModuleType) -> None:
    config = vars(module)["TorchConfig"]
    vars(module)["TorchConfig"] = lambda backend, **more: config(backend="gloo", **more)


def train_on_cpu(module: ModuleType) -> None:
    import torch

    vars(module)["ray"].train.torch.get_device = lambda: torch.device("cpu")


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "d2f_core.device": compute_on_cpu,
    "d2f_core.train.launch": exchange_by_gloo,
    "d2f_core.train.worker": train_on_cpu,
}


class Changed(importlib.machinery.PathFinder):
    """Finds the modules in `CHANGES` as Python does, and changes each after it was executed."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        change = CHANGES.get(fullname)
        spec = super().find_spec(fullname, path, target) if change else None
        if spec is None or spec.loader is None or change is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        vars(spec.loader)["exec_module"] = execute_and_change
        return spec


sys.meta_path.insert(0, Changed)
