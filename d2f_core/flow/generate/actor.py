"""The actor of generation jobs: loads a job's model, then makes images and an index part from each chunk of prompts."""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.util import metrics

from d2f_core.batch.output import part_name
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import TableFile, write_part
from d2f_core.data.schema import array_field
from d2f_core.device import reserved_device
from d2f_core.flow.generate.config import GenerateError
from d2f_core.flow.generate.plan import LATENTS, PROMPTS_NAME, TIMING, Plan
from d2f_core.flow.generate.sampler import ImageSampler, Request, Sampled, batches, encode_image
from d2f_core.flow.latents import latent_schema
from d2f_core.model.artifact import load_model
from d2f_core.storage import arrow_filesystem, join, retried, write_bytes
from d2f_core.tracking import resolve_model

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("solver", pa.string(), nullable=False),
        pa.field("steps", pa.int32(), nullable=False),
        pa.field("guidance", pa.float64(), nullable=False),
        pa.field("shift", pa.float64(), nullable=False),
        # Size of the image in pixels.
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_evaluations", pa.int32(), nullable=False),
        # Null when there is no image file: a failed row, or a job that writes latents.
        pa.field("image_uri", pa.string()),
        pa.field("image_sha256", pa.string()),
        pa.field("model_uri", pa.string(), nullable=False),
        pa.field("model_hash", pa.string(), nullable=False),
        # Null when there is an image or a latent; otherwise the reason why not.
        pa.field("error", pa.string()),
    ]
)


def index_schema(plan: Plan) -> pa.Schema:
    """`INDEX_SCHEMA`, and for another time grid than `uniform` its column, so that other indexes stay as they were."""
    if plan.time_grid == "uniform":
        return INDEX_SCHEMA
    after = INDEX_SCHEMA.get_field_index("shift") + 1
    return INDEX_SCHEMA.insert(after, pa.field("time_grid", pa.string(), nullable=False))


TIMING_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("steps", pa.int32(), nullable=False),
        # Wall time of the image's batch, divided by the number of images in it.
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("host", pa.string(), nullable=False),
    ]
)
"""Separate from the index, so that the index does not depend on interruptions of the job."""
LATENTS_FILE = b"d2f.latents"
"""Metadata key of an index part; its value is the chunk's part of the latent table, as a TableFile in JSON."""
UPLOAD_THREADS = 8


class JobsSampler:
    """Ray Data actor for chunks of several jobs; it holds one job's model at a time.

    A batch gives the numbers of one job and one chunk; the result is the chunk's index part and latents (TableFiles in
    JSON).
    """

    def __init__(self, jobs: Sequence[tuple[Plan, str]], threads: int) -> None:
        """`jobs`: plan and output of each."""
        self._jobs, self._threads = jobs, threads
        self._number, self._sampler = -1, cast(ChunkSampler, None)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        ((number,), (chunk,)) = batch["job"].tolist(), batch["chunk"].tolist()
        if number != self._number:
            del self._sampler  # free it before the next model is loaded
            plan, output = self._jobs[number]
            self._number, self._sampler = number, ChunkSampler(plan, output, self._threads)
        return {"job": [number], **self._sampler(chunk)}


