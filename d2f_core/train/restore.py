"""Resume from a checkpoint: choose an undamaged one, restore it, and verify the restored state.

The first worker finds the checkpoints. Each file is read from the storage by one worker, verified, and handed on by the
process group: weights to all, moments and averages to the workers that keep them. Of the checkpoint, a worker holds no
more than the weights (in the module) and what is exchanged at a time.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from d2f_core.train import checkpoint, exchange, group, partitions, zero
from d2f_core.train.checkpoint import KINDS, Checkpoint, CheckpointError, damaged
from d2f_core.train.evaluation import EvaluationJob, evaluation_due
from d2f_core.train.exchange import Spread
from d2f_core.train.file_share import FileShare
from d2f_core.train.group import Device
from d2f_core.train.quarantine import quarantined_rows
from d2f_core.train.task import Task
from d2f_core.train.weights import check_loaded, shapes_of
from d2f_core.train.worker_job import WorkerJob
from d2f_core.train.worker_state import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenCheckpoint(Checkpoint):
    """A checkpoint of which every file has been verified, by one worker each."""

    share: FileShare = field(compare=False)
    """The files that this worker has verified."""
    readers: dict[tuple[str, str], int] = field(compare=False)
    """(kind, parameter name) -> the worker whose share has the tensor."""


def choose(output: str, identity: str, module: nn.Module, device: Device) -> ChosenCheckpoint | None:
    """The newest checkpoint whose files all have the right hash, after loading its weights into `module`; None without
    any.

    The files are divided among the workers. A damaged checkpoint is logged, and the previous one is tried. Every worker
    must call this, and gets the same checkpoint or the same error, wherever it arose.

    Raises:
        CheckpointError: all checkpoints are damaged, or they belong to another run.
        ParameterMismatchError: the module's parameters differ from the checkpoint's.
        UnreachableStorageError: S3 stays away from a worker.
    """
    candidates: list[Checkpoint] = []  # on the first worker
    count = group.of_first(
        lambda: candidates.extend(checkpoint.candidates(output, identity)) or len(candidates), device
    )
    for place in range(count):
        candidate = group.of_first(lambda place=place: candidates[place], device)
        try:
            group.of_first(lambda candidate=candidate: len(list(quarantined_rows(candidate))), device)
            return _loaded(candidate, module, device)
        except CheckpointError as error:
            logger.error("%s is damaged, the one before it is tried: %s", candidate.uri, error)
    if count:
        raise CheckpointError(f"{output}: none of {count} checkpoints is whole. Delete its checkpoints/ to start anew.")
    return None


def _loaded(candidate: Checkpoint, module: nn.Module, device: Device) -> ChosenCheckpoint:
    """Verify a checkpoint and load its weights; on an error, the module may hold some of them."""
    shapes = shapes_of(module, candidate)
    share = FileShare(candidate, *group.rank_and_count())
    try:
        group.together(lambda: share.verify(shapes), device, f"read a worker's files of {candidate.uri}")
        found = ChosenCheckpoint(candidate.uri, candidate.manifest, share, _readers(candidate, share, device))
        parameters = dict(module.named_parameters())
        for name, whole in _wholes(found, "weights", list(shapes), shapes, device):
            parameters[name].data.copy_(whole.view(shapes[name]))
        group.refuse_any(share.failure, device)
    except BaseException:
        share.close()
        raise
    share.drop("weights")
    return found


def _readers(found: Checkpoint, share: FileShare, device: Device) -> dict[tuple[str, str], int]:
    """The worker that has read each tensor, from what all have read; a collective.

    Raises:
        CheckpointError: a tensor that the manifest names is in no file, or in two.
    """
    named = found.manifest.tensors
    tensors = [(kind, name) for kind in KINDS for name in sorted(named.get(kind, {}))]
    rank, _ = group.rank_and_count()
    mine = torch.tensor([[tensor in share.holds, rank * (tensor in share.holds)] for tensor in tensors])
    times, ranks = group.summed(mine.view(-1, 2), device).T.tolist()
    for (kind, name), count in zip(tensors, times, strict=True):
        if count != 1:
            raise damaged(found.uri, f"{'holds' if count else 'lacks'} {kind} of {name!r}{' twice' if count else ''}")
    return dict(zip(tensors, ranks, strict=True))


def _wholes(
    found: ChosenCheckpoint, kind: str, names: list[str], shapes: dict[str, tuple[int, ...]], device: Device
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, whole flattened tensor), on every worker; a collective."""
    for some in exchange.in_batches(names, lambda name: np.array([np.prod(shapes[name], dtype=np.int64)])):
        owners = [found.readers[kind, name] for name in some]
        sizes = [int(np.prod(shapes[name], dtype=np.int64)) for name in some]
        read = lambda index, some=some: found.share.read(kind, some[index])  # noqa: E731
        for index, whole in exchange.to_all(owners, sizes, read, device):
            yield some[index], whole


