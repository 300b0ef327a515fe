"""A small training for the kill tests: what it trains on, what it leaves behind, and how its processes are found.

One of the three files of its latents is cut off, so that the ledger of unusable rows has to come through as well.
"""

import threading
from collections.abc import Callable
from typing import Self

import mlflow
import numpy as np
import torch
from mlflow.entities import Metric

from d2f_core import storage
from d2f_core.data.manifest import manifest_exists, read_manifest
from d2f_core.data.quarantine import read_quarantine
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.train import checkpoint
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.steps import consumed_digest
from pipelines.configs import FinetuneConfig
from pipelines.distill_config import DistillConfig
from pipelines.finetune import main
from pipelines.finetune_task import COLUMNS
from tests.latent_tables import write_latents
from tests.ray_processes import processes, wait_for

ROWS, STEPS, SAVES = 96, 40, 5
LATENTS = "s3://d2f/test-chaos/latents"
CUT_OFF = range(32, 64)
"""Rows of the file that is cut off."""
EXPERIMENT = "test-chaos"
Training = FinetuneConfig | DistillConfig


def write_cut_off_latents(fingerprint: str) -> None:
    write_latents(LATENTS, fingerprint, rows=ROWS, rows_per_file=len(CUT_OFF), captions=7)
    file = f"{LATENTS}/{read_manifest(LATENTS).files[1].path}"
    data = storage.read_bytes(file)
    storage.write_bytes(file, data[: len(data) // 2])


def make_config(base: str, name: str, **train) -> FinetuneConfig:
    if not manifest_exists(LATENTS):
        write_cut_off_latents(autoencoder_fingerprint(resolve_base(base)))
    values = {
        "num_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "num_workers": 2, "threads_per_worker": 1,
        "learning_rate": 1e-2, "ema": EmaConfig(decay=0.9), "log_every": 4, "checkpoint_every": SAVES,
        "evaluate_every": 0, "lanes": 4, "window_rows": 8,
        "max_quarantined_share": 0.5,
    } | train  # fmt: skip
    return FinetuneConfig(
        model=ModelConfig(base=base, method="lora", lora=LoraConfig(rank=2), caption_dropout=0.5),
        latents=LATENTS,
        output=f"s3://d2f/test-chaos/{name}",
        holdout_rows=4,
        train=TrainConfig(**values),
        experiment=EXPERIMENT,
        name=name,
    )


def final(output: str) -> tuple[checkpoint.Checkpoint, dict[str, dict[str, torch.Tensor]]]:
    last = checkpoint.list_checkpoints(output)[-1]
    return last, {kind: checkpoint.read_tensors(last, kind) for kind in checkpoint.KINDS}


def assert_same_run(config: FinetuneConfig, expected: FinetuneConfig) -> None:
    """Weights, moments and averages bit for bit, exactly the planned samples, one MLflow run without gap or double."""
    last = assert_same_end(config, expected)
    plan = config.plan([read_manifest(config.latents)], COLUMNS)
    epochs, rows = plan.sources[0].order.at(np.arange(config.train.num_steps * config.train.global_batch_size))
    assert int(last.manifest.state["consumed"]) == consumed_digest(epochs, rows)


def assert_same_end(config: Training, expected: Training) -> checkpoint.Checkpoint:
    """Two trainings of any system end with the same bits, samples, ledger and steps in MLflow; returns the last
    checkpoint of the first."""
    last, tensors = final(config.output)
    wanted, unbroken = final(expected.output)
    assert last.manifest.step == wanted.manifest.step == config.train.num_steps
    for kind, named in unbroken.items():
        assert named.keys() == tensors[kind].keys() and named
        for name, tensor in named.items():
            assert torch.equal(tensor, tensors[kind][name]), (kind, name)
    assert last.manifest.state["consumed"] == wanted.manifest.state["consumed"]
    assert read_quarantine(config.output) == read_quarantine(expected.output)
    steps, every = [point.step for point in loss_points(config, status="FINISHED")], config.train.log_every
    assert sorted(steps) == list(range(every, config.train.num_steps + 1, every))
    return last


def loss_points(config: Training, status: str) -> list[Metric]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(config.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`d2f.run_key` = '{config.output}'")
    assert run.info.status == status
    return client.get_metric_history(run.info.run_id, "loss")


def losses(config: FinetuneConfig) -> list[float]:
    """In the order of the steps."""
    return [point.value for point in sorted(loss_points(config, "FINISHED"), key=lambda point: point.step)]


def has_checkpoint(output: str, step: int = SAVES) -> bool:
    return any(one.manifest.step >= step for one in checkpoint.list_checkpoints(output))


def newest_step(output: str) -> int:
    return max((one.manifest.step for one in checkpoint.list_checkpoints(output)), default=0)


def off_schedule(output: str) -> list[int]:
    """Steps of checkpoints that the schedule did not ask for."""
    return [one.manifest.step for one in checkpoint.list_checkpoints(output) if one.manifest.step % SAVES]


class Running:
    """A training in a thread of this process; leaving the context waits for its end, even after a failed check."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config, self.error = config, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        wait_for(what, lambda: self.error or condition())
        if self.error:
            raise self.error

    def wait_for_the_next_checkpoint(self) -> None:
        step = newest_step(self.config.output)
        self.wait_for("the next checkpoint", lambda: has_checkpoint(self.config.output, step + 1))

    def kill_one(self, title: str) -> None:
        self.wait_for(f"a process {title}", lambda: processes(title))
        processes(title)[-1].kill()

    def _run(self) -> None:
        try:
            main(self.config)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failed: object) -> None:
        self._thread.join(300)
        assert not self._thread.is_alive(), "the training did not end"
        if self.error:
            raise self.error
