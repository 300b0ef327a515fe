"""How long a batch job waits for room; the waiting is made fast."""

from math import inf

import pytest

from d2f_core.batch.resources import await_resources
from d2f_core.resources import InsufficientResourcesError
from tests.pending_groups import PendingGroups, groups, node

__all__ = ["groups"]


def test_a_cluster_with_room_is_not_waited_for(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.75})]}
    held = await_resources(2, {"CPU": 1, "GPU": 0}, others={"CPU": 0.75}, least=2, seconds=60)
    assert (held.count, groups.now, groups.alive) == (2, 0, [held.group])


def test_an_autoscaler_is_asked_for_all_and_the_first_that_fits_begins(groups: PendingGroups, caplog) -> None:
    groups.nodes = {0: [], 200: [node({"CPU": 8.0, "GPU": 1.0})]}
    assert await_resources(4, {"CPU": 2, "GPU": 1}, seconds=900).count == 1
    assert groups.now == 200 and groups.asked == [[{"CPU": 2, "GPU": 1}] * 4, [{"CPU": 2, "GPU": 1}]]
    assert "room for 1 of 4 actors" in caplog.text and len(groups.alive) == 1


def test_room_that_is_waited_for_without_end_is_said_every_minute(groups: PendingGroups, caplog) -> None:
    groups.nodes = {0: [node({"CPU": 2.0}, free={})], 7200: [node({"CPU": 2.0})]}
    await_resources(1, {"CPU": 1}, seconds=inf)
    assert groups.now == 7200 and caplog.text.count("waiting for room") == 120 and "61 s: An actor needs" in caplog.text


def test_readers_need_room_beside_the_actors(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.0})], 30: [node({"CPU": 2.0})] * 2}
    await_resources(2, {"CPU": 1}, others={"CPU": 0.75}, least=2, seconds=60)
    assert groups.now == 30 and groups.asked == [[{"CPU": 1}, {"CPU": 1}, {"CPU": 0.75}]]


def test_what_does_not_come_in_time_is_named(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 4.0})]}
    with pytest.raises(
        InsufficientResourcesError, match=r"An actor needs 1 CPU, 1 GPU .*, and the cluster has 4 CPU, 0 GPU.* Lower"
    ):
        await_resources(8, {"CPU": 1, "GPU": 1}, seconds=60)
    assert groups.now == 60 and not groups.alive
    with pytest.raises(
        InsufficientResourcesError, match=r"5 actors and their readers need 5\.75 CPU .*, and the cluster has 4 CPU"
    ):
        await_resources(5, {"CPU": 1}, others={"CPU": 0.75}, least=5, seconds=0)


def test_an_actor_that_fits_on_no_node_is_refused_though_the_sum_would_do(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.0})] * 2}
    with pytest.raises(InsufficientResourcesError, match="no node has room for 1 actor of 3 CPU"):
        await_resources(2, {"CPU": 3}, seconds=10)


def test_what_other_jobs_hold_is_no_room(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 4.0}, free={})], 20: [node({"CPU": 4.0}, free={"CPU": 2.0})]}
    assert await_resources(2, {"CPU": 2}, seconds=60).count == 1 and groups.now == 20
    groups.nodes = {0: [node({"CPU": 4.0}, free={})]}
    with pytest.raises(InsufficientResourcesError, match="has 4 CPU, of which other jobs hold 4 CPU"):
        await_resources(2, {"CPU": 2}, seconds=60)
