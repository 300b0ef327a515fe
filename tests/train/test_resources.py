"""How long a training waits for nodes; the waiting is made fast."""

import pytest

from d2f_core.resources import InsufficientResourcesError
from d2f_core.train import resources
from d2f_core.train.config import TrainConfig
from d2f_core.train.resources import fitting_workers


class Cluster:
    """Time passes by sleeping alone; nodes come and go at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cpus, self.asked = 0.0, {0: 0.0}, list[list]()
        monkeypatch.setattr(
            resources, "usable_resources", lambda: {"CPU": [n for t, n in self.cpus.items() if t <= self.now][-1]}
        )
        monkeypatch.setattr(resources, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(resources.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(resources.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


CONFIG = TrainConfig(
    num_workers=4,
    min_workers=2,
    global_batch_size=8,
    micro_batch_size=1,
    node_wait_seconds=60,
    lost_node_wait_seconds=600,
)


def test_a_cluster_with_room_is_asked_for_nothing(cluster):
    cluster.cpus = {0: 7.0}
    assert fitting_workers(CONFIG, again=False) == 4
    assert cluster.now == 0 and cluster.asked == []


def test_an_autoscaler_is_asked_for_all_and_told_when_it_is_over(cluster):
    cluster.cpus = {0: 1.0, 40: 7.0}
    assert fitting_workers(CONFIG, again=False) == 4
    assert cluster.now == 40 and cluster.asked == [[{"CPU": 1.5}] * 4 + [{"CPU": 1}], []]


def test_gpus_are_asked_for_where_they_are_used(cluster):
    config = TrainConfig(num_workers=2, use_gpu=True, evaluation_gpus=0.5, node_wait_seconds=0)
    with pytest.raises(InsufficientResourcesError, match=r"num_workers=2 needs 4 CPU, 2\.5 GPU .* has 0 CPU, 0 GPU"):
        fitting_workers(config, again=False)
    resources._ask_for(config)
    assert cluster.asked[-1] == [{"CPU": 1.5, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 0.5}]


def test_fewer_workers_are_taken_only_when_the_others_did_not_come_in_time(cluster, caplog):
    cluster.cpus = {0: 4.0}
    assert fitting_workers(CONFIG, again=False) == 2 and cluster.now == 60
    assert "room for 2 of 4 workers" in caplog.text


def test_a_first_start_gives_up_soon_and_lost_nodes_are_waited_for(cluster, caplog):
    cluster.cpus = {0: 1.0, 500: 4.0}
    with pytest.raises(InsufficientResourcesError, match=r"min_workers=2 needs 4 CPU .* has 1 CPU"):
        fitting_workers(CONFIG, again=False)
    assert cluster.now == 60 and cluster.asked[-1] == []
    cluster.now = 0
    assert fitting_workers(CONFIG, again=True) == 2 and cluster.now == 500
    assert caplog.text.count("waiting for nodes") == 8
    cluster.now, cluster.cpus = 0, {0: 1.0}
    with pytest.raises(InsufficientResourcesError):
        fitting_workers(CONFIG, again=True)
    assert cluster.now == 600
