"""Losses against sums written out by hand, and against what the published code calls."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from d2f_core.correspondence import distillation as d
from d2f_core.correspondence.matching import enlarge, match_distribution, similarity

TEMPERATURE = 0.05


def made(*, pairs: int = 2, source: int = 6, target: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and a distribution [pairs, source, target] in float64."""
    draw = torch.Generator().manual_seed(seed)
    cosines = torch.rand(pairs, source, target, dtype=torch.float64, generator=draw) * 2 - 1
    logits = torch.randn(pairs, source, target, dtype=torch.float64, generator=draw)
    return cosines, torch.softmax(3 * logits, dim=-1)


def test_cross_entropy_and_kl_are_the_sums_they_say() -> None:
    cosines, target = made()
    for pair in range(2):
        for token in range(6):
            weights = [math.exp(value / TEMPERATURE) for value in cosines[pair, token].tolist()]
            p = [weight / sum(weights) for weight in weights]
            q = target[pair, token].tolist()
            wanted = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
            above = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            assert d.cross_entropy(cosines, target, TEMPERATURE)[pair, token].item() == pytest.approx(wanted, rel=1e-9)
            assert d.kl(cosines, target, TEMPERATURE)[pair, token].item() == pytest.approx(above, rel=1e-9)


def test_a_student_that_matches_like_its_teachers_has_no_kl_and_no_gradient() -> None:
    cosines, _ = made()
    cosines.requires_grad_()
    target = match_distribution(cosines.detach(), TEMPERATURE)
    losses = d.kl(cosines, target, TEMPERATURE)
    assert losses.abs().max() < 1e-9
    losses.sum().backward()
    assert cosines.grad is not None and cosines.grad.abs().max() < 1e-9


def test_entropy_counts_a_certain_match_as_zero() -> None:
    assert d.entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([0.0, math.log(2)])


def test_the_published_loss_is_torchs_cross_entropy_on_probabilities() -> None:
    cosines, target = made()
    published = nn.CrossEntropyLoss()(match_distribution(cosines, TEMPERATURE), target)
    assert_close(d.reference_double_softmax(cosines, target, TEMPERATURE).mean(), published, rtol=0, atol=1e-12)


def test_the_published_loss_hardly_falls_for_a_perfect_student() -> None:
    """For a bijection of n tokens its floor is log(n - 1 + e) - 1, where cross-entropy has 0."""
    tokens = 961
    target = torch.eye(tokens)[None]
    cosines = target * 2 - 1
    assert d.cross_entropy(cosines, target, 0.01).max() < 1e-6
    floor = math.log(tokens - 1 + math.e) - 1
    assert d.reference_double_softmax(cosines, target, 0.01).mean().item() == pytest.approx(floor, abs=1e-5)
    bad = torch.zeros_like(cosines)
    assert d.reference_double_softmax(bad, target, 0.01).mean().item() == pytest.approx(math.log(tokens), abs=1e-5)


def test_soft_argmax_is_half_the_squared_distance_from_the_best_token() -> None:
    grid = (2, 3)
    target = torch.zeros(1, 1, 6)
    target[0, 0, 5] = 1.0  # column 2, row 1
    cosines = torch.zeros(1, 1, 6)
    cosines[0, 0, 0], cosines[0, 0, 4] = 1.0, 1.0  # half at (0, 0), half at (1, 1)
    loss = d.soft_argmax(cosines, target, 1 / 1000, grid=grid)
    assert loss.item() == pytest.approx(((2 - 0.5) ** 2 + (1 - 0.5) ** 2) / 2)
    moved = d.soft_argmax(cosines, target, 1 / 1000, grid=grid, jitter=torch.tensor([[[-1.5, -0.5]]]))
    assert moved.item() == pytest.approx(0.0, abs=1e-9)


def test_a_blurred_match_is_a_gaussian_within_the_grid() -> None:
    grid = (9, 11)
    target = torch.zeros(2, 99, dtype=torch.float64)
    target[0, 4 * 11 + 5] = target[1, 0] = 1.0
    found = d.blurred(target, grid=grid)
    assert_close(found.sum(dim=-1), torch.ones(2, dtype=torch.float64))
    line = [math.exp(-0.5 * (step / 1.4) ** 2) for step in range(-3, 4)]
    wanted = torch.tensor(line, dtype=torch.float64) / sum(line)
    assert_close(found[0].reshape(grid)[1:8, 2:9], torch.outer(wanted, wanted))
    assert found[0].reshape(grid)[0].sum() == 0
    corner = torch.tensor(line[3:], dtype=torch.float64) / sum(line[3:])
    assert_close(found[1].reshape(grid)[:4, :4], torch.outer(corner, corner))
    cosines = torch.zeros(2, 99, dtype=torch.float64)
    assert_close(
        d.gaussian_cross_entropy(cosines, target, 0.01, grid=grid), torch.full((2,), math.log(99), dtype=torch.float64)
    )


