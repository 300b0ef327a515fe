"""Chunks hold every pair once, and an image goes through a network with the same others wherever it is asked for."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from d2f_core.correspondence.evaluate import chunks as c
from d2f_core.correspondence.evaluate.measure import both
from d2f_core.correspondence.evaluate.shared_images import share_images
from d2f_core.data.sources.pair_sample import PairImage, PairSample
from tests.correspondence.evaluate.test_measure import FIRST, PAIR


def pairs(count: int, images: int, categories: int = 2) -> list[PairSample]:
    """Pairs of images drawn within categories, in no order."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        category = f"c{draw.integers(categories)}"
        names = [f"{category}-{place}" for place in draw.choice(images, 2, replace=False)]
        source, target = (replace(FIRST, image_id=name, uri=f"/{name}") for name in names)
        found.append(replace(PAIR, pair_id=str(number), category=category, source=source, target=target))
    return found


def images_of(chunk: c.Chunk) -> set[str]:
    return {image.key for pair in chunk.pairs for image in both(pair)}


@pytest.mark.parametrize(("chunk_size", "batch_size"), [(7, 1), (7, 4), (1000, 3)])
def test_every_pair_is_in_one_chunk_of_its_category(chunk_size: int, batch_size: int) -> None:
    every = pairs(60, 9)
    cut = c.cut(every, chunk_size=chunk_size, batch_size=batch_size)
    assert sorted(number for chunk in cut for number in chunk.numbers) == list(range(60))
    for chunk in cut:
        assert 1 <= len(chunk.pairs) <= chunk_size and len({pair.category for pair in chunk.pairs}) == 1
        assert [every[number] for number in chunk.numbers] == list(chunk.pairs)
    sizes = [len(chunk.pairs) for chunk in cut if chunk.pairs[0].category == "c0"]
    assert max(sizes) - min(sizes) <= 1, "no chunk is a small rest"


def test_an_image_is_in_one_batch_of_its_category() -> None:
    every = pairs(60, 9)
    odd = replace(every[0], pair_id="both", category="c9")  # its images are of another category too
    of_image: dict[str, tuple[str, ...]] = {}
    for size in (7, 1000):
        for chunk in c.cut([*every, odd], chunk_size=size, batch_size=4):
            assert set(chunk.batches) == images_of(chunk)
            for name, batch in chunk.batches.items():
                members = tuple(image.key for image in batch)
                assert name in members and len(members) <= 4
                assert of_image.setdefault(name, members) == members, "whatever the size of a chunk"
    assert sorted(map(len, set(of_image.values()))) == [1, 1, 4, 4, 4, 4], "nine images of each category"
    assert all({name[:3] for name in members} == {name[:3]} for name, members in of_image.items())


def test_pairs_of_the_same_images_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    every = pairs(400, 40, categories=1)
    monkeypatch.setattr(c, "TILE", 10)
    cut = c.cut(every, chunk_size=25, batch_size=1)
    assert max(len(images_of(chunk)) for chunk in cut) <= 40
    mean = np.mean([len(images_of(chunk)) for chunk in cut])
    as_given = np.mean([len(images_of(unsorted(every[at : at + 25]))) for at in range(0, 400, 25)])
    assert mean < 0.75 * as_given


def test_bytes_of_an_image_are_stored_once_for_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[bytes] = []
    monkeypatch.setattr("ray.put", lambda data: stored.append(data) or len(stored) - 1)
    monkeypatch.setattr("ray.get", lambda place: stored[place])
    contents = {image.key: bytes([number]) * 50_000 for number, image in enumerate(distinct_images(pairs(60, 9)))}

    def with_bytes(image: PairImage | None) -> PairImage:
        assert image is not None
        return replace(image, uri=None, data=contents[image.key])

    every = [replace(p, source=with_bytes(p.source), target=with_bytes(p.target)) for p in pairs(60, 9)]
    shared = share_images([*every, PAIR_OF_FILES])
    assert sorted(stored) == sorted(contents.values())
    cut, plain = (c.cut(some, chunk_size=7, batch_size=4) for some in (shared[:-1], every))
    assert [chunk.numbers for chunk in cut] == [chunk.numbers for chunk in plain]
    for chunk, other in zip(cut, plain, strict=True):
        assert len(pickle.dumps(chunk)) < 20_000 and list(chunk.batches) == list(other.batches)
        for batch, bare in zip(chunk.batches.values(), other.batches.values(), strict=True):
            assert [image.read() for image in batch] == [image.data for image in bare]
    assert shared[-1].source is PAIR_OF_FILES.source


def distinct_images(some: list[PairSample]) -> list[PairImage]:
    return list({image.key: image for pair in some for image in both(pair)}.values())


PAIR_OF_FILES = pairs(1, 2)[0]


def unsorted(some: list[PairSample]) -> c.Chunk:
    return c.Chunk(numbers=(), pairs=tuple(some), batches={})
