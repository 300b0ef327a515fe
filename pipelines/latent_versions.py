"""The versions of its tables that a finetuning reads: named ones, those that it began with, or else the newest."""

import itertools
import logging

from d2f_core.data.manifest import Manifest, ManifestNotFoundError, read_manifest
from d2f_core.data.table_history import read_versions
from d2f_core.data.table_versions import newest_version
from pipelines.configs import FinetuneConfig

logger = logging.getLogger(__name__)

MOST_TRIED = 10_000
"""Combinations of several tables' versions."""


def chosen_tables(config: FinetuneConfig) -> list[Manifest]:
    """The tables in the versions that the config names, or else in the newest.

    Raises:
        ManifestError: one is not there, or cannot be read.
    """
    manifests = []
    for uri, version in itertools.zip_longest(config.tables, config.latents_versions):
        newest = newest_version(uri)
        if version and version > newest:
            raise ManifestNotFoundError(
                f"{uri!r} has no version {version}; its newest is {newest}. Name one that is there with "
                "--latents-versions, or none for the newest."
            )
        manifests.append(read_manifest(uri, version or newest))
    return manifests


def begun_with(config: FinetuneConfig, base_hash: str, identity: str) -> list[Manifest]:
    """The tables in the versions with which a run of this identity was begun; where none fit, and so something else is
    another, as `chosen_tables` gives them.

    Raises:
        ManifestError: one is not there, or cannot be read.
    """
    newest = chosen_tables(config)
    if config.latents_versions or config.identity(base_hash, newest) == identity:
        return newest
    versions = [list(read_versions(uri)) for uri in config.tables]
    for chosen in itertools.islice(itertools.product(*versions), MOST_TRIED):
        manifests = [manifest for _, manifest in chosen]
        if config.identity(base_hash, manifests) == identity:
            told = ", ".join(
                f"{uri} has version {its[0][0]} by now, and this training began with version {version}"
                for uri, its, (version, _) in zip(config.tables, versions, chosen, strict=True)
                if version != its[0][0]
            )
            logger.info("%s: it goes on with that; for the newest give another --output", told)
            return manifests
    return newest
