"""Weights on a network file system are read, and those on a local disk are mapped."""

from pathlib import Path

import psutil
import pytest
import torch
import transformers.modeling_utils

from d2f_core.file_systems import network_type
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import load_unet
from d2f_core.model.lora import read_adapter
from d2f_core.model.text_encoder import TextEncoder, load_text_encoder
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained
from tests.model.tiny_sd import write_tiny


def mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str) -> None:
    """Let the kernel's table of mounts have these lines after the root's."""
    table = tmp_path / "proc/self/mounts"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("".join(f"{line} rw,relatime 0 0\n" for line in ("/dev/vda1 / ext4", *lines)))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))


@pytest.mark.parametrize(
    ("kind", "network"),
    [(kind, True) for kind in ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.s3fs", "fuse.sshfs", "fuse", "9p",
                               "virtiofs", "ceph", "gpfs", "beegfs", "wekafs")]
    + [(kind, False) for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk", "nfsd",
                                  "fuse.fuse-overlayfs")],
)  # fmt: skip
def test_a_file_system_is_told_by_the_kernels_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, network: bool
) -> None:
    (tmp_path / "models").mkdir()
    mount(monkeypatch, tmp_path, f"server:/export {tmp_path}/models {kind}")
    assert network_type(tmp_path / "models/unet/model.safetensors") == (kind if network else "")
    assert network_type(tmp_path / "modelsof") == "", "a name that begins alike lies elsewhere"


def test_the_deepest_mount_decides_and_of_several_at_one_place_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    share = tmp_path / "a share"
    (share / "scratch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(share)
    place = str(share).replace(" ", r"\040")
    mount(monkeypatch, tmp_path, f"/dev/vdb {place} ext4", f"server:/x {place} nfs4", f"/dev/vdc {place}/scratch xfs")
    assert network_type(share / "model") == network_type(tmp_path / "link/model") == "nfs4"
    assert network_type(share / "scratch/model") == ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return resolve_base(str(write_tiny(tmp_path_factory.mktemp("base"), "sd15")))


def is_mapped(directory: Path) -> bool:
    return str(directory) in Path("/proc/self/maps").read_text()


def test_weights_on_a_network_disk_are_read_and_on_a_local_one_mapped(
    monkeypatch: pytest.MonkeyPatch, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount(monkeypatch, tmp_path)
    here = load_unet(base), load_autoencoder(base).network
    assert is_mapped(base.path / "unet") and is_mapped(base.path / "vae") and not caplog.records
    expected = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in here]
    del here
    assert not is_mapped(base.path)
    mount(monkeypatch, tmp_path, f"server:/models {base.path} nfs4")
    with caplog.at_level("INFO"):
        there = load_unet(base), load_autoencoder(base).network
    assert not is_mapped(base.path)
    for network, tensors in zip(there, expected, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    assert f"{base.path}/unet lies on a network file system (nfs4): its weights are read" in caplog.text


def test_text_encoders_and_adapters_on_a_network_disk_are_read_too(
    monkeypatch: pytest.MonkeyPatch, base: BaseModel, tmp_path: Path
) -> None:
    expected = load_text_encoder(base).encode(["at"])
    artifact = Path(trained(write_tiny_base(tmp_path / "base"), tmp_path / "model", LoraConfig(rank=2)))
    tensors = {name: tensor.clone() for name, tensor in read_adapter(artifact / "adapter").items()}
    mount(monkeypatch, tmp_path, f"server:/models {base.path} lustre", f"server:/trained {artifact} fuse.gcsfuse")

    def no_mapping(*_: object, **__: object) -> None:
        raise AssertionError("it is mapped")

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", no_mapping)
    encoder = load_text_encoder(base)
    assert isinstance(encoder, TextEncoder) and torch.equal(encoder.encode(["at"]), expected)
    found = read_adapter(artifact / "adapter")
    assert not is_mapped(artifact) and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    mount(monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="it is mapped"):
        load_text_encoder(base)
