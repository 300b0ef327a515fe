"""The training task on given pairs: a micro-batch of pairs with their match targets -> the loss of each.

The same loss as that of a pair within a micro-batch of images (`task`), whose targets are made there: here they were
made before, once, and the most probable of each token were kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.correspondence import distillation
from d2f_core.correspondence.config import MatcherConfig
from d2f_core.correspondence.matching import similarity
from d2f_core.correspondence.preparation import normalise
from d2f_core.correspondence.student import tokens
from d2f_core.correspondence.targets.spec import PIXELS, WAYS
from d2f_core.correspondence.task import build_student, dropout_key, dropout_of, loss_of, usable_rows
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.plan_reader import EPOCH, ROW
from d2f_core.randomness import sample_keys


def pair_columns(config: MatcherConfig) -> tuple[str, ...]:
    """Columns of a table of pairs that a training reads."""
    parts = ("indices", "probabilities", *(("weights",) if config.distillation.cycle else ()))
    return (*PIXELS, *(f"{way}_{part}" for way in WAYS for part in parts))


class PairTask:
    """The task on one worker's device. The training loop calls its methods."""

    def __init__(
        self,
        config: MatcherConfig,
        *,
        normalisation: str,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Build the student.

        Args:
            normalisation: of the table's pixels, a name in `preparation.NORMALISATIONS`.
            dtype: that the student computes in.
        """
        self.module, self.patch = build_student(config.student, seed)
        self._config, self._seed, self._dtype, self._device = config, seed, dtype, device
        self._normalisation = normalisation

    def to_batch(self, table: pa.Table) -> dict[str, Any]:
        """Rows of a micro-batch -> what the loss needs, on the device; of n pairs the sources come first, n of 2 n."""
        arrays = table_to_arrays(table, [*pair_columns(self._config), EPOCH, ROW])
        pixels = torch.from_numpy(np.concatenate([arrays[name] for name in PIXELS])).permute(0, 3, 1, 2).float()
        return {
            "pixels": normalise(pixels, self._normalisation).to(self._device),
            "usable": usable_rows(table),
            "dropout": dropout_key(self._seed, sample_keys(arrays[EPOCH], arrays[ROW])),
            **{way: self._targets(arrays, way) for way in WAYS},
        }

    def _targets(self, arrays: Mapping[str, np.ndarray], way: str) -> dict[str, Tensor]:
        """Indices and probabilities [pairs, tokens, kept], and where they count the weights [pairs, tokens]."""
        found = {
            "indices": torch.from_numpy(arrays[f"{way}_indices"].astype(np.int64)),
            "probabilities": torch.from_numpy(arrays[f"{way}_probabilities"].astype(np.float32)),
        }
        if self._config.distillation.cycle:
            found["weights"] = torch.tensor(arrays[f"{way}_weights"])
        return {name: values.to(self._device) for name, values in found.items()}

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """The loss of each pair, float32 [micro-batch]; 0 for a row that stands in for one that cannot be used."""
        pixels, config = batch["pixels"].to(self._dtype), self._config.distillation
        with dropout_of(batch["dropout"], pixels.device):
            found, grid = tokens(network, pixels, self.patch)
        source, target = found.chunk(2)
        measure = loss_of(config, grid)
        losses = []
        # Pair by pair, as in `task`: dense targets of all pairs together would be the largest thing here.
        for row, usable in enumerate(batch["usable"].tolist()):
            one = slice(row, row + 1)
            if not usable:
                losses.append(source[one, 0, 0].float() * 0)  # part of the graph: gradients of zero
                continue
            targets = [_dense(batch[way], one, source.shape[1]) for way in WAYS]
            cosines = similarity(source[one], target[one])
            (forward, there), (backward, back) = targets
            losses.append(distillation.weighted_pair_loss(cosines, forward, backward, measure, (there, back)))
        return config.weight * torch.cat(losses)


def _dense(stored: Mapping[str, Tensor], rows: slice, count: int) -> tuple[Tensor, Tensor | None]:
    """The distribution [rows, tokens, tokens] of stored targets, and the weights of its source's tokens."""
    kept = distillation.from_most_probable(stored["indices"][rows], stored["probabilities"][rows], count)
    return kept, stored["weights"][rows] if "weights" in stored else None
