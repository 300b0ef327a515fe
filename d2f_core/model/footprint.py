"""What one forward and backward pass takes, counted on tensors without contents: bytes and floating point operations.

The network runs under torch's FakeTensorMode: every operation says what it would allocate, and nothing is computed. So
SDXL is counted in half a minute on a laptop. Attention is counted as a fused kernel (torch's scaled dot product, as on
GPUs): its scores are never stored, and are computed a second time in the backward pass.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from d2f_core.model.denoiser import POOLED_AND_TIME_IDS, as_denoiser

TOKENS = 77
"""Per caption, of all CLIP text encoders."""
TIME_IDS = 6
UNCERTAIN = 1.01
"""A peak may be too high by this factor."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made within, for as long as they live: `with PeakMemory() as memory: ...`.

    What was there before does not count. Views share their tensor's bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at a time."""
        self._seen = WeakIdKeyDictionary()
        self.collects = False
        """Whether garbage is collected before the peak rises by a hundredth: see `measure_pass`."""
        self._certain = 0

    def __enter__(self) -> Any:
        gc.collect()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._seen.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        if self.collects and self.live > UNCERTAIN * self._certain:
            gc.collect()
            self._certain = max(self._certain, self.live)
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True, kw_only=True)
class PassCount:
    """One micro-batch through a network, forward and backward."""

    held_bytes: int
    """Kept by the forward pass for the backward pass."""
    peak_bytes: int
    """Most at any moment of both, without the weights and without gradients that are complete."""
    forward_flops: int
    flops: int
    """Forward and backward, with what is computed twice (attention; all blocks under activation checkpointing)."""


def sizes(module: nn.Module, *, trained: bool) -> list[int]:
    """Elements of each parameter that is (or is not) trained, in the module's order."""
    return [parameter.numel() for parameter in module.parameters() if parameter.requires_grad is trained]


def count_pass(
    network: nn.Module, *, batch: int, side: int, dtype: torch.dtype, checkpointing: bool = False
) -> PassCount:
    """Count a training pass of a UNet, bare or with adapters, on any device (meta will do); it stays as it was.

    Args:
        side: height and width of the latents.
        dtype: of weights and activations.
        checkpointing: compute the blocks' activations again in the backward pass.
    """
    network = copy.deepcopy(network)
    unet = next(module for module in network.modules() if isinstance(module, UNet2DConditionModel))
    with FakeTensorMode():
        _materialize(network, dtype)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return measure_pass(network.train(), unet_inputs(unet, batch, side), dtype)


def _materialize(network: nn.Module, dtype: torch.dtype) -> None:
    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    cast(Any, network)._apply(empty)


def unet_inputs(unet: UNet2DConditionModel, batch: int, side: int) -> dict[str, Tensor]:
    """Zeros of the shapes that the denoiser around this UNet is called with, by its argument names."""
    config = cast(Any, unet.config)
    inputs = {
        "x_dm": torch.zeros(batch, config.out_channels, side, side),
        "timestep": torch.zeros(batch),
        "text_states": torch.zeros(batch, TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == POOLED_AND_TIME_IDS:
        width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        inputs |= {"pooled_text": torch.zeros(batch, width), "time_ids": torch.zeros(batch, TIME_IDS)}
    if joined := config.in_channels - config.out_channels:
        inputs["joined_latents"] = torch.zeros(batch, joined, side, side)
    return inputs


def measure_pass(network: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> PassCount:
    """Count one pass as it runs, on real tensors or on fake ones. Gradients are dropped once they are complete."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        for parameter in network.parameters()
        if parameter.requires_grad
    ]
    denoiser, rest = as_denoiser(network, dtype), dict(inputs)
    x_dm, timestep = rest.pop("x_dm"), rest.pop("timestep")
    with _little_garbage(), PeakMemory() as memory, _flop_counter() as flops:
        prediction = denoiser(x_dm, timestep, **rest).float()
        held, forward = memory.live, flops.get_total_flops()
        # Activation checkpointing leaves cycles behind; when Python collects them is chance, and must not count.
        memory.collects = True
        prediction.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return PassCount(
        held_bytes=held, peak_bytes=memory.peak, forward_flops=forward, flops=flops.get_total_flops()
    )  # fmt: skip


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Let collections within look at little more than what is made within."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def text_flops(encoders: Sequence[nn.Module]) -> int:
    """Of one caption through all of them."""
    return sum(_forward_flops(one, lambda net: net(torch.zeros(1, TOKENS, dtype=torch.long))) for one in encoders)


def encode_flops(vae: AutoencoderKL, resolution: int) -> int:
    """Of one image into latents."""
    return _forward_flops(vae, lambda net: net.encode(torch.zeros(1, 3, resolution, resolution)))


def _forward_flops(network: nn.Module, run: Callable[[Any], Any]) -> int:
    network = copy.deepcopy(network)
    with FakeTensorMode(), torch.no_grad(), _flop_counter() as flops:
        _materialize(network, torch.float32)
        run(network)
    return flops.get_total_flops()


def _flop_counter() -> FlopCounterMode:
    """torch's own, which knows the fused attention of GPUs but not the CPU's."""
    operations = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    fused: dict[Any, Any] = {
        operations._scaled_dot_product_flash_attention_for_cpu: forward,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=fused)
