"""Losses that make a student's matches equal to its teachers': both are distributions over the tokens of the target.

For a pair of images the student has cosines S [rows, source tokens, target tokens], the teachers a distribution Q of
the same shape, whose rows sum to one over the target's tokens. P = softmax(S / temperature) over the same axis.
A loss is a number per source token, [rows, source tokens]; `mean_over_tokens` makes one number of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from d2f_core.correspondence.matching import Grid, cells, match_distribution, similarity


def teacher_distribution(source: Tensor, target: Tensor, *, grid: Grid, temperature: float, finer: int = 1) -> Tensor:
    """The teachers' Q [rows, source tokens, target tokens] from their features [rows, tokens, channels].

    Args:
        source: on any grid.
        target: on a grid `finer` times as fine as `grid` in height and width. The probabilities of a token's cells are
            summed: between tokens there may lie a better match than on any of them.
        grid: of the target's tokens.
    """
    found = match_distribution(similarity(source, target), temperature)
    return sum_cells(found, grid, finer) if finer > 1 else found


def sum_cells(distribution: Tensor, grid: Grid, finer: int) -> Tensor:
    """A distribution over the cells of a grid `finer` times as fine in height and width -> over `grid`'s tokens."""
    height, width = grid
    fine = distribution.unflatten(-1, (height, finer, width, finer))
    return fine.sum(dim=(-3, -1)).flatten(-2)


def cross_entropy(cosines: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`-sum_j Q_ij log P_ij` for each source token i.

    Source: Hinton et al., 2015, arXiv:1503.02531, on match distributions as in Fundel et al., 2025, arXiv:2412.03512.
    """
    return -(target * torch.log_softmax(cosines / temperature, dim=-1)).sum(dim=-1)


def entropy(distribution: Tensor) -> Tensor:
    """`-sum_j Q_ij log Q_ij`, where 0 log 0 = 0: the least value that `cross_entropy` can have."""
    return torch.special.entr(distribution).sum(dim=-1)


def kl(cosines: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`sum_j Q_ij log(Q_ij / P_ij)`: the cross-entropy above its least value, with the same gradients."""
    return cross_entropy(cosines, target, temperature) - entropy(target)


def soft_argmax(
    cosines: Tensor, target: Tensor, temperature: float, *, grid: Grid, jitter: Tensor | None = None
) -> Tensor:
    """Half the squared distance, in tokens, of the student's mean position from the target's most probable token.

    Source: the published code of arXiv:2412.03512, with temperature 1/1000 and a jitter from N(0, 1).

    Args:
        grid: of the target image.
        jitter: [rows, source tokens, 2] added to the target's position.
    """
    places = cells(grid, cosines)
    wanted = places[target.argmax(dim=-1)]
    if jitter is not None:
        wanted = wanted + jitter
    return (match_distribution(cosines, temperature) @ places - wanted).square().mean(dim=-1)


def blurred(target: Tensor, *, grid: Grid, reach: int = 3, sigma: float = 1.4) -> Tensor:
    """A distribution [..., tokens] whose probability is spread over the neighbours of each token by a Gaussian.

    A token at the border spreads its own over the neighbours that there are, so all rows still sum to one.

    Args:
        reach: how far it spreads, in tokens, in height and in width.
        sigma: the Gaussian's standard deviation in tokens.
    """
    height, width = (_spread(number, target, reach, sigma) for number in grid)
    return (height.T @ target.unflatten(-1, grid) @ width).flatten(-2)


def _spread(tokens: int, like: Tensor, reach: int, sigma: float) -> Tensor:
    """[from, to]: the shares of each of a line's tokens that come to others."""
    places = torch.arange(tokens, dtype=like.dtype, device=like.device)
    distance = (places[:, None] - places).abs()
    share = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= reach)
    return share / share.sum(dim=1, keepdim=True)


