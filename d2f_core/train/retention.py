"""Which checkpoints are kept on storage, and the metrics that determine it."""

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from d2f_core import storage
from d2f_core.train.checkpoint import MANIFEST, Checkpoint, directories, list_checkpoints
from d2f_core.train.retention_rules import Retention
from d2f_core.train.sealed import CheckpointError, read_sealed, seal

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"


def write_evaluation(uri: str, metrics: Mapping[str, float]) -> None:
    """Store a checkpoint's metrics, once; storing equal metrics again is allowed.

    Raises:
        CheckpointError: there is no complete checkpoint at `uri`, or it already has different metrics.
    """
    if not storage.exists(storage.join(uri, MANIFEST)):
        raise CheckpointError(f"{uri} is not a complete checkpoint (any more); its evaluation has nowhere to go.")
    place = storage.join(uri, EVALUATION)
    data = seal({"metrics": {name: float(value) for name, value in metrics.items()}})
    try:
        storage.write_bytes(place, data, exclusive=True)
    except FileExistsError:
        if storage.read_bytes(place, small=True) != data:
            raise CheckpointError(f"{place} holds other metrics already. Delete it to evaluate again.") from None


def read_evaluation(uri: str) -> dict[str, float] | None:
    """A checkpoint's metrics; None when it has not been evaluated.

    Raises:
        CheckpointError: the file was damaged.
    """
    place = storage.join(uri, EVALUATION)
    try:
        return dict(read_sealed(place)["metrics"])
    except FileNotFoundError:
        return None


def last_good(newest_first: Iterable[Checkpoint]) -> Checkpoint | None:
    """The newest checkpoint with a stored evaluation; evaluations of a collapsed model are not stored."""
    for complete in newest_first:
        with contextlib.suppress(CheckpointError):  # a damaged evaluation counts as missing
            if read_evaluation(complete.uri) is not None:
                return complete
    return None


def metric_of(uri: str, name: str) -> float | None:
    """The metric's value; None before the evaluation, NaN if the evaluation does not contain the metric."""
    try:
        metrics = read_evaluation(uri)
    except CheckpointError as error:
        logger.warning("%s counts as evaluated without result: %s", uri, error)
        return math.nan
    return None if metrics is None else metrics.get(name, math.nan)


def kept(complete: Sequence[Checkpoint], retention: Retention, metric: Mapping[str, float | None]) -> set[str]:
    """URIs of the checkpoints that a rule keeps; `complete` lists all, oldest first.

    Args:
        metric: uri -> value of `retention.metric`, None when not evaluated yet, NaN when it has no value.
    """
    stay = {checkpoint.uri for checkpoint in complete[-retention.keep_last :]}
    if retention.keep_every:
        stay |= {checkpoint.uri for checkpoint in complete if checkpoint.manifest.step % retention.keep_every == 0}
    if not retention.keep_best:
        return stay
    newest_evaluated = max((place for place, c in enumerate(complete) if metric.get(c.uri) is not None), default=-1)
    stay |= {checkpoint.uri for checkpoint in complete[newest_evaluated + 1 :]}
    return stay | {checkpoint.uri for checkpoint in best_first(complete, retention, metric)[: retention.keep_best]}


def best_first(
    complete: Sequence[Checkpoint], retention: Retention, metric: Mapping[str, float | None]
) -> list[Checkpoint]:
    """The checkpoints with a metric value, best first; of equal ones the newer, which was trained longer. `complete` is
    sorted oldest first.
    """
    sign = 1 if retention.lower_is_better else -1
    values = [(value, place) for place, c in enumerate(complete) if (value := metric.get(c.uri)) is not None]
    ranked = sorted((v for v in values if not math.isnan(v[0])), key=lambda v: (sign * v[0], -v[1]))
    return [complete[place] for _, place in ranked]


def apply_retention(
    output: str, retention: Retention, being_evaluated: Collection[str] = (), *, up_to_step: int | None = None
) -> list[str]:
    """Delete complete checkpoints that no rule keeps, and the remains of unfinished saves.

    The newest evaluated checkpoint is always kept: if the model collapses, it is the last good one.

    With `keep_best`, checkpoints newer than the newest evaluated one are kept until their own evaluation; an older one
    without a value of the metric never counts as best. Directories without a manifest, or with a damaged one, are
    deleted when they are older than the oldest of the `keep_last` newest. The manifest is deleted first, so that a
    half-deleted checkpoint does not exist.

    Args:
        being_evaluated: URIs that must not be deleted yet.
        up_to_step: later checkpoints are neither counted nor deleted, so that a run that resumed from before a damaged
            checkpoint does not lose its new checkpoints because of it.

    Returns:
        URIs of the deleted directories.
    """
    complete = [c for c in list_checkpoints(output) if up_to_step is None or c.manifest.step <= up_to_step]
    if not complete:
        return []
    metric = {c.uri: metric_of(c.uri, retention.metric) for c in complete} if retention.keep_best else {}
    stay = kept(complete, retention, metric) | {uri.rstrip("/") for uri in being_evaluated}
    if good := last_good(reversed(complete)):
        stay.add(good.uri)
    exist = {checkpoint.uri for checkpoint in complete}
    oldest_last = complete[-retention.keep_last :][0].manifest.step
    gone = [uri for step, uri in directories(output) if uri not in stay and (uri in exist or step < oldest_last)]
    for uri in gone:
        logger.info("removing old checkpoint %s", uri)
        _delete(uri)
    return gone


def _delete(uri: str) -> None:
    for target in (storage.join(uri, MANIFEST), uri):
        try:
            storage.remove_tree(target)
        except FileNotFoundError:
            logger.info("%s was deleted by another process meanwhile", target)
