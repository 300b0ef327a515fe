"""A training as a job of the cluster's job server, as `ray job submit` starts it."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from tests.ray_processes import wait_for


class Job:
    def __init__(self, config: FinetuneConfig, file: Path, *flags: str, endpoint: str) -> None:
        file.write_text(to_yaml(config))
        self._command = [sys.executable, "-m", "pipelines.finetune", "--config", str(file), *flags]
        self._client = JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"])
        self._id = self._client.submit_job(
            entrypoint=shlex.join(self._command), runtime_env={"env_vars": {"AWS_ENDPOINT_URL": endpoint}}
        )

    @property
    def log(self) -> str:
        return self._client.get_job_logs(self._id)

    def status(self) -> JobStatus:
        return self._client.get_job_status(self._id)

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Until the condition holds.

        Raises:
            AssertionError: the job ends before, or it takes too long.
        """
        wait_for(what, lambda: self.status().is_terminal() or condition())
        assert not self.status().is_terminal(), self.log

    def stop(self) -> None:
        """As `ray job stop`: the driver is told to end, and killed when it has not after a time."""
        assert self._client.stop_job(self._id)

    def kill_driver(self) -> None:
        (driver,) = (
            process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == self._command
        )
        driver.kill()

    def wait(self) -> JobStatus:
        wait_for("the job's end", lambda: self.status().is_terminal(), 120)
        return self.status()


@contextlib.contextmanager
def submitted(config: FinetuneConfig, file: Path, *flags: str, endpoint: str) -> Iterator[Job]:
    """A job that has ended when the context is left.

    Args:
        endpoint: by which its processes reach S3.
    """
    job = Job(config, file, *flags, endpoint=endpoint)
    try:
        yield job
    finally:
        if not job.status().is_terminal():
            job.kill_driver()
            job.wait()
