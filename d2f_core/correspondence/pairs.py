"""Retrieval pairs: for each image those whose embeddings point most nearly the same way, found block by block.

A training without labels needs pairs of images that show things of one kind; images with similar embeddings often do
(Fundel et al., 2025, arXiv:2412.03512). The cosines of a block of images with all others come from one product in
float32, and only those that may be among the best are computed again in float64, each from its two embeddings alone. So
neither the size of the blocks nor the processor's way of multiplying changes a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

CHUNK = 64
"""Columns of which a first look takes only the largest."""
SPARE = 6
"""Candidates beside those wanted: enough for nearly every row, and the others are looked through in full."""
SCORE_BYTES = 128 * 2**20
"""Most bytes of the cosines that are in memory together."""
RESCORED = 256
"""Embeddings that are in memory together in float64."""
NOBODY = -1

RETRIEVAL_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("source_image_id", pa.string(), nullable=False),
        pa.field("target_image_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("cosine", pa.float64(), nullable=False),
    ]
)
"""One row per pair; `rank` counts a source's partners from 0, the most similar."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Partners:
    """The partners of each source, the most similar first, of equals the one with the smaller id."""

    rows: np.ndarray
    """int64 [sources, partners]: their rows; -1 when an image has fewer."""
    cosines: np.ndarray
    """float64 [sources, partners]; NaN there."""
    first: int = 0
    """Row of the first source; the others follow it."""


