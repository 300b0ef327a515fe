"""The actor of a depth job: loads the model once, then turns shards of images into depth maps and an index part."""

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2f_core.batch.output import part_name
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import BadImageError, PreparedImage, prepare_image
from d2f_core.data.manifest import write_part
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.sample import Sample
from d2f_core.device import reserved_device
from d2f_core.flow.depth.config import PredictDepthError
from d2f_core.flow.depth.ensemble import depth_npy, depth_png, preview_png
from d2f_core.flow.depth.plan import DepthPlan
from d2f_core.flow.depth.predictor import DepthMade, DepthPredictor, DepthSettings
from d2f_core.model.artifact import load_model
from d2f_core.storage import join, write_bytes
from d2f_core.tracking import resolve_model

Prepared = tuple[str | None, PreparedImage | str]
"""Sample id, and the prepared pixels or the reason why there are none."""
DEPTH_INDEX_SCHEMA = pa.schema(
    [
        # Hash of the image's bytes; null when the source could not deliver them.
        pa.field("sample_id", pa.string()),
        pa.field("source_uri", pa.string(), nullable=False),
        # Size of the original in pixels; null for an image that was not decoded.
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        # Left, top, right, bottom of the part of the original that the map covers, in pixels.
        pa.field("crop", pa.list_(pa.int32())),
        # Long side of the map in pixels.
        pa.field("resolution", pa.int32(), nullable=False),
        # Size of the map in pixels; in older parts the columns are missing, and the map is a square.
        pa.field("map_width", pa.int32()),
        pa.field("map_height", pa.int32()),
        pa.field("solver", pa.string(), nullable=False),
        pa.field("steps", pa.int32(), nullable=False),
        pa.field("shift", pa.float64(), nullable=False),
        pa.field("ensemble", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        # Network evaluations of each ensemble member.
        pa.field("num_evaluations", pa.int32(), nullable=False),
        # Files of the map: .npy float32 (0 near, 1 far), 16-bit PNG, the members' spread as .npy, and a coloured
        # preview.
        pa.field("depth_uri", pa.string()),
        pa.field("depth_sha256", pa.string()),
        pa.field("png_uri", pa.string()),
        pa.field("uncertainty_uri", pa.string()),
        pa.field("preview_uri", pa.string()),
        # Mean of the uncertainty map.
        pa.field("uncertainty", pa.float64()),
        pa.field("model_uri", pa.string(), nullable=False),
        pa.field("model_hash", pa.string(), nullable=False),
        # Null when there is a map; otherwise the reason why not.
        pa.field("error", pa.string()),
    ]
)


def work_item(number: int, shard: Any) -> dict[str, Any]:
    """The actor's input row for one shard."""
    return {"shard": number, "work": pickle.dumps(shard)}


class DepthActor:
    """Ray Data actor: takes a batch of one shard, returns the shard's index part (as a TableFile in JSON)."""

    def __init__(self, plan: DepthPlan, output: str, threads: int) -> None:
        self.plan, self.output = plan, output
        # Set even for a single actor: the order of summation depends on the number of threads.
        torch.set_num_threads(threads)
        model = load_model(resolve_model(plan.model_uri))
        if model.content_hash != plan.model_hash:
            raise PredictDepthError(
                f"{plan.model_uri!r} has the hash {model.content_hash} on this node, and {plan.model_hash} where the "
                "job started. Put the model where every node reads the same files: s3:// or models:/."
            )
        device = reserved_device()
        self.predictor = DepthPredictor(model, uri=plan.model_uri, device=device)
        self.rules = plan.rules(model.base.pixels_per_latent)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        (number,), (work,) = (int(value) for value in batch["shard"]), batch["work"]
        samples = pickle.loads(work).read()  # pickled by this job's driver
        rows: list[dict[str, Any]] = []
        while some := list(islice(samples, self.plan.batch_size)):
            rows += self._predict(number, some)
        # Written last: an index part means that all maps of its shard exist.
        part = write_part(self.output, part_name(number), pa.Table.from_pylist(rows, schema=DEPTH_INDEX_SCHEMA))
        failed = sum(row["error"] is not None for row in rows)
        return {"shard": [number], "failed": [failed], "part": [json.dumps(dataclasses.asdict(part))]}

    def _predict(self, shard: int, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """Predict some samples and yield their index rows: per number of steps, in the samples' order."""
        prepared = [_prepare(sample, self.rules) for sample in samples]
        for settings in self.plan.settings:
            made = self._maps(prepared, settings)
            for row, (sample, (name, found)) in enumerate(zip(samples, prepared, strict=True)):
                index = self._row(sample, name, settings)
                if isinstance(found, PreparedImage):
                    one, (height, width) = made[row], found.pixels.shape[:2]
                    index |= {"width": found.width, "height": found.height, "crop": list(found.crop)}
                    index |= {"map_width": width, "map_height": height}
                    index |= {"num_evaluations": one.num_evaluations, "error": one.error}
                    index |= self._write(f"{shard:06d}/{name}-{settings.steps}", found.pixels, one)
                else:
                    index["error"] = found
                yield index

    def _maps(self, prepared: Sequence[Prepared], settings: DepthSettings) -> dict[int, DepthMade]:
        """The maps by row; images of one size share a forward pass."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, (_, found) in enumerate(prepared):
            if isinstance(found, PreparedImage):
                sizes.setdefault(found.pixels.shape, []).append(row)
        made: dict[int, DepthMade] = {}
        for rows in sizes.values():
            pixels = [found.pixels for row in rows if isinstance(found := prepared[row][1], PreparedImage)]
            names = [prepared[row][0] or "" for row in rows]
            made |= zip(rows, self.predictor.predict(np.stack(pixels), names, settings), strict=True)
        return made

    def _row(self, sample: Sample, name: str | None, settings: DepthSettings) -> dict[str, Any]:
        return {
            "sample_id": name,
            "source_uri": sample.source_uri,
            "resolution": self.plan.resolution,
            **dataclasses.asdict(settings),
            "num_evaluations": 0,
            "model_uri": self.plan.model_uri,
            "model_hash": self.plan.model_hash,
        }

    def _write(self, name: str, pixels: np.ndarray, made: DepthMade) -> dict[str, Any]:
        """Write a map's files to its shard's own directory, because two shards may hold the same image."""
        if made.depth is None or made.uncertainty is None:
            return {}
        files = {
            "depth_uri": (f"{name}.npy", data := depth_npy(made.depth)),
            "png_uri": (f"{name}.png", depth_png(made.depth)),
            "uncertainty_uri": (f"{name}-uncertainty.npy", depth_npy(made.uncertainty)),
            "preview_uri": (f"{name}-preview.png", preview_png(pixels, made.depth)),
        }
        uris = {column: join(self.output, f"depth/{file}") for column, (file, _) in files.items()}
        for column, (_, content) in files.items():
            write_bytes(uris[column], content)
        digest = hashlib.sha256(data).hexdigest()
        return {**uris, "depth_sha256": digest, "uncertainty": float(made.uncertainty.mean())}


def _prepare(sample: Sample, rules: ImageRules) -> Prepared:
    if sample.image is None:
        return None, sample.problem or "no_image: none found"
    name = sample_id(sample.image, "")
    try:
        return name, prepare_image(sample.image, rules)
    except BadImageError as error:
        return name, str(error)
