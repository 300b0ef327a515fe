"""How long a training waits for nodes, and what it takes; the waiting is made fast."""

from dataclasses import replace

import pytest

from d2f_core.resources import InsufficientResourcesError
from d2f_core.train import resources
from d2f_core.train.config import TrainConfig
from d2f_core.train.resources import fitting_workers, worker_memory
from tests.pending_groups import PendingGroups, groups, node

__all__ = ["groups"]
CONFIG = TrainConfig(
    num_workers=4,
    min_workers=2,
    global_batch_size=8,
    micro_batch_size=1,
    node_wait_seconds=60,
    lost_node_wait_seconds=600,
)
WORKERS_AND_EVALUATION = [{"CPU": 1}] * 5


def test_the_place_is_held_until_it_is_given_back(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 7.0})]}
    held = fitting_workers(CONFIG, again=False)
    assert (held.count, groups.now, groups.asked) == (4, 0, [WORKERS_AND_EVALUATION])
    assert groups.alive == [held.group]
    held.release()
    held.release()
    assert not groups.alive


def test_one_group_asks_an_autoscaler_for_all_until_they_are_there(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 1.0})], 40: [node({"CPU": 1.0}), node({"CPU": 6.0})]}
    assert fitting_workers(CONFIG, again=False).count == 4
    assert groups.now == 40 and groups.asked == [WORKERS_AND_EVALUATION]


def test_gpus_are_asked_for_where_they_are_used(groups: PendingGroups) -> None:
    config = TrainConfig(num_workers=2, use_gpu=True, evaluation_gpus=0.5, node_wait_seconds=0)
    with pytest.raises(InsufficientResourcesError, match=r"num_workers=2 needs 2 CPU, 2\.5 GPU .* has 0 CPU, 0 GPU"):
        fitting_workers(config, again=False)
    evaluation = {"GPU": 0.5}
    assert groups.asked == [[{"CPU": 1, "GPU": 1}] * 2 + [evaluation]] and not groups.alive


def test_an_evaluation_between_steps_needs_no_room_of_its_own(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 3.0, "GPU": 2.0})]}
    config = TrainConfig(num_workers=2, use_gpu=True, node_wait_seconds=0)
    assert fitting_workers(config, again=False).count == 2
    assert groups.asked == [[{"CPU": 1, "GPU": 1}] * 2]


def test_the_memory_that_is_set_is_part_of_the_place(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 9.0, "memory": 30e9}, free={"CPU": 9.0, "memory": 12.25e9})]}
    config = TrainConfig(num_workers=2, worker_memory_gb=6, node_wait_seconds=0, evaluate_every=0)
    held = fitting_workers(config, again=False)
    assert groups.asked == [[{"CPU": 1, "memory": 6_000_000_000}] * 2]
    assert worker_memory(config, held, 99_000_000_000) == 6_000_000_000
    with pytest.raises(InsufficientResourcesError) as caught:
        fitting_workers(replace(config, worker_memory_gb=6.5), again=False)
    assert str(caught.value) == (
        "num_workers=2 needs 2 CPU, 13.0 GB memory (2 workers of 1 CPU, 6.5 GB memory), and "
        "the cluster has 9 CPU, 30.0 GB memory, of which other jobs hold 0 CPU, 17.8 GB memory: 1 node (10.0.0.1) with "
        "9 of 9 CPU, 12.2 of 30.0 GB memory free; no node has room for 1 worker of 1 CPU, 6.5 GB memory; waited 1 s. "
        "Lower --train.num-workers, --train.cpus-per-worker or --train.worker-memory-gb, add nodes, or give them time "
        "with --train.node-wait-seconds."
    )


