"""The model registry: a directory of weights becomes a version that has tags, a description and an alias.

The directory is uploaded once as an MLflow LoggedModel of the run that trained it, so that MLflow's model list, the
run's page and the registered version all show the same thing. It has no pyfunc flavour yet: MLflow would run a script
of ours to load it, and a stored model should not outlive the script's interface. `resolve_model` gives the files back.
"""

import fcntl
import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_core.content import cache_root, hash_directory
from d2f_core.storage import download_tree, is_s3
from d2f_core.tracking.runs import RunHandle
from d2f_core.tracking.server import TrackingError, attempt, client_for, tag_equals, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

HASH_TAG = "d2f.content_hash"
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


def register_model(
    handle: RunHandle,
    *,
    model_dir: Path | str,
    name: str,
    tags: Mapping[str, str],
    description: str,
    alias: str = "candidate",
) -> ModelVersionInfo:
    """Upload a model directory (local or s3://), register it as a version of `name`, and point `alias` at it.

    Repeating it with the same run and content uploads nothing and returns the same version; a call that was killed is
    continued. The alias is set last, so it never names a partial model.

    Args:
        tags: how to use the model (base URI and hash, prediction type, schedule, solver, steps, guidance).
        description: Markdown, shown on the version's page; at most 5,000 characters.
    """
    if len(description) > MAX_DESCRIPTION_CHARS:
        raise TrackingError(
            f"The description has {len(description)} characters; MLflow keeps {MAX_DESCRIPTION_CHARS}. Shorten it."
        )
    with tempfile.TemporaryDirectory() as scratch:
        directory = _local(model_dir, Path(scratch, "model"))
        if not directory.is_dir():
            raise TrackingError(f"{str(model_dir)!r} is not a directory. Give the one that holds diff2flow.json.")
        content_hash = hash_directory(directory)
        client = client_for(handle.tracking_uri)
        version = _find_version(client, handle, name, content_hash)
        if version is None:
            all_tags = {**tags, HASH_TAG: content_hash}
            model = _logged_model(client, handle, directory, name, all_tags)
            _ensure_registered_model(client, name)
            version = attempt(
                "create the model version",
                lambda: client.create_model_version(
                    name,
                    source=f"models:/{model.model_id}",
                    run_id=handle.run_id,
                    tags=all_tags,
                    description=description,
                    model_id=model.model_id,
                ),
            )
    attempt(f"set alias {alias!r}", lambda: client.set_registered_model_alias(name, alias, version.version))
    info = _info(handle.tracking_uri, name, str(version.version), content_hash)
    logger.info("registered %s@%s as version %s: %s", name, alias, info.version, info.url)
    return info


def pin_model(uri: str) -> str:
    """`models:/NAME@ALIAS` as `models:/NAME/VERSION`, so that an alias which moves cannot mix two models in one job.

    Any other URI is returned as it is.

    Raises:
        TrackingError: no such model, alias or version, or a malformed models:/ URI.
    """
    if not uri.startswith("models:/"):
        return uri
    version = _get_version(client_for(tracking_uri()), uri)
    return f"models:/{version.name}/{version.version}"


def resolve_model(uri: str, *, cache_dir: Path | None = None) -> str:
    """Where the files of a model are: a local directory for `models:/...`; any other URI is returned as it is.

    Downloads once per content and node: the directory's name is the content hash, and a file lock makes a second
    process wait for the first one's copy.

    Args:
        cache_dir: default `$D2F_CACHE/models`, or `~/.cache/diff2flow/models`.
    """
    if not uri.startswith("models:/"):
        return uri
    client = client_for(tracking_uri())
    version = _get_version(client, uri)
    source = attempt(
        "look up the model's files", lambda: client.get_model_version_download_uri(version.name, version.version)
    )
    if is_s3(source):
        return source
    root = cache_dir or cache_root() / "models"
    expected = version.tags.get(HASH_TAG)
    target = root / (expected or hashlib.sha256(source.encode()).hexdigest())
    root.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            attempt(f"download {uri}", lambda: _download(source, target, expected))
    return str(target)


def _download(source: str, target: Path, expected: str | None) -> None:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        directory = Path(download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=tracking_uri()))
        if expected is not None and (actual := hash_directory(directory)) != expected:
            raise TrackingError(
                f"The files at {source} have the hash {actual}, and were registered with {expected}. They changed "
                "since: register the model again."
            )
        directory.rename(target)
        if directory == Path(scratch):
            Path(scratch).mkdir()  # TemporaryDirectory removes it


def _local(model_dir: Path | str, scratch: Path) -> Path:
    return download_tree(str(model_dir), scratch) if is_s3(str(model_dir)) else Path(model_dir)


def _info(server: str, name: str, version: str, content_hash: str) -> ModelVersionInfo:
    return ModelVersionInfo(
        name=name,
        version=version,
        uri=f"models:/{name}/{version}",
        url=f"{server}/#/models/{name}/versions/{version}",
        content_hash=content_hash,
    )


def _find_version(client: "MlflowClient", handle: RunHandle, name: str, content_hash: str) -> "ModelVersion | None":
    query = f"name = '{name}' AND run_id = '{handle.run_id}' AND {tag_equals(HASH_TAG, content_hash)}"
    found = attempt("look up the model's versions", lambda: client.search_model_versions(query))
    return found[0] if found else None


def _logged_model(
    client: "MlflowClient", handle: RunHandle, directory: Path, name: str, tags: dict[str, str]
) -> "LoggedModel":
    """The run's LoggedModel with this content: found again (complete or half uploaded), or created."""
    query = tag_equals(HASH_TAG, tags[HASH_TAG])
    found = attempt("look up the model", lambda: client.search_logged_models([handle.experiment_id], query))
    model = next((one for one in found if one.source_run_id == handle.run_id), None)
    if model is None:
        make: Callable[[], Any] = lambda: client.create_logged_model(  # noqa: E731
            handle.experiment_id, name=name, source_run_id=handle.run_id, tags=tags, model_type="diff2flow"
        )
        model = attempt("create the model", make)
    if model.status != "READY":
        model_id = model.model_id
        attempt("upload the model", lambda: client.log_model_artifacts(model_id, str(directory)))
        model = attempt("complete the model", lambda: client.finalize_logged_model(model_id, "READY"))
    return model


def _ensure_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise TrackingError(f"MLflow refused to create the registered model {name!r}: {error}") from error


def _get_version(client: "MlflowClient", uri: str) -> "ModelVersion":
    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise TrackingError(f"{uri!r} is not models:/NAME@ALIAS or models:/NAME/VERSION. Correct it.")
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        if alias is not None:
            return attempt(f"find {uri}", lambda: client.get_model_version_by_alias(name, alias))
        return attempt(f"find {uri}", lambda: client.get_model_version(name, version))
    except TrackingError as error:
        raise TrackingError(f"{error}. What there is: {client.tracking_uri}/#/models") from None
