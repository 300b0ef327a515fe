"""Points are predicted once per pair, scored where they lie in the original images, and set beside the floors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate import floors as f
from d2f_core.correspondence.evaluate import measure as m
from d2f_core.correspondence.evaluate.chunks import cut
from d2f_core.correspondence.evaluate.config import EvaluateMatchesError
from d2f_core.correspondence.matcher import Matcher, transformer_matcher
from d2f_core.correspondence.preparation import Preparation
from d2f_core.data.sources.pair_sample import PairImage, PairSample
from tests.allocated import Allocated
from tests.correspondence.pictures import PLACES, patch

GRID = (24, 24)


def image(name: str, size: tuple[int, int], box: tuple[float, ...], places: Sequence[tuple[float, float]]) -> PairImage:
    """Keypoints at places of the box."""
    points = np.array([(box[0] + x * box[2], box[1] + y * box[3]) for x, y in places], np.float32)
    return PairImage(image_id=name, data=patch(size, box), size=size, box=box, keypoints=points)


FIRST = image("a", (120, 90), (20, 15, 60, 60), PLACES)
SECOND = image("b", (100, 140), (10, 40, 80, 80), PLACES)
PAIR = PairSample(
    source_uri="made#0", pair_id="a-b", category="patch", source=FIRST, target=SECOND,
    visible=np.array([True, True, True, False]), flip=np.array([1, 0, -1, -1]), viewpoint=30.0,
)  # fmt: skip
BACK = replace(PAIR, pair_id="b-a", source=SECOND, target=FIRST, viewpoint=180.0)
UNKNOWN = replace(PAIR, pair_id="a-b again", viewpoint=None)
BLIND = replace(PAIR, pair_id="none", visible=np.zeros(4, bool))


def matcher(fit: str = "stretch") -> Matcher:
    """Its features are the colours, as directions that turn with them."""
    preparation = Preparation(size=96, normalisation="none", fit=fit)  # type: ignore[arg-type]

    def features(images: Sequence[np.ndarray]) -> torch.Tensor:
        colours = torch.nn.functional.adaptive_avg_pool2d(preparation.pixels(images), GRID).flatten(2).transpose(1, 2)
        turns = colours * 2.5
        return torch.cat([turns.cos(), turns.sin()], dim=-1)

    return Matcher(name="colours", preparation=preparation, grid=GRID, features=features)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_points_are_found_in_pixels_of_the_original_images(fit: str) -> None:
    found = m.measure(m.predict_by(matcher(fit)), [PAIR, BACK, BLIND])
    assert found.pair_ids == ("a-b", "b-a") and found.categories == ("patch",)
    assert found.keypoint.tolist() == [0, 1, 2] * 2 and found.matches.pair.tolist() == [0] * 3 + [1] * 3
    assert_close(found.matches.truth[:3], torch.from_numpy(SECOND.keypoints[:3]).double())
    assert (found.matches.predicted - found.matches.truth).norm(dim=1).max() < 3
    assert (found.confidence > 0.9).all()
    scored = pck.pck(found.matches, pck.PROTOCOLS["original"].scoring, (0.1, 0.05))
    assert scored.point.tolist() == [[1.0, 1.0]]


def test_a_points_partner_is_where_the_mirror_would_put_it() -> None:
    found = m.measure(m.predict_by(matcher()), [PAIR])
    assert_close(found.partner[:2], torch.from_numpy(SECOND.keypoints[[1, 0]]).double())
    assert found.partner[2].isnan().all()


def test_an_image_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, plain = [], matcher()
    embed = Matcher.embed
    monkeypatch.setattr(Matcher, "embed", lambda self, images: counted.append(len(images)) or embed(self, images))
    m.measure(m.predict_by(plain), [PAIR, BACK, UNKNOWN])
    assert sum(counted) == 2
    monkeypatch.setattr(m, "KEPT_IMAGES", 1)
    m.measure(m.predict_by(plain), [PAIR, BACK])
    assert sum(counted) == 2 + 3, "the source of the second pair is the target of the first"


def test_images_of_a_batch_are_embedded_together_and_mirrored_ones_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    embed = Matcher.embed
    monkeypatch.setattr(Matcher, "embed", lambda self, images: asked.append(len(images)) or embed(self, images))
    images = m.EmbeddedImages(matcher())
    first, again = images.get(FIRST, (FIRST, SECOND)), images.get(FIRST, (FIRST, SECOND))
    images.get(SECOND, (FIRST, SECOND))
    assert asked == [2] and first is again
    mirrored = images.get(FIRST, (FIRST, SECOND), flipped=True)
    assert asked == [2, 2] and mirrored.size == first.size
    assert_close(mirrored.features.unflatten(0, GRID).flip(1).flatten(0, 1), first.features, rtol=0, atol=2e-2)


def test_two_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As when two files of pairs lie in folders of their own, each beside its `a.png`."""
    files = []
    for name, each in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(each.data or b"")
        files.append(replace(each, image_id="a.png", uri=str(tmp_path / name / "a.png"), data=None))
    pairs = [replace(PAIR, pair_id=each.uri, source=each, target=each) for each in files]
    chunks = cut(pairs, chunk_size=2, batch_size=2)
    assert [{image.uri for image in batch} for chunk in chunks for batch in chunk.batches.values()] == [
        {each.uri for each in files}
    ] * 2
    (batches,) = (chunk.batches for chunk in chunks)
    for together in (None, batches):
        found = m.measure(m.predict_by(matcher(), batches=together), pairs)
        assert (found.matches.predicted - found.matches.truth).norm(dim=1).max() < 3