def test_the_probability_of_a_token_is_that_of_its_cells() -> None:
    fine = torch.arange(16.0)[None, None] / 120
    assert_close(d.sum_cells(fine, (2, 2), 2)[0, 0], torch.tensor([0 + 1 + 4 + 5, 2 + 3 + 6 + 7, 42, 50]) / 120)


@pytest.mark.parametrize("finer", [1, 2, 3])
def test_a_teachers_distribution_sums_to_one(finer: int) -> None:
    features = torch.randn(2, 2, 12, 5, generator=torch.Generator().manual_seed(0))
    fine = enlarge(features[1], (3, 4), (3 * finer, 4 * finer))
    found = d.teacher_distribution(features[0], fine, grid=(3, 4), temperature=0.1, finer=finer)
    assert found.shape == (2, 12, 12)
    assert_close(found.sum(dim=-1), torch.ones(2, 12))
    if finer == 1:
        assert_close(found, match_distribution(similarity(*features), 0.1))


def test_a_match_between_tokens_is_seen_on_the_finer_grid_only() -> None:
    """A mean of two neighbours, so their common edge, is like neither of them."""
    target = torch.eye(4)[None]
    source = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    coarse, fine = (
        d.teacher_distribution(
            source, enlarge(target, (1, 4), (finer, 4 * finer)), grid=(1, 4), temperature=0.1, finer=finer
        )[0, 0]
        for finer in (1, 2)
    )
    assert_close(coarse[0], coarse[1])
    best = [(torch.tensor([0.75, 0.25]) / torch.tensor([0.75, 0.25]).norm()).sum().item() / math.sqrt(2)]
    assert best[0] > math.sqrt(0.5), "the finer cell is more alike than the token"
    assert fine[:2].sum() > coarse[:2].sum()


def test_a_token_counts_by_the_probability_of_its_way_there_and_back() -> None:
    forward = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    backward = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]])
    assert_close(d.cycle_probability(forward, backward), torch.tensor([[0.5 * 0.2 + 0.5 * 0.6, 0.8]]))
    losses = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert d.mean_over_tokens(losses).tolist() == [2.0, 6.0]
    assert d.mean_over_tokens(losses, torch.tensor([[3.0, 1.0], [0.0, 0.0]])).tolist() == [1.5, 0.0]


@pytest.mark.parametrize("cycle", [True, False])
def test_a_pair_has_the_same_loss_in_either_order(cycle: bool) -> None:
    cosines, forward = made()
    backward = made(source=8, target=6, seed=1)[1]
    loss = partial(d.cross_entropy, temperature=TEMPERATURE)
    there = d.pair_loss(cosines, forward, backward, loss, cycle=cycle)
    back = d.pair_loss(cosines.transpose(1, 2), backward, forward, loss, cycle=cycle)
    assert there.shape == (2,)
    assert_close(there, back)
    if not cycle:
        both = loss(cosines, forward).mean(dim=1) + loss(cosines.transpose(1, 2), backward).mean(dim=1)
        assert_close(there, both / 2)


def test_eight_images_make_28_pairs() -> None:
    first, second = d.all_pairs(8)
    assert len(first) == 28 and (first < second).all()
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 28


def test_a_stored_distribution_comes_back_but_for_what_was_dropped() -> None:
    _, target = made()
    indices, probabilities, dropped = d.most_probable(target, 3)
    assert_close(probabilities.sum(dim=-1) + dropped, torch.ones(2, 6, dtype=torch.float64))
    found = d.from_most_probable(indices, probabilities, 8)
    assert_close(found.sum(dim=-1), torch.ones(2, 6, dtype=torch.float64))
    kept = found > 0
    assert (kept.sum(dim=-1) == 3).all()
    assert_close(found * (1 - dropped)[..., None], torch.where(kept, target, 0.0))
    whole = d.from_most_probable(*d.most_probable(target, 8)[:2], 8)
    assert_close(whole, target)


def test_gradients_reach_the_features_through_every_loss() -> None:
    features = torch.randn(2, 1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, target = made(pairs=1, target=6)
    for loss in (
        partial(d.cross_entropy, temperature=TEMPERATURE),
        partial(d.kl, temperature=TEMPERATURE),
        partial(d.soft_argmax, temperature=TEMPERATURE, grid=(2, 3)),
        partial(d.gaussian_cross_entropy, temperature=TEMPERATURE, grid=(2, 3)),
        partial(d.reference_double_softmax, temperature=TEMPERATURE),
    ):
        source = features[0].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda value, loss=loss: loss(similarity(value, features[1]), target), source)
