"""S3 and MLflow for tests that bring a Ray cluster of their own."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from infra.local.stack import Stack


@contextlib.contextmanager
def own_servers(directory: Path) -> Iterator[dict[str, str]]:
    """The variables that name them, which the environment has until the context ends."""
    stack, before = Stack(directory, parts=("s3", "mlflow"), tied=True), dict(os.environ)
    try:
        variables = dict(stack.up().variables)
        os.environ.update(variables)
        yield variables
    finally:
        stack.down()
        os.environ.clear()
        os.environ.update(before)
