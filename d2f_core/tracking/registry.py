"""The model registry: registers a directory of weights as a version with tags, a description, metrics and an alias.

The directory is uploaded once as an MLflow LoggedModel of the run that trained it, so that MLflow's model list, the
run's page and the registered version all show the same thing:

    MLmodel, *.py, ...        MLflow's own files, by which `mlflow.pyfunc.load_model` opens it (`pyfunc_files`)
    artifacts/model/          the directory as it was, with the card beside it

`model_files.resolve_model` downloads the second part, and runs nothing of the first.
"""

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_core.hashing import HASHED_SUFFIXES, hash_directory
from d2f_core.storage import download_tree, is_s3
from d2f_core.tracking.lease_places import LEASES_TAG, leases_beside, trained_at
from d2f_core.tracking.logged_models import READY, complete, logged_model, upload
from d2f_core.tracking.pyfunc_files import MODEL_PART, Loader, write_pyfunc
from d2f_core.tracking.runs import RunHandle
from d2f_core.tracking.server import (
    TrackingError,
    UnreachableTrackingError,
    attempt,
    client_for,
    tag_equals,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

HASH_TAG = "d2f.content_hash"
CANDIDATE = "candidate"
PREVIOUS_TAG = "d2f.previous."
"""Prefix of a registered model's tag, followed by the alias; the tag lists the alias's previous versions, oldest
first."""
MAX_DESCRIPTION_CHARS = 5000
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True, kw_only=True)
class ModelVersionInfo:
    """A registered version: its address (`models:/NAME/VERSION`), its page and what it holds."""

    name: str
    version: str
    uri: str
    url: str
    content_hash: str
    """Hash of the model's own files; "" when another program registered the version."""
    run_id: str
    """Id of the training's run."""
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class NewVersion:
    """A model to register as a version: its files and metadata."""

    model_dir: Path | str
    """Directory of the model's files, local or s3://."""
    name: str
    """Name of the registered model."""
    model_type: str
    """Type in MLflow's model list: the system that trained the model."""
    tags: Mapping[str, str]
    """How to use the model (base URI and hash, prediction type, schedule, solver, steps, guidance)."""
    description: str
    """Markdown, shown on the version's page; at most 5,000 characters."""
    loader: Loader | None = None
    """How MLflow's own tools load the model; None: they cannot."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files beside the model's own, by plain name, such as README.md; not part of the content hash."""
    step: int = 0
    """Optimizer step of the weights."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the weights, for MLflow's model list."""

    def __post_init__(self) -> None:
        if len(self.description) > MAX_DESCRIPTION_CHARS:
            raise TrackingError(
                f"The description has {len(self.description)} characters; MLflow keeps {MAX_DESCRIPTION_CHARS}. "
                "Shorten it."
            )
        for name in self.files:
            if Path(name).name != name or Path(name).suffix in HASHED_SUFFIXES:
                raise TrackingError(
                    f"file {name!r} must be a plain name that ends in none of {', '.join(HASHED_SUFFIXES)}: these "
                    "belong to the model's content hash. Put it into the model's directory."
                )


