"""Who may move an alias: one place of leases, requests that are cut off, and marks; MLflow is played by a few lines."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from d2f_core import retry
from d2f_core.lease import LeaseError, LeaseLostError
from d2f_core.tracking import TrackingError, aliases, check_leases, holding, promote, rollback, server
from d2f_core.tracking.server import UnreachableTrackingError

MARK = "d2f.rolled_back.champion"


class Registry:
    """The registered model `m`, whose versions are all complete, and what MLflow does not answer."""

    tracking_uri = "http://mlflow"

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.aliases = {"champion": "1"}
        self.marks: dict[str, str] = {}
        self.away = ""
        self.read_before: list[Any] = []
        """What the next readers of the model have read before others wrote."""

    def get_registered_model(self, name: str) -> Any:
        now = SimpleNamespace(name=name, tags=dict(self.tags), aliases=dict(self.aliases))
        return self.read_before.pop() if self.read_before else now

    def search_registered_models(self, _: str) -> list[str]:
        return ["m"]

    def search_model_versions(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def get_model_version(self, name: str, version: str) -> Any:
        tags = {MARK: self.marks[version]} if version in self.marks else {}
        return SimpleNamespace(name=name, version=version, status="READY", source="models:/m-1", tags=tags, run_id="")

    def get_logged_model(self, _: str) -> Any:
        return SimpleNamespace(status="READY")

    def set_registered_model_tag(self, _: str, key: str, value: str) -> None:
        self._answer("tag")
        self.tags[key] = value

    def set_registered_model_alias(self, _: str, alias: str, version: str) -> None:
        self._answer("alias")
        self.aliases[alias] = version

    def set_model_version_tag(self, _: str, version: str, key: str, value: str) -> None:
        assert key == MARK
        self.marks[version] = value

    def delete_model_version_tag(self, _: str, version: str, key: str) -> None:
        assert key == MARK
        del self.marks[version]

    def _answer(self, request: str) -> None:
        if request == self.away:
            raise MlflowException("away", error_code=TEMPORARILY_UNAVAILABLE)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.tracking_uri)
    monkeypatch.setattr(aliases, "client_for", lambda _: made)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.001)
    return made


@pytest.mark.parametrize("given", [False, True])
def test_a_holder_whose_models_lease_is_at_another_place_by_now_moves_nothing(
    registry: Registry, tmp_path: Path, given: bool
) -> None:
    """Two jobs that find no place name two of them, one after the other; or `--leases` names one while a job runs."""
    before, other = registry.get_registered_model("m"), str(tmp_path / "b/leases")
    with holding("m", "champion", "first", output=f"{tmp_path}/a/runs/x") as first:
        registry.read_before = [] if given else [before]
        with holding("m", "champion", "second", output=f"{tmp_path}/b/runs/x", leases=other if given else "") as second:
            held = [json.loads((tmp_path / place / "leases/m.json").read_text())["free"] for place in "ab"]
            assert held == [False, False] and registry.tags["d2f.leases"] == other
            with pytest.raises(
                LeaseLostError,
                match=rf"kept at {other} of .* by now, .*{tmp_path}/a/leases.* Give --leases only while no job",
            ):
                first.promote("2")
            assert registry.aliases == {"champion": "1"} and "d2f.previous.champion" not in registry.tags
            assert not first.move_requested
            second.promote("3")
    assert registry.aliases == {"champion": "3"} and registry.tags["d2f.previous.champion"] == "1"


def test_a_local_place_of_another_machine_is_refused(registry: Registry, tmp_path: Path) -> None:
    place, shared = tmp_path / "leases", tmp_path / "shared"
    promote("m", "2", leases=str(place))
    check_leases("m")
    there = registry.tags["d2f.leases_id"]
    place.rename(shared)  # of a first machine; the second one has none, and then one of its own
    for _ in range(2):
        for move in (lambda: check_leases("m"), lambda: promote("m", "3"), lambda: rollback("m")):
            with pytest.raises(
                TrackingError, match=rf"kept in {place} of the machine \S+, .*--leases s3://BUCKET/leases"
            ):
                move()
        place.mkdir(exist_ok=True)
        (place / "directory-id").write_text("elsewhere 1")
    assert registry.aliases == {"champion": "2"}
    shutil.rmtree(place)
    place.symlink_to(shared)
    promote("m", "3")
    assert registry.tags["d2f.leases_id"] == there
    place.unlink()
    promote("m", "4", leases=str(place))
    assert registry.aliases == {"champion": "4"} and registry.tags["d2f.leases_id"] != there, "its place from now on"
    registry.tags["d2f.leases"] = str(tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(LeaseError, match=r"file cannot be written .*Give leases a directory"):
        check_leases("m")


@pytest.mark.parametrize(("away", "requested"), [("tag", False), ("alias", True)])
def test_whether_the_alias_was_asked_to_move_is_known(
    registry: Registry, tmp_path: Path, away: str, requested: bool
) -> None:
    with holding("m", "champion", "x", leases=str(tmp_path)) as held:
        registry.away = away
        with pytest.raises(UnreachableTrackingError):
            held.promote("2")
        assert held.move_requested is requested


def test_a_mark_of_the_version_that_the_alias_names_goes_when_another_is_promoted(
    registry: Registry, tmp_path: Path
) -> None:
    registry.aliases, registry.tags = {"champion": "4"}, {"d2f.previous.champion": "3"}
    registry.away = "alias"
    with pytest.raises(UnreachableTrackingError):
        rollback("m", leases=str(tmp_path))
    assert registry.marks == {"4": "3"} and registry.aliases == {"champion": "4"}
    registry.away = ""
    promote("m", "5")
    assert registry.marks == {} and registry.tags["d2f.previous.champion"] == "3 4"
    assert rollback("m").version == "4" and registry.marks == {"5": "4"}


def test_a_version_is_forgiven_when_the_alias_names_it_and_not_before(registry: Registry, tmp_path: Path) -> None:
    registry.aliases, registry.tags = {"champion": "2"}, {"d2f.previous.champion": "1"}
    for move in (lambda: promote("m", "1", leases=str(tmp_path)), lambda: rollback("m")):
        registry.marks, registry.away = {"1": "0"}, "alias"
        with pytest.raises(UnreachableTrackingError):
            move()
        assert registry.marks.pop("1") == "0"
    registry.marks, registry.away = {"1": "0"}, ""
    assert promote("m", "1").version == "1" and registry.marks == {}
