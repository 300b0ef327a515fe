"""The actor of a generation job: loads the weights once, then turns chunks of prompts into images and an index part."""

import dataclasses
import hashlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from d2f_core.data.manifest import write_part
from d2f_core.inference.plan import PROMPTS_NAME, Plan, part_name
from d2f_core.model.artifact import load_model, to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.solver import NonFiniteStateError
from d2f_core.randomness import keyed_normal
from d2f_core.storage import arrow_filesystem, join, write_bytes
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
        pa.field("num_evaluations", pa.int32(), nullable=False),
        pa.field("image_uri", pa.string()),
        pa.field("image_sha256", pa.string()),
        pa.field("model_uri", pa.string(), nullable=False),
        pa.field("model_hash", pa.string(), nullable=False),
        # Null when there is an image; otherwise why there is none.
        pa.field("error", pa.string()),
    ]
)
KEPT_PROMPTS = 256
UPLOAD_THREADS = 8


class ChunkSampler:
    """Ray Data actor: a batch of one chunk number in, that chunk's index part (as a TableFile) out."""

    def __init__(self, plan: Plan, output: str, threads: int) -> None:
        self.plan, self.output = plan, output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # Set even for a single actor: with another number of threads sums come out in another order.
        torch.set_num_threads(threads)
        filesystem, path = arrow_filesystem(join(output, PROMPTS_NAME))
        self.prompts = pq.ParquetFile(filesystem.open_input_file(path))
        self.model = load_model(resolve_model(plan.model_uri)).to(self.device)
        if self.model.content_hash != plan.model_hash:
            raise ValueError(
                f"{plan.model_uri!r} has the hash {self.model.content_hash} on this node, and {plan.model_hash} where "
                "the job started. Put the model where every node reads the same files: s3:// or models:/."
            )
        self.autoencoder = load_autoencoder(self.model.base, device=self.device)
        self.text_encoder = load_text_encoder(self.model.base, device=self.device)
        self.conditions: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        (chunk,) = (int(number) for number in batch["chunk"])
        rows = self.prompts.read_row_group(chunk).to_pylist()
        index: list[dict[str, Any]] = []
        with ThreadPoolExecutor(UPLOAD_THREADS) as uploads:
            writes = []
            for steps in self.plan.steps:
                for start in range(0, len(rows), self.plan.batch_size):
                    made = self._sample(rows[start : start + self.plan.batch_size], steps)
                    writes += [uploads.submit(write_bytes, row["image_uri"], png) for row, png in made if png]
                    index += [row for row, _ in made]
            for write in writes:
                write.result()
        # Last: an index part says that all images of its chunk are there.
        part = write_part(self.output, part_name(chunk), pa.Table.from_pylist(index, schema=INDEX_SCHEMA))
        failed = sum(row["error"] is not None for row in index)
        return {"chunk": [chunk], "failed": [failed], "part": [dataclasses.asdict(part)]}

    def _sample(self, rows: Sequence[dict[str, Any]], steps: int) -> list[tuple[dict[str, Any], bytes | None]]:
        """One index row per prompt, with its image's bytes or None."""
        try:
            latents, evaluations = self._latents(rows, steps)
        except NonFiniteStateError as error:
            if len(rows) == 1:
                return [(self._index_row(rows[0], steps, None, error=str(error)), None)]
            # One row must not cost the others their images: each by itself.
            return [made for row in rows for made in self._sample([row], steps)]
        pixels = self.autoencoder.decode(latents)
        # Asked of the latents too: decoding clamps an infinite value into an image like any other.
        finite = (latents.flatten(1).isfinite().all(1) & pixels.flatten(1).isfinite().all(1)).tolist()
        images = to_uint8(pixels.nan_to_num()).numpy()
        made = []
        for row, image, usable in zip(rows, images, finite, strict=True):
            png = _png(image) if usable else None
            error = None if usable else "the image is not finite"
            made.append((self._index_row(row, steps, png, evaluations=evaluations, error=error), png))
        return made

    def _latents(self, rows: Sequence[dict[str, Any]], steps: int) -> tuple[Tensor, int]:
        plan = self.plan
        noise = [keyed_normal(self._seed(row), [row["sample_id"]], plan.latent_shape) for row in rows]
        return sample_latents(
            self.model,
            torch.from_numpy(np.concatenate(noise)).to(self.device),
            self._condition([row["prompt"] for row in rows]),
            self._condition([row["negative_prompt"] for row in rows]),
            solver=plan.solver,
            steps=steps,
            guidance=plan.guidance,
            shift=plan.shift,
        )

    def _seed(self, row: dict[str, Any]) -> int:
        return self.plan.seed if row["seed"] is None else row["seed"]

    def _index_row(
        self, row: dict[str, Any], steps: int, png: bytes | None, *, evaluations: int = 0, error: str | None
    ) -> dict[str, Any]:
        uri = join(self.output, f"images/{row['sample_id']}-{steps}.{self.plan.format}")
        return {
            "sample_id": row["sample_id"],
            "prompt": row["prompt"],
            "negative_prompt": row["negative_prompt"],
            "seed": self._seed(row),
            "solver": self.plan.solver,
            "steps": steps,
            "guidance": self.plan.guidance,
            "shift": self.plan.shift,
            "num_evaluations": evaluations,
            "image_uri": None if png is None else uri,
            "image_sha256": None if png is None else hashlib.sha256(png).hexdigest(),
            "model_uri": self.plan.model_uri,
            "model_hash": self.plan.model_hash,
            "error": error,
        }

    def _condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What captions give, [len(captions), ...] by the denoiser's argument names; each encoded once and by itself.

        By itself, because in a batch its states would depend, by rounding, on which captions were already known here.
        """
        for caption in captions:
            if caption not in self.conditions:
                self.conditions[caption] = self.text_encoder.condition([caption])
            self.conditions.move_to_end(caption)
        conditions = [self.conditions[caption] for caption in captions]
        while len(self.conditions) > KEPT_PROMPTS:
            self.conditions.popitem(last=False)
        return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def _png(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG")
    return sink.getvalue()
