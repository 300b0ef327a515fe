"""Unusable rows are counted once, and end the training beyond their limit; with workers and a table in tests/chaos."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2f_core.train import restore
from d2f_core.train.checkpoint import Checkpoint, CheckpointManifest, list_checkpoints
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.quarantine import FILE, IN_MANIFEST, QuarantineLimitError, TrainingQuarantine, quarantined_rows
from d2f_core.train.retention_rules import Retention
from d2f_core.train.sealed import DamagedError


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def manifest(state: dict[str, Any]) -> CheckpointManifest:
    return CheckpointManifest(step=1, samples=4, identity="run", num_workers=1, files=(), state=state, tensors={})


def restored(found: Checkpoint | None, num_rows: int, max_share: float) -> TrainingQuarantine:
    plan: Any = SimpleNamespace(num_samples=num_rows)
    return TrainingQuarantine.restored(found, plan, max_share)


def saved(output: Path, step: int, quarantine: TrainingQuarantine) -> Checkpoint:
    state, files = quarantine.stored()
    writer = CheckpointWriter(str(output), "a", 0, 1, Retention(), share_seconds=20)
    tensors = {"weights": {"w": torch.ones(2)}}
    writer.save(step, samples=4, identity="run", tensors=tensors, state=state, files=files)
    writer.wait()
    return list_checkpoints(str(output))[-1]


def test_many_rows_lie_beside_the_manifest_and_are_counted_on_exactly(group, tmp_path: Path) -> None:
    quarantine = restored(None, 10**7, 0.01)
    few = {row: "not_finite: a number in part-0" for row in range(0, 2 * IN_MANIFEST, 2)}
    quarantine.add(tuple(few.items()))
    quarantine.exchange("cpu")
    first = saved(tmp_path / "run", 1, quarantine)
    assert first.manifest.state == {"quarantined": [list(pair) for pair in few.items()]}, "as it always was"
    many = {row: f"unreadable: part-{row % 7}" for row in range(1, 100_001, 2)}
    quarantine.add(tuple(many.items()))
    assert quarantine.exchange("cpu") == len(few) + len(many)
    second = saved(tmp_path / "run", 2, quarantine)
    everything = sorted((few | many).items())
    assert [tuple(pair) for pair in second.manifest.state["quarantined"]] == everything[:IN_MANIFEST]
    sizes = {file.name: file.stat().st_size for file in Path(second.uri).iterdir()}
    assert sizes["manifest.json"] < 200 * IN_MANIFEST and FILE in sizes and FILE not in os.listdir(first.uri)
    assert list(quarantined_rows(first)) == sorted(few.items()) and list(quarantined_rows(second)) == everything
    again = restored(second, 10**7, 0.01)
    assert again.rows() == everything and again.stored() == quarantine.stored()
    again.add(((1, "met again"), (3_000_001, "new")))
    assert again.exchange("cpu") == len(everything) + 1


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_damaged_list_of_rows_is_a_damaged_checkpoint(group, tmp_path: Path, damage: str) -> None:
    quarantine = restored(None, 10**7, 1.0)
    quarantine.add(tuple((row, "NaN") for row in range(IN_MANIFEST + 1)))
    quarantine.exchange("cpu")
    good = saved(tmp_path, 1, quarantine)
    bad = saved(tmp_path, 2, quarantine)
    if damage == "missing":
        Path(bad.uri, FILE).unlink()
    else:
        Path(bad.uri, FILE).write_bytes(b"other")
    with pytest.raises(
        DamagedError, match=f"{FILE} (is missing|has .* its manifest says .*): the checkpoint was damaged"
    ):
        list(quarantined_rows(bad))
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = module.w = torch.nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
    del module.weight
    found = restore.choose(str(tmp_path), "run", module, "cpu")
    assert found is not None and found.uri == good.uri


def test_a_row_counts_once_and_the_limit_names_the_first_reasons(group):
    quarantine = restored(Checkpoint("", manifest({"quarantined": [[7, "old"]]})), 200, 0.01)
    quarantine.add(((7, "met again"),))
    assert quarantine.exchange("cpu") == 1
    quarantine.add(((3, "truncated: part-1.parquet"),))
    assert quarantine.exchange("cpu") == 2, "1 % of 200"
    assert quarantine.rows() == [(3, "truncated: part-1.parquet"), (7, "old")]
    quarantine.add(((9, "NaN"),))
    message = (
        r"3 of 200 rows are unusable, more than max_quarantined_share=0.01 allows \(row 3: truncated.*raise the limit"
    )
    with pytest.raises(QuarantineLimitError, match=message):
        quarantine.exchange("cpu")