class ChunkSampler:
    """Generates the images of one job, chunk by chunk."""

    def __init__(self, plan: Plan, output: str, threads: int) -> None:
        self.plan, self.output = plan, output
        device = reserved_device()
        # Set even for a single actor: with another number of threads sums come out in another order.
        torch.set_num_threads(threads)
        filesystem, path = arrow_filesystem(join(output, PROMPTS_NAME))
        self.prompts = retried(f"open {PROMPTS_NAME}", lambda: pq.ParquetFile(filesystem.open_input_file(path)))
        model = load_model(resolve_model(plan.model_uri), base_prediction=plan.base_prediction)
        if model.content_hash != plan.model_hash:
            raise GenerateError(
                f"{plan.model_uri!r} has the hash {model.content_hash} on this node, and {plan.model_hash} where "
                "the job started. Put the model where every node reads the same files: s3:// or models:/."
            )
        self.sampler = ImageSampler(model, device=device)
        self._images = metrics.Counter("d2f_generated_images", "Images and latents made by generate.")
        self._failures = metrics.Counter("d2f_failed_images", "Rows of generate that failed.")

    def __call__(self, chunk: int) -> dict[str, Any]:
        rows = retried(f"read {PROMPTS_NAME}", lambda: self.prompts.read_row_group(chunk)).to_pylist()
        requests = self.plan.requests(rows)
        made, digests = self._sample(requests)
        latents = self._write_latents(chunk, made) if self.plan.emit != "images" else None
        self._write_timing(chunk, made)
        # Written last: an index part means that all images of its chunk exist.
        part = self._write_index(chunk, made, digests, latents)
        failed = sum(one.error is not None for one in made)
        for counter, count in ((self._images, len(made) - failed), (self._failures, failed)):
            if count:  # Ray refuses to increment by 0
                counter.inc(count)
        return {
            "chunk": [chunk],
            "failed": [failed],
            "part": [json.dumps(dataclasses.asdict(part))],
            "latents": [json.dumps(latents and dataclasses.asdict(latents))],
        }

    def _sample(self, requests: list[Request]) -> tuple[list[Sampled], dict[int, str]]:
        """Result of each request, without pixels, and the image files' hashes by position."""
        images = self.plan.emit == "images"
        kept: dict[int, Sampled] = {}
        files: dict[int, Future[str]] = {}
        # Encoding and uploading run in parallel with sampling the next batch.
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            for positions in batches(requests, self.plan.batch_size):
                made = self.sampler.sample_batch([requests[position] for position in positions], decode=images)
                for position, one in zip(positions, made, strict=True):
                    if images and one.pixels is not None:
                        files[position] = pool.submit(self._write_image, one)
                    # From here on only the pool keeps the pixels: those of a whole chunk may not fit into memory.
                    kept[position] = dataclasses.replace(one, pixels=None, latent=None if images else one.latent)
        digests = {position: file.result() for position, file in files.items()}
        return [kept[position] for position in range(len(requests))], digests

    def _write_image(self, made: Sampled) -> str:
        assert made.pixels is not None
        options = {} if self.plan.format == "png" else {"quality": self.plan.quality}
        data = encode_image(made.pixels, self.plan.format, **options)
        write_bytes(self._image_uri(made.request), data)
        return hashlib.sha256(data).hexdigest()

    def _image_uri(self, request: Request) -> str:
        return join(self.output, f"images/{request.sample_id}-{request.steps}.{self.plan.format}")

    def _write_latents(self, chunk: int, made: list[Sampled]) -> TableFile | None:
        good = [one for one in made if one.latent is not None]
        if not good:
            return None
        latents = np.stack([one.latent for one in good if one.latent is not None])
        count, (height, width) = len(good), (self.plan.height, self.plan.width)
        columns = {
            "sample_id": [one.request.sample_id for one in good],
            "caption": [one.request.prompt for one in good],
            "latent_mean": latents,
            "latent_std": np.zeros_like(latents),
            "bucket": [f"{height}x{width}"] * count,
            "source_uri": [self.plan.model_uri] * count,
            "width": [width] * count,
            "height": [height] * count,
            "crop": np.tile([0, 0, width, height], (count, 1)),
        }
        schema = latent_schema(latents.shape[1:])
        if self.plan.emit == "pairs":
            schema = schema.append(array_field("noise", "float16", latents.shape[1:]))
            columns["noise"] = np.stack([one.noise for one in good])
        name = part_name(chunk, LATENTS)
        part = write_part(self.output, name, arrays_to_table(columns, schema))
        return dataclasses.replace(part, path=name.removeprefix(f"{LATENTS}/"))

    def _write_timing(self, chunk: int, made: list[Sampled]) -> None:
        host = socket.gethostname()
        rows = [
            {"sample_id": one.request.sample_id, "steps": one.request.steps, "seconds": one.seconds, "host": host}
            for one in made
        ]
        write_part(self.output, part_name(chunk, TIMING), pa.Table.from_pylist(rows, schema=TIMING_SCHEMA))

    def _write_index(
        self, chunk: int, made: list[Sampled], digests: dict[int, str], latents: TableFile | None
    ) -> TableFile:
        rows = [self._index_row(one, digests.get(position)) for position, one in enumerate(made)]
        metadata = {} if latents is None else {LATENTS_FILE: json.dumps(dataclasses.asdict(latents))}
        table = pa.Table.from_pylist(rows, schema=index_schema(self.plan).with_metadata(metadata))
        return write_part(self.output, part_name(chunk), table)

    def _index_row(self, made: Sampled, digest: str | None) -> dict[str, Any]:
        return dataclasses.asdict(made.request) | {
            "num_evaluations": made.num_evaluations,
            "image_uri": None if digest is None else self._image_uri(made.request),
            "image_sha256": digest,
            "model_uri": self.plan.model_uri,
            "model_hash": self.plan.model_hash,
            "error": made.error,
        }
