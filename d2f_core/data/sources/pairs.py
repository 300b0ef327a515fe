"""Pairs of images with keypoints: SPair-71k, tables and lines of one's own, objects in COCO's format."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace

from d2f_core.data.errors import BadSampleError
from d2f_core.data.quarantine import DUPLICATE, BadSample
from d2f_core.data.sources.coco import plan_coco
from d2f_core.data.sources.config import PairSource
from d2f_core.data.sources.listing import Listing, Sizes, SourcePlan, plan_source, summary
from d2f_core.data.sources.pair_rows import RowRules, plan_pair_lines, plan_pair_tables
from d2f_core.data.sources.pair_sample import PairSample, pair_name, parse_object
from d2f_core.data.sources.sample import Shard, SourceError, SourceKind
from d2f_core.data.sources.spair import plan_spair
from d2f_core.storage import read_bytes

SPAIR_MARK = "/PairAnnotation/"
SUFFIXES: dict[SourceKind, str] = {"parquet": ".parquet", "jsonl": ".jsonl", "coco": ".json"}


def plan_pairs(source: PairSource, *, rows_per_shard: int = 256, points: bool = True) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` pairs, which yield `PairSample`s.

    A file of JSON lines or in COCO's format is always one shard.

    Args:
        points: whether pairs in rows or lines need keypoints, boxes and a category. False: those there are not read.

    Raises:
        SourceError: the source is empty, mixes layouts, or lacks files or columns.
    """
    flips = read_flip_partners(source.flip_partners) if source.flip_partners else {}

    def cut(kind: SourceKind, sizes: Sizes) -> Collection[Shard]:
        rules = RowRules(
            images=source.images, categories=source.categories, splits=source.splits, flip_partners=flips, points=points
        )
        plain = {uri: size for uri, size in sizes.items() if size is not None}
        if kind == "spair":
            return plan_spair(sizes, source, flips, rows_per_shard)
        if kind == "parquet":
            return plan_pair_tables(plain, rules, rows_per_shard)
        return plan_pair_lines(plain, rules) if kind == "jsonl" else plan_coco(plain, rules, source.partners_per_object)

    how = {**asdict(source), "uri": "", "kind": "", "flip_partners": flips}
    return plan_source(source.uri, source.kind, [how], cut, _detect)


def read_pairs(source: PairSource) -> tuple[list[PairSample], list[BadSample]]:
    """All pairs of a source, in its order, and the ledger of what was left out; equal `pair_id`s count once.

    Of pairs without an id of their own whose images are called alike and are not the same, the first is named after
    what its images are called, the others after their images' keys.

    Raises:
        SourceError: as `plan_pairs`.
    """
    good: dict[str, PairSample] = {}
    bad: list[BadSample] = []
    for sample in (sample for shard in plan_pairs(source).shards for sample in shard.read()):
        assert isinstance(sample, PairSample)
        if (namesake := good.get(sample.pair_id or "")) and _keys(sample) != _keys(namesake):
            sample = _told_apart(sample)
        reason = sample.problem or (DUPLICATE if sample.pair_id in good else None)
        if reason or sample.pair_id is None:
            entry = BadSample(
                source_uri=sample.source_uri, sample_id=sample.pair_id, reason=str(reason), rows=sample.rows
            )
            bad.append(entry)
        else:
            good[sample.pair_id] = sample
    return list(good.values()), bad


def _keys(sample: PairSample) -> tuple[str, ...]:
    return tuple(image.key for image in (sample.source, sample.target) if image)


def _told_apart(sample: PairSample) -> PairSample:
    """The sample under the keys of its images, if its id is made of their names."""
    named = sample.source and sample.target and sample.pair_id == pair_name(sample.source, sample.target)
    return replace(sample, pair_id=":".join(_keys(sample))) if named else sample


def read_flip_partners(uri: str) -> Mapping[str, list[list[str]]]:
    """The file `PairSource.flip_partners`.

    Raises:
        SourceError: it is not of that form.
    """
    try:
        found = parse_object(read_bytes(uri))
        return {category: [[str(name) for name in pair] for pair in pairs] for category, pairs in found.items()}
    except (BadSampleError, TypeError) as error:
        example = '{"chair": [["left arm", "right arm"]]}'
        raise SourceError(f"{uri!r} is not an object such as {example} ({error}).") from None


def _detect(uri: str, listing: Listing) -> SourceKind:
    if any(SPAIR_MARK in name for name in listing):
        return "spair"
    found: list[SourceKind] = [
        kind for kind, suffix in SUFFIXES.items() if any(name.endswith(suffix) for name in listing)
    ]
    if len(found) != 1:
        what = f"a mixture of {' and '.join(found)}" if found else "no .parquet, .jsonl, .json and no SPair-71k"
        raise SourceError(f"{uri!r} holds {what} ({summary(listing)}). Check the URI, or say --source.kind.")
    return found[0]
