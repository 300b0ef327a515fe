"""Positions are read from features as one would by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence.matching import (
    PUBLISHED,
    Decoding,
    as_map,
    enlarge,
    match_distribution,
    match_points,
    mutual,
    mutual_distance,
    nearest,
    sample,
    similarity,
    to_grid,
    to_pixels,
    unit,
    window_soft_argmax,
)


def wave(grid: tuple[int, int], size: tuple[float, float], shift: float = 0.0) -> torch.Tensor:
    """Features [tokens, 4] that turn with a token's coordinates, so that each place has its own."""
    height, width = grid
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width * size[0] + shift
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height * size[1]
    turns = [(x * 3 / size[0], False), (y * 3 / size[1], True)]
    parts = []
    for angle, rows in turns:
        for part in (angle.cos(), angle.sin()):
            parts.append((part[:, None] if rows else part[None]).expand(height, width))
    return torch.stack(parts, dim=-1).reshape(-1, 4)


def test_similarity_is_the_cosine_whatever_the_length_of_the_features() -> None:
    source, target = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [5.0, 0.0], [-6.0, -8.0]]])
    assert_close(similarity(source, target), torch.tensor([[[0.8, 0.6, -1.0], [0.0, 0.0, 0.0]]]))
    assert unit(source.bfloat16()).dtype == torch.float32
    assert unit(source.double()).dtype == torch.float64


def test_a_match_distribution_sums_to_one_over_the_target() -> None:
    cosines = torch.tensor([[[0.0, math.log(3) * 0.1]], [[0.5, 0.5]]])
    assert_close(match_distribution(cosines, 0.1), torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]))


def test_nearest_and_mutual_neighbours() -> None:
    cosines = torch.tensor([[[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]]])
    assert nearest(cosines).tolist() == [[0, 0]]
    assert mutual(cosines).tolist() == [[True, False]], "the first target token is more like the first source token"


def test_the_distance_of_mutual_neighbours_is_the_mean_of_theirs() -> None:
    """Two pairs are mutual, with cosines 1 and 1/2: distances 0 and 1; the third token's nearest prefers another."""
    cosines = torch.tensor([[[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.9, 0.1, 0.2]]])
    assert mutual(cosines).tolist() == [[True, True, False]]
    assert_close(mutual_distance(cosines), torch.tensor([0.5]))
    source, target = torch.eye(3)[None], torch.eye(3)[None, [2, 0, 1]] * 5
    assert_close(mutual_distance(similarity(source, target)), torch.zeros(1))


def test_the_first_pixel_and_the_first_token_have_their_centres_where_they_should() -> None:
    grid, size = (4, 8), (80.0, 20.0)
    pixels = torch.tensor([[5.0, 2.5], [0.0, 0.0], [80.0, 20.0]], dtype=torch.float64)
    assert_close(to_grid(pixels, grid, size), torch.tensor([[0.0, 0.0], [-0.5, -0.5], [7.5, 3.5]], dtype=torch.float64))
    assert_close(to_pixels(to_grid(pixels, grid, size), grid, size), pixels)


def test_features_between_tokens_are_bilinear_and_those_beyond_the_border_are_the_borders() -> None:
    features = torch.tensor([[[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]]])  # 3 rows of 2
    positions = torch.tensor([[[0.5, 0.5], [0.25, 1.0], [-0.5, -0.5], [3.0, 0.0], [1.0, 2.0]]])
    assert_close(sample(features, (3, 2), positions)[0, :, 0], torch.tensor([5.5, 10.25, 0.0, 1.0, 21.0]))


def test_an_enlarged_grid_covers_the_same_image() -> None:
    features = torch.tensor([[[0.0], [4.0]]])
    assert_close(enlarge(features, (1, 2), (1, 4))[0, :, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]))
    finer = enlarge(torch.rand(1, 6, 5), (2, 3), (4, 6))
    assert finer.shape == (1, 24, 5)


def test_tokens_that_make_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"966 tokens are no grid of 31 x 31.*Drop class and register tokens"):
        as_map(torch.zeros(1, 966, 3), (31, 31))


def test_the_window_is_a_true_mask() -> None:
    """A cell outside it counts nothing, even when all similarities are below zero."""
    cosines = torch.tensor([-0.1, -0.2, -0.9, -0.9, -0.9])
    inside = torch.softmax(cosines[:2] / 0.1, dim=0)
    found = window_soft_argmax(cosines, (1, 5), window=1, temperature=0.1)
    assert_close(found, torch.tensor([inside[1], 0.0]))
    assert window_soft_argmax(cosines, (1, 5), window=0, temperature=0.1).tolist() == [0.0, 0.0]
    far = torch.tensor([-0.1, -0.2, -0.9, -0.9, -0.1001])
    assert_close(window_soft_argmax(far, (1, 5), window=1, temperature=0.1), found)


@pytest.mark.parametrize("grid", [(12, 12), (6, 15)])
def test_a_point_is_found_in_a_moved_image_to_a_fraction_of_a_token(grid: tuple[int, int]) -> None:
    size, moved = (320.0, 240.0), 31.0
    source, target = wave(grid, size), wave(grid, size, shift=moved)
    points = torch.tensor([[120.0, 100.0], [203.0, 61.0], [260.0, 200.0]], dtype=torch.float64)
    wanted = points - torch.tensor([moved, 0.0], dtype=torch.float64)
    errors = {}
    for name, decoding in {"exact": Decoding(), "published": PUBLISHED}.items():
        found, cosine = match_points(source, target, points, grids=(grid, grid), sizes=(size, size), decoding=decoding)
        errors[name] = (found - wanted).norm(dim=-1).max().item()
        assert (cosine > 0.95).all()
    token = max(size[0] / grid[1], size[1] / grid[0])
    assert errors["exact"] < token / 4 < errors["published"]


def test_the_published_way_asks_the_token_that_holds_the_point_and_answers_with_a_tokens_centre() -> None:
    grid, size = (2, 4), (40.0, 20.0)
    features = torch.eye(8, dtype=torch.float64)
    points = torch.tensor([[0.0, 0.0], [19.9, 9.9], [20.0, 10.0], [40.0, 20.0]], dtype=torch.float64)
    found, cosine = match_points(
        features, features, points, grids=(grid, grid), sizes=(size, (80.0, 20.0)), decoding=PUBLISHED
    )
    assert found.tolist() == [[10.0, 5.0], [30.0, 5.0], [50.0, 15.0], [70.0, 15.0]] and (cosine == 1).all()


@pytest.mark.parametrize(
    "fields", [{"query": "round"}, {"enlarged": 0}, {"window": -1}, {"temperature": 0.0}, {"temperature": math.nan}]
)
def test_a_decoding_that_means_nothing_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"Use 'exact' or 'token'|Mend that field"):
        Decoding(**fields)
