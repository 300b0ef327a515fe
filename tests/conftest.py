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
TESTS = Path(__file__).parent
RUNGS = ("quick", "process", "servers")
"""What `--rung` chooses: pure functions and files; networks, large files, and servers of a test's own; the session's
servers and workers, and clusters."""
STARTS_PROCESSES = {"s3", "stack", "stack_directory", "pair", "single", "offloading_pair", "offloading_single"}
"""Fixtures of servers and of worker processes."""
LONGER = ("model", "data/test_hostile_inputs.py", "pipelines/test_captions.py", "pipelines/test_checkpoint_export.py",
          "pipelines/test_recipes.py", "test_credentials.py", "test_fault_proxy.py", "test_storage.py",
          "test_tracking.py")  # fmt: skip
QUICK_NEVERTHELESS = ("model/test_artifact.py", "model/test_hostile_artifacts.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rung", choices=RUNGS, help="only tests of pure functions, of one process, or with the session's servers"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fix where the session's servers live, and let a terminated run (`timeout`, a cancelled job) still stop them."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
    # Tiny networks gain nothing by threads, and lose a hundredfold where these wait for a core that is taken.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray reads these when it is imported, which test modules do before the stack is up.
    directory = Path(tempfile.mkdtemp(prefix="d2f-tests-"))
    config.stash[STACK_DIRECTORY] = directory
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Ray's workers give way to all else by default, and so would wait for the tests that run beside them.
    os.environ["RAY_worker_niceness"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(directory / "ray_token")


def rung_of(item: pytest.Item) -> str:
    if STARTS_PROCESSES & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("starts_cluster"):
        return "servers"
    place = item.path.relative_to(TESTS).as_posix()
    longer = place.startswith(LONGER) and place not in QUICK_NEVERTHELESS
    return "process" if longer or item.get_closest_marker("starts_processes") else "quick"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put first what fails most plainly, and the chaos tests last: other tests, beside them, have ended by then."""
    rungs = {item: rung_of(item) for item in items}
    chaos = TESTS / "chaos"
    items.sort(key=lambda item: (chaos in item.path.parents, RUNGS.index(rungs[item])))
    if rung := config.getoption("--rung"):
        config.hook.pytest_deselected(items=[item for item in items if rungs[item] != rung])
        items[:] = [item for item in items if rungs[item] == rung]


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
def cluster(stack: StackEnv) -> None:
    """A connection to the Ray head; it lasts, for Ray ends the processes of a connection with it, and new ones would
    import everything anew."""
    import ray  # not above: `pytest_configure` sets what Ray reads when it is imported

    del stack
    ray.init(ignore_reinit_error=True)
