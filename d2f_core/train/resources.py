"""Room on the cluster for a training's workers, and their start in it."""

import logging
from collections import Counter

from d2f_core.nodes import MEMORY, Part, living_nodes
from d2f_core.resources import Demand, Reservation, nodes_of, reserve
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


def worker_bundle(config: TrainConfig, memory: int) -> dict[str, float]:
    """What Ray reserves for a worker; `memory` in bytes."""
    bundle = {"CPU": config.cpus_per_worker, "GPU": int(config.use_gpu), MEMORY: memory}
    return {name: amount for name, amount in bundle.items() if amount}


def worker_memory(config: TrainConfig, held: Reservation, estimate: int) -> int:
    """Bytes of the host's memory to reserve for each of the `num_workers` workers that the place is held for.

    What is set was part of the place. The estimate is not: a training that runs without reserved memory must not end
    for want of it, and an autoscaler whose kinds of nodes are described by CPUs and GPUs alone would never start one.
    So it is taken where the nodes of the place have it free.
    """
    if config.worker_memory_gb >= 0 or not estimate or held.group is None:
        return _demanded(config)
    free = {node.id: node.free.get(MEMORY, 0) for node in living_nodes()}
    workers = Counter(nodes_of(held.group, config.num_workers))
    short = [node for node, count in workers.items() if count * estimate > free.get(node, 0)]
    if not short:
        return estimate
    logger.warning(
        "no memory is reserved: a worker is estimated to take %.1f GB, and a node for %d of them has %.1f GB left. Ray "
        "may place other work there, and end a worker when memory runs out; set --train.worker-memory-gb to reserve "
        "some, or 0 for none.",
        estimate / 1e9, workers[short[0]], free.get(short[0], 0) / 1e9,
    )  # fmt: skip
    return 0


def _demanded(config: TrainConfig) -> int:
    return max(0, round(config.worker_memory_gb * 1e9))


def _demand(config: TrainConfig, *, again: bool) -> Demand:
    counts = config.worker_counts
    name = "num_workers" if counts[-1] == config.num_workers else "min_workers"
    wait = "lost_node_wait_seconds" if again else "node_wait_seconds"
    lowered = [name, "cpus_per_worker", *(["worker_memory_gb"] if _demanded(config) else [])]
    *flags, last, wait = (f"--train.{flag.replace('_', '-')}" for flag in (*lowered, wait))
    return Demand(
        counts=counts,
        parts=lambda count: _parts(config, count),
        subject=f"{name}={{count}} needs",
        advice=f"Lower {', '.join(flags)} or {last}, add nodes, or give them time with {wait}.",
    )


def _parts(config: TrainConfig, num_workers: int) -> list[Part]:
    """The workers, whose readers reserve nothing (`data.stream`), and one evaluation if it runs beside the training."""
    parts = [Part("worker", num_workers, worker_bundle(config, _demanded(config)))]
    if config.evaluate_every and config.evaluation_place != "workers":
        gpus = config.evaluation_task_gpus
        parts.append(Part("evaluation", 1, {"GPU": gpus} if gpus else {"CPU": 1}))
    return parts
