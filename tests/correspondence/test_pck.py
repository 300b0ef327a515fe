"""Each protocol scores as its authors' code does, and differs from the others where its rule says so."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence.pck import (
    PROTOCOLS,
    Matches,
    Scoring,
    box_copy,
    errors,
    lengths,
    pck,
    placement,
    random_in_box,
    same_pixel,
    side_confusion,
    to_frame,
    within,
)
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate

ALPHAS = (0.1, 0.05, 0.01, 0.15)
SIZES = ((500, 375), (375, 500), (500, 333), (500, 500), (481, 321), (840, 840))
IMAGE_LENGTH = Scoring(length="image")


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, np.float64))


def matches(predicted, truth, *, pair=None, size=((500, 375),), box=((100, 50, 300, 200),), category=(0,)) -> Matches:
    return Matches(
        predicted=tensor(predicted),
        truth=tensor(truth),
        pair=torch.tensor(np.zeros(len(truth), int) if pair is None else pair),
        size=tensor(size),
        box=tensor(box),
        category=torch.tensor(category),
    )


def made_up(points: int = 1000, pairs: int = 90, categories: int = 4) -> Matches:
    """Integer pixels as annotators give them, errors of every length about the thresholds, and errors exactly on them
    in images that no frame scales."""
    draw = np.random.default_rng(0)
    size = np.array([SIZES[number % len(SIZES)] for number in range(pairs)], np.float64)
    corner = np.floor(size * draw.uniform(0, 0.4, (pairs, 2)))
    box = np.concatenate([corner, np.floor((size - corner) * draw.uniform(0.3, 1, (pairs, 2)))], 1)
    box[5::12, 2:] = (300, 200)  # in 840 x 840: 0.1 of it are the 30 px of a triangle of 18, 24, 30
    pair = np.sort(draw.integers(0, pairs - 1, points))  # the last pair has no point
    truth = np.floor(draw.uniform(0, size[pair])) + 0.5
    length = box[pair, 2:].max(1) * draw.choice([0.5, 1], points) * draw.choice(ALPHAS, points)
    angle = draw.uniform(0, 2 * np.pi, points)
    error = (length * draw.uniform(0.5, 1.5, points))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    on_the_line = (box[pair, 2] == 300) & (box[pair, 3] == 200) & (size[pair, 0] == 840)
    error[on_the_line] = (18, 24)
    assert on_the_line.sum() > 10
    return matches(truth + error, truth, pair=pair, size=size, box=box, category=np.arange(pairs) % categories)


def read_original(p, t, size, box, alpha):
    return np.hypot(*(p - t)) / max(box[2], box[3]) <= alpha


def read_dift(p, t, size, box, alpha):
    (x, y), (kx, ky) = p - 0.5, t - 0.5  # that code counts in pixel indices
    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    threshold = max(y2 - y1, x2 - x1)
    return (((x - kx) ** 2 + (y - ky) ** 2) ** 0.5 / threshold) <= alpha


def read_geoaware_padded(p, t, size, box, alpha):
    width, height = size
    scale = np.float32(840 / max(width, height))
    dx = int((840 - int(np.around(840 * width / height))) / 2) if width < height else 0
    dy = int((840 - int(np.around(840 * height / width))) / 2) if height < width else 0
    p, t = (np.float32(q - 0.5) * scale + np.float32((dx, dy)) for q in (p, t))
    error = np.linalg.norm(p - t)
    return error < np.float32(alpha) * np.float32(max(box[2], box[3]) * scale)


def read_reference_b(p, t, size, box, alpha):
    scale_x, scale_y = 840 / size[0], 840 / size[1]
    p, t = (np.float32((q - 0.5) * (scale_x, scale_y)) for q in (p, t))
    return np.linalg.norm(p - t) < np.float32(alpha) * np.float32(max(box[2], box[3]) * scale_y)


READINGS = {
    "original": read_original,
    "dift": read_dift,
    "geoaware_padded": read_geoaware_padded,
    "reference_b": read_reference_b,
}


def read_averages(correct: np.ndarray, made: Matches) -> tuple[float, float, float]:
    pair, category = made.pair.numpy(), made.category.numpy()
    by_image = [correct[pair == number].mean() for number in np.unique(pair)]
    by_category = [correct[category[pair] == number].mean() for number in np.unique(category)]
    return correct.mean(), float(np.mean(by_image)), float(np.mean(by_category))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_thousand_predictions_score_as_an_independent_reading_of_each_rule_says(name):
    made, scoring = made_up(), PROTOCOLS[name].scoring
    rows = list(zip(made.predicted.numpy(), made.truth.numpy(), made.pair.tolist(), strict=True))
    found, correct = pck(made, scoring, ALPHAS), within(errors(made, scoring), ALPHAS, scoring)
    for number, alpha in enumerate(ALPHAS):
        read = [READINGS[name](p, t, made.size[i].numpy(), made.box[i].numpy(), alpha) for p, t, i in rows]
        assert correct[:, number].tolist() == [bool(one) for one in read]
        averages = [found.average(how)[0, number].item() for how in ("point", "image", "category")]
        np.testing.assert_allclose(averages, read_averages(np.array(read), made), rtol=0, atol=1e-12)
        assert 0.05 < averages[0] < 0.97


def test_the_protocols_do_not_agree():
    scores = {name: pck(made_up(), protocol.scoring).point[0, 0].item() for name, protocol in PROTOCOLS.items()}
    assert scores["original"] == scores["dift"] > scores["geoaware_padded"]  # `<=` and `<` on the line
    assert len(set(scores.values())) == 3


def test_an_error_of_exactly_alpha_is_correct_in_two_protocols_and_wrong_in_two():
    on_the_line = matches([[318, 424]], [[300, 400]], size=[(840, 840)], box=[(0, 0, 200, 300)])
    scores = {name: pck(on_the_line, p.scoring, (0.1,)).point.item() for name, p in PROTOCOLS.items()}
    assert scores == {"original": 1, "dift": 1, "geoaware_padded": 0, "reference_b": 0}


def resized(made: Matches, factor: float) -> Matches:
    names = ("predicted", "truth", "size", "box")
    scaled = {name: getattr(made, name) * factor for name in names}
    return Matches(**scaled, pair=made.pair, category=made.category)


def turned(made: Matches) -> Matches:
    """The same images turned onto their side."""
    swapped = {name: getattr(made, name).flip(1) for name in ("predicted", "truth", "size")}
    return Matches(**swapped, box=made.box[:, [1, 0, 3, 2]], pair=made.pair, category=made.category)


@pytest.mark.parametrize("factor", [2.0, 0.25, 1.7])
def test_pck_does_not_change_when_an_image_is_resized_with_its_shape_kept(factor):
    made, scoring = made_up(), PROTOCOLS["original"].scoring
    assert_close(errors(resized(made, factor), scoring), errors(made, scoring), rtol=1e-12, atol=0)
    if factor != 1.7:  # powers of two are exact, so not even an error on the line may move
        assert pck(resized(made, factor), scoring).point.tolist() == pck(made, scoring).point.tolist()


def test_the_shape_of_an_image_changes_what_reference_b_counts_and_nothing_in_original():
    """A square of 500 x 375 px stretches heights by 2.24 and widths by 1.68: an error of 36 px with a box of 300 px is
    beyond 0.1, and passes along x."""
    along_x, along_y = (matches([place], [[200, 200]]) for place in ([236, 200], [200, 236]))
    original, stretched = (PROTOCOLS[name].scoring for name in ("original", "reference_b"))
    assert_close(errors(along_x, stretched), tensor([36 / 300 * 375 / 500]))
    assert_close(errors(along_y, stretched), tensor([36 / 300]))
    assert [pck(one, stretched, (0.1,)).point.item() for one in (along_x, along_y, turned(along_x))] == [1, 0, 0]
    for one in (along_x, along_y, turned(along_x), turned(along_y)):
        assert_close(errors(one, original), tensor([36 / 300]))
    # Resized to the frame with its shape kept, 840 x 630, the same image scores otherwise than in the frame itself.
    in_the_frame = matches(along_x.predicted * 1.68, along_x.truth * 1.68, size=[(840, 840)], box=along_x.box * 1.68)
    assert_close(errors(in_the_frame, stretched), errors(along_x, original))


@pytest.mark.parametrize(("size", "expected"), [((500, 375), 0.766), ((500, 333), 0.795), ((375, 500), 0.564)])
def test_reference_b_flatters_landscape_images_by_as_much_as_was_measured(size, expected):
    """Errors of 20 px in each coordinate and a box of 300 px: by Rayleigh's law 1 - exp(-30^2 / (2 * 20^2)) = 0.675."""
    count, draw = 40_000, np.random.default_rng(1)
    truth = np.full((count, 2), 150.0)
    made = matches(truth + draw.normal(0, 20, (count, 2)), truth, size=[size])
    assert pck(made, PROTOCOLS["original"].scoring, (0.1,)).point.item() == pytest.approx(
        1 - math.exp(-1.125), abs=0.01
    )
    assert pck(made, PROTOCOLS["reference_b"].scoring, (0.1,)).point.item() == pytest.approx(expected, abs=0.01)


