"""python -m tests.waiting_jobs JOB ...: drivers on a cluster that must grow, or that is shared; prints what happened.

    train OUTPUT WORKERS CPUS WAIT SECONDS [OTHERS] [MEMORY]
                                               a training whose workers do nothing for so long; it begins when one of
                                               the others' outputs (a glob) shows that their workers have begun
    lose OUTPUT                                a training of 2 workers of 2 CPUs whose place another job takes
    generate ACTORS CPUS GPUS WAIT             a batch job of as many items as actors
    paths OUTPUT NODES                         what is said of a local path when so many nodes are there
    ask GPUS SECONDS                           what of two demands the autoscaler still sees beside a Ray Data job

Ends with 2 and one line when the cluster is too small, as the commands of the pipelines do.
"""

import functools
import glob
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group

from d2f_core import ray_internals
from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.config import ActorPoolConfig
from d2f_core.nodes import Part
from d2f_core.resources import Demand, InsufficientResourcesError, Reservation, reserve
from d2f_core.shared_paths import NotSharedError, check_shared
from d2f_core.train import launch
from d2f_core.train.config import TrainConfig
from d2f_core.train.worker_job import WorkerJob

ESTIMATE = 1_000_000_000
"""Bytes of the host's memory that a worker is said to take."""


def occupy(seconds: float, job: WorkerJob) -> None:
    """In place of a training worker's work."""
    began, rank, group = time.time(), ray.train.get_context().get_world_rank(), get_current_placement_group()
    Path(job.output, f"began-{job.attempt}-{rank}").write_text(json.dumps(group.bundle_specs if group else None))
    time.sleep(seconds)
    Path(job.output, f"ended-{job.attempt}-{rank}").write_text(f"{began} {time.time()}")


def train(output: str, workers: str, cpus: str, wait: str, seconds: str, others: str = "", memory: str = "-1") -> None:
    """`run_training` as it is, but for what the workers do and how the end is known: a file per worker."""
    config = TrainConfig(
        num_workers=int(workers), global_batch_size=int(workers), micro_batch_size=1, cpus_per_worker=float(cpus),
        node_wait_seconds=int(wait), max_failures=1, worker_memory_gb=float(memory),
    )  # fmt: skip
    while others and not glob.glob(f"{others}/began-*"):
        time.sleep(0.2)
    Path(output).mkdir()
    ended: Callable[..., Any] = lambda *_: len([*Path(output).glob("ended-*")]) == config.num_workers  # noqa: E731
    launch.run_worker, launch._complete, launch._settle = functools.partial(occupy, float(seconds)), ended, print
    unused: Any = None
    launch.run_training(
        config=config, build_task=unused, plan=unused, output=output, identity="", worker_bytes=lambda _: ESTIMATE
    )
    times = [[float(word) for word in file.read_text().split()] for file in Path(output).glob("ended-*")]
    print("RAN", min(began for began, _ in times), max(end for _, end in times))


def lose(output: str) -> None:
    """Room for the first attempt is promised and gone; it comes back when room is waited for again."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "3"
    other, fitting_workers = placement_group([{"CPU": 2}] * 2), launch.fitting_workers
    assert other.wait(90)

    def promise(config: TrainConfig, *, again: bool) -> Reservation:
        if not again:
            return Reservation(count=config.num_workers, group=None)
        remove_placement_group(other)
        return fitting_workers(config, again=again)

    launch.fitting_workers = promise
    train(output, "2", "2", "60", "1")


class Echo:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def generate(actors: str, cpus: str, gpus: str, wait: str) -> None:
    there = threading.Thread(target=_say_when_a_node_is_there, daemon=True)
    there.start()
    pool = ActorPoolConfig(num_actors=int(actors), cpus_per_actor=int(cpus), gpus_per_actor=float(gpus))
    items = [{"number": number} for number in range(int(actors))]
    for _ in map_items(items, Echo, (), pool, node_wait_seconds=float(wait)):
        print("ROW", time.time())


def paths(output: str, nodes: str) -> None:
    if int(nodes):
        assert placement_group([{"CPU": 2}] * int(nodes), strategy="STRICT_SPREAD").wait(90)
    began = time.time()
    try:
        check_shared(reads={"model": __file__}, writes={"output": output})
        print("SHARED", time.time() - began)
    except NotSharedError as error:
        print("REFUSED", error)


def ask(gpus: str, seconds: str) -> None:
    """Two demands that cannot be met, one of each kind, before Ray Data's coordinator sends its own."""
    began, count = time.time(), int(gpus)
    request_resources(bundles=[{"CPU": 1, "GPU": 0.25}] * count)
    over = threading.Event()
    beside = threading.Thread(target=_data_job, args=(float(seconds), over))
    cluster_status = ray_internals.found(ray_internals.STARTING)
    demand = Demand(
        counts=[count], parts=lambda n: [Part("worker", n, {"GPU": 1})], subject="{count} need", advice="None."
    )
    waiting = threading.Thread(target=_refused, args=(demand, float(seconds)))
    waiting.start()
    while waiting.is_alive():
        demands = cluster_status(ray.get_runtime_context().gcs_address).resource_demands
        kinds = (demands.placement_group_demand, demands.cluster_constraint_demand)
        seen = [any(part.bundle.get("GPU") for one in kind for part in one.bundles_by_count) for kind in kinds]
        print("SEEN", f"{time.time() - began:.0f}", *map(int, seen))
        if all(seen) and beside.ident is None:
            beside.start()
        time.sleep(1)
    over.set()
    if beside.ident is not None:
        beside.join()  # a thread inside Ray Data while the interpreter ends makes the process crash at times


def _refused(demand: Demand, seconds: float) -> None:
    try:
        reserve(demand, seconds=seconds, fewer_after=seconds)
    except InsufficientResourcesError as error:
        print("REFUSED", error)


def _data_job(seconds: float, over: threading.Event) -> None:
    def slow(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(1)
        return batch

    tasks = 6 * int(seconds)  # as many CPUs there are on the three nodes
    rows = ray.data.range(tasks, override_num_blocks=tasks).map_batches(slow, num_cpus=1)
    for _ in rows.iter_batches(batch_size=1):
        if over.is_set():
            return


def _say_when_a_node_is_there() -> None:
    while not any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes()):
        time.sleep(0.2)
    print("THERE", time.time())


def main(job: str, *arguments: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    ray.init(log_to_driver=False)
    try:
        {"train": train, "lose": lose, "generate": generate, "paths": paths, "ask": ask}[job](*arguments)
    except InsufficientResourcesError as error:
        print("REFUSED", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main(*sys.argv[1:]))
