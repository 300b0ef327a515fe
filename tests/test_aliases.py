"""Promotions and rollbacks against real servers: killed at any request, or with a registry that is away."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from benchmarks.fault_proxy import FaultProxy
from d2f_core import retry, storage
from d2f_core.flow.publish.config import PromoteConfig
from d2f_core.flow.publish.job import check_move_alias, move_alias
from d2f_core.registration import RegisterError
from d2f_core.tracking import (
    HeldAlias,
    TrackingError,
    check_leases,
    get_alias,
    holding,
    promote,
    rollback,
    server,
)
from d2f_core.tracking.lease_places import leases_beside
from d2f_core.tracking.server import UnreachableTrackingError, client_for
from infra.local.stack import StackEnv
from pipelines.promote import RECIPES
from tests.test_registry import start, tiny


def test_promotions_come_back_one_by_one(stack: StackEnv, tmp_path: Path) -> None:
    handle, name = start("s3://d2f/runs/promote"), "promoted"
    assert get_alias(name, "champion") is None
    for number in (1, 2, 3):
        tiny(handle, tmp_path / str(number), name, bytes([number]))
    with pytest.raises(TrackingError, match="There is no promoted@champion"):
        rollback(name)
    for number in ("1", "2", "2", "3", "1"):
        assert move_alias(PromoteConfig(name=name, version=number)).version == number
    back = dataclasses.replace(RECIPES["emoji-flow"], name=name, rollback=True)
    assert [move_alias(back).version for _ in range(3)] == ["3", "2", "1"]
    with pytest.raises(TrackingError, match="no earlier one to return to"):
        move_alias(back)
    assert get_alias(name, "champion") == "1" and get_alias(name, "candidate") == "3"
    client = client_for(handle.tracking_uri)
    promote(name, "2")
    promote(name, "3")
    client.delete_model_version(name, "2")
    assert rollback(name).version == "1", "a version that is gone is passed over"
    with pytest.raises(RegisterError, match="Give --version N, or --rollback"):
        move_alias(PromoteConfig(name=name))


class Killed(BaseException):
    """In place of SIGKILL, which `benchmarks.promotions` sends."""


def kill_at(monkeypatch: pytest.MonkeyPatch, request: int, *, arrives: bool) -> None:
    """End the process at its n-th request that changes the registry, before or after it is carried out."""
    sent, write = [0], HeldAlias._write

    def deadly(self: HeldAlias, what: str, call: Callable[[], Any]) -> Any:
        sent[0] += 1
        if sent[0] < request:
            return write(self, what, call)
        if arrives:
            write(self, what, call)
        raise Killed

    monkeypatch.setattr(HeldAlias, "_write", deadly)


@pytest.fixture(scope="module")
def moved_by_hand(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], None]:
    """Sets alias, history and mark of four versions of `killed`, as if others had done so."""
    handle, directory = start("s3://d2f/runs/killed"), tmp_path_factory.mktemp("killed")
    for number in (1, 2, 3, 4):
        tiny(handle, directory / str(number), "killed", bytes([number]))
    client = client_for(handle.tracking_uri)

    def move(current: str, previous: str, rolled_back: str = "") -> None:
        client.set_registered_model_alias("killed", "champion", current)
        client.set_registered_model_tag("killed", "d2f.previous.champion", previous)
        for version in "1234":
            client.delete_model_version_tag("killed", version, "d2f.rolled_back.champion")
        if rolled_back:
            client.set_model_version_tag("killed", rolled_back, "d2f.rolled_back.champion", "1")

    return move


def history() -> tuple[str | None, list[str], set[str]]:
    """Of `killed`: the champion, those before it, and those that were rolled back from."""
    client = client_for(mlflow.get_tracking_uri())
    model = client.get_registered_model("killed")
    versions = client.search_model_versions("name = 'killed'")
    marked = {str(version.version) for version in versions if version.tags.get("d2f.rolled_back.champion")}
    return get_alias("killed", "champion"), model.tags["d2f.previous.champion"].split(), marked


@pytest.mark.parametrize("arrives", [False, True])
def test_a_promotion_killed_at_any_request_and_repeated_is_one_promotion(
    moved_by_hand: Callable[..., None], monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    for request in (1, 2, 3):
        moved_by_hand("2", "1", rolled_back="3")
        with monkeypatch.context() as patch:
            kill_at(patch, request, arrives=arrives)
            with pytest.raises(Killed):
                promote("killed", "3")
        assert promote("killed", "3").version == "3"
        assert history() == ("3", ["1", "2"], set()), "a person has promoted it again"
        assert rollback("killed").version == "2"


@pytest.mark.parametrize("arrives", [False, True])
def test_a_rollback_goes_to_the_version_before_the_one_that_is_whatever_was_killed(
    moved_by_hand: Callable[..., None], monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    for request in (1, 2, 3):
        moved_by_hand("4", "1 2 3")
        with monkeypatch.context() as patch:
            kill_at(patch, request, arrives=arrives)
            with pytest.raises(Killed):
                rollback("killed")
        now, _, marked = history()
        assert now == ("3" if request + arrives > 2 else "4") and marked == ({"4"} if request + arrives > 1 else set())
        assert rollback("killed").version == str(int(now) - 1)
        assert history()[:2] == (str(int(now) - 1), ["1", "2"][: int(now) - 2]) and "4" in history()[2]


def test_a_killed_promotion_of_one_version_does_not_confuse_that_of_another(
    moved_by_hand: Callable[..., None],
) -> None:
    moved_by_hand("2", "1 2")  # killed while it promoted something
    promote("killed", "4")
    assert history()[:2] == ("4", ["1", "2"])
    moved_by_hand("2", "1 2 2 2")
    assert rollback("killed").version == "1" and history() == ("1", [], {"2"})


def test_leases_of_a_model_are_where_its_first_training_says_or_where_they_are_given(
    stack: StackEnv, tmp_path: Path
) -> None:
    handle = start("s3://d2f/tests/leases/runs/first")
    tiny(handle, tmp_path / "1", "leased", b"1")
    tiny(start("s3://d2f/other/runs/second"), tmp_path / "2", "leased", b"2")
    client = client_for(handle.tracking_uri)

    def place() -> str | None:
        return client.get_registered_model("leased").tags.get("d2f.leases")

    assert place() == "s3://d2f/tests/leases/leases"
    promote("leased", "1")
    assert json.loads(storage.read_bytes(f"{place()}/leased.json"))["free"] is True
    client.delete_registered_model_tag("leased", "d2f.leases")  # a model that an older program has made
    promote("leased", "2")
    assert place() == "s3://d2f/tests/leases/leases", "of the first version's training, whichever is promoted"
    move_alias(PromoteConfig(name="leased", rollback=True, leases=str(tmp_path / "leases")))
    assert place() == str(tmp_path / "leases") and (tmp_path / "leases/leased.json").is_file()
    with pytest.raises(storage.StorageError, match="no bucket 'none'"):
        check_move_alias(PromoteConfig(name="leased", version="1", leases="s3://none/leases"))

    client.create_registered_model("strange")
    with pytest.raises(TrackingError, match=r"Nothing tells where .* versions of strange .* Give --leases DIRECTORY"):
        check_leases("strange")
    check_leases("strange", output="s3://d2f/evaluations/x")
    with holding("strange", "champion", "x", output="s3://d2f/tests/leases/evaluations/x"):
        tags = client.get_registered_model("strange").tags
    assert tags["d2f.leases"] == "s3://d2f/tests/leases/leases"


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("s3://b/runs/x", "s3://b/leases"), ("s3://b/team/runs/x/", "s3://b/team/leases"), ("s3://b/x", "s3://b/leases"),
        ("s3://b", "s3://b/leases"), ("/data/runs/x", "/data/leases"), ("file:///data/runs/x", "/data/leases"),
        ("/runs/x", "/runs/leases"), ("/x", "/x/leases"),
    ],
)  # fmt: skip
def test_leases_lie_beside_the_directory_of_outputs(output: str, place: str) -> None:
    assert leases_beside(output) == place


@pytest.fixture
def bad_registry(stack: StackEnv, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """MLflow behind a bad network."""
    monkeypatch.setattr(server, "RETRY_SECONDS", 10.0)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.05)
    with FaultProxy.before(stack.variables["MLFLOW_TRACKING_URI"], seed=3) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        yield proxy


def test_a_registry_that_is_away_and_loses_answers_is_waited_for_and_read_back(
    moved_by_hand: Callable[..., None], bad_registry: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_by_hand("2", "1")
    bad_registry.reset_rate = 0.3
    assert promote("killed", "3").version == "3" and rollback("killed").version == "2"
    promote("killed", "4")
    bad_registry.reset_rate = 0.0
    assert bad_registry.counts["reset"] >= 5 and history() == ("4", ["1", "2"], {"3"})
    bad_registry.outage_for(2.0)
    assert rollback("killed").version == "2"
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.5)
    bad_registry.outage = True
    with pytest.raises(UnreachableTrackingError, match="the same command goes on from there"):
        promote("killed", "3")
