"""Damaged data, a bad network, and other numbers of workers."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray

from benchmarks.fault_proxy import FaultProxy
from d2f_core import storage
from d2f_core.data.manifest import read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.train import heartbeat
from d2f_core.train.launch import TrainingStoppedError
from infra.local.stack import Stack, StackEnv
from pipelines.finetune import main
from tests.chaos.training import Running, assert_same_run, final, losses, make_config, processes
from tests.slow import slow

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


@slow("150 s: four workers on two cores")
def test_losses_do_not_depend_on_the_number_of_workers_nor_on_the_zero_stage(base, unbroken):
    config = make_config(base, "four-workers", num_workers=4, zero_stage=3)
    main(config)
    assert losses(config) == pytest.approx(losses(unbroken), abs=1e-5)
    assert final(config.output)[0].manifest.state["consumed"] == final(unbroken.output)[0].manifest.state["consumed"]


def damaged_latents(uri: str, change) -> None:
    file = f"{uri}/{read_manifest(uri).files[1].path}"
    storage.write_bytes(file, change(storage.read_bytes(file)))


def test_rows_that_cannot_be_read_are_left_out_and_named(base):
    latents = "s3://d2f/test-chaos/truncated"
    config = make_config(
        base, "truncated", latents, max_quarantined_share=0.5, num_workers=1, num_steps=16, log_every=8
    )  # one epoch and a part of the next
    damaged_latents(latents, lambda data: data[: len(data) // 2])
    main(config)
    ledger = read_quarantine(config.output)
    holdout = config.plan([read_manifest(latents)], ()).sources[0].order.holdout()
    assert {bad.source_uri for bad in ledger} == {f"{latents}#{row}" for row in set(range(32, 64)) - set(holdout)}
    assert all("part-1.parquet" in bad.reason for bad in ledger)
    assert final(config.output)[0].manifest.step == config.train.num_steps


@slow("a minute: the limit alone is in tests/train/test_quarantine.py")
def test_more_unusable_rows_than_allowed_end_the_training_at_once(base):
    latents = "s3://d2f/test-chaos/too-many"
    config = make_config(base, "too-many", latents, evaluate_every=0)
    damaged_latents(latents, lambda data: data[: len(data) // 2])
    with pytest.raises(
        TrainingStoppedError, match=r"rows are unusable, more than max_quarantined_share=0\.01 .*part-1"
    ):
        main(config)


def test_nothing_changes_by_a_bad_network_killed_readers_killed_servers_and_a_worker_that_stands_still(
    base, unbroken, stack: StackEnv, stack_directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch
):
    """Refused, cut and lost answers of S3 for all of the cluster's processes throughout, and an outage of all of it.

    Reader and executor are killed as soon as they are there: so few rows are read ahead at once, and then their readers
    end.
    """
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 6.0)  # far from the time limit, however busy the machine is
    # Without Ray's head: `up` would replace it, and the training with it, if it were too busy to answer.
    servers = Stack(stack_directory, parts=("s3", "mlflow"), tied=True)
    address = urlsplit(stack.variables["AWS_ENDPOINT_URL"])
    with (
        FaultProxy(str(address.hostname), int(address.port or 0), seed=1) as proxy,
        cluster_with(AWS_ENDPOINT_URL=proxy.url),
        caplog.at_level(logging.WARNING, logger="d2f_core.train"),
    ):
        proxy.error_rate, proxy.reset_rate = 0.1, 0.05
        config = make_config(base, "bad-network", worker_timeout_seconds=30)
        with Running(config) as running:
            running.kill_one("ray::MapWorker(MapBatches(PlanReader")
            running.kill_one("ray::SplitCoordinator")
            running.wait_for_the_next_checkpoint()
            proxy.outage_for(5)
            running.wait_for_the_next_checkpoint()
            for status in servers.status():
                for pid in status.pids:
                    os.kill(pid, signal.SIGKILL)
            servers.up()
            running.wait_for_the_next_checkpoint()
            stopped = processes("ray::RayTrainWorker")[-1]
            os.kill(stopped.pid, signal.SIGSTOP)
        assert proxy.counts["error"] and proxy.counts["reset"] and proxy.counts["refused"], "there were faults"
    assert f"process {stopped.pid}) was last heard of" in caplog.text, "named before the time limit"
    assert_same_run(config, unbroken)


@contextlib.contextmanager
def cluster_with(**variables: str) -> Iterator[None]:
    """A connection whose processes on the cluster have these variables."""
    ray.shutdown()
    ray.init(runtime_env={"env_vars": variables})
    try:
        yield
    finally:
        ray.shutdown()
        ray.init()
