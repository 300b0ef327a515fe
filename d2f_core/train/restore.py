"""Go on from a checkpoint: choose one that is whole, put it back, and prove that it is there."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.model.artifact import load_weights
from d2f_core.train import checkpoint, shares, zero
from d2f_core.train.checkpoint import KINDS, Checkpoint, CheckpointError
from d2f_core.train.evaluation import EvaluationJob, evaluation_due
from d2f_core.train.state import Worker
from d2f_core.train.task import Task

if TYPE_CHECKING:
    from d2f_core.train.worker import WorkerJob

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint and all its tensors, by kind and parameter name."""

    checkpoint: Checkpoint
    tensors: dict[str, dict[str, Tensor]]


def _all_agree(fine: bool, device: str) -> bool:
    flag = torch.tensor([int(fine)], device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def choose(output: str, identity: str, module: nn.Module, device: str) -> Found | None:
    """The newest checkpoint of which every worker read every file with the right hash; its weights are in `module`.

    A damaged one is named in the log, and the one before it is taken. Every worker must call it.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; or they belong to another run.
    """
    candidates = checkpoint.candidates(output, identity)
    for candidate in candidates:
        tensors: dict[str, dict[str, Tensor]] = {}
        try:
            tensors = {kind: checkpoint.read_tensors(candidate, kind) for kind in KINDS}
        except CheckpointError as error:
            logger.error("%s is damaged, the one before it is tried: %s", candidate.uri, error)
        if _all_agree(bool(tensors), device):
            load_weights(module, tensors["weights"])
            return Found(candidate, tensors)
    if candidates:
        raise CheckpointError(
            f"{output}: none of {len(candidates)} checkpoints is whole. Delete its checkpoints/ to start anew."
        )
    return None


def put_back(worker: Worker, task: Task, found: Found, first_rows: pa.Table) -> None:
    """Restore moments, averages and the engine's own state, then compare what is there with the manifest's hashes.

    Raises:
        CheckpointError: the engine holds other numbers than the checkpoint.
    """
    manifest, names = found.checkpoint.manifest, list(shares.trained_parameters(worker.engine))
    moments = {name: {moment: found.tensors[moment][name] for moment in shares.MOMENTS} for name in names}
    batch = task.to_batch(first_rows)
    zero.restore_moments(worker.engine, moments, manifest.step, lambda: task.loss_fn(worker.engine, batch).mean())
    zero.restore_engine_state(worker.engine, manifest.state.get("engine", {}))
    worker.restore_averages(found.tensors["ema"].items())
    for kind, name, tensor in worker.owned():
        checkpoint.check_loaded(found.checkpoint, kind, {name: tensor})
    logger.info("resumed from %s: all its hashes and those of the loaded tensors are right", found.checkpoint.uri)


def not_evaluated(job: "WorkerJob") -> list[EvaluationJob]:
    """Evaluations that an earlier attempt owes: of the untrained model, and of complete checkpoints."""
    steps: list[tuple[int, str | None]] = [(0, None)]
    steps += [(one.manifest.step, one.uri) for one in checkpoint.list_checkpoints(job.output)]
    due = [job.evaluation(step, uri) for step, uri in steps if evaluation_due(job.config, step)]
    return [one for one in due if not one.done()]
