"""A prefix of its own for each test, and the stack's Ray."""

import uuid

import pytest

from infra.local.stack import StackEnv


@pytest.fixture
def bucket(s3: StackEnv) -> str:
    del s3
    return f"s3://d2f/tests/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def cluster(stack: StackEnv) -> StackEnv:
    """A driver connected to the stack's Ray."""
    import ray

    ray.init(ignore_reinit_error=True)
    return stack
