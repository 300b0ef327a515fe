"""Diff2Flow costs what the diffusion loss costs: the same network work, one latent-sized tensor more at most."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.loss import LOSSES
from d2f_core.objective.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.from_scheduler_config(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
DATA, NOISE = torch.randn(4, 4, 16, 16), torch.randn(4, 4, 16, 16)
UNIFORM = torch.tensor([0.1, 0.4, 0.6, 0.9])


class LatentAllocations(TorchDispatchMode):
    """Counts tensors of a latent batch's size that get memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.UntypedStorage] = []  # kept, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() == DATA.numel():
            storage = out.untyped_storage()
            if storage.data_ptr() not in given:
                self.seen.append(storage)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_at_most_one_latent_sized_tensor_more(kind, dtype):
    answer = torch.randn_like(DATA, dtype=dtype).requires_grad_()
    count = {}
    for name in ("diffusion", "diff2flow"):
        with LatentAllocations() as allocations:
            LOSSES[name](VelocityField(lambda x, t: answer, SCHEDULE, kind), DATA, NOISE, UNIFORM).mean().backward()
        count[name] = len(allocations.seen)
    assert 4 <= count["diffusion"] and count["diff2flow"] <= count["diffusion"] + 1, count


def test_the_same_floating_point_operations_forward_and_backward():
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 4, 1))
    count = {}
    for name in LOSSES:
        with FlopCounterMode(display=False) as flops:
            LOSSES[name](
                VelocityField(lambda x, t: network(x), SCHEDULE, "epsilon"), DATA, NOISE, UNIFORM
            ).mean().backward()
        count[name] = flops.get_total_flops()
    assert count["diffusion"] > 1e5
    assert count["diff2flow"] == pytest.approx(count["diffusion"], rel=1e-3)
