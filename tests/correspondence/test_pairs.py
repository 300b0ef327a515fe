"""Retrieval pairs are those of a plain comparison of all with all, whatever the blocks."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2f_core.correspondence.pairs import RETRIEVAL_SCHEMA, Partners, nearest_partners, retrieval_table


def draw(images: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, width)).astype(np.float32)


def brute_force(embeddings: np.ndarray, ids: np.ndarray, partners: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Rows of the partners by float64 cosines of all with all; the smaller id first among equals."""
    wide = embeddings.astype(np.float64)
    cosines = wide @ wide.T / np.linalg.norm(wide, axis=1) / np.linalg.norm(wide, axis=1)[:, None]
    never = ids[:, None] == ids
    if groups is not None:
        never |= groups[:, None] == groups
    cosines[never] = -np.inf
    order = np.array([np.lexsort((ids, -row))[:partners] for row in cosines])
    return np.where(np.take_along_axis(cosines, order, 1) > -np.inf, order, -1)


@pytest.mark.parametrize("block_rows", [1, 7, 64, None])
@pytest.mark.parametrize("partners", [1, 10])
def test_partners_are_those_of_a_comparison_of_all_with_all(block_rows, partners):
    embeddings, ids = draw(300, 48), np.arange(300)[::-1]
    found = nearest_partners(embeddings, ids, partners=partners, block_rows=block_rows)
    assert found.rows.tolist() == brute_force(embeddings, ids, partners).tolist()
    for row in (0, 299):
        pair = embeddings[[row, found.rows[row, 0]]].astype(np.float64)
        assert found.cosines[row, 0] == pytest.approx(
            pair[0] @ pair[1] / np.prod(np.linalg.norm(pair, axis=1)), abs=1e-14
        )


def test_the_size_of_a_block_changes_no_bit():
    embeddings, ids = draw(500, 96), np.arange(500)
    first, *others = [nearest_partners(embeddings, ids, block_rows=rows) for rows in (500, 1, 33, 499)]
    for other in others:
        assert np.array_equal(first.rows, other.rows) and np.array_equal(first.cosines, other.cosines)


def test_some_sources_have_the_partners_that_they_have_among_all():
    embeddings, ids, groups = draw(200, 12), [f"{row:03d}" for row in range(200)], np.arange(200) // 3
    whole = nearest_partners(embeddings, ids, groups=groups)
    parts = [nearest_partners(embeddings, ids, groups=groups, sources=range(a, a + 50), block_rows=7)
             for a in range(0, 200, 50)]  # fmt: skip
    assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
    assert np.array_equal(np.concatenate([part.cosines for part in parts]), whole.cosines)
    assert pa.concat_tables([retrieval_table(ids, part) for part in parts]).equals(retrieval_table(ids, whole))


@pytest.mark.parametrize("names", ["numbers", "text"])
@pytest.mark.parametrize("block_rows", [5, 64, None])
def test_among_equal_cosines_the_smaller_id_comes_first(names, block_rows):
    """Corners of a cube have dozens of exactly equal cosines, more than a row's spare candidates."""
    embeddings = np.sign(draw(900, 9)).astype(np.float32) * 0.5
    ids = np.random.default_rng(1).permutation(900) + 50  # so that 100 is below 99 as text alone
    ids = ids if names == "numbers" else ids.astype(str)
    found = nearest_partners(embeddings, ids, block_rows=block_rows)
    assert found.rows.tolist() == brute_force(embeddings, ids, 10).tolist()
    assert (np.diff(found.cosines) == 0).mean() > 0.5


def test_cosines_that_float32_cannot_tell_apart_are_told_apart():
    """Partners whose cosines differ by less than 1e-9, in a shuffled order."""
    order = np.random.default_rng(2).permutation(100)
    angles = np.concatenate([[0.0], 0.5 + 1e-9 * order])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = nearest_partners(embeddings, np.arange(101), partners=100)
    assert found.rows[0].tolist() == (1 + np.argsort(order)).tolist()
    assert len(set(embeddings.astype(np.float32)[1:, 0])) < 5


