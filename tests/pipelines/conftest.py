"""What all pipeline tests use: the servers, a Ray connection, a tiny base model."""

from collections.abc import Iterator

import pytest

from infra.local.stack import StackEnv
from tests.inference.tiny_base import write_tiny_base


@pytest.fixture(scope="module", autouse=True)
def cluster(stack: StackEnv) -> Iterator[None]:
    import ray  # not above: pytest may import this file before tests/conftest.py has set what Ray reads then

    del stack
    ray.init(ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))
