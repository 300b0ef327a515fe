"""Room on the cluster for a training's workers, and their start in it."""

import logging

from d2f_core.nodes import Part
from d2f_core.resources import Demand, Reservation, reserve
from d2f_core.train.config import TrainConfig

logger = logging.getLogger(__name__)


def fitting_workers(config: TrainConfig, *, again: bool) -> Reservation:
    """Room for as many workers as the cluster can hold, at most `num_workers` and at least `min_workers`.

    A pending placement group asks an autoscaler for all of them, and nodes are given `node_wait_seconds` to come before
    fewer workers are taken. A node that was announced to go does not count, nor what other jobs hold.

    Args:
        again: the training ran on this cluster before, so wait up to `lost_node_wait_seconds` for `min_workers`.

    Returns:
        The place, held: release it when the workers are about to take it.

    Raises:
        InsufficientResourcesError: there is no room for `min_workers`; says what is missing.
    """
    patience = max(config.node_wait_seconds, config.lost_node_wait_seconds if again else 0)
    held = reserve(_demand(config, again=again), seconds=patience, fewer_after=config.node_wait_seconds)
    if held.count < config.num_workers:
        logger.warning("the cluster has room for %d of %d workers: going on with those", held.count, config.num_workers)
    return held


def worker_bundle(config: TrainConfig) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {})


def _demand(config: TrainConfig, *, again: bool) -> Demand:
    counts = config.worker_counts
    name = "num_workers" if counts[-1] == config.num_workers else "min_workers"
    wait = "lost_node_wait_seconds" if again else "node_wait_seconds"
    flags = [f"--train.{flag.replace('_', '-')}" for flag in (name, "cpus_per_worker", wait)]
    return Demand(
        counts=counts,
        parts=lambda count: _parts(config, count),
        subject=f"{name}={{count}} needs",
        advice=f"Lower {flags[0]} or {flags[1]}, add nodes, or give them time with {flags[2]}.",
    )


def _parts(config: TrainConfig, num_workers: int) -> list[Part]:
    """The workers, whose readers reserve nothing (`data.stream`), and one evaluation."""
    parts = [Part("worker", num_workers, worker_bundle(config))]
    if config.evaluate_every:
        gpus = {"GPU": config.evaluation_gpus} if config.use_gpu and config.evaluation_gpus else {}
        parts.append(Part("evaluation", 1, {"CPU": 1, **gpus}))
    return parts
