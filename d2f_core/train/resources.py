"""How many workers the cluster has room for, and requests for more nodes."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
from ray.autoscaler.sdk import request_resources

from d2f_core.resources import InsufficientResourcesError
from d2f_core.train.config import TrainConfig

logger = logging.getLogger(__name__)

SAY_SECONDS = 60.0
"""Interval between log lines while waiting for nodes."""


def leaving_nodes() -> set[str]:
    """Ids of alive nodes that Ray was told are leaving; it schedules nothing new on them.

    Ray 2.60 has no public API for this; Ray Train's own watcher makes the same call.
    """
    return set(ray._private.state.state.get_draining_nodes())


def usable_resources() -> dict[str, float]:
    """Resources of all nodes that are not leaving; `ray.cluster_resources` includes leaving nodes."""
    leaving = leaving_nodes()
    total: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            total.update(node["Resources"])
    return dict(total)


def fitting_workers(config: TrainConfig, *, again: bool) -> int:
    """Number of workers that fit into the cluster, at most `num_workers` and at least `min_workers`.

    An autoscaler is asked for `num_workers`, and nodes have `node_wait_seconds` to join before fewer workers are used.
    Nodes that were announced as leaving do not count.

    Args:
        again: the training ran on this cluster before, so wait up to `lost_node_wait_seconds` for `min_workers`.

    Raises:
        InsufficientResourcesError: there is no room for `min_workers`; says what is missing.
    """
    began, said, asked = time.monotonic(), 0.0, False
    patience = max(config.node_wait_seconds, config.lost_node_wait_seconds if again else 0)
    try:
        while True:
            waited, total = time.monotonic() - began, usable_resources()
            fitting = [number for number in config.worker_counts if not _short(_needed(config, number), total)]
            if fitting and (fitting[0] == config.num_workers or waited >= config.node_wait_seconds):
                break
            if waited >= patience:
                raise InsufficientResourcesError(_what_is_missing(config, total))
            if not asked:
                _ask_for(config)
                asked = True
            if waited - said >= SAY_SECONDS:
                said = waited
                logger.warning("waiting for nodes, %.0f of %d s: %s", waited, patience, _what_is_missing(config, total))
            time.sleep(1)
    finally:
        if asked:
            request_resources(bundles=[])  # a request is valid until the next one, and would keep the nodes forever
    if fitting[0] < config.num_workers:
        logger.warning("the cluster has room for %d of %d workers: going on with those", fitting[0], config.num_workers)
    return fitting[0]


def _bundles(config: TrainConfig, num_workers: int) -> list[dict[str, float]]:
    """Resource bundles: one per worker with its reader, and one for an evaluation."""
    worker: dict[str, float] = {"CPU": config.cpus_per_worker + 0.5}
    evaluation: dict[str, float] = {"CPU": 1}
    if config.use_gpu:
        worker["GPU"] = 1
        if config.evaluation_gpus:
            evaluation["GPU"] = config.evaluation_gpus
    return [worker] * num_workers + [evaluation]


def _needed(config: TrainConfig, num_workers: int) -> Counter[str]:
    total: Counter[Any] = Counter()
    for bundle in _bundles(config, num_workers):
        total.update(bundle)
    return total


def _ask_for(config: TrainConfig) -> None:
    """Ask an autoscaler for the nodes: by itself it only starts nodes for queued work, and nothing is queued yet."""
    request_resources(bundles=_bundles(config, config.num_workers))


def _short(needed: Mapping[str, float], total: Mapping[str, float]) -> list[str]:
    return [name for name, amount in needed.items() if total.get(name, 0) < amount]


def _what_is_missing(config: TrainConfig, total: Mapping[str, float]) -> str:
    fewest = config.worker_counts[-1]
    needed = _needed(config, fewest)
    short = _short(needed, total)
    name = "num_workers" if fewest == config.num_workers else "min_workers"
    has = ", ".join(f"{total.get(resource, 0):g} {resource}" for resource in short)
    wants = ", ".join(f"{needed[resource]:g} {resource}" for resource in short)
    return (
        f"{name}={fewest} needs {wants} (each worker, its reader and one evaluation), the cluster has {has}. "
        f"Lower --train.{name.replace('_', '-')} or --train.cpus-per-worker, or add nodes."
    )
