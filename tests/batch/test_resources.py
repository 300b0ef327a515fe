"""How long a batch job waits for room; the waiting is made fast."""

import pytest

from d2f_core.batch import resources
from d2f_core.batch.resources import await_resources
from d2f_core.resources import InsufficientResourcesError


class Cluster:
    """Time passes by sleeping alone; nodes come at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.there, self.asked = 0.0, {0: {"CPU": 0.0}}, list[list]()
        monkeypatch.setattr(
            resources.ray, "cluster_resources", lambda: [has for t, has in self.there.items() if t <= self.now][-1]
        )
        monkeypatch.setattr(resources, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(resources.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(resources.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_cluster_with_room_is_asked_for_nothing(cluster: Cluster) -> None:
    cluster.there = {0: {"CPU": 2.75}}
    await_resources(2, {"CPU": 1, "GPU": 0}, others={"CPU": 0.75}, least=2, seconds=60)
    assert cluster.now == 0 and not cluster.asked


def test_an_autoscaler_is_asked_for_all_and_the_first_that_fits_begins(cluster: Cluster, caplog) -> None:
    cluster.there = {0: {}, 200: {"CPU": 8.0, "GPU": 1.0}}
    await_resources(4, {"CPU": 2, "GPU": 1}, seconds=900)
    assert cluster.now == 200 and cluster.asked == [[{"CPU": 2, "GPU": 1}] * 4, []]
    assert "room for 1 of 4 actors" in caplog.text


def test_readers_need_room_beside_the_actors(cluster: Cluster) -> None:
    cluster.there = {0: {"CPU": 2.0}, 30: {"CPU": 4.0}}
    await_resources(2, {"CPU": 1}, others={"CPU": 0.75}, least=2, seconds=60)
    assert cluster.now == 30 and cluster.asked == [[{"CPU": 1}, {"CPU": 1}, {"CPU": 0.75}], []]


def test_what_does_not_come_in_time_is_named(cluster: Cluster) -> None:
    cluster.there = {0: {"CPU": 4.0}}
    with pytest.raises(
        InsufficientResourcesError, match=r"An actor needs 1 CPU, 1 GPU, and the cluster has 4 CPU, 0 GPU\. Lower"
    ):
        await_resources(8, {"CPU": 1, "GPU": 1}, seconds=60)
    assert cluster.now == 60 and cluster.asked[-1] == []
    with pytest.raises(
        InsufficientResourcesError, match=r"5 actors and their readers need 5\.75 CPU, and the cluster has 4 CPU"
    ):
        await_resources(5, {"CPU": 1}, others={"CPU": 0.75}, least=5, seconds=0)