def test_the_length_of_an_embedding_does_not_count_and_any_floats_will_do():
    embeddings, ids = draw(200, 16).astype(np.float16), np.arange(200)
    expected = brute_force(embeddings, ids, 10)
    scaled = embeddings.astype(np.float32) * 2.0 ** np.arange(-50, 50).repeat(2)[:, None]
    for given in (embeddings, torch.from_numpy(embeddings), embeddings.astype(np.float64), scaled):
        assert nearest_partners(given, ids).rows.tolist() == expected.tolist()
    short = torch.from_numpy(embeddings).bfloat16()
    assert nearest_partners(short, ids).rows.tolist() == brute_force(short.float().numpy(), ids, 10).tolist()


def test_an_image_is_no_partner_of_itself_nor_of_its_group():
    embeddings = np.concatenate([draw(60, 8), draw(60, 8) * 3])  # each once more, longer: a dot product would prefer it
    ids, groups = np.array([f"{number % 60:02d}" for number in range(120)]), np.arange(120) // 4
    by_id, by_group = nearest_partners(embeddings, ids), nearest_partners(embeddings, ids, groups=groups)
    assert by_id.rows.tolist() == brute_force(embeddings, ids, 10).tolist()
    assert by_group.rows.tolist() == brute_force(embeddings, ids, 10, groups).tolist() != by_id.rows.tolist()
    assert not (ids[by_id.rows] == ids[:, None]).any() and not (groups[by_group.rows] == groups[:, None]).any()


def test_an_image_may_have_fewer_partners_than_asked_for():
    found = nearest_partners(draw(5, 3), np.arange(5), partners=4, groups=np.array([0, 0, 0, 1, 1]))
    assert (found.rows >= 0).sum(1).tolist() == np.isfinite(found.cosines).sum(1).tolist() == [2, 2, 2, 3, 3]
    alone = nearest_partners(draw(3, 2), np.zeros(3), partners=100)
    assert (alone.rows == -1).all() and np.isnan(alone.cosines).all()


def test_pairs_are_rows_with_both_ids_and_the_rank():
    found = Partners(
        rows=np.array([[2, 1], [0, -1], [-1, -1]]), cosines=np.array([[0.9, 0.5], [0.5, np.nan], [np.nan] * 2])
    )
    table = retrieval_table(["a", "b", "c"], found)
    assert table.schema.equals(RETRIEVAL_SCHEMA) and isinstance(table, pa.Table)
    assert table.to_pylist() == [
        {"pair_id": "a:c", "source_image_id": "a", "target_image_id": "c", "rank": 0, "cosine": 0.9},
        {"pair_id": "a:b", "source_image_id": "a", "target_image_id": "b", "rank": 1, "cosine": 0.5},
        {"pair_id": "b:a", "source_image_id": "b", "target_image_id": "a", "rank": 0, "cosine": 0.5},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.ones((3, 2), np.int64)}, r"embeddings are torch.int64 \(3, 2\)"),
        ({"embeddings": np.ones(3)}, r"\(3,\), for 3 ids"),
        ({"ids": ["a"]}, "for 1 ids"),
        ({"embeddings": np.empty((0, 2)), "ids": []}, "at least one image"),
        ({"groups": [1]}, "There are 1 groups for 3 images"),
        ({"partners": 0}, "partners=0"),
        ({"block_rows": 0}, "block_rows=0"),
        ({"embeddings": np.array([[1, 0], [0, 0], [1, 1.0]])}, "The embedding of 'b' is zero or not finite"),
        ({"embeddings": np.array([[1, 0], [1, 0], [1, np.inf]])}, "The embedding of 'c' is zero or not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        nearest_partners(**{"embeddings": np.ones((3, 2)), "ids": ["a", "b", "c"]} | change)
