"""Where a point of one image lies in another: the cosine similarity of features, and how a position is read from it.

Features are vectors of an image's tokens, [rows, tokens, channels]; the tokens of a grid (height, width) come row by
row. Positions are (x, y). In an image of width W and height H they run from 0 to W and from 0 to H, so the centre of
the first pixel is (0.5, 0.5); on a grid they are numbers of cells, and the centre of the first cell is (0, 0).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, normalize

Grid = tuple[int, int]
"""Height and width in tokens."""
Size = tuple[float, float]
"""Width and height in pixels of what the grid covers."""


def unit(features: Tensor) -> Tensor:
    """Features [..., channels] divided by their length, in float32 or wider; zero stays zero."""
    wide = features if features.dtype.itemsize >= 4 else features.float()
    return normalize(wide, dim=-1, eps=1e-12)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Cosines [rows, source tokens, target tokens] of features [rows, tokens, channels]."""
    return unit(source) @ unit(target).transpose(-1, -2)


def match_distribution(cosines: Tensor, temperature: float) -> Tensor:
    """For each source token the probability of each target token: softmax(cosines / temperature) over the last axis.

    Source: Fundel et al., 2025, arXiv:2412.03512.
    """
    return torch.softmax(cosines / temperature, dim=-1)


def nearest(cosines: Tensor) -> Tensor:
    """The most similar target token of each source token, [rows, source tokens]; the first of equals."""
    return cosines.argmax(dim=-1)


def mutual(cosines: Tensor) -> Tensor:
    """Which source tokens [rows, source tokens] are themselves the most similar of their most similar target token."""
    back = cosines.argmax(dim=-2).gather(-1, nearest(cosines))
    return back == torch.arange(cosines.shape[-2], device=cosines.device)


def mutual_distance(cosines: Tensor) -> Tensor:
    """Mean distance [rows] of unit features that are each other's most similar ones: `|a - b|^2 = 2 - 2 cos(a, b)`.

    Source: what pose alignment compares, Zhang et al., 2024, arXiv:2311.17034.
    """
    near = mutual(cosines)
    distance = (2 - 2 * cosines.amax(dim=-1)).clamp(min=0).sqrt()
    return (distance * near).sum(dim=-1) / near.sum(dim=-1)


def to_grid(points: Tensor, grid: Grid, size: Size) -> Tensor:
    """Positions in pixels [..., 2] -> positions on the grid: `x / W * width - 1/2`, and the same in y."""
    return points * points.new_tensor([grid[1] / size[0], grid[0] / size[1]]) - 0.5


def to_pixels(positions: Tensor, grid: Grid, size: Size) -> Tensor:
    """The inverse of `to_grid`."""
    return (positions + 0.5) * positions.new_tensor([size[0] / grid[1], size[1] / grid[0]])


def cells(grid: Grid, like: Tensor) -> Tensor:
    """The positions [tokens, 2] of a grid's tokens on the grid, in the dtype and on the device of `like`."""
    rows, columns = (torch.arange(number, dtype=like.dtype, device=like.device) for number in grid)
    return torch.stack([columns.repeat(grid[0]), rows.repeat_interleave(grid[1])], dim=-1)


def as_map(features: Tensor, grid: Grid) -> Tensor:
    """Features [rows, tokens, channels] -> [rows, channels, height, width].

    Raises:
        ValueError: the grid has another number of tokens.
    """
    if features.shape[-2] != math.prod(grid):
        raise ValueError(
            f"{features.shape[-2]} tokens are no grid of {grid[0]} x {grid[1]}. Drop class and register tokens first."
        )
    return features.transpose(-1, -2).unflatten(-1, grid)


def sample(features: Tensor, grid: Grid, positions: Tensor) -> Tensor:
    """Features [rows, points, channels] at positions [rows, points, 2] of the grid, bilinear between token centres.

    Beyond the outermost centres the nearest token on the border is taken.
    """
    height, width = grid
    where = (2 * positions + 1) / positions.new_tensor([width, height]) - 1
    found = grid_sample(
        as_map(features, grid), where[:, None].to(features.dtype), padding_mode="border", align_corners=False
    )
    return found[:, :, 0].transpose(1, 2)


def enlarge(features: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Features [rows, tokens, channels] of a grid -> those of a finer grid over the same image, bilinear."""
    finer = interpolate(as_map(features, grid), size=to, mode="bilinear", align_corners=False)
    return finer.flatten(-2).transpose(-1, -2)


def window_soft_argmax(cosines: Tensor, grid: Grid, *, window: int, temperature: float) -> Tensor:
    """Positions [..., 2] on the grid: the mean of the cells around the best one, weighted by softmax(cosines / T).

    Source: the kernel soft-argmax of Lee et al., 2019, arXiv:1904.01810, with a square window that is a true mask:
    cells outside it have no weight at all.

    Args:
        cosines: [..., tokens].
        window: cells to each side of the best one; 0 gives the best one itself.
        temperature: T.
    """
    places = cells(grid, cosines)
    best = places[cosines.argmax(dim=-1)]
    inside = (places - best[..., None, :]).abs().amax(dim=-1) <= window
    weights = torch.softmax((cosines / temperature).masked_fill(~inside, -math.inf), dim=-1)
    return weights @ places


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a point of the target is read from features."""

    query: str = "exact"
    """`exact`: the source's feature at the point's own coordinate; `token`: that of the token which holds the point."""
    enlarged: int = 2
    """Target features are enlarged so many times in height and width before they are compared."""
    window: int = 5
    """Cells of the enlarged grid to each side of the best one, over which its position is averaged."""
    temperature: float = 0.02

    def __post_init__(self) -> None:
        if self.query not in ("exact", "token"):
            raise ValueError(f"query={self.query!r} is not known. Use 'exact' or 'token'.")
        if self.enlarged < 1 or self.window < 0 or not self.temperature > 0:
            raise ValueError(f"{self} must have enlarged >= 1, window >= 0 and temperature > 0. Mend that field.")


PUBLISHED = Decoding(query="token", enlarged=1, window=0)
"""The query's token and the best token of the target, without anything between tokens."""


def match_points(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    *,
    grids: tuple[Grid, Grid],
    sizes: tuple[Size, Size],
    decoding: Decoding | None = None,
) -> tuple[Tensor, Tensor]:
    """Where points of a source image lie in a target image.

    Args:
        source: features [tokens, channels].
        target: features [tokens, channels].
        points: [points, 2] in pixels of the source.
        grids: of source and target.
        sizes: width and height in pixels of source and target.
        decoding: `Decoding()` by default.

    Returns:
        Positions [points, 2] in pixels of the target, and the cosine [points] of the best cell.
    """
    how = decoding or Decoding()
    where = to_grid(points, grids[0], sizes[0])
    if how.query == "token":
        highest = where.new_tensor([grids[0][1] - 1, grids[0][0] - 1])
        where = (where + 0.5).floor().clamp(torch.zeros_like(highest), highest)
    query = sample(unit(source)[None], grids[0], where[None])
    finer = (grids[1][0] * how.enlarged, grids[1][1] * how.enlarged)
    cosines = similarity(query, enlarge(unit(target)[None], grids[1], finer))[0]
    found = window_soft_argmax(cosines, finer, window=how.window, temperature=how.temperature)
    return to_pixels(found, finer, sizes[1]), cosines.amax(dim=-1)
