"""The actor of a job of pairs: reads features, and makes match targets of them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.batch.chunks import TableActor
from d2f_core.correspondence import distillation
from d2f_core.correspondence.config import TargetConfig
from d2f_core.correspondence.matching import Grid
from d2f_core.correspondence.targets.images import FeatureReader, Image
from d2f_core.correspondence.targets.index import planned_features
from d2f_core.correspondence.targets.spec import PIXELS, SIDES, WAYS, PairsSpec
from d2f_core.correspondence.task import PIXELS as IMAGE
from d2f_core.correspondence.task import TeacherColumn, fused, shares_of
from d2f_core.correspondence.teacher_columns import teachers_of
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.device import reserved_device

Fused = tuple[Tensor, Tensor]
"""Features of an image [1, tokens, channels] on the student's grid, and on the finer one."""


class PairEmbedder(TableActor):
    """Ray Data actor: a chunk's pairs -> their images and match targets."""

    def __init__(self, spec: PairsSpec) -> None:
        torch.set_num_threads(spec.config.cpus_per_actor)
        self._spec, self._device = spec, reserved_device()
        manifest = planned_features(spec.config.features, spec.inputs["features_digest"])
        self._teachers = teachers_of(manifest)
        columns = (IMAGE, *(teacher.column for teacher in self._teachers))
        self._reader = FeatureReader(spec.config.features, manifest, columns, spec.config.cache_gb * 1e9)
        self._ahead = ThreadPoolExecutor(1)

    def make(self, prepared: pa.Table) -> pa.Table:
        columns: dict[str, Any] = table_to_arrays(prepared)
        pairs = np.stack([columns.pop(f"{side}_row") for side in SIDES], axis=1)
        schema = self._spec.schema()
        made = [row for rows, images in self._batches(pairs) for row in self._rows(rows, images)]
        columns |= {name: np.stack([row[name] for row in made]) for name in made[0]} if made else _none(schema)
        return arrays_to_table(columns, schema)

    def _batches(self, pairs: np.ndarray) -> Iterator[tuple[np.ndarray, dict[int, Image]]]:
        """Pairs [batch, 2], and the images in them by row; the next batch is read while one is worked on."""
        size = self._spec.config.batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        reads = (self._ahead.submit(self._reader.read, np.unique(batch)) for batch in batches)
        ahead = next(reads, None)
        for batch in batches:
            assert ahead is not None
            found, ahead = ahead.result(), next(reads, None)
            yield batch, found

    @torch.inference_mode()
    def _rows(self, pairs: np.ndarray, images: dict[int, Image]) -> Iterator[dict[str, np.ndarray]]:
        of, grid = self._spec.config.targets, self._spec.grid
        known = {row: fused_of(image, self._teachers, grid, of, self._device) for row, image in images.items()}
        for source, target in pairs.tolist():
            pixels = dict(zip(PIXELS, (images[source][IMAGE], images[target][IMAGE]), strict=True))
            yield pixels | match_targets(known[source], known[target], grid, of)


def _none(schema: pa.Schema) -> dict[str, np.ndarray]:
    return {name: values for name, values in table_to_arrays(schema.empty_table()).items() if values.ndim > 1}


def fused_of(image: Image, teachers: Sequence[TeacherColumn], grid: Grid, config: TargetConfig, device: Any) -> Fused:
    """One image's features, as a training that makes targets itself fuses them."""
    each = [(torch.tensor(image[one.column])[None].to(device), one.grid) for one in teachers]
    return fused(each, grid, shares_of(teachers, config), config)


def match_targets(source: Fused, target: Fused, grid: Grid, config: TargetConfig) -> dict[str, np.ndarray]:
    """The columns of one pair's targets."""
    forward, backward = (
        distillation.teacher_distribution(
            one[0], other[1], grid=grid, temperature=config.teacher_temperature, finer=config.finer
        )
        for one, other in ((source, target), (target, source))
    )
    found: dict[str, np.ndarray] = {}
    weights = distillation.cycle_weights(forward, backward)
    for way, distribution, weight in zip(WAYS, (forward, backward), weights, strict=True):
        indices, probabilities, dropped = distillation.most_probable(distribution[0], config.kept)
        found[f"{way}_indices"] = indices.cpu().numpy().astype(np.uint16)
        found[f"{way}_probabilities"] = probabilities.cpu().numpy().astype(config.probabilities)
        found[f"{way}_dropped"] = dropped.cpu().numpy()
        if config.cycle:
            found[f"{way}_weights"] = weight[0].cpu().numpy()
    return found
