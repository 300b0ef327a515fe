"""What a training needs besides its model, data and loss."""

import math
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.model.ema import EmaConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000
    """Optimizer steps of the whole training."""
    global_batch_size: int = 64
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = 32
    """Samples per worker and forward pass; lower this when memory runs out."""
    num_workers: int = 1
    """Ray Train workers."""
    use_gpu: bool = False
    """One GPU per worker, NCCL between them; otherwise CPU and gloo."""
    cpus_per_worker: float = 1
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: int = 0
    """torch threads of a CPU worker; 0 divides the machine's cores."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is partitioned over the workers (1 moments, 2 also gradients, 3 also weights)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward dtype. Weights, moments and averages are kept in fp32."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall as a cosine to `final_learning_rate_factor` at `num_steps`."""
    final_learning_rate_factor: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.99
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    seed: int = 0
    """Decides data order, noise, flow times and new weights."""
    log_every: int = 10
    """Steps between metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on storage."""
    evaluate_every: int = 500
    """Steps between evaluations; also before the first step and after the last. 0: never."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "global_batch_size",
            "micro_batch_size",
            "num_workers",
            "log_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.keep_checkpoints < 1:
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints} must be at least 1: a run resumes from the last one."
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0. Use 1e-5 to 1e-3.")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision='bf16' with zero_stage=0 runs other numerics in DeepSpeed. Use zero_stage 1, 2 or 3."
            )
        _ = self.gradient_accumulation_steps

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per worker and optimizer step."""
        per_pass = self.micro_batch_size * self.num_workers
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size * num_workers = "
                f"{per_pass}. Nearest that fits: {self.global_batch_size // per_pass * per_pass or per_pass}."
            )
        return self.global_batch_size // per_pass

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        floor = self.final_learning_rate_factor
        return self.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)
