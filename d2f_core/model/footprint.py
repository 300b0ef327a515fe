"""Memory and FLOPs of one forward and backward pass, counted on tensors without contents.

The network runs under torch's FakeTensorMode, where operations report their allocations and compute nothing. SDXL is
counted in half a minute on a laptop. Attention is counted as a fused kernel (torch's scaled dot product, as on GPUs):
its scores are never stored, and are computed a second time in the backward pass.
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
"""Tokens in the window of every CLIP text encoder."""
TIME_IDS = 6
UNCERTAIN = 1.01
"""The counted peak may be too high by up to this factor."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors created inside a block while they are alive: `with PeakMemory() as memory: ...`.

    Tensors that existed before do not count. Views share their tensor's bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once."""
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
    """Cost of one micro-batch through a network, forward and backward."""

    held_bytes: int
    """Bytes of activations that the forward pass keeps for the backward pass."""
    peak_bytes: int
    """Peak bytes during both passes, without the weights and without finished gradients."""
    forward_flops: int
    flops: int
    """FLOPs of both passes, recomputation included (attention; all blocks under activation checkpointing)."""


def sizes(module: nn.Module, *, trained: bool) -> list[int]:
    """Number of elements of each trained (or each frozen) parameter, in the module's order."""
    return [parameter.numel() for parameter in module.parameters() if parameter.requires_grad is trained]


def count_pass(
    network: nn.Module, *, batch: int, side: int, dtype: torch.dtype, checkpointing: bool = False, chunks: int = 1
) -> PassCount:
    """Count a training pass of a UNet, bare or with adapters, on any device, also meta; the UNet is not changed.

    Args:
        side: height and width of the latents.
        dtype: of weights and activations.
        checkpointing: recompute the blocks' activations in the backward pass (activation checkpointing).
        chunks: windows of the text encoder that a caption fills.
    """
    network = copy.deepcopy(network)
    unet = next(module for module in network.modules() if isinstance(module, UNet2DConditionModel))
    with FakeTensorMode():
        materialize(network, dtype)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return measure_pass(network.train(), unet_inputs(unet, batch, side, chunks), dtype)


def materialize(network: nn.Module, dtype: torch.dtype) -> None:
    """Give a network on "meta" empty weights of a type, inside a FakeTensorMode."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    cast(Any, network)._apply(empty)


def unet_inputs(unet: UNet2DConditionModel, batch: int, side: int, chunks: int = 1) -> dict[str, Tensor]:
    """Inputs of the denoiser around this UNet, as zeros of the right shapes by argument name."""
    config = cast(Any, unet.config)
    inputs = {
        "x_dm": torch.zeros(batch, config.out_channels, side, side),
        "timestep": torch.zeros(batch),
        "text_states": torch.zeros(batch, chunks * TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == POOLED_AND_TIME_IDS:
        width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        inputs |= {"pooled_text": torch.zeros(batch, width), "time_ids": torch.zeros(batch, TIME_IDS)}
    if joined := config.in_channels - config.out_channels:
        inputs["joined_latents"] = torch.zeros(batch, joined, side, side)
    return inputs


def measure_pass(network: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> PassCount:
    """Count one pass of a denoiser while it runs, on real or fake tensors."""
    denoiser, rest = as_denoiser(network, dtype), dict(inputs)
    x_dm, timestep = rest.pop("x_dm"), rest.pop("timestep")
    return measure(network, lambda: denoiser(x_dm, timestep, **rest).float())


def measure(network: nn.Module, forward: Callable[[], Tensor]) -> PassCount:
    """Count a forward pass of a network, given as a function, and the backward pass from its output.

    Gradients are dropped when they are finished.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        for parameter in network.parameters()
        if parameter.requires_grad
    ]
    with _little_garbage(), PeakMemory() as memory, _flop_counter() as flops:
        prediction = forward()
        held, until_here = memory.live, flops.get_total_flops()
        # Activation checkpointing leaves reference cycles; when Python collects them is random, and must not count.
        memory.collects = True
        prediction.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return PassCount(
        held_bytes=held, peak_bytes=memory.peak, forward_flops=until_here, flops=flops.get_total_flops()
    )  # fmt: skip


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Freeze existing objects for the block, so that garbage collections in it only scan new objects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def text_flops(encoders: Sequence[nn.Module]) -> int:
    """FLOPs of one chunk of a caption through all text encoders."""
    return sum(forward_flops(one, lambda net: net(torch.zeros(1, TOKENS, dtype=torch.long))) for one in encoders)


def encode_flops(vae: AutoencoderKL, resolution: int) -> int:
    """FLOPs of encoding one image to latents."""
    return forward_flops(vae, lambda net: net.encode(torch.zeros(1, 3, resolution, resolution)))


def decode_bytes(vae: AutoencoderKL, side: int) -> int:
    """Peak bytes of decoding one image from latents of `side` by `side`, in fp32 and without the weights."""
    vae = copy.deepcopy(vae)
    with FakeTensorMode(), torch.no_grad():
        materialize(vae, torch.float32)
        with PeakMemory() as memory:
            vae.decode(cast(Any, torch.zeros(1, int(cast(Any, vae.config).latent_channels), side, side)))
    return memory.peak


def forward_flops(network: nn.Module, run: Callable[[Any], Any]) -> int:
    """FLOPs of what `run` does with the network, on tensors without contents."""
    network = copy.deepcopy(network)
    with FakeTensorMode(), torch.no_grad(), _flop_counter() as flops:
        materialize(network, torch.float32)
        run(network)
    return flops.get_total_flops()


def _flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, extended by the CPU's fused attention, which it does not know."""
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
