"""Servers for the tests: started when first asked for, once for the session, in a directory of their own."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from infra.local.stack import Stack, StackEnv

# Cases are the same in every run, and none fails because the machine was busy.
settings.register_profile("d2f", deadline=None, derandomize=True)
settings.load_profile("d2f")

STACK_DIRECTORY = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Fix where the session's servers live, and let a terminated run (`timeout`, a cancelled job) still stop them."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
    # Tiny networks gain nothing by threads, and lose a hundredfold where these wait for a core that is taken.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray reads these when it is imported, which test modules do before the stack is up.
    directory = Path(tempfile.mkdtemp(prefix="d2f-tests-"))
    config.stash[STACK_DIRECTORY] = directory
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(directory / "ray_token")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the chaos tests last: `make test` runs other tests beside these, which end earlier, and kills need quiet."""
    chaos = Path(__file__).parent / "chaos"
    items.sort(key=lambda item: chaos in item.path.parents)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[STACK_DIRECTORY], ignore_errors=True)


@pytest.fixture(scope="session")
def stack_directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    directory = request.config.stash[STACK_DIRECTORY]
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


@pytest.fixture(scope="module")
def cluster(stack: StackEnv) -> Iterator[None]:
    """A connection to the Ray head, ended after the module."""
    import ray  # not above: `pytest_configure` sets what Ray reads when it is imported

    del stack
    ray.init(ignore_reinit_error=True)
    yield
    ray.shutdown()
