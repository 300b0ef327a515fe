"""A table of pairs holds the targets that its images' features make, once for a pair, with bad pairs in the ledger."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from d2f_core.batch import table_job
from d2f_core.batch.chunks import write_row
from d2f_core.batch.output import OutputError
from d2f_core.batch.table_job import TableJob, make_table
from d2f_core.correspondence import distillation as d
from d2f_core.correspondence.config import DistillationConfig, TargetConfig
from d2f_core.correspondence.pairs import RETRIEVAL_SCHEMA
from d2f_core.correspondence.targets import index
from d2f_core.correspondence.targets.check import check_embed_pairs, dropped_share
from d2f_core.correspondence.targets.config import EmbedPairsConfig, PairsError
from d2f_core.correspondence.targets.images import FeatureReader
from d2f_core.correspondence.targets.index import image_index, planned_features
from d2f_core.correspondence.targets.source import pairs_within
from d2f_core.correspondence.targets.spec import PairsSpec, row_bytes
from d2f_core.correspondence.teacher_columns import fused, shares_of, teachers_of
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.manifest import Manifest, ManifestError, read_manifest, write_manifest, write_part
from d2f_core.data.quarantine import read_quarantine
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.config import PairSource
from d2f_core.data.sources.pairs import read_pairs
from d2f_core.data.sources.sample import SourceError
from d2f_core.data.table_reader import RowReader
from tests.correspondence.features import BROKEN, write_features
from tests.data.pair_sources import HEIGHT, WIDTH, images_of, own_row, write_images, write_lines, write_spair
from tests.data.pictures import file_bytes, pixels
from tests.flow.here import prepared_rows

IDS = [f"{row:032x}" for row in range(24)]
FOUR = TargetConfig(kept=3, probabilities="float32")


def write_mined(uri: str, *pairs: tuple[str, str]) -> str:
    rows = [
        {"pair_id": f"{a}:{b}", "source_image_id": a, "target_image_id": b, "rank": 0, "cosine": 0.5} for a, b in pairs
    ]
    part = write_part(uri, "part-0.parquet", pa.Table.from_pylist(rows, RETRIEVAL_SCHEMA))
    write_manifest(uri, Manifest(kind="retrieval_pairs", files=(part,)))
    return uri


def numbered(*pairs: tuple[int, int]) -> list[tuple[str, str]]:
    return [(IDS[a], IDS[b]) for a, b in pairs]


def config(tmp_path: Path, **fields) -> EmbedPairsConfig:
    known = {"mined": ""} if {"pairs", "within_category"} & fields.keys() else {}
    if not fields.keys() & {"mined", "pairs", "within_category"}:
        known = {"mined": write_mined(str(tmp_path / "mined"), *numbered((0, 5), (5, 0), (7, 0), (3, 9), (11, 23)))}
    made = EmbedPairsConfig(
        features=write_features(str(tmp_path / "features")), output=str(tmp_path / "pairs"), rows_per_part=2,
        batch_size=1, targets=FOUR, max_quarantined_share=1.0,
    )  # fmt: skip
    return replace(made, **known | fields)


@contextmanager
def here() -> Iterator[None]:
    """Without Ray: chunk after chunk in this process."""

    def rows(job: TableJob, todo: Mapping[int, Mapping[int, int]]) -> Iterator[dict[str, Any]]:
        actor, threads = job.actor(job.spec), torch.get_num_threads()
        for row in prepared_rows(job, todo):
            made = write_row(actor(row), output=job.spec.config.output, row_group_rows=job.spec.row_group_rows)
            yield from made.to_pylist()
        torch.set_num_threads(threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_job, "_rows", rows)
        yield


def arrays(uri: str, names: list[str]) -> dict[str, np.ndarray]:
    manifest = read_manifest(uri)
    return table_to_arrays(RowReader(uri, manifest, names).read(np.arange(manifest.num_rows)))


def test_a_row_holds_both_images_and_the_most_probable_matches_of_both_directions(tmp_path: Path) -> None:
    made = config(tmp_path, targets=replace(FOUR, shares={"a": 3.0, "b": 1.0}, teacher_temperature=0.1))
    job = check_embed_pairs(made)
    with here():
        manifest = make_table(job)
    assert manifest.kind == "pairs" and manifest.counts["read"] == manifest.num_rows == 4, "5:0 is 0:5 once more"
    found = arrays(made.output, job.spec.schema().names)
    pairs = [(0, 5), (7, 0), (3, 9), (11, 23)]
    assert list(zip(found["source_image_id"], found["target_image_id"], strict=True)) == numbered(*pairs)
    features = arrays(made.features, ["pixels", "features_a", "features_b"])
    of = DistillationConfig(shares={"a": 3.0, "b": 1.0})
    given = [(torch.tensor(features[f"features_{name}"]), grid) for name, grid in (("a", (4, 4)), ("b", (2, 2)))]
    coarse, finer = fused(given, (2, 2), shares_of(teachers_of(read_manifest(made.features)), of), of)
    for row, (source, target) in enumerate(pairs):
        ways = [
            d.teacher_distribution(coarse[a : a + 1], finer[b : b + 1], grid=(2, 2), temperature=0.1, finer=2)
            for a, b in ((source, target), (target, source))
        ]
        weights = d.cycle_probability(*ways), d.cycle_probability(*ways[::-1])
        for way, wanted, weight in zip(("forward", "backward"), ways, weights, strict=True):
            best = wanted[0].numpy().argsort(axis=1)[:, ::-1][:, :3]
            assert np.array_equal(found[f"{way}_indices"][row], best)
            np.testing.assert_allclose(
                found[f"{way}_probabilities"][row], np.take_along_axis(wanted[0].numpy(), best, 1), atol=1e-6
            )
            rest = 1 - found[f"{way}_probabilities"][row].sum(axis=1)
            np.testing.assert_allclose(found[f"{way}_dropped"][row], rest, atol=1e-6)
            np.testing.assert_allclose(found[f"{way}_weights"][row], weight[0].numpy(), atol=1e-6)
        for side, image in (("source", source), ("target", target)):
            assert np.array_equal(found[f"{side}_pixels"][row], features["pixels"][image])
    both = np.concatenate([found["forward_dropped"], found["backward_dropped"]])
    assert dropped_share(made.output, manifest) == pytest.approx(both.mean()) and both.mean() > 1e-3
    assert make_table(job) == manifest, "nothing is left to do"


def test_a_stopped_job_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, parts = config(tmp_path), config(tmp_path, output=str(tmp_path / "parts"), mined=str(tmp_path / "mined"))
    with here():
        wanted = make_table(check_embed_pairs(whole))
        job = check_embed_pairs(parts)
        table_job.claim_output(job.spec)
        next(table_job.run_chunks(job, {1: {}}))
        assert make_table(job).files == wanted.files


def test_the_identity_holds_what_decides_the_targets(tmp_path: Path) -> None:
    made = config(tmp_path)
    copy = write_features(str(tmp_path / "copy"))
    other = write_mined(str(tmp_path / "other"), *numbered((0, 5), (1, 2)))
    same = [replace(made, features=copy), replace(made, batch_size=8, cache_gb=0.0, output=str(tmp_path / "x"))]
    same.append(replace(made, targets=replace(FOUR, shares={"a": 2.0, "b": 2.0})))
    changes: list[dict[str, Any]] = [
        {"teacher_temperature": 0.02}, {"finer": 1}, {"cycle": False}, {"kept": 2}, {"shares": {"a": 3.0, "b": 1.0}},
        {"probabilities": "float16"},
    ]  # fmt: skip
    others = [replace(made, targets=replace(FOUR, **change)) for change in changes]
    others += [replace(made, mined=other), replace(made, rows_per_part=3), replace(made, patch=7)]
    told = {json.dumps(check_embed_pairs(each).spec.identity(), sort_keys=True) for each in (made, *same)}
    assert len(told) == 1
    told |= {json.dumps(check_embed_pairs(each).spec.identity(), sort_keys=True) for each in others}
    assert len(told) == 1 + len(others)
    with here():
        make_table(check_embed_pairs(made))
        with pytest.raises(OutputError, match="is a complete table of another job: targets was"):
            make_table(check_embed_pairs(others[0]))


@pytest.mark.parametrize("fields", [{"within_category": 2}, {}])
def test_tables_that_were_moved_are_the_same(tmp_path: Path, fields: dict) -> None:
    made = config(tmp_path, **fields)
    with here():
        manifest = make_table(check_embed_pairs(made))
        moved = replace(made, features=shutil.move(made.features, str(tmp_path / "other")))
        if made.mined:
            moved = replace(moved, mined=shutil.move(made.mined, str(tmp_path / "pairs-of-images")))
        assert make_table(check_embed_pairs(moved)) == manifest, "complete already"
        other = replace(moved, features=write_features(str(tmp_path / "more"), things=4))
        with pytest.raises(OutputError, match=r"source_digest was|features_digest was"):
            make_table(check_embed_pairs(other))


def test_pairs_that_cannot_be_used_are_in_the_ledger(tmp_path: Path) -> None:
    pairs = [*numbered((0, 1), (2, 2)), (IDS[3], BROKEN), ("nobody", IDS[4]), *numbered((5, 6))]
    made = config(tmp_path, mined=write_mined(str(tmp_path / "mined"), *pairs))
    with here():
        manifest = make_table(check_embed_pairs(made))
    assert manifest.counts == {"read": 5, "written": 2, "quarantined": 3, "duplicates": 0}
    assert [(bad.source_uri.rpartition("#")[2], bad.reason) for bad in read_quarantine(made.output)] == [
        (f"{IDS[2]}:{IDS[2]}", f"same_image: {IDS[2]} is paired with itself"),
        (f"{IDS[3]}:{BROKEN}", f"quarantined: {BROKEN} has no features (too_small: 1x1 px)"),
        (f"nobody:{IDS[4]}", "not_embedded: nobody is not in the table of features"),
    ]
    with here(), pytest.raises(table_job.TableJobError, match=r"1 of the 2 samples .* \(1 same_image\), more than max"):
        make_table(check_embed_pairs(replace(made, output=str(tmp_path / "strict"), max_quarantined_share=0.1)))


def test_images_of_given_pairs_are_found_by_file_or_else_by_their_bytes(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png")
    content = sample_id((tmp_path / "b.png").read_bytes(), "")
    known = {4: (str(tmp_path / "a.png"), IDS[4]), 9: ("s3://elsewhere/of.tar#b.png", content)}
    features = write_features(str(tmp_path / "features"), known=known)
    rows = [own_row(), own_row(source_image_id="b.png", target_image_id="a.png"), own_row(target_image_id="c.png"), "{"]
    source = PairSource(uri=write_lines(tmp_path / "own.jsonl", *rows))
    made = replace(config(tmp_path / "x", pairs=source), features=features)
    with here():
        manifest = make_table(check_embed_pairs(made))
    found = arrays(made.output, ["source_image_id", "target_image_id"])
    assert (found["source_image_id"].tolist(), found["target_image_id"].tolist()) == ([IDS[4]], [content])
    assert [bad.code for bad in read_quarantine(made.output)] == ["duplicate", "not_embedded", "damaged_json"]
    assert manifest.counts["duplicates"] == 1 and read_quarantine(made.output)[0].reason.endswith("own.jsonl#line=1")
    assert check_embed_pairs(made).source.shards == (), "what is complete is not read again"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_of_pairs_needs_their_images_only(tmp_path: Path, kind: str) -> None:
    """Points are not looked at where there are some, be they ever so wrong."""
    write_images(tmp_path, "a.png", "b.png", "c.png")
    places = {row: (str(tmp_path / name), IDS[row]) for row, name in enumerate(("a.png", "b.png", "c.png"))}
    rows = [{"source_image_id": f"{a}.png", "target_image_id": f"{b}.png", "category": None} for a, b in ("ab", "bc")]
    rows.append(own_row(target_image_id="c.png", source_box=[1.0], target_keypoints=[[1.0, 900.0]]))
    if kind == "jsonl":
        uri = write_lines(tmp_path / "own.jsonl", *rows)
    else:
        rows = rows[:2]
        pq.write_table(pa.Table.from_pylist(rows), uri := str(tmp_path / "own.parquet"))
    made = config(tmp_path / "x", pairs=PairSource(uri=uri), max_quarantined_share=0.0)
    made = replace(made, features=write_features(str(tmp_path / "features"), known=places))
    with here():
        make_table(check_embed_pairs(made))
    found = arrays(made.output, ["source_image_id", "target_image_id"])
    assert list(zip(*found.values(), strict=True)) == numbered((0, 1), (1, 2), (0, 2))[: len(rows)]
    if kind == "jsonl":
        good, bad = read_pairs(made.pairs)
        assert not good and len(bad) == 3, "an evaluation needs points"
    else:
        with pytest.raises(SourceError, match="It needs category, source_keypoints"):
            read_pairs(made.pairs)
        pq.write_table(pa.table({"source_image_id": ["a.png"]}), uri)
        with pytest.raises(SourceError, match="It needs an image or image_id of source and target; its columns"):
            check_embed_pairs(replace(made, output=str(tmp_path / "again")))


def test_images_of_one_name_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    """As when tables of several annotators, who each begin at a.jpg, are joined."""
    files = [file_bytes(pixels(number, HEIGHT, WIDTH)) for number in range(3)]
    known = {row: (f"s3://elsewhere/{row}", sample_id(data, "")) for row, data in enumerate(files)}
    features = write_features(str(tmp_path / "features"), known=known)
    named = {"source_image_id": "a.jpg", "target_image_id": "b.jpg"}
    ends = [(0, 1), (2, 1), (2, 0)]
    rows = [own_row(**named) | {"source_image": files[a], "target_image": files[b]} for a, b in ends]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    made = replace(config(tmp_path / "x", pairs=PairSource(uri=str(tmp_path / "own.parquet"))), features=features)
    with here():
        make_table(check_embed_pairs(made))
    found = arrays(made.output, ["source_image_id", "target_image_id"])
    assert list(zip(*found.values(), strict=True)) == [(known[a][1], known[b][1]) for a, b in ends]


def test_the_training_pairs_of_spair_become_rows(tmp_path: Path) -> None:
    """Half of them are the reverse of others, as in SPair-71k."""
    source = PairSource(uri=write_spair(str(tmp_path / "SPair-71k")), splits=("trn",))
    pairs, _ = read_pairs(source)
    files = sorted({str(image.uri) for pair in pairs for image in images_of(pair)})
    features = write_features(str(tmp_path / "known"), known={row: (file, IDS[row]) for row, file in enumerate(files)})
    made = replace(config(tmp_path, pairs=source), features=features, max_quarantined_share=0.0)
    with here():
        manifest = make_table(check_embed_pairs(made))
    assert manifest.counts == {"read": 4, "written": 3, "quarantined": 1, "duplicates": 1}
    found, wanted = arrays(made.output, ["source_uri", "source_image_id", "target_image_id"]), []
    for pair in pairs[:3]:
        names = [IDS[files.index(str(image.uri))] for image in images_of(pair)]
        wanted.append((pair.source_uri, *names))
    assert list(zip(*found.values(), strict=True)) == wanted


def test_pairs_within_a_category_are_of_other_things_and_each_image_has_some(tmp_path: Path) -> None:
    made = config(tmp_path, within_category=2)
    features = read_manifest(made.features)
    known = image_index(made.features, features.digest)
    pairs = [(known.row_of[a], known.row_of[b]) for a, b in pairs_within(known, 2)]
    assert len(pairs) == 48 and {a for a, _ in pairs} == set(range(24))
    assert all(a // 12 == b // 12 and known.meshes[a] != known.meshes[b] for a, b in pairs)
    assert pairs == [(known.row_of[a], known.row_of[b]) for a, b in pairs_within(known, 2)]
    assert check_embed_pairs(made).source.num_rows == len({frozenset(pair) for pair in pairs})


def test_features_that_are_kept_in_memory_change_nothing(tmp_path: Path) -> None:
    uri = write_features(str(tmp_path / "features"))
    manifest, names = read_manifest(uri), ("pixels", "features_a")
    plain = arrays(uri, list(names))
    for limit in (0, 20_000, 1e9):
        reader = FeatureReader(uri, manifest, names, limit)
        for rows in ([3, 4, 21], [4], [0, 23, 3], [11, 4]):
            found = reader.read(np.array(rows))
            assert list(found) == rows
            for row, image in found.items():
                assert all(np.array_equal(image[name], plain[name][row]) for name in names)
        kept = len(reader._kept)
        assert kept == {0: 0, 20_000: kept, 1e9: 4}[limit] and (limit != 20_000 or 0 < kept < 4)


def test_a_table_that_was_replaced_is_refused(tmp_path: Path) -> None:
    uri = write_features(str(tmp_path / "features"))
    with pytest.raises(ManifestError, match="it was replaced"):
        planned_features(uri, "0" * 64)
    index.image_index.cache_clear()


def test_a_row_of_the_papers_sizes_is_mostly_its_two_images() -> None:
    """What docs/correspondence.md states."""
    spec = PairsSpec(config=EmbedPairsConfig(), fingerprint={}, inputs={}, size=434)
    assert row_bytes(list(spec.schema())) == 6 * 434**2 + 8 * 961 * 32 + 16 * 961 == 1_391_528
    assert spec.row_group_rows == 6


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"features": ""}, PairsError, "features is empty"),
        ({"mined": ""}, PairsError, "give one of mined, pairs.uri and within_category"),
        ({"within_category": 2, "mined": "s3://x"}, PairsError, "give one of"),
        ({"targets": TargetConfig()}, PairsError, r"a grid has 4 tokens; targets\.kept=32 may be at most that"),
        ({"patch": 15}, PairsError, "images of 28 pixels, no multiple of patch=15"),
        ({"targets": replace(FOUR, shares={"a": 1.0})}, ValueError, "not one for each of the table's teachers"),
    ],
)
def test_jobs_that_cannot_run_are_refused(tmp_path: Path, fields: dict, error, message: str) -> None:
    made = replace(config(tmp_path), **fields)
    with pytest.raises(error, match=message):
        check_embed_pairs(made)


def test_tables_of_another_kind_are_refused(tmp_path: Path) -> None:
    made = config(tmp_path)
    other = write_features(str(tmp_path / "latents"), kind="latents")
    for change, message in (({"features": other}, "holds latents"), ({"mined": made.features}, "holds features")):
        with pytest.raises(PairsError, match=message):
            check_embed_pairs(replace(made, **change))
    none = write_mined(str(tmp_path / "none"))
    with pytest.raises(PairsError, match="There is no pair of two images"):
        check_embed_pairs(replace(made, mined=none))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TargetConfig, {"kept": 0}), (TargetConfig, {"finer": 0}), (TargetConfig, {"shares": {"a": 0.0}}),
        (TargetConfig, {"teacher_temperature": 0.0}), (EmbedPairsConfig, {"within_category": -1}),
        (EmbedPairsConfig, {"max_quarantined_share": 2.0}), (EmbedPairsConfig, {"batch_size": 0}),
    ],
)  # fmt: skip
def test_configs_that_mean_nothing_are_refused(kind, fields: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(fields))}="):
        kind(**fields)
