"""A pool of actors does long work and outlives one that dies while it loads."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from ray.exceptions import RayError

from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.config import ActorPoolConfig
from d2f_core.batch.refusals import RefusedError
from d2f_core.data.ray_data import INIT_DEATHS, configure

pytestmark = pytest.mark.usefixtures("cluster")
ONE = ActorPoolConfig(num_actors=1)


class Slow:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(6)
        return batch


def test_an_item_may_take_three_times_ray_datas_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 2)
    (made,) = map_items([{"item": 7}], Slow, (), ONE, node_wait_seconds=None)
    assert made["item"] == 7


class Fragile:
    """Does not start as long as there are files to take away."""

    def __init__(self, directory: str, how: str) -> None:
        for file in sorted(Path(directory).iterdir()):
            file.unlink()
            if how == "dies":
                os._exit(1)
            raise OSError("out of memory")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_an_actor_that_does_not_start_is_replaced(how: str, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).touch()
    (made,) = map_items([{"item": 7}], Fragile, (str(tmp_path), how), ONE, node_wait_seconds=None)
    assert made["item"] == 7 and not list(tmp_path.iterdir())


def test_actors_that_never_start_end_the_job(tmp_path: Path) -> None:
    for number in range(INIT_DEATHS + 5):
        (tmp_path / str(number)).touch()
    with pytest.raises(RayError, match="out of memory"):
        list(map_items([{"item": 7}], Fragile, (str(tmp_path), "fails"), ONE, node_wait_seconds=None))
    assert len(list(tmp_path.iterdir())) == 4


class Refusing:
    def __init__(self, where: str) -> None:
        self.where = where
        if where == "start":
            raise RefusedError("the model has another hash on this node. Give a URI that all nodes share.")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.where == "bug":
            raise ValueError("shapes do not match")
        raise RefusedError("the image cannot be decoded. Make it again.")


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("start", "the model has another hash on this node. Give a URI that all nodes share."),
        ("work", "the image cannot be decoded. Make it again."),
    ],
)
def test_what_an_actor_refuses_is_one_line_for_whoever_started_the_job(where: str, line: str) -> None:
    with pytest.raises(RefusedError) as refused:
        list(map_items([{"item": 7}], Refusing, (where,), ONE, node_wait_seconds=None))
    assert str(refused.value) == line


def test_a_fault_keeps_its_traceback() -> None:
    with pytest.raises(RayError, match="shapes do not match"):
        list(map_items([{"item": 7}], Refusing, ("bug",), ONE, node_wait_seconds=None))


def test_what_is_derived_from_a_dataset_is_told_the_same() -> None:
    dataset = ray.data.from_items([1])
    configure(dataset)
    assert dataset.map(lambda row: row).context.execution_no_progress_timeout_s == -1
