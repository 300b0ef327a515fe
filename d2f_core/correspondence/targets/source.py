"""The pairs of a job: mined ones, given ones, or drawn within categories. Imports no torch."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from d2f_core.correspondence.targets.config import EmbedPairsConfig, PairsError
from d2f_core.correspondence.targets.index import ImageIndex, image_index
from d2f_core.data.errors import BadSampleError
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.data.quarantine import DUPLICATE
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.data.sources.pair_sample import PairSample
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
    source: str = ""
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class IdPairs:
    """A shard of pairs that are known beforehand."""

    pairs: tuple[IdPair, ...]

    @property
    def num_rows(self) -> int:
        return sum(pair.rows for pair in self.pairs)

    def read(self) -> Iterator[IdPair]:
        yield from self.pairs


def plan(config: EmbedPairsConfig, features: Manifest) -> SourcePlan:
    """The pairs, cut into shards; none where the table is complete.

    Raises:
        PairsError: no source is given, or more than one; or images have no categories to be paired within.
        SourceError: see `plan_pairs`.
    """
    if sum(map(bool, (config.mined, config.pairs.uri, config.within_category))) != 1:
        raise PairsError("give one of mined, pairs.uri and within_category: where the pairs come from.")
    if config.pairs.uri:
        given = plan_pairs(config.pairs, rows_per_shard=config.rows_per_part, points=False)
        return _cut(config, lambda: given_pairs(given, image_index(config.features, features.digest)), given.digest)
    if config.mined:
        manifest = read_manifest(config.mined)
        if manifest.kind != MINED:
            raise PairsError(f"mined={config.mined!r} holds {manifest.kind}. Give a table that mine_pairs wrote.")
        return _cut(config, lambda: _named(config.mined, mined_pairs(config.mined, manifest)), manifest.digest)
    digest = identity_hash({"features": features.digest, "within_category": config.within_category})
    within = lambda: pairs_within(image_index(config.features, features.digest), config.within_category)  # noqa: E731
    return _cut(config, lambda: _named(config.features, within()), digest)


def _cut(config: EmbedPairsConfig, pairs: Callable[[], Iterable[IdPair]], digest: str) -> SourcePlan:
    found = () if manifest_exists(config.output) else tuple(pairs())
    size = config.rows_per_part
    shards = tuple(IdPairs(pairs=found[start : start + size]) for start in range(0, len(found), size))
    if not shards and not manifest_exists(config.output):
        raise PairsError("There is no pair of two images. Give more images, or more partners of each.")
    return SourcePlan(kind="parquet", shards=shards, digest=digest)


def _named(uri: str, pairs: Iterable[tuple[str, str]]) -> Iterator[IdPair]:
    """Pairs that this project made itself, each once whichever way round it comes."""
    seen = set[frozenset[str]]()
    for source, target in pairs:
        if (pair := frozenset((source, target))) not in seen:
            seen.add(pair)
            yield IdPair(source_uri=f"{uri}#{source}:{target}", source=source, target=target)


def given_pairs(planned: SourcePlan, index: ImageIndex) -> Iterator[IdPair]:
    """The pairs of someone else, in their order; with the reason for those that cannot be used, and for a pair that was
    there before, whichever way round.
    """
    seen: dict[frozenset[str], str] = {}
    for sample in (sample for shard in planned.shards for sample in shard.read()):
        found = _by_ids(cast(PairSample, sample), index)
        if found.problem is None:
            first = seen.setdefault(frozenset((found.source, found.target)), found.source_uri)
            if first != found.source_uri:
                found = replace(found, problem=f"{DUPLICATE}: of {first}")
        yield found


def _by_ids(sample: PairSample, index: ImageIndex) -> IdPair:
    try:
        if sample.problem or sample.source is None or sample.target is None:
            raise BadSampleError(str(sample.problem))
        source, target = (index.ids[index.find(image)] for image in (sample.source, sample.target))
        return IdPair(source_uri=sample.source_uri, source=source, target=target)
    except BadSampleError as error:
        return IdPair(source_uri=sample.source_uri, problem=str(error), rows=sample.rows)


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
