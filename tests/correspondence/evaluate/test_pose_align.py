"""A mirrored source is asked for each keypoint at its flip partner's place, where that brings the images nearer."""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from d2f_core.correspondence.evaluate import chunks as c
from d2f_core.correspondence.evaluate import measure as m
from d2f_core.correspondence.evaluate import pose_align as p
from d2f_core.correspondence.evaluate.actor import AskedMatcher
from d2f_core.correspondence.evaluate.answers import ALIGNED, AS_PUBLISHED, EXACT
from d2f_core.correspondence.evaluate.measure import both
from d2f_core.correspondence.matcher import Matcher
from d2f_core.data.sources.pair_sample import PairImage, PairSample
from tests.correspondence.evaluate.test_measure import FIRST, GRID, PAIR, matcher

FLIP = [1, 0, -1, -1]


def seen_from_the_other_side(image: PairImage) -> PairImage:
    """What was the right eye's place is, mirrored, the left eye's."""
    pixels = Image.open(io.BytesIO(image.data or b"")).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sink = io.BytesIO()
    pixels.save(sink, "PNG")
    partner = [own if other < 0 else other for own, other in enumerate(FLIP)]
    points = image.keypoints[partner] * (-1, 1) + (image.size[0], 0)
    x, y, width, height = image.box
    box = (image.size[0] - x - width, y, width, height)
    return replace(image, image_id="other", data=sink.getvalue(), box=box, keypoints=points.astype(np.float32))


TURNED = replace(PAIR, target=seen_from_the_other_side(FIRST))


def handed() -> Matcher:
    """Its features tell a picture from its mirror image: the colours of a token, and of the third one to its right."""
    plain = matcher()

    def features(images: Sequence[np.ndarray]) -> torch.Tensor:
        found = plain.features(images).unflatten(1, GRID)
        return torch.cat([found, found.roll(-3, 2)], dim=-1).flatten(1, 2)

    return replace(plain, features=features)


def answers(pair: PairSample) -> dict:
    (chunk,) = c.cut([pair], chunk_size=1, batch_size=1)
    return {answer.decoding: answer for answer in AskedMatcher(handed(), pose_align=True).answers(pair, chunk)}


def error(pair: PairSample, positions: torch.Tensor) -> list[float]:
    assert pair.target is not None
    truth = torch.from_numpy(pair.target.keypoints[pair.visible])
    return (positions - truth).norm(dim=1).tolist()


def test_as_many_images_as_are_kept_are_embedded_once_as_they_are_and_once_mirrored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An eighth of the images and pairs of a category of which 128 are kept."""
    monkeypatch.setattr(m, "KEPT_IMAGES", 16)
    monkeypatch.setattr(c, "TILE", c.TILE // 8)
    draw, asked = np.random.default_rng(0), []
    monkeypatch.setattr(m, "read_image", lambda image: np.zeros((2, 2, 3), np.uint8))
    counted = replace(handed(), features=lambda images: asked.extend(images) or torch.ones(len(images), 576, 4))
    names = [draw.choice(16, 2, replace=False) for _ in range(320)]
    pairs = [
        replace(PAIR, pair_id=str(number), source=replace(FIRST, uri=f"/{a}"), target=replace(FIRST, uri=f"/{b}"))
        for number, (a, b) in enumerate(names)
    ]
    asker = AskedMatcher(counted, pose_align=True)
    for chunk in c.cut(pairs, chunk_size=32, batch_size=1):
        for pair in chunk.pairs:
            source, target = both(pair)
            for image, flipped in ((source, False), (target, False), (source, True)):
                asker._images.get(image, chunk.batches[image.key], flipped=flipped)
    assert len(asked) == 16 * 2


def test_a_target_seen_from_the_other_side_is_matched_from_the_mirrored_source() -> None:
    found = answers(TURNED)
    assert list(found) == [EXACT, AS_PUBLISHED, ALIGNED] and found[ALIGNED].flipped
    assert min(error(TURNED, found[EXACT].positions)[:2]) > 10, "left is taken for right"
    assert max(error(TURNED, found[ALIGNED].positions)) < 3


def test_a_target_seen_from_the_same_side_is_matched_from_the_source_as_it_is() -> None:
    found = answers(PAIR)
    assert not found[ALIGNED].flipped
    assert torch.equal(found[ALIGNED].positions, found[EXACT].positions)
    assert torch.equal(found[ALIGNED].confidence, found[EXACT].confidence)


def test_a_point_whose_partner_is_not_marked_keeps_its_plain_answer() -> None:
    assert TURNED.source is not None
    points = TURNED.source.keypoints.copy()
    points[1] = np.nan
    half = replace(
        TURNED, source=replace(TURNED.source, keypoints=points), visible=np.array([True, False, True, False])
    )
    places, known = p.mirrored_points(half)
    assert known.tolist() == [False, True]
    assert_close(places[1], torch.tensor([120 - points[2, 0], points[2, 1]]))
    found = answers(half)
    assert found[ALIGNED].flipped and torch.equal(found[ALIGNED].positions[0], found[EXACT].positions[0])
    assert error(half, found[ALIGNED].positions)[1] < 3


def test_points_of_the_mirrored_source_are_those_of_the_partners() -> None:
    places, known = p.mirrored_points(PAIR)
    own = FIRST.keypoints[[1, 0, 2]]
    assert known.all()
    assert_close(places, torch.from_numpy(np.stack([120 - own[:, 0], own[:, 1]], 1)))