def register_model(handle: RunHandle, new: NewVersion, *, alias: str = CANDIDATE) -> ModelVersionInfo:
    """Upload a model directory, register it as a version of the run `handle`, and point `alias` at the version.

    Repeating it with the same run and content uploads nothing and returns the same version; a call that was killed is
    completed. The alias is set last, so it never names a partial model.

    Raises:
        TrackingError: the directory does not exist, the alias is one that promotions move, or MLflow cannot be reached
            or refuses a request.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = _local(new.model_dir, Path(scratch, "model"))
        if not directory.is_dir():
            raise TrackingError(f"{str(new.model_dir)!r} is not a directory. Give that of an exported model.")
        content_hash = hash_directory(directory)
        client = client_for(handle.tracking_uri)
        _check_not_promoted(client, new.name, alias)
        version = _find_version(client, handle, new.name, content_hash)
        if version is None:
            tags = {**new.tags, HASH_TAG: content_hash}
            version = _create_version(client, handle, replace(new, model_dir=directory, tags=tags))
    attempt(f"set alias {alias!r}", lambda: client.set_registered_model_alias(new.name, alias, version.version))
    info = version_info(handle.tracking_uri, version)
    logger.info("registered %s@%s as version %s: %s", new.name, alias, info.version, info.url)
    return info


def _check_not_promoted(client: "MlflowClient", name: str, alias: str) -> None:
    """Raise TrackingError for an alias with a way back: registering would move it without a lease, and lose that."""
    model = None if alias == CANDIDATE else registered_model(client, name)
    if model and PREVIOUS_TAG + alias in model.tags:
        raise TrackingError(
            f"alias={alias!r}: promotions move {name}@{alias}, and registering must not. Register with another alias, "
            f"such as {CANDIDATE}, then run `python -m pipelines.promote emoji-flow --name {name} --alias {alias} "
            "--version N`."
        )


def registered_model(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """With its aliases and tags; None when there is none of that name."""
    query = f"name = '{name}'"
    found = attempt(f"look up {name}", lambda: client.search_registered_models(query))
    if not found:
        return None
    return attempt(f"read {name}", lambda: client.get_registered_model(name))  # a search may omit the aliases


def _create_version(client: "MlflowClient", handle: RunHandle, new: NewVersion) -> "ModelVersion":
    model = _uploaded(client, handle, new)
    _ensure_registered_model(client, handle, new.name)
    return attempt(
        "create the model version",
        lambda: client.create_model_version(
            new.name,
            source=f"models:/{model.model_id}",
            run_id=handle.run_id,
            tags=dict(new.tags),
            description=new.description,
            model_id=model.model_id,
        ),
    )


def _uploaded(client: "MlflowClient", handle: RunHandle, new: NewVersion) -> "LoggedModel":
    """The run's complete LoggedModel with the content of the local directory `new.model_dir`."""
    model = logged_model(client, handle, key=HASH_TAG, name=new.name, tags=new.tags, model_type=new.model_type)
    if model.status == READY:
        return model
    directory = Path(new.model_dir)
    upload(client, model, directory, MODEL_PART)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "mlflow")
        if new.loader is not None:
            size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            write_pyfunc(target, new.loader, new.files, model_bytes=size, run_id=handle.run_id, model_id=model.model_id)
        else:
            (target / MODEL_PART).mkdir(parents=True)
            for name, content in new.files.items():
                (target / MODEL_PART / name).write_bytes(content)
        upload(client, model, target)
    complete(client, handle, model, step=new.step, metrics=new.metrics)
    return model


def pin_model(uri: str) -> str:
    """Resolve `models:/NAME@ALIAS` to `models:/NAME/VERSION`, so that a moving alias cannot mix two models in one job.

    Any other URI is returned unchanged.

    Raises:
        TrackingError: the model, alias or version does not exist, or the models:/ URI is malformed.
    """
    return model_version(uri).uri if uri.startswith("models:/") else uri


def model_version(uri: str) -> ModelVersionInfo:
    """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        TrackingError: the model, alias or version does not exist, or the URI is malformed.
    """
    client = client_for(tracking_uri())
    return version_info(client.tracking_uri, find_version(client, uri))


def version_info(server: str, version: "ModelVersion") -> ModelVersionInfo:
    return ModelVersionInfo(
        name=version.name,
        version=str(version.version),
        uri=f"models:/{version.name}/{version.version}",
        url=f"{server}/#/models/{version.name}/versions/{version.version}",
        content_hash=version.tags.get(HASH_TAG, ""),
        run_id=version.run_id or "",
        tags=dict(version.tags),
    )


def find_version(client: "MlflowClient", uri: str) -> "ModelVersion":
    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise TrackingError(f"{uri!r} is not models:/NAME@ALIAS or models:/NAME/VERSION. Correct it.")
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        if alias is not None:
            return attempt(f"find {uri}", lambda: client.get_model_version_by_alias(name, alias))
        return attempt(f"find {uri}", lambda: client.get_model_version(name, version))
    except UnreachableTrackingError:
        raise
    except TrackingError as error:
        raise TrackingError(f"{error}. What there is: {client.tracking_uri}/#/models") from None


def _local(model_dir: Path | str, scratch: Path) -> Path:
    return download_tree(str(model_dir), scratch) if is_s3(str(model_dir)) else Path(model_dir)


def _find_version(client: "MlflowClient", handle: RunHandle, name: str, content_hash: str) -> "ModelVersion | None":
    query = f"name = '{name}' AND run_id = '{handle.run_id}' AND {tag_equals(HASH_TAG, content_hash)}"
    found = attempt("look up the model's versions", lambda: client.search_model_versions(query))
    return found[0] if found else None


def _ensure_registered_model(client: "MlflowClient", handle: RunHandle, name: str) -> None:
    """Create it with the place of its lease; of several jobs that do so, MLflow takes the first one's."""
    from mlflow.exceptions import MlflowException

    output = trained_at(client, handle.run_id)
    tags = {LEASES_TAG: leases_beside(output)} if output else {}

    def create() -> None:
        try:
            client.create_registered_model(name, tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    attempt(f"create the registered model {name!r}", create)
