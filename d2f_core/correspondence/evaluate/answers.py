"""What matchers answered, as files at the output: one for each group of matchers and chunk of pairs, written once.

OUTPUT/plan.json              what decides the answers
OUTPUT/answers/part-*.parquet
"""

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from d2f_core.batch.output import claim
from d2f_core.correspondence.evaluate.measure import Measured, both, gather
from d2f_core.data.sources.pair_sample import PairSample
from d2f_core.storage import join, list_names, read_bytes, write_bytes

EXACT, AS_PUBLISHED, ALIGNED, FLOOR = "exact", "published", "exact, pose-aligned", "floor"
"""How points were read, or that a floor guessed them."""
PARTS = "answers"
READ_THREADS = 8
ANSWERS = pa.schema(
    [
        ("matcher", pa.int32()), ("decoding", pa.string()), ("pair", pa.int64()), ("flipped", pa.bool_()),
        ("x", pa.float64()), ("y", pa.float64()), ("confidence", pa.float32()),
    ]
)  # fmt: skip
"""A row per point: the numbers of its matcher and of its pair, and where it was found."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A matcher's answer for the visible points of one pair."""

    decoding: str
    positions: Tensor
    """[points, 2]"""
    confidence: Tensor
    """[points]"""
    flipped: bool = False
    """Whether the source was mirrored."""


def answer_rows(matcher: int, pair: int, answer: Answer) -> pa.Table:
    """The columns of `ANSWERS`."""
    count = len(answer.positions)
    x, y = answer.positions.double().T.numpy()
    rows = {"matcher": [matcher] * count, "decoding": [answer.decoding] * count, "pair": [pair] * count}
    values = {"flipped": [answer.flipped] * count, "x": x, "y": y, "confidence": answer.confidence.float().numpy()}
    return pa.table({**rows, **values}, schema=ANSWERS)


def part_name(group: int, chunk: int) -> str:
    return f"part-{group:03d}-{chunk:06d}.parquet"


def write_answers(output: str, group: int, chunk: int, answers: pa.Table) -> None:
    """Write the answers of a group of matchers for a chunk of pairs."""
    sink = io.BytesIO()
    pq.write_table(answers, sink, compression="zstd")
    write_bytes(join(output, PARTS, part_name(group, chunk)), sink.getvalue())


def claim_output(
    output: str, matchers: Mapping[str, Any], pairs: Sequence[PairSample], *, images: str, **sizes: Any
) -> None:
    """Write what decides the answers at the output, or check that it is the same there.

    Args:
        matchers: what determines each one's answers, as JSON values, by name.
        images: hash of what the images of `pairs` hold.
        sizes: further values that decide.

    Raises:
        OutputError: the output belongs to another comparison; names what differs.
    """
    short = {f"matcher {number} {name}": _hash(each) for number, (name, each) in enumerate(matchers.items())}
    identity = json.loads(json.dumps({"pairs": digest(pairs), "images": images, **short, **sizes}))
    claim(output, identity, matchers=json.loads(json.dumps(matchers)))


def _hash(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def digest(pairs: Sequence[PairSample]) -> str:
    """Hash of what pairs ask and of what is true: ids, sizes, boxes, keypoints; not of what the images hold."""
    found = sha256()
    for pair in pairs:
        found.update(repr((pair.pair_id, pair.category, pair.viewpoint)).encode())
        found.update(pair.visible.tobytes() + pair.flip.tobytes())
        for image in both(pair):
            found.update(repr((image.image_id, image.size, image.box)).encode() + image.keypoints.tobytes())
    return found.hexdigest()[:16]


def missing(output: str, groups: int, chunks: int) -> list[tuple[int, int]]:
    """The groups of matchers and chunks of pairs whose answers are not there yet."""
    there = set(list_names(join(output, PARTS)))
    every = [(group, chunk) for group in range(groups) for chunk in range(chunks)]
    return [place for place in every if part_name(*place) not in there]


def read_answers(output: str, groups: int, chunks: int, pairs: Sequence[PairSample]) -> dict[tuple[int, str], Measured]:
    """All answers beside what is true, by a matcher's number and decoding, in the order of the pairs."""
    names = [join(output, PARTS, part_name(group, chunk)) for group in range(groups) for chunk in range(chunks)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = pool.map(lambda name: pq.read_table(pa.BufferReader(read_bytes(name))), names)
        every = pa.concat_tables(tables)
    found = {}
    for matcher in np.unique(every["matcher"].to_numpy()).tolist():
        its = every.filter(pc.field("matcher") == matcher)
        for decoding in its["decoding"].unique().to_pylist():
            found[matcher, decoding] = _measured(its.filter(pc.field("decoding") == decoding), pairs)
    return found


def _measured(answers: pa.Table, pairs: Sequence[PairSample]) -> Measured:
    numbers = answers["pair"].to_numpy()
    order = np.argsort(numbers, kind="stable")  # within a pair as they were asked
    x, y, confidence, flipped = (answers[name].to_numpy()[order] for name in ("x", "y", "confidence", "flipped"))
    first = np.unique(numbers[order], return_index=True)[1]
    positions = torch.from_numpy(np.stack([x, y], axis=1))
    return gather(pairs, positions, torch.from_numpy(confidence), torch.from_numpy(flipped[first]))
