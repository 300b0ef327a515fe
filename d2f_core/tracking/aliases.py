"""Aliases of registered versions, moved by one job at a time, with the history that rollbacks need.

Every step can be killed: the history is written before a promotion and after a rollback moves the alias, and whoever
reads it passes over entries that equal the version which the alias names. A rollback marks the version before the alias
leaves it, so that a version which the alias names is marked untruly: whatever moves the alias next corrects that.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from d2f_core.storage import check_reachable
from d2f_core.tracking.lease_places import ModelLease, alone, find_leases
from d2f_core.tracking.logged_models import READY
from d2f_core.tracking.registry import PREVIOUS_TAG, ModelVersionInfo, find_version, registered_model, version_info
from d2f_core.tracking.server import TrackingError, UnreachableTrackingError, attempt, client_for, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHAMPION = "champion"
ROLLED_BACK_TAG = "d2f.rolled_back."
"""Prefix of a version's tag, followed by the alias; its value is the version that the alias went back to."""
KEPT = 100
LOGGED_MODEL = re.compile(r"models:/(m-[^/@]+)")
"""Source URI of a version whose files belong to a LoggedModel."""


def get_alias(name: str, alias: str) -> str | None:
    """The version that an alias names; None when there is no such alias or model."""
    model = registered_model(client_for(tracking_uri()), name)
    return None if model is None else _named(model, alias)


def complete_version(name: str, version: str) -> ModelVersionInfo:
    """The version, when all of its files are there.

    Raises:
        TrackingError: the version does not exist, or its files are not all uploaded.
    """
    client = client_for(tracking_uri())
    found = find_version(client, f"models:/{name}/{version}")
    if (status := _status(client, found)) != READY:
        raise TrackingError(
            f"models:/{name}/{version} is {status}, but must be READY: its upload was not completed. Run "
            "pipelines.register again, then promote it."
        )
    return version_info(client.tracking_uri, found)


def rolled_back_to(version: ModelVersionInfo, alias: str) -> str:
    """The version that `alias` went back to from this one; "" if it did not, or this one was promoted by hand since."""
    return version.tags.get(ROLLED_BACK_TAG + alias, "")


def check_leases(name: str, *, output: str = "", leases: str = "") -> None:
    """Refuse a place of leases that cannot be used, before any work; arguments as of `holding`.

    Raises:
        TrackingError: there is no such model, or no place.
        StorageError: the place cannot be written to.
    """
    client = client_for(tracking_uri())
    model = attempt(f"read {name}", lambda: client.get_registered_model(name))
    check_reachable(find_leases(client, model, output, leases), write=True)


class HeldAlias:
    """An alias that nobody else moves: its model's lease is held. `holding` makes it."""

    def __init__(self, client: "MlflowClient", name: str, alias: str, lease: ModelLease) -> None:
        self._client, self._name, self._alias, self._lease = client, name, alias, lease
        self.move_requested = False
        """Whether a request that moves it was sent; without an answer it has moved or not."""

    def current(self) -> str | None:
        """The version that it names now; None when it names none."""
        return _named(self._read(), self._alias)

    def promote(self, version: str) -> None:
        """Point it at a version, and keep the one that it named for rollbacks. Repeated, it changes nothing more.

        Raises:
            TrackingError: MLflow refuses, or somebody who does not keep to leases moves the alias meanwhile.
            UnreachableTrackingError: MLflow stays away; the alias is moved or not if that was requested.
            LeaseLostError: likewise.
        """
        model = self._read()
        current, previous = _named(model, self._alias), _previous(model, self._alias)
        if current == version:
            return
        if current is not None:
            named = find_version(self._client, f"models:/{self._name}/{current}")
            self.forgive(version_info(self._client.tracking_uri, named))  # a rollback of it was killed
            if (kept := [*_without_end(previous, current), current]) != previous:
                self._remember(kept)
        self._point_at(version)
        logger.info("%s@%s is now version %s (before: %s)", self._name, self._alias, version, current)

    def forgive(self, version: ModelVersionInfo) -> None:
        """Let a gate promote this version again, although it was rolled back from."""
        if rolled_back_to(version, self._alias):
            key = ROLLED_BACK_TAG + self._alias
            self._write("forgive", lambda: self._client.delete_model_version_tag(self._name, version.version, key))

    def rollback(self) -> ModelVersionInfo:
        """Point it at the version before the one that it names, which a gate does not promote again.

        Raises:
            TrackingError: there is no such alias, no earlier version still exists, or as of `promote`.
        """
        current, info, remaining = _before(self._client, self._name, self._alias)
        key = ROLLED_BACK_TAG + self._alias
        self._write(
            f"mark version {current}",
            lambda: self._client.set_model_version_tag(self._name, current, key, info.version),
        )
        self._point_at(info.version)
        self.forgive(info)
        self._remember(remaining)
        logger.info("%s@%s is version %s again (before: %s)", self._name, self._alias, info.version, current)
        return info

    def _read(self) -> "RegisteredModel":
        return attempt(f"read {self._name}", lambda: self._client.get_registered_model(self._name))

    def _write(self, what: str, call: Callable[[], T]) -> T:
        """A request that changes the registry; nobody else holds the lease when it is sent."""

        def once() -> T:
            self._lease.check()
            return call()

        return attempt(what, once)

    def _remember(self, previous: list[str]) -> None:
        value, key = " ".join(previous[-KEPT:]), PREVIOUS_TAG + self._alias
        self._write("keep the way back", lambda: self._client.set_registered_model_tag(self._name, key, value))

    def _point_at(self, version: str) -> None:
        def move() -> None:
            self.move_requested = True
            self._client.set_registered_model_alias(self._name, self._alias, version)

        self._write(f"set {self._name}@{self._alias}", move)
        if (now := self.current()) != version:
            raise TrackingError(
                f"{self._name}@{self._alias} was set to version {version}, and is {now}: somebody moves it who does "
                "not use pipelines.promote. Look who does, then repeat this command."
            )


