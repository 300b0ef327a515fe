"""The versions of a table, for whoever began with one of them and goes on with it (see `table_versions`)."""

from collections.abc import Iterator

from d2f_core.data.manifest import Manifest, ManifestNotFoundError, read_manifest
from d2f_core.data.table_versions import newest_version


def read_versions(uri: str) -> Iterator[tuple[int, Manifest]]:
    """Number and manifest of each version of the table at `uri`, the newest first.

    Raises:
        ManifestNotFoundError: no table is there.
        ManifestError: a manifest cannot be read.
    """
    for version in range(newest_version(uri), 0, -1):
        yield version, read_manifest(uri, version)


def read_version(uri: str, digest: str) -> Manifest | None:
    """The manifest with this digest among the versions of the table at `uri`; None if none of them has it.

    Raises:
        ManifestError: a manifest cannot be read.
    """
    try:
        return next((manifest for _, manifest in read_versions(uri) if manifest.digest == digest), None)
    except ManifestNotFoundError:
        return None
