"""What fits on which node, and how a place that is held is given to those who take it."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from d2f_core import resources
from d2f_core.nodes import Part, without_place
from d2f_core.resources import Reservation, handed_to_group
from tests.pending_groups import PendingGroups, groups

__all__ = ["groups"]
WORKER = {"CPU": 3.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("parts", "free", "missing"),
    [
        ([Part("worker", 1, {"CPU": 3})], [{"CPU": 2}, {"CPU": 2}], [1]),
        ([Part("worker", 3, {"CPU": 3})], [{"CPU": 7}], [1]),
        ([Part("worker", 2, {"CPU": 1, "GPU": 1})], [{"CPU": 9, "GPU": 1}, {"CPU": 1}], [1]),
        ([Part("worker", 1, {"CPU": 1, "GPU": 0})], [{"CPU": 1}], []),
        (
            [Part("reader", 2, {"CPU": 1}), Part("worker", 1, {"CPU": 2, "GPU": 1})],
            [{"CPU": 2, "GPU": 1}, {"CPU": 2}],
            [],
        ),
        ([Part("reader", 10, {"CPU": 0.1})], [{"CPU": 1.0}], []),
    ],
)
def test_each_lies_whole_on_one_node(parts: list[Part], free: list[dict], missing: list[int]) -> None:
    before = [dict(node) for node in free]
    assert [part.count for part in without_place(parts, free)] == missing
    assert free == before


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ray's placement groups, by id."""
    listed: dict[str, Any] = {"other": {"bundles": {0: WORKER, 1: WORKER}}}
    monkeypatch.setattr(resources, "_groups", lambda: dict(listed))
    monkeypatch.setattr(resources, "_remove", lambda group: group.clear())
    return listed


def test_a_place_is_given_back_when_the_group_that_takes_it_is_queued(table: dict[str, Any]) -> None:
    group = ["held"]
    with handed_to_group(Reservation(count=2, group=group), [{"CPU": 3, "GPU": 1}] * 2):
        table["smaller"] = {"bundles": {0: WORKER}}
        time.sleep(0.5)
        assert group, "neither for one that was there before, nor for another's"
        table["same"] = {"bundles": {0: WORKER, 1: WORKER}}
        assert until(lambda: not group)


def test_a_place_that_nobody_takes_is_given_back_at_the_end(table: dict[str, Any], monkeypatch) -> None:
    group = ["held"]
    with pytest.raises(RuntimeError, match="start"), handed_to_group(Reservation(count=1, group=group), [WORKER]):
        raise RuntimeError("no start")
    assert not group
    monkeypatch.setattr(resources, "HAND_OVER_SECONDS", 0.2)
    group = ["held"]
    with handed_to_group(Reservation(count=1, group=group), [WORKER]):
        assert until(lambda: not group), "Ray Train might wait for it"


def test_an_interrupt_leaves_nothing_held(groups: PendingGroups, monkeypatch) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(resources, "_is_placed", interrupted)
    demand = resources.Demand(
        counts=[1], parts=lambda n: [Part("worker", n, WORKER)], subject="{count} need", advice=""
    )
    with pytest.raises(KeyboardInterrupt):
        resources.reserve(demand, seconds=60, fewer_after=60)
    assert groups.asked and not groups.alive
