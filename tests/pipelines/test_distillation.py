"""The workflow `distill` on real servers: rendered, embedded, distilled, refined, registered, judged; nothing twice."""

import json
from dataclasses import replace

import pytest

from d2f_core.correspondence.artifact import describe_matcher
from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, MultiViewConfig, StudentConfig
from d2f_core.correspondence.embed.config import EmbedConfig
from d2f_core.correspondence.evaluate.config import (
    EvaluateMatchesConfig,
    MatcherChoice,
    MatcherGateConfig,
    ViewPairsConfig,
)
from d2f_core.correspondence.publish.config import RegisterMatcherConfig
from d2f_core.correspondence.views.config import MakeViewsConfig
from d2f_core.data.sources.config import ImageSource
from d2f_core.storage import exists, read_bytes
from d2f_core.tracking import get_alias, pin_model
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.distill_config import DistillConfig
from pipelines.embed_images import DINO, LITE0
from pipelines.unpack_config import UnpackConfig
from pipelines.workflow import check, main
from pipelines.workflow_config import DistillWorkflowConfig

HOME = "s3://d2f/tests/distillation"
NAME = "matcher-workflow"
STAGES = [
    "make_views", "unpack_dinov2", "embed_images", "distill", "refine", "control", "register", "evaluate_matches",
]  # fmt: skip


def workflow() -> DistillWorkflowConfig:
    base, views, features = (f"{HOME}/{name}" for name in ("base", "views", "features"))
    student = StudentConfig(base=base, layers=2, first_block=1, dropout=0.0)
    distillation = DistillationConfig(shares={"lite0": 0.5, "dino": 0.5})
    train = TrainConfig(
        num_steps=2, global_batch_size=4, micro_batch_size=4, lanes=1, window_rows=4, checkpoint_every=2,
        evaluate_every=0, ema=EmaConfig(decay=0.0),
    )  # fmt: skip
    first = DistillConfig(
        matcher=MatcherConfig(student=student, distillation=distillation), features=features,
        output=f"{HOME}/distill", train=train, matching_size=56, experiment="distillation tests",
    )  # fmt: skip
    return DistillWorkflowConfig(
        output=f"{HOME}/workflow",
        views=MakeViewsConfig(
            output=views, categories=("chair", "plane"), size=48, train_meshes=2, val_meshes=0, test_meshes=2,
            views_per_mesh=4,
        ),
        base=UnpackConfig(output=base),
        embed=EmbedConfig(
            source=ImageSource(uri=views), split="train", output=features, size=42,
            teachers=(replace(LITE0, size=64), replace(DINO, uri=base, size=56, layers=2)),
        ),
        distill=first,
        refine=replace(
            first, output=f"{HOME}/refine", bucket="things",
            matcher=replace(first.matcher, multi_view=MultiViewConfig(weight=1.0, points=8, least_points=1)),
        ),
        control=replace(first, output=f"{HOME}/control"),
        register=RegisterMatcherConfig(name=NAME),
        evaluate=EvaluateMatchesConfig(
            matchers=(
                MatcherChoice(name="untrained", uri=base, layers=2, size=56),
                MatcherChoice(name="refined", uri=f"models:/{NAME}@candidate"),
            ),
            views=ViewPairsConfig(views=views, split="test", per_range=2), output=f"{HOME}/evaluation",
            replicates=20, shown=1, gate=MatcherGateConfig(candidate="refined", must_beat=("untrained",)),
            experiment="distillation tests",
        ),
    )  # fmt: skip


def summary(config: DistillWorkflowConfig) -> dict:
    return json.loads(read_bytes(f"{config.output}/summary.json"))


@pytest.mark.timeout(600)
def test_one_job_makes_a_registered_and_judged_matcher_and_does_nothing_twice(cluster: None) -> None:
    config = workflow()
    check(config)
    main(config)
    first = summary(config)
    assert [stage["name"] for stage in first["stages"]] == STAGES
    assert not any(stage["skipped"] for stage in first["stages"])
    assert pin_model(f"models:/{NAME}@candidate") == f"models:/{first['registered_model']}/{first['model_version']}"
    assert first["gate"].startswith("does not hold: ") and get_alias(NAME, "champion") is None, "of two steps"
    assert exists(first["report"])
    scores = json.loads(read_bytes(f"{config.evaluate.output}/scores.json"))
    assert scores["gate"]["candidate"] == f"models:/{NAME}/1"
    assert {"untrained", "refined", "HOG", "box copy"} <= {row["name"] for row in scores["rows"]}
    described = describe_matcher(f"models:/{NAME}@candidate")
    assert described.preparation.size == 56 and described.training["multi_view"]["weight"] == 1.0
    main(config)
    assert all(stage["skipped"] for stage in summary(config)["stages"])


def test_stages_that_do_not_fit_one_another_are_refused() -> None:
    config = workflow()
    other = MatcherChoice(name="untrained", uri="s3://d2f/other/model")
    for change, message in (
        ({"output": ""}, "output is empty"),
        (
            {"refine": replace(config.refine, features="s3://d2f/other")},
            "refine.features='s3://d2f/other'",
        ),
        ({"base": UnpackConfig(output="s3://d2f/other")}, "distill.matcher.student.base="),
        ({"views": replace(config.views, output="s3://d2f/other")}, "embed.source.uri="),
        (
            {"evaluate": replace(config.evaluate, matchers=(other, config.evaluate.matchers[1]))},
            "does not make",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **change)
