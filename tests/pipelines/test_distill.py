"""A student is distilled and refined on the rails: resumed exactly, evaluated, and kept with how it is used."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from d2f_core.batch.table_job import make_table
from d2f_core.correspondence import artifact
from d2f_core.correspondence.artifact import (
    MatcherDescription,
    MatcherError,
    describe_matcher,
    load_matcher,
    load_student,
    save_matcher,
)
from d2f_core.correspondence.config import (
    DistillationConfig,
    MatcherConfig,
    MultiViewConfig,
    StudentConfig,
    TargetConfig,
)
from d2f_core.correspondence.evaluate.config import ViewPairsConfig
from d2f_core.correspondence.matching import Decoding
from d2f_core.correspondence.mine.config import MinePairsConfig
from d2f_core.correspondence.mine.table import CLUSTER_SCHEMA, check_mine, mine_pairs
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import add_adapters, load_network, trained
from d2f_core.correspondence.targets.check import check_embed_pairs
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.table_plan import BucketError
from d2f_core.model.base import described_copy
from d2f_core.tracking import RunHandle
from d2f_core.train.checkpoint import CheckpointError
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines import distill_job
from pipelines.distill_config import DistillConfig
from pipelines.distill_data import groups
from pipelines.distill_job import check_distill
from pipelines.training import train
from tests.correspondence.features import write_features
from tests.correspondence.made_views import write_views
from tests.correspondence.test_targets import here
from tests.correspondence.tiny_transformers import write

STEPS = TrainConfig(
    num_steps=4, global_batch_size=8, micro_batch_size=4, learning_rate=1e-2, lanes=1, window_rows=4,
    checkpoint_every=2, evaluate_every=4, evaluate_on="workers", ema=EmaConfig(decay=0.0),
)  # fmt: skip


def config(tmp_path: Path, **fields) -> DistillConfig:
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), dropout=0.1)
    made = DistillConfig(
        matcher=MatcherConfig(student=student), features=write_features(str(tmp_path / "features")),
        output=str(tmp_path / "run"), train=STEPS,
    )  # fmt: skip
    return replace(made, **fields)


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For checks without an MLflow server."""
    monkeypatch.setattr(distill_job, "check_tracking", lambda: None)


def test_things_share_a_micro_batch_by_groups_of_those_that_follow_one_another() -> None:
    categories = ["a"] * 5 + ["b"] * 2
    meshes = ["a0", "a1", "a1", "a2", "a3", "b0", "b0"]
    assert groups(categories, meshes, 2) == ["a/0", "a/0", "a/0", "a/1", "a/1", "b/0", "b/0"]
    assert groups(["a"] * 3, ["a0", "a1", "a2"], 2) == ["a/0"] * 3, "no group of one thing beside others"


