"""The table of retrieval pairs, written by a Ray Data job, each part for some of the images; and that of clusters."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from d2f_core.correspondence.mine.clusters import clusters_of
from d2f_core.correspondence.mine.config import MineError, MinePairsConfig
from d2f_core.correspondence.pairs import NOBODY, Partners, nearest_partners, retrieval_table
from d2f_core.correspondence.teacher_columns import checked_features
from d2f_core.correspondence.teachers import mean_token
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.datasets.generated_table import GeneratedTable, generate_table, part_name
from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    TableFile,
    manifest_exists,
    read_manifest,
    write_manifest,
    write_part,
)
from d2f_core.data.table_reader import TableReader, read_columns, read_rows

PAIRS, CLUSTERED = "retrieval_pairs", "clusters"
CLUSTER_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), pa.field("cluster", pa.string(), nullable=False)]
)
"""One row per image, in the order of the table of features."""
READ_ROWS, READ_BYTES = 256, 64e6
"""Most rows that are read at once, and most bytes of their features in float32, in which these are averaged."""
SIDES = ("source", "target")


def check_mine(config: MinePairsConfig) -> Manifest:
    """The manifest of the table that is compared.

    Raises:
        MineError: a field is missing, or the table lacks a column.
        ValueError: it is no table of features.
    """
    manifest = checked_features(config.features, config.output, MineError)
    embedded = ["embedding"] if "embedding" in manifest.fingerprint else []
    if config.column not in (known := [*embedded, *manifest.fingerprint["shapes"]]):
        raise MineError(
            f"column={config.column!r} is not in {config.features!r}. Use one of {', '.join(known) or 'none'}, or "
            "embed the images with --embedding TEACHER."
        )
    views = bool(manifest.fingerprint["points"])
    lacking = {"mesh": not views, "category": not views and manifest.inputs.get("source_kind") != "folder"}
    if lacking.get(config.apart):
        raise MineError(f"apart={config.apart!r}, and the images of {config.features!r} have none. Leave apart out.")
    return manifest


def mine_pairs(config: MinePairsConfig, of: Manifest) -> tuple[Manifest, bool]:
    """Write the missing parts of both tables; needs a running Ray.

    Args:
        of: what `check_mine` returned.

    Returns:
        The manifest of the pairs, and whether anything was written.

    Raises:
        ManifestError: the output holds another table, or files that are no table.
        MineError: see `clusters_of`.
    """
    chosen = {name: getattr(config, name) for name in ("column", "apart", "partners", "rows_per_part")}
    pairs = GeneratedTable(
        job="mine_pairs",
        output=config.output,
        kind=PAIRS,
        fingerprint={"features": of.digest},
        inputs={**chosen, "features_digest": of.digest},
        num_parts=-(-of.num_rows // config.rows_per_part),
        make_part=partial(make_pairs, config, of),
        num_tasks=config.num_tasks,
    )
    manifest, written = generate_table(pairs)
    if not config.cluster_size:
        return manifest, written
    return manifest, write_clusters(config, of, manifest) or written


def make_pairs(config: MinePairsConfig, of: Manifest, number: int) -> TableFile:
    """Find and write the partners of one part's images."""
    ids, embeddings, groups = read_embeddings(config, of)
    first = number * config.rows_per_part
    own = range(first, min(first + config.rows_per_part, len(ids)))
    found = nearest_partners(embeddings, ids, partners=config.partners, groups=groups, sources=own)
    return write_part(config.output, part_name(number), retrieval_table(ids, found))