def gaussian_cross_entropy(cosines: Tensor, target: Tensor, temperature: float, *, grid: Grid) -> Tensor:
    """`cross_entropy` against the target's most probable token, spread by a Gaussian: neighbours are half right.

    Source: the published code of arXiv:2412.03512, whose kernel has 7 x 7 tokens and a standard deviation of 1.4.
    """
    best = torch.zeros_like(target).scatter_(-1, target.argmax(dim=-1, keepdim=True), 1.0)
    return cross_entropy(cosines, blurred(best, grid=grid), temperature)


def reference_double_softmax(cosines: Tensor, target: Tensor, temperature: float) -> Tensor:
    """What the published code of arXiv:2412.03512 computes in place of `cross_entropy`; for comparison only.

    It hands the probabilities P [rows, source tokens, target tokens] to torch's cross-entropy, which takes the source
    tokens for classes and applies another softmax over them. So the number is one per target token here, near
    log(source tokens) for a bad student and not far below it for a perfect one.
    """
    again = torch.log_softmax(match_distribution(cosines, temperature), dim=-2)
    return -(target * again).sum(dim=-2)


def cycle_probability(forward: Tensor, backward: Tensor) -> Tensor:
    """The probability [rows, source tokens] that a token is found again on the way back.

    `sum_j Q_ij Q'_ji` of the distributions from source to target and from target to source. It is high on the things
    that both images show and low on what has no partner, so it serves as a token's weight.
    """
    return (forward * backward.transpose(-1, -2)).sum(dim=-1)


def mean_over_tokens(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean [rows] of losses [rows, tokens], each token counted by its weight.

    A row whose weights are all zero has the loss zero.
    """
    if weights is None:
        return losses.mean(dim=-1)
    total = weights.sum(dim=-1)
    return (weights * losses).sum(dim=-1) / torch.where(total > 0, total, 1)


def most_probable(distribution: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` most probable target tokens of each source token, for storing a distribution.

    Returns:
        Their indices and probabilities, both [..., count] and the most probable first, and the probability [...] of all
        others, which is dropped.
    """
    probabilities, indices = distribution.topk(count, dim=-1)
    return indices, probabilities, (1 - probabilities.sum(dim=-1)).clamp(min=0)


def from_most_probable(indices: Tensor, probabilities: Tensor, tokens: int) -> Tensor:
    """A distribution [..., tokens] of stored indices and probabilities; what was dropped goes to them in proportion."""
    kept = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return kept.new_zeros(*kept.shape[:-1], tokens).scatter_add_(-1, indices, kept)


def pair_loss(
    cosines: Tensor, forward: Tensor, backward: Tensor, loss: Callable[[Tensor, Tensor], Tensor], *, cycle: bool = True
) -> Tensor:
    """The loss [rows] of pairs, the mean of both directions.

    Args:
        cosines: the student's, [rows, source tokens, target tokens]; transposed they are those of the way back.
        forward: the teachers' distribution from source to target.
        backward: the one from target to source, [rows, target tokens, source tokens].
        loss: of (cosines, distribution), a number per token.
        cycle: whether a token counts by its `cycle_probability`, or all alike.
    """
    weights = cycle_weights(forward, backward) if cycle else (None, None)
    return weighted_pair_loss(cosines, forward, backward, loss, weights)


def cycle_weights(forward: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """The `cycle_probability` of the source's tokens, and that of the target's."""
    return cycle_probability(forward, backward), cycle_probability(backward, forward)


def weighted_pair_loss(
    cosines: Tensor,
    forward: Tensor,
    backward: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    weights: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """`pair_loss` with given weights of the source's and of the target's tokens; None: all alike."""
    there = mean_over_tokens(loss(cosines, forward), weights[0])
    back = mean_over_tokens(loss(cosines.transpose(-1, -2), backward), weights[1])
    return (there + back) / 2


def all_pairs(images: int) -> tuple[Tensor, Tensor]:
    """First and second image of each unordered pair of a batch: (0, 1), (0, 2), ... n (n - 1) / 2 of them."""
    first, second = torch.triu_indices(images, images, offset=1)
    return first, second