def test_frames_place_an_image_as_resizing_and_pasting_do():
    size = tensor([(500, 375), (333, 500), (64, 64)])
    scale, offset = placement(size, "padded_square", 840)
    assert_close(scale[:, 0], tensor([840 / 500, 840 / 500, 840 / 64]))
    assert offset.tolist() == [[0, 105], [140, 0], [0, 0]]  # 333 becomes 559, and (840 - 559) / 2 = 140.5
    assert_close(to_frame(size, size, "stretched_square", 840), torch.full((3, 2), 840.0, dtype=torch.float64))
    assert to_frame(size, size, "original").tolist() == size.tolist()


def test_alpha_multiplies_the_longer_side_of_box_or_frame():
    size, box = tensor([(500, 375)]), tensor([(0, 0, 120, 200)])
    by_rule = {rule: lengths(size, box, rule).item() for rule in (Scoring(), IMAGE_LENGTH)}
    assert by_rule == {Scoring(): 200, IMAGE_LENGTH: 500}
    padded = Scoring(frame="padded_square", side=840)
    assert lengths(size, box, padded).item() == pytest.approx(200 * 840 / 500)
    for frame in ("padded_square", "stretched_square"):
        assert lengths(size, box, Scoring(frame=frame, side=840, length="image")).item() == 840