def test_no_map_of_features_is_as_large_as_the_image() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    asked = transformer_matcher("small", Dinov2Model(config).eval(), Preparation(size=98))
    pair = replace(PAIR, source=image("a", (500, 375), (20, 15, 300, 300), PLACES), target=FIRST)
    back = replace(pair, pair_id="back", source=FIRST, target=pair.source)
    with Allocated(floor=0) as made:
        m.measure(m.predict_by(asked), [pair, back])
    assert max(made.large) == 500 * 375 * 3 * 4, "the decoded image in floating point; 24 channels are eight times that"


def test_floors_are_what_their_names_say() -> None:
    floors = f.floors()
    copied = m.measure(floors["box copy"], [PAIR, BACK])
    assert_close(copied.matches.predicted, copied.matches.truth, rtol=0, atol=1e-4)
    same = m.measure(floors["same pixel"], [PAIR]).matches.predicted
    assert_close(same, torch.from_numpy(FIRST.keypoints[:3]).double() / torch.tensor([1.2, 90 / 140]).double())
    random = m.measure(floors["random"], [PAIR] * 50).matches
    place = (random.predicted - torch.tensor([10.0, 40.0])) / 80
    assert 0 <= place.min() < 0.1 and 0.9 < place.max() <= 1 and abs(place.mean() - 0.5) < 0.1
    assert torch.equal(m.measure(f.floors()["random"], [PAIR]).matches.predicted, random.predicted[:3])


def test_pairs_fall_into_ranges_of_the_angle_between_the_views() -> None:
    found = m.measure(m.predict_by(matcher()), [PAIR, BACK, UNKNOWN])
    ranges = dict(m.by_viewpoint(found))
    assert {name: within.tolist() for name, within in ranges.items()} == {
        "0-30": [False] * 3,
        "30-60": [True, False, False],
        "60-120": [False] * 3,
        "120-180": [False, True, False],
    }


def test_a_damaged_image_or_one_of_another_size_is_named() -> None:
    cut = replace(SECOND, data=(SECOND.data or b"")[:200])
    for wrong, message in ((cut, "'b': undecodable"), (replace(SECOND, size=(50, 70)), "'b' is .*its pairs say")):
        with pytest.raises(EvaluateMatchesError, match=message):
            m.measure(m.predict_by(matcher()), [replace(PAIR, target=wrong)])


def test_pairs_without_a_visible_point_are_refused() -> None:
    with pytest.raises(ValueError, match="No pair has a keypoint that is visible in both"):
        m.measure(m.predict_by(matcher()), [BLIND])
