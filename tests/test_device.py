"""The device comes from what Ray reserved, whatever GPUs the machine has."""

import pytest
import ray
import torch

from d2f_core.device import reserved_device


class Context:
    def __init__(self, gpus: list[str]) -> None:
        self.gpus = gpus

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": self.gpus, "TPU": []}


@pytest.mark.parametrize(("gpus", "expected"), [([], "cpu"), (["0"], "cuda"), (["2", "3"], "cuda")])
def test_a_gpu_that_is_in_sight_but_not_reserved_is_left_alone(
    gpus: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Context(gpus))
    assert reserved_device() == expected


def test_outside_of_ray_nothing_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert reserved_device() == "cpu"


@pytest.mark.usefixtures("cluster")
def test_a_task_without_a_gpu_computes_on_the_cpu() -> None:
    assert ray.get(ray.remote(reserved_device).remote()) == "cpu"
