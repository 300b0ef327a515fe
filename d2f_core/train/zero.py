"""The DeepSpeed engine: how it is built and its state restored, for every ZeRO stage.

Only `partitions` knows the layout of the engine's fp32 weights and moments.
"""

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from d2f_core.train import partitions
from d2f_core.train.compiler import MissingCompilerError, missing_compiler
from d2f_core.train.config import TrainConfig
from d2f_core.train.memory import MOST_IN_BUCKET

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class NonFiniteGradientError(FloatingPointError):
    """A gradient was not finite, on at least one worker; no weight was changed by that step."""


def _import_muon() -> None:
    """Import Muon, which every engine imports but none here uses, without torch's compiler.

    Its module decorates a function with torch.compile, which loads 500 modules of the compiler and takes two seconds.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _deepspeed() -> Any:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    _import_muon()
    # Otherwise the first initialize() on a CPU compiles a shared-memory operator, which needs g++ and two minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch by names that torch 2.13 deprecates, some of them in every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def engine_config(config: TrainConfig, num_workers: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration; `trained` is the number of trained elements."""
    # The bucket is allocated in full, so DeepSpeed's default would take 1 GB (bf16) even for an adapter of a few MB.
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(trained, MOST_IN_BUCKET)}
    host = {"device": "cpu", "pin_memory": config.use_gpu}
    if config.offload != "none":
        zero["offload_optimizer"] = host
    if config.offload == "optimizer_and_weights":
        zero["offload_param"] = host
    kept: dict[str, Any] = {}
    if config.precision != "fp32" and config.gradient_precision == "fp32":
        kept = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        if config.zero_stage == 2:
            # By itself it divides by the number of workers in the dtype of the passes, before it exchanges.
            zero["reduce_scatter"] = False
    return {
        **kept,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * num_workers),
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 10**9,
    }


@contextlib.contextmanager
def _same_engine_for_fp32_sums(deepspeed: Any) -> Iterator[None]:
    """Let ZeRO 1 sum bf16 gradients in fp32 by the optimizer that does so for fp16, offloaded bf16 and stage 2.

    DeepSpeed takes another one for this case alone (`BF16_Optimizer`), which refuses a gradient of zero, as of
    `restore_moments`, does not look whether gradients are finite, and keeps whole fp32 gradients besides.
    """
    engine = deepspeed.DeepSpeedEngine
    choose = engine._do_optimizer_sanity_check

    def choose_zero(self: Any, optimizer: Any) -> Any:
        chosen = choose(self, optimizer)
        return "zero_optimization" if self.zero_optimization() else chosen

    engine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = choose


def _build_optimizer(trained: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    options: Any = dict(lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=True, **options)
    if not shutil.which("ninja"):
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # where torch's build looks for ninja
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(trained, adamw_mode=True, **options)


def enable_activation_checkpointing(module: nn.Module) -> None:
    """Make `module` recompute its activations in the backward pass; raises ValueError if it does not support that."""
    enable = getattr(module, "enable_gradient_checkpointing", None)
    if enable is None:
        raise ValueError(
            f"activation_checkpointing=True, but {type(module).__name__} has no method enable_gradient_checkpointing "
            "(diffusers' models have one). Use activation_checkpointing=False and a smaller micro_batch_size."
        )
    enable()


def build_engine(module: nn.Module, config: TrainConfig, num_workers: int) -> Any:
    """Wrap `module`; its trainable parameters get AdamW.

    Under fp16 the engine's `step` skips an optimizer step when gradients overflow (`engine.skipped_steps` counts them).
    Under fp32 and bf16, where only a fault makes gradients overflow, it raises `NonFiniteGradientError` on every
    worker.

    Raises:
        MissingCompilerError: the optimizer must be compiled on this machine, but cannot be.
    """
    if missing := missing_compiler(config):
        raise MissingCompilerError(missing)
    deepspeed = _deepspeed()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    whole = {} if config.precision == "fp32" else {name: p.detach().clone() for name, p in trained.items()}
    with _same_engine_for_fp32_sums(deepspeed):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_build_optimizer(list(trained.values()), config),
            model_parameters=list(trained.values()),
            config=engine_config(config, num_workers, sum(p.numel() for p in trained.values())),
            dist_init_required=False,
        )
    _limit_waiting(config.worker_timeout_seconds)
    for name, weight in whole.items():
        # DeepSpeed creates its fp32 weights from the rounded ones: a resumed run would lose their last digits.
        partitions.write(engine, trained[name], weight.float())
    if config.precision != "fp16":
        _refuse_non_finite_gradients(engine)
    return engine


