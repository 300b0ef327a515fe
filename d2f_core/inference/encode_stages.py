"""The three stages of an encode job, each one row per chunk: prepare (CPU tasks), encode (actors), write (CPU tasks).

A chunk travels whole, so that what is one forward pass and what is one file follow from the input alone, never from
how Ray schedules or bundles.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.data.images import BadImageError, PreparedImage, prepare_image
from d2f_core.data.latents import arrays_to_table, table_to_arrays
from d2f_core.data.quarantine import BadSample
from d2f_core.data.schema import latent_schema, sample_id
from d2f_core.data.sources import Sample, Shard
from d2f_core.inference.encode_job import EncodeJob
from d2f_core.inference.encode_records import ChunkRecord, write_chunk
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.text_encoder import load_text_encoder

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


class ChunkEncoder:
    """Ray Data actor: pixels of a chunk -> its latent table. Loads the weights once."""

    def __init__(self, job: EncodeJob) -> None:
        torch.set_num_threads(job.config.cpus_per_actor)
        self._job = job
        self._device = "cuda" if job.config.gpus_per_actor else "cpu"
        base = resolve_base(job.config.base)
        self._autoencoder = load_autoencoder(base, device=self._device)
        states = job.config.text == "states"
        self._text_encoder = load_text_encoder(base, device=self._device) if states else None

    def __call__(self, row: pa.Table) -> pa.Table:
        record, meta, buffer = unpack(row)
        if self._autoencoder.fingerprint != self._job.fingerprint["autoencoder"]:
            problem = f"{self._job.config.base!r} is another model on some node. Give a URI that all nodes share."
            return pack(record, meta, problem=problem)
        resolution, size = self._job.config.resolution, self._job.config.batch_size
        pixels = np.frombuffer(buffer, np.uint8).reshape(meta.num_rows, resolution, resolution, 3)
        moments = [self._encode(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        columns: dict[str, Any] = table_to_arrays(meta)
        empty = np.empty((0, *self._job.latent_shape), np.float16)
        columns["latent_mean"] = np.concatenate([empty, *(mean for mean, _ in moments)])
        columns["latent_std"] = np.concatenate([empty, *(std for _, std in moments)])
        text_shape = None
        if self._text_encoder is not None:
            columns["text_state"], text_shape = self._encode_text(list(columns["caption"]), size)
        schema = latent_schema(self._job.latent_shape, text_shape=text_shape)
        return pack(record, arrays_to_table(columns, schema), problem=_not_finite(columns))

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self._autoencoder.encode(to_input(pixels, self._device))
        return mean.half().cpu().numpy(), std.half().cpu().numpy()

    def _encode_text(self, captions: list[str], size: int) -> tuple[np.ndarray, tuple[int, ...]]:
        assert self._text_encoder is not None
        # An empty chunk still needs the shape of its column.
        batches = [captions[start : start + size] for start in range(0, len(captions), size)] or [[""]]
        states = np.concatenate([self._text_encoder.encode(batch).half().cpu().numpy() for batch in batches])
        return states[: len(captions)], states.shape[1:]


def _not_finite(columns: Mapping[str, Any]) -> str | None:
    finite = [np.isfinite(columns[name]).all(axis=(1, 2, 3)) for name in ("latent_mean", "latent_std")]
    wrong = np.flatnonzero(~(finite[0] & finite[1]))
    if not len(wrong):
        return None
    names = ", ".join(columns["sample_id"][row] for row in wrong[:8])
    return (
        f"{len(wrong)} latents are not finite in half precision, of the samples {names}. The autoencoder's weights or "
        "its scaling_factor are damaged; check the base model."
    )


def to_input(pixels: np.ndarray, device: str) -> Tensor:
    """Float32 [batch, 3, height, width] in [-1, 1] of uint8 [batch, height, width, 3]."""
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def write_row(row: pa.Table, *, output: str) -> pa.Table:
    """Write one encoded chunk; only its record goes on to the driver. A chunk with a problem is not written."""
    record, table, _ = unpack(row)
    problem = row["problem"][0].as_py()
    if problem is None:
        record = write_chunk(output, record, table)
    return pa.table({"record": [record.to_json()], "problem": pa.array([problem], pa.string())})
