"""The kill tests use the servers of all tests, and a tiny base model."""

import pytest

from infra.local.stack import StackEnv
from pipelines.configs import FinetuneConfig
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def unbroken(base: str, stack: StackEnv) -> FinetuneConfig:
    """A training that nothing happened to."""
    import ray

    from pipelines.finetune import main
    from tests.chaos.training import make_config

    del stack
    ray.init(ignore_reinit_error=True)
    config = make_config(base, "unbroken")
    main(config)
    return config