@pytest.mark.parametrize(
    ("set_gb", "estimate", "reserved", "warned"),
    [
        (-1, 4_000_000_000, 4_000_000_000, False),
        (-1, 4_000_000_001, 0, True),
        (-1, 0, 0, False),
        (0, 4_000_000_000, 0, False),
    ],
)
def test_the_estimate_is_reserved_where_the_nodes_have_it_and_refuses_nothing(
    groups: PendingGroups, monkeypatch, caplog, set_gb: float, estimate: int, reserved: int, warned: bool
) -> None:
    """Two of three workers lie on the first node."""
    each = replace(node({"CPU": 4.0, "memory": 16e9}, free={"CPU": 4.0, "memory": 8e9}), id="first")
    other = replace(node({"CPU": 4.0, "memory": 4e9}), id="other")
    groups.nodes = {0: [each, other]}
    monkeypatch.setattr(resources, "nodes_of", lambda group, count: ["first", "other", "first"][:count])
    monkeypatch.setattr(resources, "living_nodes", lambda: [each, other])
    config = TrainConfig(num_workers=3, global_batch_size=3, micro_batch_size=1, worker_memory_gb=set_gb)
    held = fitting_workers(config, again=False)
    assert not any("memory" in bundle for bundle in groups.asked[0])
    assert worker_memory(config, held, estimate) == reserved
    assert ("no memory is reserved: a worker is estimated to take 4.0 GB" in caplog.text) == warned
    assert ("--train.worker-memory-gb" in caplog.text) == warned


def test_a_training_that_never_evaluates_needs_room_for_its_workers_alone(groups: PendingGroups) -> None:
    """Their readers start on a node whose CPUs are all taken."""
    groups.nodes = {0: [node({"CPU": 1.0})]}
    assert fitting_workers(TrainConfig(evaluate_every=0), again=False).count == 1 and groups.now == 0


def test_a_worker_that_fits_on_no_node_is_refused_in_one_line(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.0}), node({"CPU": 2.0}), node({"CPU": 8.0}, free={"CPU": 1.0})]}
    config = TrainConfig(num_workers=1, cpus_per_worker=3, node_wait_seconds=5)
    with pytest.raises(InsufficientResourcesError) as caught:
        fitting_workers(config, again=False)
    assert str(caught.value) == (
        "num_workers=1 needs 4 CPU (1 worker of 3 CPU, 1 evaluation of 1 CPU), and the cluster has "
        "12 CPU, of which other jobs hold 7 CPU: 1 node (10.0.0.1) with 1 of 8 CPU free; 2 nodes (10.0.0.1) with "
        "2 of 2 CPU free; no node has room for 1 worker of 3 CPU; waited 5 s. Lower --train.num-workers or "
        "--train.cpus-per-worker, add nodes, or give them time with --train.node-wait-seconds."
    )


def test_fewer_workers_are_taken_only_when_the_others_did_not_come_in_time(groups: PendingGroups, caplog) -> None:
    groups.nodes = {0: [node({"CPU": 9.0}, free={"CPU": 4.0})]}
    assert fitting_workers(CONFIG, again=False).count == 2 and groups.now == 60
    assert "room for 2 of 4 workers" in caplog.text and len(groups.alive) == 1


def test_a_first_start_gives_up_soon_and_lost_nodes_are_waited_for(groups: PendingGroups, caplog) -> None:
    groups.nodes = {0: [node({"CPU": 1.0})], 500: [node({"CPU": 4.0})]}
    with pytest.raises(InsufficientResourcesError, match=r"min_workers=2 needs 3 CPU .* has 1 CPU"):
        fitting_workers(CONFIG, again=False)
    assert groups.now == 60 and not groups.alive
    groups.now = 0
    caplog.clear()
    assert fitting_workers(CONFIG, again=True).count == 2 and groups.now == 500
    assert caplog.text.count("waiting for room") == 9
    groups.now, groups.nodes = 0, {0: [node({"CPU": 1.0})]}
    with pytest.raises(InsufficientResourcesError, match=r"--train\.lost-node-wait-seconds"):
        fitting_workers(CONFIG, again=True)
    assert groups.now == 600


def test_nodes_that_have_begun_to_start_are_waited_for_longer(groups: PendingGroups) -> None:
    groups.starting = {20: 2}
    groups.nodes = {0: [], 300: [node({"CPU": 7.0})]}
    assert fitting_workers(CONFIG, again=False).count == 4 and groups.now == 300
    groups.now, groups.starting, groups.nodes = 0, {20: 2, 200: 0}, {0: []}
    with pytest.raises(InsufficientResourcesError, match=r"no node; .* waited 200 s"):
        fitting_workers(CONFIG, again=False)
    groups.now, groups.starting = 0, {0: 1}
    with pytest.raises(InsufficientResourcesError, match="waited 1860 s"):
        fitting_workers(CONFIG, again=False)
