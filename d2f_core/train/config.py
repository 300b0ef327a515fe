"""Settings of a training other than its model, data and loss. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.identity import since
from d2f_core.train.retention_rules import Retention

AT_LEAST = {
    "num_steps": 1,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "num_workers": 1,
    "lanes": 1,
    "window_rows": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "worker_timeout_seconds": 1,
    "worker_memory_gb": -1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "clip_grad_norm": 0,
    "evaluate_every": 0,
    "evaluation_gpus": 0,
    "evaluation_seconds": 1,
    "keep_best": 0,
    "keep_every": 0,
    "max_failures": -1,
    "node_wait_seconds": 0,
    "lost_node_wait_seconds": 0,
    "min_workers": 0,
}


Which = int | Literal["newest", "best"]
"""How users select a checkpoint of a run: by step, or as the newest or best."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    decay: float = 0.999
    """EMA decay per step, in [0, 1); 0 keeps no average."""
    start_step: int = 0
    """Number of first steps in which the average equals the weights."""
    power: float = 0.75
    """Warm-up: the decay grows as `1 - (1 + steps) ** -power` up to `decay`."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema decay={self.decay} must lie in [0, 1). Use 0.999, or 0 for none.")

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step `step` (counted from 1)."""
        if step <= self.start_step:
            return 0.0
        return min(self.decay, 1 - (1 + step - self.start_step) ** -self.power)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000
    """Optimizer steps of the whole training."""
    global_batch_size: int = 64
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = 32
    """Samples per worker and forward pass; lower this when memory runs out."""
    num_workers: int = 1
    """Number of Ray Train workers."""
    min_workers: int = 0
    """Fewest workers to train with when the cluster has no room for `num_workers`: every start and restart takes the
    largest number that fits and divides the global batch; the samples of each step stay the same. 0: `num_workers`."""
    use_gpu: bool = False
    """One GPU per worker, NCCL between them; otherwise CPU and gloo."""
    cpus_per_worker: float = 1
    """Logical CPUs that Ray reserves per worker. The worker's reader reserves none, and uses up to one more."""
    worker_memory_gb: float = since(-1.0, before=-1.0)
    """GB (1e9 bytes) of the host's memory that Ray reserves per worker, so that it places nothing else there; a node
    must have it. 0: none. -1: as much as a worker is estimated to take, if the nodes that were found have it free;
    otherwise none, and a line says so."""
    threads_per_worker: int = 0
    """torch threads of a CPU worker; 0 divides the machine's cores. Of a GPU worker those of the optimizer that steps
    offloaded moments (`optimizer="cpu_adamw"`); 0 takes `cpus_per_worker`."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is partitioned over the workers (1 moments, 2 also gradients, 3 also weights)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Forward and backward dtype. Weights, moments and averages are kept in fp32. fp16 scales the loss so that small
    gradients survive, and leaves out a step when they overflow; bf16 needs neither."""
    gradient_precision: Literal["fp32", "same"] = since("fp32", before="fp32")
    """Dtype in which the gradients of micro-batches are summed and exchanged between workers, at every stage that takes
    bf16 or fp16 (1 to 3): fp32, or the same as `precision`. The latter takes less memory and half the traffic, and
    rounds at every addition: the sum of 128 micro-batches is off by 1e-2 then, in fp32 by 1e-8."""
    optimizer: Literal["adamw", "cpu_adamw"] = "adamw"
    """AdamW: torch's fused one, or DeepSpeed's for offloaded moments, compiled with g++ on first use (some 150 s).
    There is no 8-bit AdamW: its moments are quantised in blocks over a worker's flattened share, so a checkpoint by
    parameter, from which any ZeRO stage and number of workers can resume, could not store them without loss."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What lives in the host's memory instead of the GPU's: moments and fp32 weights (stage 1 or higher), or also the
    partitioned weights (stage 3). Slower, fits larger models. Needs `optimizer="cpu_adamw"`."""
    deterministic: bool = since(False, before=False)
    """Compute by deterministic algorithms only (torch's, cuDNN's and cuBLAS's), so that a resumed run may end with the
    bits of an unbroken one on GPUs too. Slower, and an operator that has no such algorithm ends the training with an
    error that names it. CPUs compute the same bits without it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time, equal results."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine down to `final_learning_rate_factor` at `num_steps`."""
    final_learning_rate_factor: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.99
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are clipped; 0: no clipping."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    seed: int = 0
    """Seed of data order, noise, flow times and new weights."""
    lanes: int = 16
    """Independent reading streams of the data order; at least the largest number of workers that the run will ever
    have, or windows are read more than once. Part of the run's identity."""
    window_rows: int = 512
    """Consecutive rows that are read and shuffled together."""
    max_quarantined_share: float = 0.01
    """Largest share of unusable samples before the run stops."""
    max_failures: int = 3
    """Most consecutive failures after which a training is restarted from its last checkpoint; -1: no limit. A new
    checkpoint resets the count, and failures due to an announced loss of a node (a spot instance's notice) do not
    count."""
    node_wait_seconds: int = 60
    """How long room for all workers is waited for before fewer are taken (see `min_workers`), or the first start is
    given up. An autoscaler is asked for nodes; those that it has begun to start are waited for longer, for up to half
    an hour. 0: it must be there."""
    lost_node_wait_seconds: int = 1800
    """Seconds that a training which has lost its nodes waits for room for its fewest workers."""
    worker_timeout_seconds: int = 600
    """Seconds after which a worker that keeps the others waiting ends the attempt; the error names the worker."""
    log_every: int = 10
    """Steps between logged metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep on storage."""
    keep_best: int = 0
    """Number of best evaluated checkpoints to keep in addition to the newest."""
    keep_best_metric: str = "validation_flow_loss"
    """Metric of the task's evaluation by which the best checkpoints are chosen."""
    keep_best_lower_is_better: bool = since(True, before=True)
    """Whether the lowest value of `keep_best_metric` is the best, as for a loss, or the highest, as for an accuracy."""
    keep_every: int = 0
    """Steps between checkpoints that are kept forever; 0: none are."""
    evaluate_every: int = 500
    """Steps between evaluations; also before the first step and after the last; 0: never. An evaluation reads a
    checkpoint."""
    evaluate_on: Literal["auto", "workers", "spare", "cpu"] = since("auto", before="auto")
    """Where evaluations run. `workers`: between steps on the first worker's device, while all workers pause. `spare`:
    beside the training on `evaluation_gpus` GPUs of their own. `cpu`: beside it on one CPU. `auto`: `workers` when the
    training runs on GPUs, unless `evaluation_gpus` asks for spare ones; else `cpu`."""
    evaluation_gpus: float = 0.0
    """GPUs of an evaluation beside the training, in addition to the workers'; 0: one, if `evaluate_on="spare"`."""
    evaluation_seconds: int = since(1800, before=1800)
    """Seconds after which one evaluation is given up. It is owed then: the end of the training names it."""

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.keep_checkpoints < 1:
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints} must be at least 1: a run resumes from the last one."
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0. Use 1e-5 to 1e-3.")
        if not 0 <= self.max_quarantined_share <= 1:
            raise ValueError(f"max_quarantined_share={self.max_quarantined_share} must lie in [0, 1]. Use 0.01.")
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} is above num_workers={self.num_workers}. Lower it.")
        self._check_engine()
        self._check_schedule()
        self._check_evaluation()
        _ = self.gradient_accumulation_steps

    def _check_engine(self) -> None:
        """Refuse settings that DeepSpeed does not support, ignores, or computes differently."""
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision={self.precision!r} with zero_stage=0 runs other numerics in DeepSpeed. "
                "Use zero_stage 1, 2 or 3."
            )
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError(
                "precision='fp16' with use_gpu=False: most CPUs cannot compute in fp16. Use precision='bf16' or 'fp32'."
            )
        if self.offload != "none" and self.optimizer != "cpu_adamw":
            raise ValueError(
                f"offload={self.offload!r} with optimizer={self.optimizer!r}: DeepSpeed steps offloaded moments with "
                "its own optimizer only. Use optimizer='cpu_adamw' (needs g++ on the workers) or offload='none'."
            )
        if self.optimizer == "cpu_adamw" and self.offload == "none":
            raise ValueError(
                "optimizer='cpu_adamw' with offload='none': it steps only what lies in the host's memory. "
                "Use optimizer='adamw', or offload='optimizer'."
            )
        if self.offload == "optimizer" and self.zero_stage < 1:
            raise ValueError(
                "offload='optimizer' with zero_stage=0 would be ignored by DeepSpeed: nothing is partitioned. "
                "Use zero_stage 1, 2 or 3."
            )
        if self.offload == "optimizer_and_weights" and self.zero_stage < 3:
            raise ValueError(
                f"offload='optimizer_and_weights' with zero_stage={self.zero_stage}: weights are partitioned, and can "
                "be offloaded, at stage 3 only. Use zero_stage=3, or offload='optimizer'."
            )

    def _check_evaluation(self) -> None:
        """Refuse GPUs for an evaluation that would not use them."""
        if self.evaluation_gpus and self.evaluate_on in ("workers", "cpu"):
            raise ValueError(
                f"evaluation_gpus={self.evaluation_gpus:g} with evaluate_on={self.evaluate_on!r} would stay unused. "
                "Use evaluate_on='spare', or evaluation_gpus=0."
            )

    def _check_schedule(self) -> None:
        """Refuse intervals at which an evaluation or retention rule needs a checkpoint that is not written."""
        every = self.checkpoint_every
        for name, why in (("evaluate_every", "an evaluation reads a checkpoint"), ("keep_every", "only those exist")):
            value = getattr(self, name)
            if value % every:
                raise ValueError(
                    f"{name}={value} is not a multiple of checkpoint_every={every}: {why}. "
                    f"Nearest that fits: {name}={max(1, round(value / every)) * every}, or checkpoint_every="
                    f"{math.gcd(value, every)}, or 0 to turn it off."
                )
        if self.keep_best and not self.evaluate_every:
            raise ValueError(
                f"keep_best={self.keep_best} with evaluate_every=0: no checkpoint is ever evaluated. "
                f"Use keep_best=0, or evaluate_every={every}."
            )
        if self.keep_best and not self.keep_best_metric:
            raise ValueError(
                f"keep_best={self.keep_best} with an empty keep_best_metric. Name a metric of the evaluation, such as "
                "'validation_flow_loss'."
            )

    @property
    def evaluation_place(self) -> Literal["workers", "spare", "cpu"]:
        """Where evaluations run, with `auto` resolved."""
        if self.evaluate_on != "auto":
            return self.evaluate_on
        if self.evaluation_gpus:
            return "spare"
        return "workers" if self.use_gpu else "cpu"

    @property
    def evaluation_task_gpus(self) -> float:
        """GPUs that an evaluation in a Ray task of its own reserves. What an ended training owes is made up so, too."""
        if self.evaluation_place == "spare":
            return self.evaluation_gpus or 1.0
        return 1.0 if self.use_gpu and self.evaluation_place == "workers" else 0.0

    @property
    def precision_warning(self) -> str:
        """What fp32 costs on GPUs, and which flag changes it; "" elsewhere."""
        if not self.use_gpu or self.precision != "fp32":
            return ""
        return (
            "precision='fp32' on GPUs: activations take twice the memory of bf16, matrix products several times its "
            "time (an A100 has 19.5 TFLOP/s in fp32 and 312 in bf16 by its data sheet). --train.precision bf16 changes "
            f"it{'' if self.zero_stage else ', with --train.zero-stage 1'}; weights and moments stay in fp32."
        )

    @property
    def retention(self) -> Retention:
        """The retention rules for checkpoints."""
        return Retention(
            keep_last=self.keep_checkpoints,
            keep_best=self.keep_best,
            metric=self.keep_best_metric,
            lower_is_better=self.keep_best_lower_is_better,
            keep_every=self.keep_every,
        )

    @property
    def worker_counts(self) -> list[int]:
        """Numbers of workers that the training may run with, `num_workers` first."""
        numbers = range(self.num_workers, (self.min_workers or self.num_workers) - 1, -1)
        return [number for number in numbers if self.global_batch_size % (self.micro_batch_size * number) == 0]

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
