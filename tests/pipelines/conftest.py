"""What all pipeline tests use: the servers, a Ray connection, a tiny base model."""

import pytest

from tests.inference.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))