def test_averages_weigh_points_images_and_categories():
    """Pair 0 finds 1 of 4, pair 1 of the same category 2 of 2, pair 2 finds 0 of 1, and pair 3 has no point."""
    pair = [0] * 4 + [1] * 2 + [2]
    error = [0, 99, 99, 99, 0, 0, 99]
    made = matches(
        [[100 + e, 100] for e in error],
        [[100, 100]] * 7,
        pair=pair,
        size=[(500, 375)] * 4,
        box=[(0, 0, 100, 100)] * 4,
        category=[0, 0, 2, 1],
    )
    found = pck(made, Scoring(), (0.1, 1.0))
    assert_close(found.point, tensor([[3 / 7, 1]]))
    assert_close(found.image, tensor([[(1 / 4 + 1 + 0) / 3, 1]]))
    assert_close(found.category, tensor([[(3 / 6 + 0) / 2, 1]]))
    assert_close(found.by_category[0, :, 0], tensor([0.5, math.nan, 0]), equal_nan=True)


def test_draws_of_a_bootstrap_score_as_the_pairs_that_they_repeat():
    made, scoring = made_up(300, 40), Scoring()
    counts = bootstrap_counts(40, 30, seed=3)
    found = pck(made, scoring, (0.1, 0.05), draws=torch.from_numpy(counts))
    for number in (0, 29):
        chosen = np.repeat(np.arange(40), counts[number])
        where = [np.flatnonzero(made.pair.numpy() == one) for one in chosen]
        repeated = Matches(
            predicted=made.predicted[np.concatenate(where)],
            truth=made.truth[np.concatenate(where)],
            pair=torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(points) for points in where])),
            size=made.size[chosen],
            box=made.box[chosen],
            category=made.category[chosen],
        )
        alone = pck(repeated, scoring, (0.1, 0.05))
        for how in ("point", "image", "category"):
            assert_close(found.average(how)[number], alone.average(how)[0], rtol=0, atol=1e-12)
    value = pck(made, scoring, (0.1, 0.05)).point[0, 0].item()
    estimate = Estimate.of(value, found.point[:, 0].numpy(), 40)
    assert estimate.low < value < estimate.high < estimate.low + 0.3


