"""The stages of an encode job around the actors: read and decode before, write after; one row per chunk.

A chunk travels whole, so that what is one forward pass and what is one file follow from the input alone, never from
how Ray schedules or bundles. Nothing here imports torch: each of these tasks' processes would pay for it.
"""

import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.data.images import BadImageError, PreparedImage, prepare_image
from d2f_core.data.latents import arrays_to_table
from d2f_core.data.quarantine import BadSample
from d2f_core.data.schema import latent_schema, sample_id
from d2f_core.data.sources import Sample, Shard
from d2f_core.inference.encode_config import EncodeJob
from d2f_core.inference.encode_records import ChunkRecord, write_chunk

PACKED_SCHEMA = pa.schema(
    [("record", pa.string()), ("table", pa.binary()), ("pixels", pa.binary()), ("problem", pa.string())]
)
"""`problem` stops the job. It travels as data because Ray keeps of an exception only its traceback's text."""

GoodSample = tuple[str, Sample, PreparedImage]
"""Sample id, sample, its pixels."""

META_SCHEMA = latent_schema((1,)).remove(2).remove(2)
"""Columns that are known before encoding."""


def pack(record: ChunkRecord, table: pa.Table, *, pixels: bytes = b"", problem: str | None = None) -> pa.Table:
    """A chunk as one row of bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    values = [record.to_json(), sink.getvalue().to_pybytes(), pixels, problem]
    return pa.table([[value] for value in values], schema=PACKED_SCHEMA)


def unpack(row: pa.Table) -> tuple[ChunkRecord, pa.Table, pa.Buffer]:
    """The chunk of a one-row table; pixels are not copied."""
    record = ChunkRecord.from_json(row["record"][0].as_py())
    return record, pa.ipc.open_stream(row["table"][0].as_buffer()).read_all(), row["pixels"][0].as_buffer()


def check_caption(caption: str | None) -> str:
    """The caption without outer white space.

    Raises:
        BadImageError: none, or not UTF-8.
    """
    if caption is None or not caption.strip():
        raise BadImageError("no_caption: empty" if caption is not None else "no_caption: none found")
    if "\ufffd" in caption:
        raise BadImageError("bad_caption: not UTF-8")
    return caption.strip()


def prepare_chunk(samples: Sequence[Sample], job: EncodeJob, **where: Any) -> tuple[ChunkRecord, list[GoodSample]]:
    """Sort out a chunk's samples; of equal ones the first counts."""
    good: list[GoodSample] = []
    bad: list[BadSample] = []
    seen: set[str] = set()
    duplicates = 0
    for sample in samples:
        name = None
        try:
            if sample.image is None:
                raise BadImageError(sample.problem or "no_image: none found")
            caption = check_caption(sample.caption)
            name = sample_id(sample.image, caption)
            if name in seen:
                duplicates += 1
                continue
            seen.add(name)
            prepared = prepare_image(sample.image, job.config.rules)
            good.append((name, Sample(source_uri=sample.source_uri, image=None, caption=caption), prepared))
        except BadImageError as error:
            bad.append(BadSample(source_uri=sample.source_uri, sample_id=name, reason=str(error)))
    record = ChunkRecord(read=len(samples), bad=tuple(bad), duplicates=duplicates, **where)
    return record, good


def _meta_table(good: Sequence[GoodSample], resolution: int) -> pa.Table:
    columns = {
        "sample_id": [name for name, _, _ in good],
        "caption": [sample.caption for _, sample, _ in good],
        "bucket": [f"{resolution}x{resolution}"] * len(good),
        "source_uri": [sample.source_uri for _, sample, _ in good],
        "width": [image.width for _, _, image in good],
        "height": [image.height for _, _, image in good],
        "crop": np.array([image.crop for _, _, image in good], dtype=np.int32).reshape(-1, 4),
    }
    return arrays_to_table(columns, META_SCHEMA)


def work_item(number: int, shard: Shard, done: frozenset[int]) -> dict[str, Any]:
    """The input row of one shard; `done` are its chunks to leave out."""
    return {"shard": number, "work": pickle.dumps((shard, done))}


def prepare_shards(rows: pa.Table, *, job: EncodeJob) -> Iterator[pa.Table]:
    """Read the shards of work items and yield their chunks, decoded."""
    size = job.config.rows_per_part
    for item in rows.to_pylist():
        shard, done = pickle.loads(item["work"])  # made by the driver of this very job
        samples = shard.read()
        number, chunk = 0, list(islice(samples, size))
        while True:
            following = list(islice(samples, size))
            if number not in done:
                record, good = prepare_chunk(chunk, job, shard=item["shard"], number=number, last=not following)
                pixels = b"".join(image.pixels.tobytes() for _, _, image in good)
                yield pack(record, _meta_table(good, job.config.resolution), pixels=pixels)
            if not following:
                break
            number, chunk = number + 1, following


def write_row(row: pa.Table, *, output: str) -> pa.Table:
    """Write one encoded chunk; only its record goes on to the driver. A chunk with a problem is not written."""
    record, table, _ = unpack(row)
    problem = row["problem"][0].as_py()
    if problem is None:
        record = write_chunk(output, record, table)
    return pa.table({"record": [record.to_json()], "problem": pa.array([problem], pa.string())})
