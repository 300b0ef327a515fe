"""Resume from a checkpoint: choose an undamaged one, restore it, and verify the restored state.

Of the checkpoint, a worker holds no more than the weights (in the module) and one or two tensors of the file being
read.
"""

import logging
from collections.abc import Iterator

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.train import checkpoint, partitions, zero
from d2f_core.train.checkpoint import Checkpoint, CheckpointError
from d2f_core.train.evaluation import EvaluationJob, evaluation_due
from d2f_core.train.quarantine import quarantined_rows
from d2f_core.train.task import Task
from d2f_core.train.weights import load_parameters
from d2f_core.train.worker_job import WorkerJob
from d2f_core.train.worker_state import Worker

logger = logging.getLogger(__name__)

MOST_OF_A_MESSAGE = 1000
"""Most bytes of a worker's error message that are sent to the others."""


def choose(output: str, identity: str, module: nn.Module, device: str) -> Checkpoint | None:
    """The newest checkpoint whose files all have the right hash, after loading its weights into `module`; None without
    any.

    Every worker reads the weights; the other files are divided among the workers, which only verify them. A damaged
    checkpoint is logged, and the previous one is tried. Every worker must call this.

    Raises:
        CheckpointError: all checkpoints are damaged, or they belong to another run.
        ParameterMismatchError: the module's parameters differ from the checkpoint's.
    """
    candidates = checkpoint.candidates(output, identity)
    for candidate in candidates:
        damage = ""
        try:
            _verify_share(candidate)
            for _ in quarantined_rows(candidate):  # all of them need it, and it is small beside the weights
                pass
            load_parameters(module, candidate)
        except CheckpointError as error:
            damage = str(error)
        damage = _of_any_worker(damage, device)
        if not damage:
            return candidate
        logger.error("%s is damaged, the one before it is tried: %s", candidate.uri, damage)
    if candidates:
        raise CheckpointError(
            f"{output}: none of {len(candidates)} checkpoints is whole. Delete its checkpoints/ to start anew."
        )
    return None


def _rank_and_count() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _verify_share(found: Checkpoint) -> None:
    """Verify this worker's share of the files other than weights by reading them."""
    rank, count = _rank_and_count()
    for file in [file for file in found.manifest.files if file.kind != "weights"][rank::count]:
        for _ in checkpoint.iter_file(found, file):
            pass


def _of_any_worker(damage: str, device: str) -> str:
    """The error message of the first worker that found damage; empty if none did."""
    rank, count = _rank_and_count()
    text = damage.encode()[:MOST_OF_A_MESSAGE]
    said = torch.zeros(count, MOST_OF_A_MESSAGE, dtype=torch.uint8, device=device)
    said[rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
    if dist.is_initialized():
        dist.all_reduce(said)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in said.cpu()]
    return next((text for text in texts if text), "")


def put_back(worker: Worker, task: Task, found: Checkpoint, first_rows: pa.Table) -> None:
    """Restore moments, averages and the engine's own state, then compare the loaded tensors with the manifest's hashes.

    Raises:
        CheckpointError: a file was damaged since `choose`, or the engine's tensors differ from the checkpoint's.
    """
    manifest, batch = found.manifest, task.to_batch(first_rows)
    loss_fn = task.loss_fn
    zero.restore_moments(worker.engine, _moments(found), manifest.step, lambda: loss_fn(worker.engine, batch).mean())
    zero.restore_engine_state(worker.engine, manifest.state.get("engine", {}))
    worker.restore_averages(checkpoint.iter_tensors(found, "ema"))
    for kind, name, tensor in worker.owned():
        checkpoint.check_loaded(found, kind, {name: tensor})
    logger.info("resumed from %s: all its hashes and those of the loaded tensors are right", found.uri)


def _moments(found: Checkpoint) -> Iterator[tuple[str, str, Tensor]]:
    for moment in partitions.MOMENTS:
        for name, tensor in checkpoint.iter_tensors(found, moment):
            yield moment, name, tensor


def not_evaluated(job: WorkerJob) -> list[EvaluationJob]:
    """Evaluations that earlier attempts left undone: of the untrained model, and of complete checkpoints."""
    steps: list[tuple[int, str | None]] = [(0, None)]
    steps += [(one.manifest.step, one.uri) for one in checkpoint.list_checkpoints(job.output)]
    due = [job.evaluation(step, uri) for step, uri in steps if evaluation_due(job.config, step)]
    return [one for one in due if not one.done()]