@pytest.mark.parametrize("bucket", ["category", "things"])
def test_a_micro_batch_holds_images_of_one_bucket(untracked: None, tmp_path: Path, bucket) -> None:
    plan = check_distill(config(tmp_path, bucket=bucket)).plan
    for number in range(8):
        rows = plan.micro_batch(number, 0, 1).rows
        assert len(set(rows // 12)) == 1, "of one category"
        if bucket == "things":
            assert len(set(rows // 4)) <= 3 and plan.one_source_per == "micro_batch"


def write_clusters(uri: str, ids: list[str], clusters: list[str]) -> str:
    part = write_part(uri, "part-0.parquet", pa.table([ids, clusters], schema=CLUSTER_SCHEMA))
    write_manifest(uri, Manifest(kind="clusters", files=(part,)))
    return uri


def test_a_micro_batch_may_hold_images_of_a_cluster_wherever_their_rows_lie(untracked: None, tmp_path: Path) -> None:
    ids, numbers = [f"{row:032x}" for row in range(24)], [row * 7 % 24 // 6 for row in range(24)]
    given = write_clusters(str(tmp_path / "a"), ids[::-1], [f"r{number}" for number in numbers[::-1]])
    other = write_clusters(str(tmp_path / "b"), ids, [f"r{row // 6}" for row in range(24)])
    made = config(tmp_path, bucket="retrieval", clusters=given)
    checked = check_distill(made)
    for number in range(12):
        rows = checked.plan.micro_batch(number, 0, 1).rows.tolist()
        assert len({numbers[row] for row in rows}) == 1 and len(set(rows)) == 4
    identities = {checked.identity, check_distill(replace(made, clusters=other)).identity}
    assert len(identities | {check_distill(config(tmp_path)).identity}) == 3, "clusters count by what they hold"
    short = write_clusters(str(tmp_path / "c"), ids[1:], ["r"] * 23)
    for clusters, message in ((short, "1 of 24 images of .* are in no cluster"), (made.features, "holds features")):
        with pytest.raises(ValueError, match=message):
            check_distill(replace(made, clusters=clusters))


def test_clusters_are_probed_and_told_to_the_nodes(
    untracked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like all that a training reads: an unreachable place is refused first, and a path that nodes do not share."""
    probed = list[str]()
    monkeypatch.setattr(distill_job.storage, "check_reachable", lambda uri, **_: probed.append(uri))
    given = write_clusters(str(tmp_path / "a"), [f"{row:032x}" for row in range(24)], ["r"] * 24)
    checked = check_distill(config(tmp_path, bucket="retrieval", clusters=given))
    assert given in probed and checked.job().reads["clusters"] == given


def test_the_identity_tells_what_is_computed(untracked: None, tmp_path: Path) -> None:
    made = config(tmp_path)
    other = replace(made.matcher, distillation=DistillationConfig(temperature=0.1))
    same = replace(made, output=str(tmp_path / "other"), train=replace(STEPS, checkpoint_every=1))
    (tmp_path / "copy").symlink_to(tmp_path / "base")
    moved = replace(made.matcher, student=replace(made.matcher.student, base=str(tmp_path / "copy")))
    identities = [
        check_distill(each).identity
        for each in (
            made, same, replace(made, matcher=moved), replace(made, matcher=other), replace(made, bucket="things"),
            replace(made, normalisation="none"), replace(made, train=replace(STEPS, micro_batch_size=8)),
        )
    ]  # fmt: skip
    assert identities[0] == identities[1] == identities[2] and len(set(identities[2:])) == 5


def started(made: DistillConfig, path: Path, **changes) -> str:
    """A matcher to start with, as a training would leave it."""
    student = made.matcher.student
    network = add_adapters(load_network(student), student, seed=changes.pop("seed", 0))
    described = MatcherDescription(
        student=student, base_hash=described_copy(student.base).hash(), preparation=Preparation(size=28),
        decoding=Decoding(), training={},
    )  # fmt: skip
    path.mkdir(exist_ok=True)
    save_matcher(path, network, replace(described, **changes))
    return str(path)


def test_a_start_counts_by_what_it_holds(untracked: None, tmp_path: Path) -> None:
    made = config(tmp_path)
    first, same = (started(made, tmp_path / name) for name in ("first", "same"))
    identities = [check_distill(replace(made, start=start)).identity for start in ("", first, same)]
    assert identities[0] != identities[1] == identities[2]
    started(made, tmp_path / "first", seed=1)
    assert check_distill(replace(made, start=first)).identity != identities[1], "trained anew at the same place"
    for change, message in (
        ({"base_hash": "another"}, "has base=another"),
        ({"preparation": Preparation(size=28, normalisation="none")}, "has normalisation=none"),
    ):
        with pytest.raises(ValueError, match=message):
            check_distill(replace(made, start=started(made, tmp_path / "other", **change)))


def test_a_start_by_its_registered_name_is_pinned_and_counts_by_what_it_holds(
    untracked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, place = config(tmp_path), started(config(tmp_path), tmp_path / "version", seed=3)
    versions = {"models:/m@candidate": "models:/m/1", "models:/m/1": "models:/m/1"}
    files = {**dict.fromkeys(versions, place), place: place}
    monkeypatch.setattr(distill_job, "pin_model", lambda uri: versions.get(uri, uri))
    for module in (distill_job, artifact):
        monkeypatch.setattr(module, "resolve_model", files.__getitem__)
    checked = check_distill(replace(made, start="models:/m@candidate"))
    assert checked.config.start == "models:/m/1", "the workers load the version that was checked"
    assert checked.identity == check_distill(replace(made, start=place)).identity
    wanted = dict(trained(load_student(place)[0]))
    found = dict(trained(checked.job().build_task("cpu").module))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def multi_view(made: DistillConfig) -> DistillConfig:
    return replace(made, matcher=replace(made.matcher, multi_view=MultiViewConfig(weight=1.0)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c, _: replace(c, features=write_features(f"{c.features}-other", kind="latents")),
            ValueError, "holds latents",
        ),
        (
            lambda c, _: replace(c, train=replace(STEPS, micro_batch_size=16, global_batch_size=16)),
            BucketError, "2 of 2 buckets .* 'c0' has 12. Lower it to 12",
        ),
        (
            lambda c, _: replace(c, matcher=replace(c.matcher, distillation=DistillationConfig(shares={"a": 1.0}))),
            ValueError, "not one for each of the table's teachers, a, b",
        ),
        (
            lambda c, _: multi_view(replace(c, features=write_features(f"{c.features}-images", points=0))),
            ValueError, "holds images, no views",
        ),
        (
            lambda c, _: replace(c, train=replace(STEPS, micro_batch_size=1)),
            ValueError, "pairs are made within a micro-batch",
        ),
        (lambda c, path: replace(c, start=str(path / "nothing")), MatcherError, "holds no matcher.json"),
        (
            lambda c, _: multi_view(replace(c, bucket="things", things=1, train=replace(STEPS, micro_batch_size=2))),
            ValueError, "all images of a micro-batch show one thing",
        ),
        (lambda c, _: replace(c, pairs=ViewPairsConfig(views=c.features)), ValueError, "holds features"),
        (
            lambda c, path: replace(c, pairs=ViewPairsConfig(views=write_views(str(path / "views")), split="test")),
            ValueError, r"pairs.split='test' is not in .*Use one of \['train', 'val'\]",
        ),
    ],
)  # fmt: skip
def test_trainings_that_cannot_work_are_refused(tmp_path: Path, change, error, message: str) -> None:
    with pytest.raises(error, match=message):
        check_distill(change(config(tmp_path), tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"things": 0}, "things=0"),
        ({"bucket": "retrieval"}, "bucket='retrieval' and clusters='': one goes with the other"),
        ({"clusters": "s3://x"}, "one goes with the other"),
    ],
)
def test_configs_that_mean_nothing_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_a_student_is_distilled_then_refined_and_says_how_to_use_it(cluster: None, tmp_path: Path) -> None:
    base = "s3://d2f/test-distill"
    made = config(
        tmp_path, output=f"{base}/run", features=write_features(f"{base}/features"),
        pairs=ViewPairsConfig(views=write_views(f"{base}/views"), per_range=2),
    )  # fmt: skip
    result = train(check_distill(made).job()).complete()
    assert result.step == 4 and isinstance(result.run, RunHandle)
    description = describe_matcher(result.model)
    assert (description.preparation.size, description.preparation.normalisation) == (28, "imagenet")
    assert description.training["step"] == 4 and set(description.training["teachers"]) == {"a", "b"}
    student, _ = load_student(result.model)
    assert any(value.abs().max() > 0 for name, value in trained(student) if "lora_B" in name)

    refined = multi_view(replace(made, output=f"{base}/refined", start=result.model, bucket="things"))
    again = train(check_distill(refined).job()).complete()
    weights = [dict(trained(load_student(model)[0])) for model in (result.model, again.model)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match=r"has student\.rank=8, this training 4"):
        other = replace(refined.matcher, student=replace(refined.matcher.student, rank=4))
        check_distill(replace(refined, matcher=other, output=f"{base}/other"))
    with pytest.raises(CheckpointError):
        check_distill(replace(made, normalisation="none"))

    image = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8).numpy()
    matcher = load_matcher(again.model)
    (embedded,) = matcher.embed([image])
    found, cosine = matcher.match(embedded, embedded, torch.tensor([[10.0, 20.0]]))
    assert cosine.item() > 0.99 and (found - torch.tensor([10.0, 20.0])).norm() < 15


def pairs_of(made: DistillConfig, uri: str, **targets) -> str:
    """A table of all pairs of things of a category, without Ray."""
    of = TargetConfig(kept=3, **targets)
    job = EmbedPairsConfig(features=made.features, within_category=4, targets=of, output=uri, rows_per_part=16)
    with here():
        make_table(check_embed_pairs(job))
    return uri


def test_a_table_of_pairs_is_known_by_its_kind(untracked: None, tmp_path: Path) -> None:
    images = config(tmp_path)
    made = replace(images, features=pairs_of(images, str(tmp_path / "pairs")))
    checked = check_distill(made)
    assert checked.plan.one_source_per == "global_batch" and checked.plan.columns[:2] == (
        "source_pixels",
        "target_pixels",
    )
    equal = DistillationConfig(shares={"a": 3.0, "b": 3.0}, temperature=made.matcher.distillation.temperature)
    same = [replace(made, output=str(tmp_path / "x")), replace(made, train=replace(STEPS, checkpoint_every=1))]
    other = [replace(made, train=replace(STEPS, micro_batch_size=1)), images]
    assert {check_distill(each).identity for each in same} == {checked.identity}
    assert len({checked.identity, *(check_distill(each).identity for each in other)}) == 3
    check_distill(replace(made, matcher=replace(made.matcher, distillation=equal)))
    for change, message in (
        ({"finer": 1}, r"were made with finer=2, not 1\. Train with the same"),
        ({"teacher_temperature": 0.02}, "teacher_temperature=0.01, not 0.02"),
        ({"cycle": False}, "cycle=True, not False"),
        ({"shares": {"a": 3.0, "b": 1.0}}, r"shares=\{'a': 0.5, 'b': 0.5\}, not \{'a': 0.75, 'b': 0.25\}"),
    ):
        wrong = replace(made.matcher, distillation=replace(made.matcher.distillation, **change))
        with pytest.raises(ValueError, match=message):
            check_distill(replace(made, matcher=wrong))
    for wrong in (multi_view(made), replace(made, bucket="things")):
        with pytest.raises(ValueError, match=r"holds pairs: multi_view\.weight must be 0 and bucket 'category'"):
            check_distill(wrong)


def test_a_stopped_distillation_of_pairs_ends_with_the_same_bits_on_more_workers(cluster: None, tmp_path: Path) -> None:
    """From features to a student, on a cluster: mined pairs, their targets, a training."""
    base, images = "s3://d2f/test-distill-pairs", config(tmp_path)
    mined = MinePairsConfig(
        features=write_features(f"{base}/features"), column="features_a", apart="mesh", output=f"{base}/mined",
        partners=3,
    )  # fmt: skip
    mine_pairs(mined, check_mine(mined))
    asked = EmbedPairsConfig(
        features=mined.features, mined=mined.output, output=f"{base}/pairs", targets=TargetConfig(kept=4),
        rows_per_part=16, num_actors=2,
    )  # fmt: skip
    manifest = make_table(check_embed_pairs(asked))
    assert manifest.counts["quarantined"] == 0 and 36 <= manifest.num_rows <= 72
    whole = replace(images, features=asked.output, output=f"{base}/whole")
    parts = replace(whole, output=f"{base}/parts")
    wanted = train(check_distill(whole).job()).complete()
    train(check_distill(replace(parts, train=replace(STEPS, num_steps=2))).job())
    found = train(check_distill(replace(parts, train=replace(STEPS, num_workers=2))).job())
    weights = [dict(trained(load_student(each.model)[0])) for each in (wanted, found)]
    assert any(value.abs().max() > 0 for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert describe_matcher(found.model).training["features"] == manifest.digest


def test_a_stopped_distillation_ends_with_the_same_bits_on_more_workers(cluster: None, tmp_path: Path) -> None:
    whole, parts = config(tmp_path, output=str(tmp_path / "whole")), config(tmp_path, output=str(tmp_path / "parts"))
    wanted = train(check_distill(whole).job())
    train(check_distill(replace(parts, train=replace(STEPS, num_steps=2))).job())
    found = train(check_distill(replace(parts, train=replace(STEPS, num_workers=2))).job())
    for (name, value), (_, other) in zip(
        trained(load_student(wanted.model)[0]), trained(load_student(found.model)[0]), strict=True
    ):
        assert torch.equal(value, other), name
