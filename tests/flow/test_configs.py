"""Configs refuse at the door what cannot work; those of batch jobs have their pool of actors in common."""

import dataclasses
from typing import Any

import pytest

from d2f_core.flow.depth.config import DepthEvaluationError, EvaluateDepthConfig, PredictDepthConfig, PredictDepthError
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig, EncodeError
from d2f_core.flow.estimate.config import EstimateConfig
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError, MeasureConfig, ScoreConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig, GenerateError
from d2f_core.flow.publish.config import PromoteConfig, RegisterConfig
from d2f_core.registration import RegisterError

ERRORS = {
    GenerateConfig: (GenerateError, ""), PredictDepthConfig: (PredictDepthError, ""), EncodeConfig: (EncodeError, ""),
    EncodeDepthConfig: (EncodeError, ""), ScoreConfig: (ValueError, "score: "),
}  # fmt: skip


@pytest.mark.parametrize("name", ["batch_size", "num_actors", "cpus_per_actor"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_pool_without_actors_is_refused_by_the_jobs_own_error(kind: type[Any], name: str):
    error, where = ERRORS[kind]
    with pytest.raises(error, match=rf"^{where}{name}=0 must be at least 1\.$"):
        kind(**{name: 0})


@pytest.mark.parametrize("kind", ERRORS)
def test_flags_and_yaml_tell_the_work_before_the_pool(kind: type[Any]):
    names = [field.name for field in dataclasses.fields(kind)]
    pool = names.index("num_actors")
    assert names.index("batch_size") < pool
    assert names[pool : pool + 3] == ["num_actors", "cpus_per_actor", "gpus_per_actor"]


@pytest.mark.parametrize(
    ("kind", "fields", "error", "message"),
    [
        (GenerateConfig, {"steps": (4, 4)}, GenerateError, r"steps=\(4, 4\) must be different numbers of at least 1"),
        (GenerateConfig, {"steps": (0,)}, GenerateError, r"steps=\(0,\) must be different numbers of at least 1"),
        (GenerateConfig, {"quality": 0}, GenerateError, "quality=0 must be from 1 to 100"),
        (GenerateConfig, {"quality": 101}, GenerateError, "quality=101 must be from 1 to 100"),
        (GenerateConfig, {"emit": "latents", "steps": (1, 2)}, GenerateError, "'latents' .* Give one number of steps"),
        (ContactSheetConfig, {"titles": ("a",), "generations": ("x", "y")}, ValueError, "1 titles for 2 generations"),
        (ScoreConfig, {"dimensions": -1}, ValueError, "score: dimensions=-1 must be at least 1, or 0 for all"),
        (
            MeasureConfig,
            {"neighbours": 40, "pairwise_rows": 40},
            ValueError,
            "neighbours=40 must be below pairwise_rows=40",
        ),
        (MeasureConfig, {"pairwise_rows": 29}, ValueError, "pairwise_rows=29 must be at least 30"),
        (EvaluateConfig, {"straightness_prompts": -1}, EvaluateError, "straightness_prompts=-1 must be at least 0"),
        (EvaluateConfig, {"shown_prompts": -1}, EvaluateError, "shown_prompts=-1 must be at least 0"),
        (EvaluateConfig, {"champion_alias": ""}, EvaluateError, "champion_alias is empty. Use 'champion'"),
        (EvaluateDepthConfig, {"replicates": 19}, DepthEvaluationError, "replicates=19 must be at least 20"),
        (EvaluateDepthConfig, {"shown": 0}, DepthEvaluationError, "shown=0 at least 1"),
        (RegisterConfig, {"alias": ""}, RegisterError, "alias is empty. Use 'candidate'"),
        (
            RegisterConfig,
            {"alias": "champion"},
            RegisterError,
            "'champion' must not be moved by .* Use 'candidate', .*pipelines.promote",
        ),
        (RegisterConfig, {"name": "a/b"}, RegisterError, "name='a/b' must not be empty or hold any of / @ :"),
        (RegisterConfig, {"name": ""}, RegisterError, "name='' must not be empty"),
        (PromoteConfig, {"name": "it's"}, RegisterError, 'name="it\'s" must not .* Choose another'),
        (PromoteConfig, {"alias": ""}, RegisterError, "alias is empty. Use 'champion'"),
        (PromoteConfig, {"version": "newest"}, RegisterError, "version='newest' is no number. Give one .* such as 3"),
        (PromoteConfig, {"version": "3", "rollback": True}, RegisterError, "version='3' with rollback: .* Give one"),
        (
            EstimateConfig,
            {"gpu": "h200"},
            ValueError,
            "gpu='h200' is not known. Use one of a10g, .*--tflops for another",
        ),
        (EstimateConfig, {"utilization": 0.0}, ValueError, "utilization=0.0 must lie above 0 .* Use 0.2 to 0.5"),
        (EstimateConfig, {"utilization": 1.5}, ValueError, "utilization=1.5 must lie above 0 and at most at 1"),
        (EstimateConfig, {"dollars_per_gpu_hour": -1.0}, ValueError, "dollars_per_gpu_hour=-1.0 must be a number"),
        (EstimateConfig, {"rows": 0}, ValueError, "rows=0 must be at least 1"),
        (EstimateConfig, {"captions": -1}, ValueError, "captions=-1 at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_rule(
    kind: type[Any], fields: dict[str, Any], error: type[ValueError], message: str
):
    with pytest.raises(error, match=message):
        kind(**({"architecture": "sd15"} if kind is EstimateConfig else {}), **fields)


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        (("a", "a"), r"titles=\('a', 'a'\) must be different, one for each of the predictions"),
        (("a",), r"titles=\('a',\) must be different, one for each"),
        (("a", "mean depth"), "must not be those of floors: constant, vertical ramp, mean depth"),
    ],
)
def test_titles_of_depth_predictions_tell_them_apart_and_from_the_floors(titles: tuple[str, ...], message: str):
    with pytest.raises(DepthEvaluationError, match=message):
        EvaluateDepthConfig(predictions=("x", "y"), titles=titles)
    assert EvaluateDepthConfig(predictions=("x", "y"), titles=("a", "b")).titles == ("a", "b")
