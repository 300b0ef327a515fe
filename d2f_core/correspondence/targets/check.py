"""Checks a job of pairs and makes its specification before it starts; no features are read."""

from typing import Any

import numpy as np

from d2f_core.batch.table_job import TableJob, check_output
from d2f_core.correspondence.targets.actor import PairEmbedder
from d2f_core.correspondence.targets.config import EmbedPairsConfig, PairsError
from d2f_core.correspondence.targets.source import plan
from d2f_core.correspondence.targets.spec import WAYS, PairsSpec
from d2f_core.correspondence.teacher_columns import checked_features, shares_of, teachers_of
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest
from d2f_core.data.table_reader import TableReader, read_rows

LOOKED_AT = 256
MOST_TOKENS = 2**16
"""What an index of two bytes can name."""


def check_embed_pairs(config: EmbedPairsConfig) -> TableJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, features or source; one line each.
    """
    manifest = checked_features(config.features, config.output, PairsError)
    size = int(manifest.fingerprint["size"])
    _check_targets(config, manifest, size)
    planned = plan(config, manifest)
    inputs = {
        "source": config.mined or config.pairs.uri or config.features,
        "source_kind": "mined" if config.mined else "given" if config.pairs.uri else "category",
        "source_digest": planned.digest,
        "features": config.features,
        "features_digest": manifest.digest,
        "rows_per_part": config.rows_per_part,
    }
    fingerprint = {
        "size": size,
        "patch": config.patch,
        "teachers": manifest.fingerprint["teachers"],
        "targets": _targets(config, manifest),
    }
    spec = PairsSpec(config=config, fingerprint=fingerprint, inputs=inputs, size=size)
    job = TableJob(spec=spec, source=planned, actor=PairEmbedder)
    check_output(job)
    return job


def dropped_share(uri: str, manifest: Manifest) -> float:
    """The mean probability that a table's first pairs have dropped, over their tokens and both directions."""
    names = [f"{way}_dropped" for way in WAYS]
    table = read_rows(TableReader(uri, manifest, names), 0, min(manifest.num_rows, LOOKED_AT))
    return float(np.mean(list(table_to_arrays(table).values())))


def _check_targets(config: EmbedPairsConfig, manifest: Manifest, size: int) -> None:
    """Raise ValueError when no targets can be made of these features for that student."""
    if not (teachers := teachers_of(manifest)):
        raise PairsError(f"{config.features!r} holds no teacher's features. Embed the images again.")
    shares_of(teachers, config.targets)
    if size % config.patch:
        raise PairsError(
            f"{config.features!r} holds images of {size} pixels, no multiple of patch={config.patch}. Give the patch "
            "of the student, such as 14."
        )
    tokens = (size // config.patch) ** 2
    if tokens > MOST_TOKENS or config.targets.kept > tokens:
        raise PairsError(
            f"a grid has {tokens} tokens; targets.kept={config.targets.kept} may be at most that, and they at most "
            f"{MOST_TOKENS}. Lower kept, or give the student's own patch."
        )


def _targets(config: EmbedPairsConfig, manifest: Manifest) -> dict[str, Any]:
    """What the targets are, the same for the same shares however they are given."""
    of, teachers = config.targets, teachers_of(manifest)
    shares = shares_of(teachers, of)
    names = ("teacher_temperature", "finer", "cycle", "kept", "probabilities")
    told = {name: getattr(of, name) for name in names}
    return {**told, "shares": {one.name: share / sum(shares) for one, share in zip(teachers, shares, strict=True)}}
