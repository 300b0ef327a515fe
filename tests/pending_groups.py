"""Waiting for room made fast: time passes by waiting alone, and groups are placed by what the nodes have free."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from d2f_core import resources
from d2f_core.nodes import Node, Part, without_place


def node(total: Mapping[str, float], free: Mapping[str, float] | None = None) -> Node:
    return Node(address="10.0.0.1", total=total, free=total if free is None else free)


class PendingGroups:
    """Ray's placement groups, nodes and autoscaler, at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes, self.starting = 0.0, {0: list[Node]()}, dict[float, int]()
        self.asked: list[list[dict[str, float]]] = []
        """The bundles of each group, in the order in which they were asked for."""
        self.alive: list[Any] = []
        for name, value in {
            "_ask_for": self.ask_for, "_is_placed": self.is_placed, "_remove": self.alive.remove, "time": self,
            "warn_off_head": lambda: None,
            "living_nodes": lambda: self.at_present(self.nodes),
            "starting_nodes": lambda: self.at_present({0: 0, **self.starting}),
        }.items():  # fmt: skip
            monkeypatch.setattr(resources, name, value)

    def monotonic(self) -> float:
        return self.now

    def at_present(self, timeline: Mapping[float, Any]) -> Any:
        return [value for time, value in timeline.items() if time <= self.now][-1]

    def ask_for(self, parts: Sequence[Part]) -> Sequence[Part]:
        self.asked.append([dict(part.bundle) for part in parts for _ in range(part.count)])
        group = [*parts]
        self.alive.append(group)
        return group

    def is_placed(self, group: Sequence[Part], seconds: int) -> bool:
        for _ in range(seconds):
            if not without_place(group, [one.free for one in self.at_present(self.nodes)]):
                return True
            self.now += 1
        return False


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> PendingGroups:
    return PendingGroups(monkeypatch)
