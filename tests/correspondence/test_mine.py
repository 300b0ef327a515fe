"""Mined pairs are those of `nearest_partners` however the job is cut, and clusters hold each image once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2f_core.correspondence.mine import table
from d2f_core.correspondence.mine.clusters import clusters_of
from d2f_core.correspondence.mine.config import MineError, MinePairsConfig
from d2f_core.correspondence.mine.table import check_mine, mine_pairs, partners_of, read_clusters, read_pairs
from d2f_core.correspondence.pairs import nearest_partners, retrieval_table
from d2f_core.data.manifest import ManifestError, read_manifest
from d2f_core.data.table_reader import RowReader
from tests.correspondence.features import write_features
from tests.flow.here import here


def drawn(images: int, size: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    ids = [f"{row:03d}" for row in draw.permutation(images)]
    return ids, nearest_partners(draw.standard_normal((images, 6)), ids, partners=size + 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("images", "size"), [(97, 5), (40, 2), (9, 5), (300, 8)])
def test_each_image_is_in_one_cluster_and_none_is_too_small(images: int, size: int, seed: int) -> None:
    ids, partners = drawn(images, size, seed)
    found = clusters_of(partners, ids, size)
    counts = np.bincount(found)
    assert len(found) == images and counts.min() >= size
    for image, cluster in enumerate(found.tolist()):
        mates = set(np.flatnonzero(found == cluster).tolist()) - {image}
        chosen_by = {other for other in mates if image in partners.rows[other].tolist()}
        assert mates & set(partners.rows[image].tolist()) or chosen_by, "with a partner, or one that has it as partner"


def test_clusters_by_hand() -> None:
    """On a line the two tight groups begin clusters, and what lies between joins the nearer one."""
    angles = np.array([0.0, 0.01, 0.02, 0.6, 1.0, 1.01, 1.03])
    ids = list("abcdefg")
    partners = nearest_partners(np.stack([np.cos(angles), np.sin(angles)], 1), ids, partners=4)
    assert clusters_of(partners, ids, 3).tolist() == [0, 0, 0, 1, 1, 1, 1]
    shuffled = [4, 0, 3, 6, 1, 5, 2]
    other = nearest_partners(
        np.stack([np.cos(angles), np.sin(angles)], 1)[shuffled], [ids[i] for i in shuffled], partners=4
    )
    again = clusters_of(other, [ids[i] for i in shuffled], 3)
    assert [again[shuffled.index(row)] for row in range(7)] == [0, 0, 0, 1, 1, 1, 1], "whatever the order of the rows"
    with pytest.raises(MineError, match=r"takes 4 partners of each image, and 'a' has 2. Use cluster_size=3"):
        clusters_of(nearest_partners(np.eye(3) + 1, list("abc"), partners=4), list("abc"), 5)


def frames(videos: int = 6, each: int = 4, seed: int = 0, partners: int = 10):
    """Ids, groups and partners of frames that look most like those of their own video."""
    draw = np.random.default_rng(seed)
    count = videos * each
    groups = [f"v{row % videos}" for row in range(count)]
    scenes = draw.standard_normal((videos, 6))
    embeddings = scenes[[row % videos for row in range(count)]] + draw.standard_normal((count, 6)) / 2
    ids = [f"{row:03d}" for row in draw.permutation(count)]
    return ids, groups, nearest_partners(embeddings, ids, partners=partners, groups=groups)


def within(found: np.ndarray, groups: list[str]) -> tuple[int, int]:
    """Pairs within clusters, and those of them that are of one group."""
    first, second = np.triu_indices(len(found), 1)
    together, names = found[first] == found[second], np.array(groups)
    return int(together.sum()), int((together & (names[first] == names[second])).sum())


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_apart_in_clusters_too(seed: int) -> None:
    ids, groups, partners = frames(seed=seed, partners=20)
    found = clusters_of(partners, ids, 4, groups)
    assert np.bincount(found).min() >= 4 and within(found, groups)[1] == 0
    assert within(clusters_of(partners, ids, 4), groups)[1] > 0, "which partners alone do not see to"
    shuffled = np.random.default_rng(seed).permutation(len(ids)).tolist()
    place = np.argsort(shuffled)
    moved = np.where(partners.rows < 0, -1, place[partners.rows])[shuffled]
    other = replace(partners, rows=moved, cosines=partners.cosines[shuffled])
    again = clusters_of(other, [ids[row] for row in shuffled], 4, [groups[row] for row in shuffled])
    assert np.array_equal(again, found[shuffled]), "whatever the order of the rows"


def test_near_duplicates_share_clusters_where_others_are_too_few() -> None:
    """Of two videos no cluster of four can hold one frame of each: all frames are in one all the same."""
    ids, groups, partners = frames(videos=2, each=6, partners=5)
    found = clusters_of(partners, ids, 4, groups)
    assert np.bincount(found).min() >= 4 and within(found, groups)[1] > 0
    for seed in range(20):
        ids, groups, partners = frames(videos=5, each=9, seed=seed, partners=6)
        counts = np.bincount(clusters_of(partners, ids, 5, groups))
        assert counts.sum() == 45 and counts.min() >= 5 and len(counts) > 2


@pytest.mark.parametrize(("partners", "plain", "apart"), [(10, (1032, 238), (1292, 108)), (30, (792, 183), (890, 0))])
def test_more_partners_keep_more_near_duplicates_apart(partners: int, plain: tuple, apart: tuple) -> None:
    """What docs/correspondence.md states."""
    ids, groups, found = frames(videos=24, each=8, partners=partners)
    assert within(clusters_of(found, ids, 8), groups) == plain
    assert within(clusters_of(found, ids, 8, groups), groups) == apart


def config(tmp_path: Path, **fields) -> MinePairsConfig:
    made = MinePairsConfig(
        features=write_features(str(tmp_path / "features"), embedding=True), output=str(tmp_path / "pairs"), partners=5,
        rows_per_part=10, cluster_size=4,
    )  # fmt: skip
    return replace(made, **fields)


def test_the_job_finds_the_pairs_and_clusters_of_a_plain_comparison(tmp_path: Path) -> None:
    """Without Ray: each part is made on its own, and the clusters from what the parts hold."""
    made = config(tmp_path, apart="mesh")
    with here():
        manifest, written = mine_pairs(made, of := check_mine(made))
    names = ("sample_id", "embedding", "mesh")
    rows = RowReader(made.features, of, names).read(np.arange(24))
    embeddings = np.stack([np.frombuffer(row, np.float16) for row in rows.column("embedding").to_pylist()])
    ids, meshes = rows.column("sample_id").to_pylist(), rows.column("mesh").to_pylist()
    wanted = nearest_partners(embeddings, ids, partners=5, groups=meshes)
    pairs = RowReader(made.output, manifest, retrieval_table(ids, wanted).column_names)
    assert written and pairs.read(np.arange(manifest.num_rows)).equals(retrieval_table(ids, wanted).combine_chunks())
    assert [file.rows for file in manifest.files] == [50, 50, 20] and manifest.kind == "retrieval_pairs"
    assert np.array_equal(partners_of(ids, read_pairs(made.output, manifest), 5).rows, wanted.rows)
    clusters = read_clusters(made.clusters)
    assert [int(clusters[name]) for name in ids] == clusters_of(wanted, ids, 4, meshes).tolist()
    assert clusters_of(wanted, ids, 4).tolist() != clusters_of(wanted, ids, 4, meshes).tolist(), "so meshes were told"
    assert mine_pairs(made, of) == (manifest, False), "nothing is left to do"
    with pytest.raises(ManifestError, match=r"holds the clusters of .*'cluster_size': 4.* asked for .*3"):
        mine_pairs(replace(made, cluster_size=3), of)


def test_features_are_compared_by_the_mean_of_their_tokens(tmp_path: Path) -> None:
    made = config(tmp_path, column="features_b")
    ids, found, groups = table.read_embeddings(made, check_mine(made))
    rows = RowReader(made.features, read_manifest(made.features), ("features_b",)).read(np.arange(24))
    tokens = np.stack([np.frombuffer(row, np.float16) for row in rows.column(0).to_pylist()]).reshape(24, 4, 7)
    tokens = tokens.astype(np.float32)
    np.testing.assert_allclose(found, (tokens / np.linalg.norm(tokens, axis=2, keepdims=True)).mean(1), rtol=1e-5)
    assert len(ids) == 24 and groups is None


@pytest.mark.parametrize(("limit", "most"), [(1000, 8), (200, 1), (111, 1)])
def test_features_are_read_by_bytes_to_the_same_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, most: int
) -> None:
    """However large an image's features are: here 4 tokens of 7 channels, 112 bytes in float32."""
    made = config(tmp_path, column="features_b")
    of, pooled, rows = check_mine(made), table._pooled, list[int]()
    wanted = table.read_embeddings(made, of)[1]
    monkeypatch.setattr(table, "READ_BYTES", limit)
    monkeypatch.setattr(table, "_pooled", lambda part, name: rows.append(part.num_rows) or pooled(part, name))
    assert np.array_equal(table.read_embeddings(made, of)[1], wanted) and sum(rows) == 24 and max(rows) == most
    rows.clear()
    table.read_embeddings(replace(made, column="embedding"), of)
    assert rows == [24], "embeddings are small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": ""}, "output is empty"),
        (
            {"column": "features_c"},
            r"column='features_c' is not in .* Use one of embedding, features_a, features_b, or",
        ),
        ({"apart": "category", "points": 0}, "apart='category', and the images of .* have none"),
        ({"apart": "mesh", "points": 0}, "apart='mesh', and the images of .* have none"),
        ({"kind": "latents"}, "holds latents"),
    ],
)
def test_jobs_that_cannot_run_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    table = {name: change.pop(name) for name in ("points", "kind") if name in change}
    made = config(tmp_path, **change)
    if table:
        made = replace(made, features=write_features(str(tmp_path / "other"), **table, embedding=True))
    with pytest.raises(MineError, match=message):
        check_mine(made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partners": 0}, "partners=0"),
        ({"cluster_size": 12}, r"from 2 to partners \+ 1 = 11"),
        ({"cluster_size": 1}, "1 "),
    ],
)
def test_configs_that_mean_nothing_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(MineError, match=message):
        MinePairsConfig(**fields)


def test_the_job_goes_on_where_it_stopped_on_a_cluster(cluster: None, tmp_path: Path) -> None:
    made = config(tmp_path, output="s3://d2f/test-mine")
    part = table.make_pairs(made, of := check_mine(made), 1)
    with pytest.raises(ManifestError, match="is not empty"):
        mine_pairs(made, of)
    made = replace(made, output="s3://d2f/test-mine-again")
    manifest, written = mine_pairs(made, of)
    assert written and manifest.files[1] == part, "the same bytes in any process"
    assert mine_pairs(made, of) == (manifest, False)
