"""The DeepSpeed engine, and parameters read and written whole, whatever the ZeRO stage.

The only module that knows how DeepSpeed lays parameters out.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2f_core.train.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def _deepspeed() -> Any:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Without this the first initialize() on CPU compiles a shared-memory operator, which needs g++ and two minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def engine_config(config: TrainConfig, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * num_workers),
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    }


def build_engine(module: nn.Module, config: TrainConfig, num_workers: int) -> Any:
    """Wrap `module`; its trainable parameters get AdamW."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )
    engine, *_ = _deepspeed().initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=trained,
        config=engine_config(config, num_workers),
        dist_init_required=False,
    )
    return engine


def trained_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that are trained, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def read_weight(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 weight, whole. Every worker must call it, for every parameter in the same order."""
    if engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32:
        return parameter.detach()  # below stage 3 every worker computes with the whole fp32 weight itself
    from deepspeed.utils import safe_get_full_fp32_param

    return cast(Tensor, safe_get_full_fp32_param(parameter))


def read_moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """One of `MOMENTS`, fp32, whole. Every worker must call it, for every parameter in the same order."""
    if not engine.zero_optimization_stage():
        return engine.optimizer.state[parameter][name]
    from deepspeed.utils import safe_get_full_optimizer_state

    return cast(Tensor, safe_get_full_optimizer_state(parameter, name))


def restore_moments(
    engine: Any, moments: dict[str, dict[str, Tensor]], steps: int, any_loss: Callable[[], Tensor]
) -> None:
    """Set optimizer moments (parameter name -> moment name -> tensor) and AdamW's step count.

    The weights must have been put into the module before the engine was built. The optimizer's state comes into being
    with a step of `0 * any_loss()` at learning rate 0, which changes no weight; under stage 3 only a real forward
    reaches all weights.
    """
    set_learning_rate(engine, 0.0)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(any_loss() * 0)
        engine.step()
    from deepspeed.utils import safe_set_full_optimizer_state

    for name, parameter in trained_parameters(engine).items():
        for moment in MOMENTS:
            if engine.zero_optimization_stage():
                safe_set_full_optimizer_state(parameter, moments[name][moment].to(parameter.device), moment)
            else:
                engine.optimizer.state[parameter][moment].copy_(moments[name][moment])
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        if "step" in state:
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)


@contextlib.contextmanager
def swapped_weights(engine: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """Compute with other weights (an average, say) for a while, then put the trained ones back. Empty: no change."""
    if not weights:
        yield
        return
    with gathered(engine, list(trained_parameters(engine).values()), modify=True):
        kept = {name: p.detach().clone() for name, p in trained_parameters(engine).items()}
        for name, parameter in trained_parameters(engine).items():
            parameter.data.copy_(weights[name])
    try:
        yield
    finally:
        with gathered(engine, list(trained_parameters(engine).values()), modify=True):
            for name, parameter in trained_parameters(engine).items():
                parameter.data.copy_(kept[name])


def gathered(engine: Any, parameters: list[nn.Parameter], *, modify: bool = False) -> Any:
    """Whole parameters inside the context, also at stage 3."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)
