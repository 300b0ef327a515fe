"""After which failures a training is started again, and what it says when not."""

import errno
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train
import torch
from ray.exceptions import RayTaskError

from d2f_core.model.base import BaseModelError, UnreachableHubError
from d2f_core.resources import Reservation
from d2f_core.storage import StorageError, UnreachableStorageError
from d2f_core.train import checkpoint, launch, restarts
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError
from d2f_core.train.launch import TrainingStoppedError
from d2f_core.train.quarantine import QuarantineLimitError
from d2f_core.train.restarts import Restarts
from d2f_core.train.retention import write_evaluation
from d2f_core.train.retention_rules import Retention
from d2f_core.train.sealed import CheckpointError, UnfinishedSaveError
from d2f_core.train.steps import NonFiniteLossError

BROKEN = RuntimeError("connection closed by peer")


@pytest.fixture(autouse=True)
def leaving(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of nodes that are announced to go."""
    nodes: set[str] = set()
    monkeypatch.setattr(restarts, "leaving_nodes", lambda: nodes)
    for module in (restarts, launch):
        monkeypatch.setattr(module, "ask", lambda method, default: method())
    return nodes


def pulse(*leaving: str) -> SimpleNamespace:
    return SimpleNamespace(leaving=lambda: list(leaving), report=lambda: ["worker 0"])


def preempted(*nodes: str) -> ray.train.PreemptionError:
    info = ray.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})
    return ray.train.PreemptionError(info)


def of_workers(*errors: Exception) -> Exception:
    """What Ray Train raises when these end its workers."""
    wrapped = {rank: RayTaskError("run", "", error) for rank, error in enumerate(errors)}
    return ray.train.WorkerGroupError("failed", wrapped)  # type: ignore[arg-type]


def test_a_node_that_goes_as_announced_costs_no_failure_and_excuses_one_attempt_only(leaving):
    counted = Restarts(limit=-1)
    assert counted.add(BROKEN, pulse(), 0) == "" and counted.in_a_row == 1
    leaving.add("a")
    counted.add(BROKEN, pulse(), 0)
    assert counted.in_a_row == 1, "it is leaving"
    counted.add(BROKEN, pulse("a"), 0)
    assert counted.in_a_row == 2, "but an attempt was lost with it already"
    counted.add(BROKEN, pulse("b"), 0)
    assert counted.in_a_row == 2, "the workers saw it announced, and it is gone"
    counted.add(preempted("c"), pulse(), 0)
    assert counted.in_a_row == 2


def test_a_new_checkpoint_starts_the_count_anew():
    counted = Restarts(limit=2)
    assert [counted.add(BROKEN, pulse(), step) for step in (0, 0, 10, 10, 20, 30)] == [""] * 6
    assert [counted.add(BROKEN, pulse(), 30) for _ in range(2)] == [
        "",
        "That was failure 3 without a new checkpoint, max_failures=2.",
    ]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (NonFiniteLossError("step 4"), True),
        (QuarantineLimitError("3 of 200 rows"), True),
        (CheckpointError("damaged"), True),
        (StorageError("no room"), True),
        (UnfinishedSaveError("no share of worker 1"), False),
        (UnreachableStorageError("away"), False),
        (BaseModelError("no unet"), True),
        (UnreachableHubError("away"), False),
        (MemoryError(), False),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (ValueError("from some library"), False),
        (ConnectionError("reset"), False),
    ],
)
def test_verdicts_and_bad_input_end_it_and_what_may_have_been_chance_does_not(error, ends):
    found = Restarts(limit=3).add(of_workers(BROKEN, error), pulse(), 0)
    assert found == ("A restart would end alike." if ends else "")


def test_a_wrong_setting_is_known_by_its_coming_again_and_a_killed_worker_is_not():
    counted, wrong = Restarts(limit=-1), of_workers(ValueError("rank=0 must be positive"))
    assert counted.add(wrong, pulse(), 0) == ""
    assert counted.add(of_workers(ValueError("another")), pulse(), 0) == ""
    assert counted.add(wrong, pulse(), 0) == "" == counted.add(wrong, pulse(), 10), "the training got further"
    assert counted.add(wrong, pulse(), 10) == "A restart ended in the same error."
    for chance in (BROKEN, UnreachableStorageError("away"), UnfinishedSaveError("no share of worker 1")):
        assert [counted.add(of_workers(chance), pulse(), 10) for _ in range(3)] == [""] * 3


def saved(output: Path, step: int) -> str:
    writer = CheckpointWriter(str(output), "a", 0, 1, Retention(keep_last=9))
    writer.save(step, samples=step, identity="run", tensors={"weights": {"w": torch.ones(1)}}, state={})
    writer.wait()
    writer.close()
    return str(output / "checkpoints" / f"step-{step:08d}.a")


def after(output: Path, error: Exception, counted: Restarts) -> None:
    job: Any = SimpleNamespace(output=str(output), identity="run")
    launch._after_failure(job, error, pulse(), counted)


def test_a_failure_is_logged_with_its_number_and_from_where_it_goes_on(tmp_path, caplog):
    newest = saved(tmp_path, 10)
    after(tmp_path, of_workers(BROKEN), Restarts(limit=1))
    assert f"failure 1 in a row: RuntimeError: {BROKEN} (worker 0)" in caplog.text
    assert f"The last good checkpoint is {newest}" in caplog.text
    with pytest.raises(TrainingStoppedError, match=rf"max_failures=0\. The last good .*{newest}\. The same command"):
        after(tmp_path, of_workers(BROKEN), Restarts(limit=0))


def test_a_collapse_names_the_newest_checkpoint_that_was_found_good_before_it(tmp_path):
    """Not the newest of all, which is the collapsed one or comes after it; and resuming would end alike."""
    uris = {step: saved(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    collapse = of_workers(CollapseError("step 40: all 4 images drawn are flat.", 40))
    with pytest.raises(TrainingStoppedError, match=r"flat.* No checkpoint before it was evaluated"):
        after(tmp_path, collapse, Restarts(limit=3))
    for step in (10, 20, 50):
        write_evaluation(uris[step], {"loss": 1.0})
    with pytest.raises(TrainingStoppedError, match=rf"flat.* {uris[20]}: .*--step 20 ") as caught:
        after(tmp_path, collapse, Restarts(limit=3))
    assert "resumes" not in str(caught.value)


def test_a_collapse_travels_between_processes():
    there = pickle.loads(pickle.dumps(CollapseError("step 40: flat", 40)))
    assert (str(there), there.step) == ("step 40: flat", 40)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The driver's loop around attempts that save step 10 at once; its argument is what the driver itself meets."""

    def start(outages: dict[str, int], max_failures: int = 3, **settings: Any) -> launch.Trained:
        left = dict(outages)

        def away_at_first(name: str, call: Any) -> Any:
            def met(*args: Any) -> Any:
                if left.get(name, 0):
                    left[name] -= 1
                    raise UnreachableStorageError(f"{name}: S3 is away")
                return call(*args)

            return met

        monkeypatch.setattr(checkpoint, "candidates", away_at_first("candidates", checkpoint.candidates))
        monkeypatch.setattr(launch, "_settle", away_at_first("settle", lambda job, last: ()))
        monkeypatch.setattr(launch, "_attempt", lambda job, held, memory: saved(Path(job.output), 10))
        monkeypatch.setattr(launch, "fitting_workers", lambda config, again: Reservation(count=1, group=None))
        monkeypatch.setattr(launch, "start_pulse", pulse)
        monkeypatch.setattr(launch.ray, "kill", lambda pulse: None)
        config, nothing = TrainConfig(num_steps=10, max_failures=max_failures, **settings), cast(Any, None)
        return launch.run_training(
            config=config, build_task=nothing, plan=nothing, output=str(tmp_path), identity="run", tracker=None
        )

    return start


def test_a_storage_that_is_away_from_the_driver_is_a_failure_like_others(run, caplog):
    assert run({"candidates": 3, "settle": 1}).last.manifest.step == 10
    assert "failure 2 in a row: UnreachableStorageError: candidates: S3 is away (in the driver)" in caplog.text
    assert "UnreachableStorageError: settle: S3 is away" in caplog.text


@pytest.mark.parametrize(
    ("use_gpu", "precision", "zero_stage", "said"),
    [
        (True, "fp32", 2, "--train.precision bf16 changes it; weights"),
        (True, "fp32", 0, "--train.precision bf16 changes it, with --train.zero-stage 1; weights"),
        (True, "bf16", 2, ""),
        (False, "fp32", 2, ""),
        (False, "bf16", 1, ""),
    ],
)
def test_a_training_on_gpus_in_fp32_begins_with_what_that_costs(
    run, caplog, use_gpu: bool, precision: str, zero_stage: int, said: str
):
    run({}, use_gpu=use_gpu, precision=precision, zero_stage=zero_stage)
    assert said in caplog.text and caplog.text.count("on GPUs: activations take twice the memory") == bool(said)


def test_a_storage_that_stays_away_from_the_driver_ends_the_training_with_what_to_do(run):
    with pytest.raises(TrainingStoppedError, match=r"S3 is away.*max_failures=1.*The same command again resumes"):
        run({"candidates": 99}, max_failures=1)