class _Labels:
    """Images that carry one label, such as an id that occurs twice."""

    def __init__(self, labels: np.ndarray) -> None:
        self.label = np.unique(labels, return_inverse=True)[1]
        self.members = np.argsort(self.label, kind="stable")
        self.starts = np.searchsorted(self.label[self.members], np.arange(self.label.max() + 2))

    def places(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(row of the block, image) for every image with the label of a row of the block."""
        labels = self.label[rows]
        sizes = self.starts[labels + 1] - self.starts[labels]
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        images = self.members[np.repeat(self.starts[labels], sizes) + within]
        return torch.from_numpy(np.repeat(np.arange(len(labels)), sizes)), torch.from_numpy(images)


class _Embeddings:
    """What all blocks share.

    Memory: the embeddings once more in float32, beside those given.
    """

    def __init__(self, given: Tensor, ids: np.ndarray, groups: np.ndarray | None) -> None:
        self.given, self.images = given, len(given)
        self.norms = torch.cat([part.double().norm(dim=1) for part in given.split(RESCORED)])
        wrong = ~(torch.isfinite(self.norms) & (self.norms > 0))
        if bool(wrong.any()):
            name = ids[int(wrong.int().argmax())]
            raise ValueError(f"The embedding of {str(name)!r} is zero or not finite. Leave that image out.")
        # Padded by rows of zeros to whole chunks.
        self.unit = torch.zeros(-(-self.images // CHUNK) * CHUNK, given.shape[1])
        for start in range(0, self.images, RESCORED):
            rows = slice(start, min(start + RESCORED, self.images))
            self.unit[rows] = (given[rows].double() / self.norms[rows, None]).float()
        self.never = [_Labels(labels) for labels in (ids, groups) if labels is not None]
        self.place_of_id = np.pad(self.never[0].label, (0, len(self.unit) - self.images))
        # Rounding of a float32 product of unit vectors, in whatever order it is summed, and of the vectors themselves:
        # Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1.
        self.error = (given.shape[1] + 8) * 2.0**-24

    def scores(self, rows: slice, out: Tensor) -> Tensor:
        """Cosines in float32 of a block with all images, [block, padded images]; -inf where no pair may be."""
        block = self.unit[rows]
        found = torch.mm(block, self.unit.T, out=out[: len(block)])
        found[:, self.images :] = -torch.inf
        for labels in self.never:
            found[labels.places(rows)] = -torch.inf
        return found

    def cosines(self, rows: Tensor, columns: Tensor, block: slice) -> Tensor:
        """Cosines in float64 of images [pairs], rows of a block, with images [pairs], each by a sum of its own.

        In numpy and in pieces that stay in the processor's cache: torch's threads would meet several times in each.
        """
        given, sources = self.given.numpy(), self.given[block].double().numpy()
        sums = np.empty(len(rows))
        for start in range(0, len(rows), RESCORED):
            piece = slice(start, start + RESCORED)
            products = given[columns[piece].numpy()].astype(np.float64)
            products *= sources[rows[piece].numpy()]
            sums[piece] = products.sum(1)
        return torch.from_numpy(sums) / (self.norms[block][rows] * self.norms[columns])


def nearest_partners(
    embeddings: np.ndarray | Tensor,
    ids: Sequence[str] | np.ndarray,
    *,
    partners: int = 10,
    groups: Sequence[object] | np.ndarray | None = None,
    block_rows: int | None = None,
    sources: range | None = None,
) -> Partners:
    """The images whose embeddings have the largest cosines with each image's own.

    Memory beside the embeddings: as much as they take in float32, and `SCORE_BYTES`.

    Args:
        embeddings: [images, width], floats of any size.
        ids: [images] text or numbers. An image under the id of another is the same, and never its partner.
        partners: most of each image.
        groups: [images], what near-duplicates share, such as the id of the video that they are frames of: of its own
            group an image gets no partner. None: only equal ids are left out.
        block_rows: images of a block. None: as many as `SCORE_BYTES` hold. It changes nothing in the result.
        sources: consecutive rows of the images whose partners are looked for, among all. None: all rows.

    Raises:
        ValueError: shapes that do not fit, an embedding that is zero or not finite, less than one partner.
    """
    given, names = torch.as_tensor(embeddings), np.asarray(ids)
    given = (given.float() if given.dtype == torch.bfloat16 else given).detach().cpu()  # as numpy takes it
    own = None if groups is None else np.asarray(groups)
    if given.ndim != 2 or not given.is_floating_point() or not 0 < len(given) == len(names):
        shapes = f"embeddings are {given.dtype} {tuple(given.shape)}, for {len(names)} ids"
        raise ValueError(f"{shapes}. Give floats [images, width] of at least one image, and an id for each.")
    if own is not None and own.shape != names.shape:
        raise ValueError(f"There are {len(own)} groups for {len(names)} images. Give one for each.")
    if partners < 1 or (block_rows is not None and block_rows < 1):
        raise ValueError(f"partners={partners}, block_rows={block_rows}: both must be at least 1.")
    every = _Embeddings(given, names, own)
    own_rows = sources or range(len(given))
    height = min(block_rows or max(1, SCORE_BYTES // (4 * len(every.unit))), len(own_rows))
    buffer = torch.empty(height, len(every.unit))
    rows, cosines = np.full((len(own_rows), partners), NOBODY), np.full((len(own_rows), partners), np.nan)
    for start in range(own_rows.start, own_rows.stop, height):
        block = slice(start, min(start + height, own_rows.stop))
        for where, found, values in _best(every, every.scores(block, buffer), block, partners):
            place = where - own_rows.start
            rows[place, : found.shape[1]], cosines[place, : found.shape[1]] = found, values
    return Partners(rows=rows, cosines=cosines, first=own_rows.start)


Best = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows [some], their partners [some, partners or fewer], cosines alike."""


def _best(of: _Embeddings, scores: Tensor, block: slice, partners: int) -> Iterator[Best]:
    """The partners of a block's rows."""
    columns, near, certain = _candidates(scores, partners, 2 * of.error)
    rows = torch.arange(len(scores))
    if certain.any():
        own, columns, near = rows[certain], columns[certain], near[certain]
        cosines = torch.full(columns.shape, -torch.inf, dtype=torch.float64)
        cosines[near] = of.cosines(own[:, None].expand_as(columns)[near], columns[near], block)
        yield block.start + own.numpy(), *_ranked(of, columns.numpy(), cosines.numpy(), partners)
    for number in (~certain).nonzero().flatten().tolist():
        columns = _all_near(scores[number], partners, 2 * of.error)
        if len(columns):
            cosines = of.cosines(rows[number].expand(len(columns)), columns, block)
            where = np.array([block.start + number])
            yield where, *_ranked(of, columns[None].numpy(), cosines[None].numpy(), partners)


def _candidates(scores: Tensor, partners: int, doubt: float) -> tuple[Tensor, Tensor, Tensor]:
    """Columns int64 [rows, candidates] with the largest scores, which of them may be partners, and the rows [rows] of
    which no other column may be one.

    A score more than `doubt` below that of the last partner is none. First only the largest score of each chunk is
    compared: the best columns are in the chunks whose largest is among the largest.
    """
    chunks = scores.view(len(scores), -1, CHUNK)
    where = chunks.amax(2).topk(min(partners + SPARE, chunks.shape[1]), dim=1).indices
    looked_at = chunks.gather(1, where[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
    values, places = looked_at.topk(min(partners + SPARE, looked_at.shape[1]), dim=1)
    columns = where.gather(1, places // CHUNK) * CHUNK + places % CHUNK
    least = values[:, min(partners, values.shape[1]) - 1] - doubt
    # Each chunk looked at has a value of its own, so that those left out are no larger than the last value. Of fewer
    # allowed columns than partners the least is -inf, and nothing is below it.
    return columns, values >= least[:, None], values[:, -1] < least


def _all_near(scores: Tensor, partners: int, doubt: float) -> Tensor:
    """All columns of one row that may be partners."""
    least = scores.topk(min(partners, len(scores))).values[-1] - doubt
    return (torch.isfinite(scores) & (scores >= least)).nonzero().flatten()


def _ranked(of: _Embeddings, columns: np.ndarray, cosines: np.ndarray, partners: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((of.place_of_id[columns], -cosines), axis=-1)[:, :partners]
    return np.take_along_axis(columns, order, 1), np.take_along_axis(cosines, order, 1)


def retrieval_table(ids: Sequence[str] | np.ndarray, found: Partners) -> pa.Table:
    """The pairs as rows of `RETRIEVAL_SCHEMA`, by source in the order of `ids`, then by rank."""
    sources, ranks = (found.rows != NOBODY).nonzero()
    names = np.asarray([str(name) for name in ids], object)
    first, second = names[found.first + sources], names[found.rows[sources, ranks]]
    columns = (first + ":" + second, first, second, ranks.astype(np.int32), found.cosines[sources, ranks])
    return pa.table(list(columns), schema=RETRIEVAL_SCHEMA)
