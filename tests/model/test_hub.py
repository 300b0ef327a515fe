"""A hub's model by its revision: the files that are read are fetched alone, and the same ones on every machine."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.importing.config import ImportCheckpointConfig
from d2f_core.model.importing.job import import_checkpoint
from tests.flow.tiny_base import write_tiny_base
from tests.model.tiny_sd import write_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Hub:
    """The calls of huggingface_hub, on a directory; what was fetched lies in `cache/snapshots/COMMIT`."""

    def __init__(self, there: Path, cache: Path) -> None:
        self.there, self.snapshot, self.asked = there, cache / "snapshots" / COMMIT, list[str]()

    def names(self) -> list[str]:
        return [file.relative_to(self.there).as_posix() for file in self.there.rglob("*") if file.is_file()]

    def list_repo_files(self, name: str, *, revision: str) -> list[str]:
        self.asked.append(f"{name}@{revision}")
        return self.names()

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.asked.append(f"{name}@{revision}")
        for file in self.names():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.there / file, self.snapshot / file)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        return {file.relative_to(self.snapshot).as_posix() for file in self.snapshot.rglob("*") if file.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(write_tiny_base(tmp_path / "there"), tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return made


def add_what_is_not_read(there: Path) -> None:
    for part in ("unet", "vae"):
        half = {name: tensor.half() for name, tensor in load_file(there / part / WEIGHTS).items()}
        save_file(half, there / part / "diffusion_pytorch_model.fp16.safetensors")
    (there / "checkpoint.safetensors").write_bytes(b"x" * 1000)
    (there / "unet/diffusion_pytorch_model.bin").write_bytes(b"x" * 1000)
    (there / "safety_checker").mkdir()
    (there / "safety_checker/model.safetensors").write_bytes(b"x" * 1000)
    (there / "model_index.json").write_text("{}")


def test_the_files_that_are_read_are_fetched_alone(hub: Hub):
    wanted = resolve_base(str(hub.there))
    hash_before = wanted.content_hash
    add_what_is_not_read(hub.there)
    found = resolve_base("owner/name@v1.5")
    assert found.read_hash == found.content_hash == hash_before
    weights = {name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))}
    assert weights == {f"{part}/{WEIGHTS}" for part in ("unet", "vae")}
    assert set(hub.asked) == {"owner/name@v1.5"} and COMMIT in str(found.path)


def test_what_else_lies_in_the_hubs_cache_changes_nothing(hub: Hub):
    add_what_is_not_read(hub.there)
    first = resolve_base("owner/name@v1.5").content_hash
    hub.snapshot_download("owner/name", revision="v1.5", allow_patterns=["*"])
    assert resolve_base("owner/name@v1.5").content_hash == first


def test_a_commit_is_not_asked_for_again_and_a_lost_cache_is_made_up(hub: Hub):
    first = resolve_base(f"owner/name@{COMMIT}")
    hub.asked.clear()
    assert resolve_base(f"owner/name@{COMMIT}").path == first.path and not hub.asked
    shutil.rmtree(hub.snapshot)
    assert resolve_base(f"owner/name@{COMMIT}").content_hash == first.content_hash and hub.asked


def test_a_revision_that_is_not_there_or_empty_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BaseModelError, match="'owner/name@' has no revision behind the @"):
        resolve_base("owner/name@")

    def missing(*_: Any, **__: Any) -> list[str]:
        raise ValueError("no such revision")

    monkeypatch.setattr(hub, "list_repo_files", missing)
    with pytest.raises(BaseModelError, match="'owner/name@no' is no local directory and could not be fetched"):
        resolve_base("owner/name@no")


def test_importing_takes_the_present_revision_and_records_its_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    add_what_is_not_read(write_tiny(hub.there, "sd15"))
    done = import_checkpoint(ImportCheckpointConfig(source="owner/name", output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out/import.json").read_text())["revision"] == COMMIT
    assert resolve_base(done.output).content_hash == done.content_hash
    assert not any("fp16" in name or name.endswith(".bin") for name in hub.fetched())
    alone = Hub(hub.there / "vae", tmp_path / "vae")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: alone)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", alone.snapshot_download)
    config = ImportCheckpointConfig(source=done.output, output=str(tmp_path / "with"), vae="owner/vae")
    assert import_checkpoint(config).content_hash == done.content_hash
    assert alone.fetched() == {"config.json", WEIGHTS}
