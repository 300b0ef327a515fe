"""Whether a base may be fetched because a trained model names it.

A model may come from anybody, and the base that it names is fetched with this machine's credentials before its hash can
be compared. So where bases may lie, and how large one may be, is for the user to say.
"""

import os
from pathlib import Path

from d2f_core import storage
from d2f_core.model.artifact_files import ArtifactError
from d2f_core.model.hub import HubError, is_hub_id, size

ALLOWED = "D2F_BASES"
"""Environment variable: beginnings of URIs, separated by commas, from where a model that names its base may have it."""
MAX_GIGABYTES = "D2F_MAX_BASE_GB"
"""Environment variable: size of the largest base that is fetched because a model names it."""
DEFAULT_GIGABYTES = 40.0
"""SDXL in float32 and in float16 beside it takes 21."""


def require_allowed(uri: str, named_by: str) -> None:
    """Refuse a base that a model names, which may be anybody's, before anything of it is fetched.

    Args:
        uri: of the base, as the model says.
        named_by: the model's URI.

    Raises:
        ArtifactError: it lies outside of what `D2F_BASES` allows, or is larger than `D2F_MAX_BASE_GB`.
    """
    named = f"{named_by!r} names the base {uri!r}"
    fix = "If you trust it, give it yourself (--base), or"
    allowed = [place.strip() for place in os.environ.get(ALLOWED, "").split(",") if place.strip()]
    if allowed and not any(_is_below(uri, place) for place in allowed):
        raise ArtifactError(f"{named}, and {ALLOWED} allows those below {', '.join(allowed)}. {fix} add its place.")
    try:
        most = float(os.environ.get(MAX_GIGABYTES) or DEFAULT_GIGABYTES)
    except ValueError:
        raise ArtifactError(f"{MAX_GIGABYTES}={os.environ[MAX_GIGABYTES]!r} must be a number of gigabytes.") from None
    if (found := _fetched_bytes(uri) / 1e9) > most:
        raise ArtifactError(f"{named}, of {found:.1f} GB, and {MAX_GIGABYTES} is {most:g}. {fix} raise it.")


def _is_below(uri: str, place: str) -> bool:
    """Whether a URI is a place or inside of it; local paths as they are after links and `..` were followed."""
    here, there = uri.removeprefix("file://"), place.removeprefix("file://")
    if Path(there).is_absolute():
        return Path(here).expanduser().resolve().is_relative_to(Path(there).resolve())
    return f"{here}/".startswith(f"{there.rstrip('/')}/") and ".." not in here.split("/")


def _fetched_bytes(uri: str) -> int:
    """Bytes that a base's weights take on their way to this machine; of a local one none."""
    if storage.is_s3(uri):
        return sum(int(info["size"]) for info in storage.list_tree(uri).values())
    if Path(uri.removeprefix("file://")).expanduser().exists() or not is_hub_id(uri):
        return 0
    try:
        return size(uri)
    except HubError as error:
        raise type(error)(f"{uri!r} {error}") from error.__cause__