def _parts(worker: Worker, found: ChosenCheckpoint, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, the flattened elements of one kind that this worker keeps); a collective.

    Raises:
        CheckpointError: a file was damaged since `choose`.
    """
    engine, share = worker.engine, found.share
    group.together(lambda: share.check(kind), engine.device, f"read a worker's files of {found.uri}")
    if kind in partitions.MOMENTS and not engine.zero_optimization_stage():
        saved, parameters = found.manifest.tensors.get(kind, {}), partitions.trained_parameters(engine)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name in saved}
        yield from _wholes(found, kind, list(shapes), shapes, engine.device)
    else:
        for some in exchange.in_batches(_spreads(worker, found, kind), lambda item: item[1].load):
            read = lambda index, some=some: share.read(kind, some[index][0])  # noqa: E731
            for index, stretch in exchange.scatter([where for _, where in some], read, engine.device):
                yield some[index][0], stretch
    group.refuse_any(share.failure, engine.device)
    share.drop(kind)


def _spreads(worker: Worker, found: ChosenCheckpoint, kind: str) -> Iterator[tuple[str, Spread]]:
    """(parameter name, which elements of the saved tensor each worker keeps)."""
    saved, trained = found.manifest.tensors.get(kind, {}), list(partitions.trained_parameters(worker.engine).items())
    for index in exchange.interleaved(len(trained), worker.num_workers):
        name, parameter = trained[index]
        if name in saved:
            yield name, worker.spread(kind, index, parameter, reader=found.readers[kind, name])


def _moments(worker: Worker, found: ChosenCheckpoint) -> Iterator[tuple[str, str, Tensor]]:
    """(moment, parameter name, this worker's share of it)."""
    engine, parameters = worker.engine, partitions.trained_parameters(worker.engine)
    for moment in partitions.MOMENTS:
        for name, elements in _parts(worker, found, moment):
            yield moment, name, partitions.laid_out(engine, parameters[name], elements)


def put_back(worker: Worker, task: Task, found: ChosenCheckpoint, first_rows: pa.Table) -> None:
    """Restore moments, averages and the engine's own state, then compare the loaded tensors with the manifest's hashes.

    Every worker must call this, and fails if any does.

    Raises:
        CheckpointError: a file was damaged since `choose`, or the engine's tensors differ from the checkpoint's.
    """
    manifest, batch, engine = found.manifest, task.to_batch(first_rows), worker.engine
    loss_fn = task.loss_fn
    with contextlib.closing(found.share):
        zero.restore_moments(engine, _moments(worker, found), manifest.step, lambda: loss_fn(engine, batch).mean())
        zero.restore_engine_state(engine, manifest.state.get("engine", {}))
        worker.restore_averages(_parts(worker, found, "ema"))
    group.refuse_any(_difference(worker, found), engine.device)
    logger.info("resumed from %s: all its hashes and those of the loaded tensors are right", found.uri)


def _difference(worker: Worker, found: Checkpoint) -> CheckpointError | None:
    """The first tensor that this worker saves and that differs from the checkpoint's, as an error."""
    difference = None
    for kind, name, tensor in worker.owned():  # to the end, for it is a collective
        try:
            check_loaded(found, kind, {name: tensor})
        except CheckpointError as error:
            difference = difference or error
    return difference


def not_evaluated(job: WorkerJob) -> list[EvaluationJob]:
    """Evaluations that earlier attempts left undone: of the untrained model, and of complete checkpoints."""
    steps: list[tuple[int, str | None]] = [(0, None)]
    steps += [(one.manifest.step, one.uri) for one in checkpoint.list_checkpoints(job.output)]
    due = [job.evaluation(step, uri) for step, uri in steps if evaluation_due(job.config, step)]
    return [one for one in due if not one.done()]