def test_left_taken_for_right_is_wrong_nearer_to_the_partner_and_near_enough():
    truth, partner = [[100, 100]] * 5, [[160, 100]] * 4 + [[math.nan] * 2]
    predicted = [[155, 100], [104, 100], [128, 100], [200, 100], [155, 100]]
    made = matches(predicted, truth, box=[(0, 0, 200, 100)])
    assert side_confusion(made, tensor(partner), Scoring()).tolist() == [True, False, False, False, False]
    # A partner nearer than alpha: correct, so not confused.
    close = matches([[112, 100]], [[100, 100]], box=[(0, 0, 200, 100)])
    assert side_confusion(close, tensor([[115, 100]]), Scoring()).tolist() == [False]
    assert side_confusion(close, tensor([[115, 100]]), Scoring(), alpha=0.05).tolist() == [True]


def test_floors_are_places_that_know_nothing_of_the_features():
    points, source_box, target_box = tensor([[30, 40]]), tensor([[10, 20, 40, 80]]), tensor([[100, 50, 200, 20]])
    assert box_copy(points, source_box, target_box).tolist() == [[200, 55]]
    assert same_pixel(points, tensor([[60, 80]]), tensor([[500, 400]])).tolist() == [[250, 200]]
    assert random_in_box(target_box, tensor([[0.25, 0.5]])).tolist() == [[150, 60]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": [[math.nan, 1]]}, "predicted holds a number that is not finite"),
        ({"predicted": [[1, 1], [2, 2]]}, r"predicted has shape \(2, 2\), it should be \(1, 2\)"),
        ({"truth": [[-1, -1]]}, r"A true point lies at \[-1.0, -1.0\], outside its image"),
        ({"truth": [[10, 376]]}, "outside its image"),
        ({"box": [(0, 0, 0, 5)]}, "no width or height"),
        ({"pair": [1]}, "pair goes from 1 to 1, there are 1 pairs"),
        ({"category": [-1]}, "category holds -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        matches(**{"predicted": [[1, 1]], "truth": [[1, 1]]} | change)


def test_rules_that_cannot_be_meant_are_refused():
    one = matches([[1, 1]], [[1, 1]])
    for alphas in ((), (0.0,), (10.0,)):
        with pytest.raises(ValueError, match="must lie above 0"):
            pck(one, Scoring(), alphas)
    for rule in ({"side": 840}, {"frame": "padded_square"}):
        with pytest.raises(ValueError, match="a square has a side"):
            Scoring(**rule)
    with pytest.raises(ValueError, match=r"draws has shape \(1, 3\), there are 1 pairs"):
        pck(one, Scoring(), draws=torch.ones(1, 3))
    with pytest.raises(ValueError, match="no point to score"):
        pck(matches(np.empty((0, 2)), np.empty((0, 2))), Scoring())
