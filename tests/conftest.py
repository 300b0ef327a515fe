"""Servers for the tests: started when first asked for, once for the session, in a directory of their own."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.stack import Stack, StackEnv


def pytest_configure(config: pytest.Config) -> None:
    """Let a terminated run (`timeout`, a cancelled job) still stop its servers."""
    del config
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


@pytest.fixture(scope="session")
def stack_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("stack")
    before = dict(os.environ)
    yield directory
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    Stack(directory).down()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def s3(stack_directory: Path) -> StackEnv:
    """The S3 server alone (1 s); `os.environ` names it from now on. Use s3://d2f/ with a prefix of your test's own."""
    env = Stack(stack_directory, parts=("s3",), tied=True).up()
    os.environ.update(env.variables)
    return env


@pytest.fixture(scope="session")
def stack(s3: StackEnv, stack_directory: Path) -> StackEnv:
    """S3, MLflow and a Ray head with 8 logical CPUs (10 s); `ray.init()` in a test connects to it."""
    del s3
    env = Stack(stack_directory, tied=True).up()
    os.environ.update(env.variables)
    return env
