"""What the configs of batch jobs have in common: the pool of actors."""

import dataclasses
from typing import Any

import pytest

from d2f_core.flow.depth.config import PredictDepthConfig, PredictDepthError
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig, EncodeError
from d2f_core.flow.evaluate.config import ScoreConfig
from d2f_core.flow.generate.config import GenerateConfig, GenerateError

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
