"""Processes that several modules' tests share: starting them takes longer than what they do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from d2f_core.train.compiler import missing_compiler
from d2f_core.train.config import TrainConfig
from tests.train.processes import Workers


@pytest.fixture(scope="package")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pair` and `single` would compile operators to."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="package")
def pair(extensions: Path) -> Iterator[Workers]:
    """Two workers."""
    workers = Workers(2, TORCH_EXTENSIONS_DIR=str(extensions))
    yield workers
    workers.close()


@pytest.fixture(scope="package")
def single(extensions: Path) -> Iterator[Workers]:
    """One worker."""
    workers = Workers(1, TORCH_EXTENSIONS_DIR=str(extensions))
    yield workers
    workers.close()


def _need_cpu_adam() -> None:
    if missing := missing_compiler(TrainConfig(optimizer="cpu_adamw", offload="optimizer")):
        pytest.skip(missing)


@pytest.fixture(scope="package")
def offloading_pair() -> Iterator[Workers]:
    """Two workers with DeepSpeed's CPU AdamW; tests are skipped where it is not compiled and cannot be."""
    _need_cpu_adam()
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="package")
def offloading_single() -> Iterator[Workers]:
    """One worker, likewise."""
    _need_cpu_adam()
    workers = Workers(1)
    yield workers
    workers.close()
