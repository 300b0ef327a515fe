"""A checkpoint exists whole or not at all, and a damaged one is never used."""

from pathlib import Path

import pytest
import torch

from d2f_core.train import checkpoint
from d2f_core.train.checkpoint import CheckpointError, CheckpointManifest


def write(output: Path, step: int, *, attempt: str = "a", identity: str = "run", complete: bool = True) -> str:
    uri = f"{checkpoint.checkpoints_uri(str(output))}/{checkpoint.directory_name(step, attempt)}"
    files = []
    for rank in range(2):
        share = {f"layer.{rank}.weight": torch.full((3, 2), step + rank)}
        files += checkpoint.write_share(uri, rank, {"weights": share, "ema": share})
    if complete:
        manifest = CheckpointManifest(step=step, samples=step * 4, identity=identity, num_workers=2, files=tuple(files))
        checkpoint.write_manifest(uri, manifest)
    return uri


def test_tensors_of_all_shares_come_back(tmp_path):
    uri = write(tmp_path, 3)
    tensors = checkpoint.read_tensors(uri, checkpoint.read_manifest(uri), "weights")
    assert {name: tensor[0, 0].item() for name, tensor in tensors.items()} == {"layer.0.weight": 3, "layer.1.weight": 4}


def test_a_directory_without_manifest_does_not_exist(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10, complete=False)
    found = checkpoint.latest_checkpoint(str(tmp_path), "run")
    assert found and found[1].step == 5


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert checkpoint.latest_checkpoint(str(tmp_path / "new"), "run") is None


def test_a_run_with_another_identity_is_refused(tmp_path):
    write(tmp_path, 5, identity="another")
    with pytest.raises(CheckpointError, match="Choose another --output"):
        checkpoint.latest_checkpoint(str(tmp_path), "run")


def test_a_flipped_bit_is_found(tmp_path):
    uri = write(tmp_path, 5)
    file = Path(uri) / "weights-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights-1.safetensors has sha256 .* damaged"):
        checkpoint.read_tensors(uri, checkpoint.read_manifest(uri), "weights")


def test_a_manifest_is_written_once(tmp_path):
    uri = write(tmp_path, 5)
    with pytest.raises(FileExistsError):
        checkpoint.write_manifest(uri, checkpoint.read_manifest(uri))


def test_old_checkpoints_and_left_overs_before_them_go(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 2, attempt="killed", complete=False)
    write(tmp_path, 5, attempt="under-way", complete=False)
    checkpoint.remove_old(str(tmp_path), keep=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000003.a", "step-00000004.a", "step-00000005.under-way"]
