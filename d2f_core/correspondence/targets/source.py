"""The pairs of a job: mined ones, given ones, or drawn within categories. Imports no torch."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from d2f_core.correspondence.targets.config import EmbedPairsConfig, PairsError
from d2f_core.correspondence.targets.index import ImageIndex, image_index
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.data.sources.pairs import plan_pairs
from d2f_core.data.sources.sample import Sample
from d2f_core.data.table_reader import read_columns
from d2f_core.identity import identity_hash

MINED = "retrieval_pairs"
IDS = ("source_image_id", "target_image_id")


@dataclass(frozen=True, kw_only=True)
class IdPair(Sample):
    """Two images by their ids in the table of features."""

    image: bytes | None = None
    caption: str | None = None
    """Both always None."""
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class IdPairs:
    """A shard of pairs that are known beforehand."""

    uri: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def num_rows(self) -> int:
        return len(self.pairs)

    def read(self) -> Iterator[IdPair]:
        for source, target in self.pairs:
            yield IdPair(source_uri=f"{self.uri}#{source}:{target}", source=source, target=target)


def plan(config: EmbedPairsConfig, features: Manifest) -> SourcePlan:
    """The pairs, cut into shards.

    Raises:
        PairsError: no source is given, or more than one; or images have no categories to be paired within.
        SourceError: see `plan_pairs`.
    """
    if sum(map(bool, (config.mined, config.pairs.uri, config.within_category))) != 1:
        raise PairsError("give one of mined, pairs.uri and within_category: where the pairs come from.")
    if config.pairs.uri:
        return plan_pairs(config.pairs, rows_per_shard=config.rows_per_part)
    if config.mined:
        manifest = read_manifest(config.mined)
        if manifest.kind != MINED:
            raise PairsError(f"mined={config.mined!r} holds {manifest.kind}. Give a table that mine_pairs wrote.")
        return _cut(config, config.mined, mined_pairs(config.mined, manifest), manifest.digest)
    pairs = pairs_within(image_index(config.features, features.digest), config.within_category)
    digest = identity_hash({"features": features.digest, "within_category": config.within_category})
    return _cut(config, config.features, pairs, digest)


def _cut(config: EmbedPairsConfig, uri: str, pairs: Iterable[tuple[str, str]], digest: str) -> SourcePlan:
    """Shards of pairs, each of which counts once whichever way round it comes."""
    once = {frozenset(pair): pair for pair in reversed(list(pairs))}
    found = list(reversed(once.values()))
    if not found:
        raise PairsError(f"{uri!r} makes no pair. Give more images, or more partners of each.")
    size = config.rows_per_part
    shards = [IdPairs(uri=uri, pairs=tuple(found[start : start + size])) for start in range(0, len(found), size)]
    return SourcePlan(kind="parquet", shards=tuple(shards), digest=digest)


def mined_pairs(uri: str, manifest: Manifest) -> list[tuple[str, str]]:
    """Ids of source and target, in the table's order."""
    if not manifest.num_rows:
        return []
    table = read_columns(uri, manifest, IDS)
    return list(zip(*(table.column(name).to_pylist() for name in IDS), strict=True))


def pairs_within(index: ImageIndex, partners: int) -> Iterator[tuple[str, str]]:
    """In an order that a hash makes of ids, each image with the next `partners` of its category that show another thing
    (`mesh`), if they are views.

    Raises:
        PairsError: an image has no category.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, category in enumerate(index.categories):
        rows[category].append(row)
    if "" in rows:
        raise PairsError(
            f"{len(rows[''])} images have no category, such as {index.ids[rows[''][0]]!r}. Mine pairs instead."
        )
    for category in sorted(rows):
        its = sorted(rows[category], key=lambda row: hashlib.blake2b(index.ids[row].encode(), digest_size=16).digest())
        for place, row in enumerate(its):
            following = its[place + 1 :] + its[:place]
            others = (other for other in following if not index.meshes[row] or index.meshes[other] != index.meshes[row])
            for _, other in zip(range(partners), others, strict=False):
                yield index.ids[row], index.ids[other]
