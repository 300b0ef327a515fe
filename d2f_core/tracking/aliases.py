"""Aliases of registered versions, with the history that rollbacks need."""

import logging
import re
from typing import TYPE_CHECKING

from d2f_core.tracking.logged_models import READY
from d2f_core.tracking.registry import ModelVersionInfo, find_version, version_info
from d2f_core.tracking.server import TrackingError, attempt, client_for, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

CHAMPION = "champion"
PREVIOUS_TAG = "d2f.previous."
"""Prefix of a registered model's tag, followed by the alias; the tag lists the alias's previous versions, oldest
first."""
KEPT = 100
LOGGED_MODEL = re.compile(r"models:/(m-[^/@]+)")
"""Source URI of a version whose files belong to a LoggedModel."""


def get_alias(name: str, alias: str) -> str | None:
    """The version that an alias names; None when there is no such alias or model."""
    model = _registered(client_for(tracking_uri()), name)
    return None if model is None else _named(model, alias)


def set_alias(name: str, alias: str, version: str) -> None:
    """Point an alias at a version, without a record for `rollback`. Raises TrackingError when there is no such
    version.
    """
    client = client_for(tracking_uri())
    attempt(f"set {name}@{alias}", lambda: client.set_registered_model_alias(name, alias, version))


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


def promote(name: str, version: str, alias: str = CHAMPION) -> ModelVersionInfo:
    """Point `alias` at a complete version, and keep the one that it named for `rollback`.

    Repeated, or continued after it was killed, it changes nothing more.

    Raises:
        TrackingError: no such version, or one whose files are not all uploaded.
    """
    client, info = client_for(tracking_uri()), complete_version(name, version)
    model = _registered(client, name)
    assert model is not None, "it has a version"
    current, previous = _named(model, alias), _previous(model, alias)
    if current == info.version:
        return info
    if current is not None and previous[-1:] != [current]:  # equal: a promotion was killed before it set the alias
        _remember(client, name, alias, [*previous, current])
    set_alias(name, alias, info.version)
    logger.info("%s@%s is now version %s (before: %s)", name, alias, info.version, current)
    return info


def rollback(name: str, alias: str = CHAMPION) -> ModelVersionInfo:
    """Point `alias` back at its previous version; each further call goes back one more promotion.

    Raises:
        TrackingError: there is no such alias, or no earlier version still exists.
    """
    client = client_for(tracking_uri())
    current, info, remaining = _before(client, name, alias)
    set_alias(name, alias, info.version)
    _remember(client, name, alias, remaining)
    logger.info("%s@%s is version %s again (before: %s)", name, alias, info.version, current)
    return info


def earlier_version(name: str, alias: str = CHAMPION) -> ModelVersionInfo:
    """The version that `rollback` would go back to. Raises TrackingError as it does."""
    return _before(client_for(tracking_uri()), name, alias)[1]


def _before(client: "MlflowClient", name: str, alias: str) -> tuple[str, ModelVersionInfo, list[str]]:
    """The version that the alias names, the usable one that it named before, and those before that."""
    model = _registered(client, name)
    current = None if model is None else _named(model, alias)
    if model is None or current is None:
        raise TrackingError(f"There is no {name}@{alias}. Promote a version first.")
    previous = _previous(model, alias)
    while previous:
        version = previous[-1]
        try:
            found = find_version(client, f"models:/{name}/{version}")
            usable = _status(client, found) == READY
        except TrackingError as error:
            logger.warning("passing over version %s: %s", version, error)
            usable = False
        previous = previous[:-1]
        if usable:
            return current, version_info(client.tracking_uri, found), previous
    raise TrackingError(f"{name}@{alias} is version {current}, and there is no earlier one to return to. Promote one.")


def _registered(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    query = f"name = '{name}'"
    found = attempt(f"look up {name}", lambda: client.search_registered_models(query))
    if not found:
        return None
    return attempt(f"read {name}", lambda: client.get_registered_model(name))  # a search may omit the aliases


def _named(model: "RegisteredModel", alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _previous(model: "RegisteredModel", alias: str) -> list[str]:
    return model.tags.get(PREVIOUS_TAG + alias, "").split()


def _remember(client: "MlflowClient", name: str, alias: str, previous: list[str]) -> None:
    value = " ".join(previous[-KEPT:])
    attempt("keep the way back", lambda: client.set_registered_model_tag(name, PREVIOUS_TAG + alias, value))


def _status(client: "MlflowClient", version: "ModelVersion") -> str:
    """READY, or the status that prevents use: the version's, or that of the LoggedModel with its files."""
    source = LOGGED_MODEL.fullmatch(version.source or "")  # the server does not keep the version's `model_id`
    if version.status != READY:
        return str(version.status)
    if source is None:
        return "not of a logged model"
    return str(attempt("look up the model", lambda: client.get_logged_model(source[1])).status)