def write_clusters(config: MinePairsConfig, of: Manifest, pairs: Manifest) -> bool:
    """Write the table of clusters, unless it is there; tells whether it was written.

    Raises:
        ManifestError: other clusters are there.
        MineError: see `clusters_of`.
    """
    inputs = {"cluster_size": config.cluster_size, "pairs_digest": pairs.digest}
    if manifest_exists(config.clusters):
        if (there := read_manifest(config.clusters)).inputs != inputs:
            raise ManifestError(
                f"{config.clusters!r} holds the clusters of {there.inputs}; asked for {inputs}. Use another output."
            )
        return False
    ids, groups = _texts(config, read_columns(config.features, of, _text_columns(config)))
    found = partners_of(ids, read_pairs(config.output, pairs), config.partners)
    names = [f"{cluster:06d}" for cluster in clusters_of(found, ids, config.cluster_size, groups).tolist()]
    file = write_part(config.clusters, part_name(0), pa.table([ids, names], schema=CLUSTER_SCHEMA))
    fingerprint = {"features": of.digest, "size": config.cluster_size}
    write_manifest(config.clusters, Manifest(kind=CLUSTERED, files=(file,), fingerprint=fingerprint, inputs=inputs))
    return True


def read_embeddings(config: MinePairsConfig, of: Manifest) -> tuple[list[str], np.ndarray, list[str] | None]:
    """Ids [images], embeddings [images, width], and what near-duplicates share."""
    names = [config.column, *_text_columns(config)]
    reader, pieces, texts = TableReader(config.features, of, names), [], []
    step = _rows_at_once(config, of)
    for first in range(0, of.num_rows, step):
        table = read_rows(reader, first, min(first + step, of.num_rows))
        pieces.append(_pooled(table, config.column))
        texts.append(table.drop_columns([config.column]))
    ids, groups = _texts(config, pa.concat_tables(texts))
    return ids, np.concatenate(pieces), groups


def _text_columns(config: MinePairsConfig) -> list[str]:
    return ["sample_id", *([config.apart] if config.apart else [])]


def _texts(config: MinePairsConfig, known: pa.Table) -> tuple[list[str], list[str] | None]:
    """Ids, and what near-duplicates share."""
    groups = known.column(config.apart).to_pylist() if config.apart else None
    return known.column("sample_id").to_pylist(), groups


def _rows_at_once(config: MinePairsConfig, of: Manifest) -> int:
    """An image's features may be megabytes: 961 tokens of 1,280 channels are 4.9 MB."""
    shape = of.fingerprint["shapes"].get(config.column, ())
    return max(1, min(READ_ROWS, int(READ_BYTES // (4 * math.prod(shape)))))


def _pooled(table: pa.Table, name: str) -> np.ndarray:
    """[images, width]: stored embeddings, or those of stored features."""
    values = table_to_arrays(table, [name])[name]
    return values if values.ndim == 2 else mean_token(torch.tensor(values)).numpy()


def read_pairs(uri: str, manifest: Manifest) -> pa.Table:
    """Ids of source and target, and the cosine, of all pairs."""
    return read_columns(uri, manifest, ("source_image_id", "target_image_id", "rank", "cosine"))


def partners_of(ids: Sequence[str], pairs: pa.Table, most: int) -> Partners:
    """The partners of each image, from the rows of a table of pairs."""
    place = {name: row for row, name in enumerate(ids)}
    found = Partners(rows=np.full((len(ids), most), NOBODY), cosines=np.full((len(ids), most), np.nan))
    sources, targets = ([place[name] for name in pairs.column(f"{side}_image_id").to_pylist()] for side in SIDES)
    ranks = pairs.column("rank").to_numpy()
    found.rows[sources, ranks], found.cosines[sources, ranks] = targets, pairs.column("cosine").to_numpy()
    return found


def read_clusters(uri: str) -> dict[str, str]:
    """The cluster of each image by its id.

    Raises:
        MineError: no table of clusters is there.
    """
    manifest = read_manifest(uri)
    if manifest.kind != CLUSTERED:
        raise MineError(f"{uri!r} holds {manifest.kind}. Give the directory 'clusters' in the output of mine_pairs.")
    table = read_columns(uri, manifest, CLUSTER_SCHEMA.names)
    return dict(zip(*(table.column(name).to_pylist() for name in CLUSTER_SCHEMA.names), strict=True))
