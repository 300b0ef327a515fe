"""What all pipeline tests use: the servers, a Ray connection, a tiny base model, and one depth workflow's results."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.flow.tiny_base import write_tiny_base

if TYPE_CHECKING:  # `pytest_configure` sets what Ray reads when it is imported
    from infra.local.stack import StackEnv
    from pipelines.workflow_config import DepthConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def depth_workflow(base: str) -> "DepthConfig":
    from tests.pipelines.depth_workflow import depth_config

    return depth_config(base)


@pytest.fixture(scope="session")
def depth_made(depth_workflow: "DepthConfig", stack: "StackEnv") -> dict[str, Any]:
    """The summary of the workflow, which has run."""
    import ray

    from d2f_core.storage import read_bytes
    from pipelines.workflow import main
    from tests.flow.here import measured_here
    from tests.train_here import trained_here

    del stack
    ray.init(ignore_reinit_error=True)
    with trained_here(), measured_here():
        main(depth_workflow)
    return json.loads(read_bytes(f"{depth_workflow.output}/summary.json"))
