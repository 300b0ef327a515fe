"""Downloads a registered version's own files by content hash; MLflow's files beside them are neither fetched nor
run.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from d2f_core.cache import kept, make_room
from d2f_core.hashing import cache_root, hash_directory, one_at_a_time
from d2f_core.s3_calls import fetched_whole
from d2f_core.tracking.pyfunc_files import MODEL_PART
from d2f_core.tracking.registry import HASH_TAG, find_version
from d2f_core.tracking.server import TrackingError, attempt, client_for, tracking_uri

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SHA256 = re.compile("[0-9a-f]{64}")
MAX_ENTRIES = 1000
"""Most files and directories in a version."""
MLFLOW_FILES = re.compile(
    r"MLmodel|conda\.yaml|python_env\.yaml|requirements\.txt|constraints\.txt|(serving_)?input_example\.json"
    r"|registered_model_meta|\w+\.py"
)


class DamagedModelError(TrackingError):
    """Other files came than were registered."""


def resolve_model(uri: str, *, cache_dir: Path | None = None) -> str:
    """The location of a model's files: a local directory for `models:/...`; any other URI is returned unchanged.

    Downloads once per content and node: the directory's name is the content hash, and a file lock makes a second
    process wait for the first one's copy. No downloaded file is run, and nothing is written outside that directory.

    Args:
        cache_dir: default `$D2F_CACHE/models`, or `~/.cache/diff2flow/models`.

    Raises:
        TrackingError: the version does not exist, was not registered by this project, or its files differ from those
            registered.
    """
    if not uri.startswith("models:/"):
        return uri
    client = client_for(tracking_uri())
    version = find_version(client, uri)
    expected = version.tags.get(HASH_TAG, "")
    if not SHA256.fullmatch(expected):
        raise TrackingError(
            f"{uri} has {HASH_TAG}={expected!r}, which is no sha256: this project did not register it. Register it "
            "with pipelines.register."
        )
    target = (cache_dir or cache_root() / "models") / expected
    with one_at_a_time(target):
        if not target.is_dir():
            where = lambda: client.get_model_version_download_uri(version.name, version.version)  # noqa: E731
            source = attempt("look up the model's files", where)
            fetch = lambda: attempt(f"download {uri}", lambda: download_model(source, target, expected))  # noqa: E731
            fetched_whole(uri, fetch, DamagedModelError)
        kept(target, uri)
    make_room(target.parent)
    return str(target)


def download_model(source: str, target: Path, expected: str) -> None:
    """Copy the model's own files under the artifact URI `source` to the new directory `target`.

    Raises:
        DamagedModelError: the content hash is not `expected`.
        TrackingError: a file does not belong in a registered model, or a name points outside the directory.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(source, tracking_uri=tracking_uri())
    listed = _listed(source, repository)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        repository.download_artifacts(MODEL_PART, scratch)
        directory = Path(scratch, MODEL_PART)
        found = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
        if found != listed:
            changed = sorted(set(found) ^ set(listed))[:3]
            raise TrackingError(f"The files at {source} changed during the download: {changed}. Register it again.")
        if (actual := hash_directory(directory)) != expected:
            raise DamagedModelError(
                f"The files at {source} have the hash {actual}, and were registered with {expected}. They changed "
                "since: register the model again."
            )
        directory.rename(target)


def _listed(source: str, repository: "ArtifactRepository") -> list[str]:
    """Sorted names of the model's own files, after every listed name was checked."""
    names: list[str] = []
    left, entries = [""], 0
    while left:
        parent = left.pop()
        for info in repository.list_artifacts(parent or None):
            entries += 1
            if entries > MAX_ENTRIES:
                raise TrackingError(f"{source} lists more than {MAX_ENTRIES} files. Delete what is not of the model.")
            check_name(source, parent, info.path)
            (left if info.is_dir else names).append(info.path)
    return own_files(source, names)


def check_name(source: str, parent: str, name: str) -> None:
    """Refuse a listed name that is not directly inside the directory `parent`."""
    path = PurePosixPath(name)
    plain = name == path.as_posix() and path.name not in ("", "..") and "\\" not in name
    if not plain or path.parent != PurePosixPath(parent or "."):
        raise TrackingError(f"{source} lists {name!r} in {parent!r}, which leads elsewhere. Refused; delete that file.")


def own_files(source: str, names: Sequence[str]) -> list[str]:
    """Sorted names below MODEL_PART; all other files must be MLflow's."""
    prefix = f"{MODEL_PART}/"
    own = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    strange = sorted(name for name in names if not name.startswith(prefix) and not MLFLOW_FILES.fullmatch(name))
    if strange:
        raise TrackingError(f"{source} holds {strange[0]!r}, which no registered model has. Refused; delete that file.")
    if not own:
        raise TrackingError(f"{source} has no files in {MODEL_PART}/. Register the model with pipelines.register.")
    return own