@contextlib.contextmanager
def holding(name: str, alias: str, purpose: str, *, output: str = "", leases: str = "") -> Iterator[HeldAlias]:
    """Let nobody else move the aliases of a registered model while the context lasts.

    Args:
        purpose: shown to whoever waits for it.
        output: of the job that asks; it tells the place of leases for a model of which nothing else does.
        leases: the directory of leases; empty: the model's own.

    Raises:
        TrackingError: there is no such model, or no place for its lease.
        LeaseError: another job holds the lease for too long, or it cannot be written.
    """
    client = client_for(tracking_uri())
    with alone(client, name, purpose, output=output, given=leases) as lease:
        yield HeldAlias(client, name, alias, lease)


def promote(name: str, version: str, alias: str = CHAMPION, *, leases: str = "") -> ModelVersionInfo:
    """Point `alias` at a complete version by hand, also at one that was rolled back from.

    Repeated, or continued after it was killed, it changes nothing more.

    Args:
        leases: as of `holding`.

    Raises:
        TrackingError: no such version, or one whose files are not all uploaded; or as of `HeldAlias.promote`.
        LeaseError: as of `holding`.
    """
    complete_version(name, version)
    with holding(name, alias, f"promote {name}@{alias} to version {version}", leases=leases) as held:
        info = complete_version(name, version)
        held.promote(info.version)
        held.forgive(info)
    return info


def rollback(name: str, alias: str = CHAMPION, *, leases: str = "") -> ModelVersionInfo:
    """Point `alias` back at the version before; each further call goes back one more promotion.

    Raises:
        TrackingError: there is no such alias, or no earlier version still exists; or as of `HeldAlias.promote`.
        LeaseError: as of `holding`.
    """
    earlier_version(name, alias)
    with holding(name, alias, f"roll {name}@{alias} back", leases=leases) as held:
        return held.rollback()


def earlier_version(name: str, alias: str = CHAMPION) -> ModelVersionInfo:
    """The version that `rollback` would go back to. Raises TrackingError as it does."""
    return _before(client_for(tracking_uri()), name, alias)[1]


def _before(client: "MlflowClient", name: str, alias: str) -> tuple[str, ModelVersionInfo, list[str]]:
    """The version that the alias names, the usable one that it named before, and those before that."""
    model = registered_model(client, name)
    current = None if model is None else _named(model, alias)
    if model is None or current is None:
        raise TrackingError(f"There is no {name}@{alias}. Promote a version first.")
    previous = _without_end(_previous(model, alias), current)
    while previous:
        version = previous[-1]
        try:
            found = find_version(client, f"models:/{name}/{version}")
            usable = _status(client, found) == READY
        except UnreachableTrackingError:
            raise
        except TrackingError as error:
            logger.warning("passing over version %s: %s", version, error)
            usable = False
        previous = _without_end(previous[:-1], current)
        if usable:
            return current, version_info(client.tracking_uri, found), previous
    raise TrackingError(f"{name}@{alias} is version {current}, and there is no earlier one to return to. Promote one.")


def _without_end(previous: list[str], current: str) -> list[str]:
    """Without the last entries that equal the current version: a promotion was killed before it moved the alias, or a
    rollback after it.
    """
    while previous[-1:] == [current]:
        previous = previous[:-1]
    return previous


def _named(model: "RegisteredModel", alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _previous(model: "RegisteredModel", alias: str) -> list[str]:
    return model.tags.get(PREVIOUS_TAG + alias, "").split()


def _status(client: "MlflowClient", version: "ModelVersion") -> str:
    """READY, or the status that prevents use: the version's, or that of the LoggedModel with its files."""
    source = LOGGED_MODEL.fullmatch(version.source or "")  # the server does not keep the version's `model_id`
    if version.status != READY:
        return str(version.status)
    if source is None:
        return "not of a logged model"
    return str(attempt("look up the model", lambda: client.get_logged_model(source[1])).status)
