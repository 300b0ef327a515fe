"""How long a training waits for nodes, and what it takes; the waiting is made fast."""

import pytest

from d2f_core.resources import InsufficientResourcesError
from d2f_core.train.config import TrainConfig
from d2f_core.train.resources import fitting_workers
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
    with pytest.raises(InsufficientResourcesError, match=r"num_workers=2 needs 3 CPU, 2\.5 GPU .* has 0 CPU, 0 GPU"):
        fitting_workers(config, again=False)
    evaluation = {"CPU": 1, "GPU": 0.5}
    assert groups.asked == [[{"CPU": 1, "GPU": 1}] * 2 + [evaluation]] and not groups.alive


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