def _limit_waiting(seconds: float) -> None:
    """Limit the time that collectives wait for a stalled worker to `seconds`.

    DeepSpeed creates its own process group with torch's default of 30 minutes (10 with NCCL), ignores the timeout of
    Ray Train's group, and has no setting for it.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _refuse_non_finite_gradients(engine: Any) -> None:
    """Raise on non-finite gradients: DeepSpeed would silently skip the step at stages 1 to 3, write NaN at stage 0."""

    def refuse(broken: bool) -> None:
        if broken:
            raise NonFiniteGradientError(
                f"step {engine.global_steps + 1} of this attempt: the losses are finite, but a gradient is not. Lower "
                "the learning rate, or look at the loss where it is not smooth; the last checkpoint is good."
            )

    if engine.zero_optimization_stage():
        engine.optimizer.loss_scaler.update_scale = refuse  # called in every step with whether a gradient is not finite
        return

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        refuse(not torch.isfinite(nn.utils.get_total_norm(gradients)))

    engine.optimizer.register_step_pre_hook(check)


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def restore_moments(
    engine: Any, moments: Iterable[tuple[str, str, Tensor]], steps: int, any_loss: Callable[[], Tensor]
) -> None:
    """Set the optimizer's moments from (moment, parameter name, this worker's share of it, as `partitions.partition_of`
    gives it), one at a time, and AdamW's step count.

    The weights must have been loaded into the module before the engine was built. The optimizer's state is created by a
    step of `0 * any_loss()` at learning rate 0, which changes no weight; under stage 3 only a real forward pass reaches
    all weights. The loss scale is left unchanged.

    Raises:
        NonFiniteGradientError: the loss or its gradient is not finite, so that no step could be made.
    """
    before = engine_state(engine)
    set_learning_rate(engine, 0.0)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(any_loss() * 0)
        engine.step()
    if not partitions.moments_exist(engine):
        raise NonFiniteGradientError(
            "the loss of the first batch, or its gradient, is not finite, so the optimizer cannot be restored. "
            "Look at that batch, or resume with precision='fp32' or 'bf16'."
        )
    restore_engine_state(engine, before)
    parameters = partitions.trained_parameters(engine)
    for moment, name, tensor in moments:
        partitions.write_partition(engine, parameters[name], tensor, moment)
    _set_optimizer_steps(engine, steps)


def _set_optimizer_steps(engine: Any, steps: int) -> None:
    inner = partitions.inner_optimizer(engine)
    for state in inner.state.values():
        if "step" in state:
            counted = state["step"]
            state["step"] = steps if isinstance(counted, int) else torch.full_like(torch.as_tensor(counted), steps)
    if hasattr(inner, "ds_opt_adam"):
        _count_up(inner, steps)


def _count_up(cpu_adam: Any, steps: int) -> None:
    """Advance DeepSpeedCPUAdam's internal powers of beta to `steps`.

    The optimizer multiplies them in fp32 step by step, but computes them in another way, with different last bits, when
    the step count jumps. So the steps are repeated on a single element: 0.2 s for 100,000 steps.
    """
    beta1, beta2 = cpu_adam.param_groups[0]["betas"]
    scratch = [torch.zeros(1) for _ in range(4)]
    for step, beta in [(0, beta1 / 2), *((step, beta1) for step in range(steps + 1))]:  # a new beta resets the count
        cpu_adam.ds_opt_adam.adam_update(cpu_adam.opt_id, step, 0.0, beta, beta2, 1.0, 0.0, False, *scratch)


def _loss_scaler(engine: Any) -> Any:
    """DeepSpeed's dynamic loss scaler; None unless the engine computes in fp16."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def engine_state(engine: Any) -> dict[str, Any]:
    """Other state that an exact resume needs, as JSON; equal on every worker. {} unless fp16 was used.

    A step that fp16 skipped counts as a step of the run, but not of AdamW.
    """
    scaler = _loss_scaler(engine)
    if not scaler and not engine.skipped_steps:
        return {}
    counted = [int(state["step"]) for state in partitions.inner_optimizer(engine).state.values() if "step" in state]
    return {
        "loss_scaler": {name: getattr(scaler, name) for name in LOSS_SCALER_FIELDS} if scaler else {},
        "skipped_steps": engine.skipped_steps,
        "optimizer_steps": max(counted, default=0),
    }


def restore_engine_state(engine: Any, state: dict[str, Any]) -> None:
    """Restore `engine_state`; call it after `restore_moments`. The loss scale is used only by an fp16 engine."""
    if not state:
        return
    engine.skipped_steps = state["skipped_steps"]
    _set_optimizer_steps(engine, state["optimizer_steps"])
    if scaler := _loss_scaler(engine):
        vars(scaler).update(state["loss_scaler"])
