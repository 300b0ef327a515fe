"""A base model is the same one wherever it lies: its hash is of its contents."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.storage import upload_tree, write_bytes
from infra.local.stack import StackEnv
from tests.flow.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def test_on_s3_it_has_the_hash_of_the_local_copy_and_a_change_is_fetched(base: Path, s3: StackEnv, tmp_path: Path):
    uri = "s3://d2f/test-base/tiny"
    upload_tree(base, uri)
    local, there = resolve_base(f"file://{base}"), resolve_base(uri, cache_dir=tmp_path)
    assert there.content_hash == local.content_hash == resolve_base(str(base)).content_hash
    assert there.uri == uri and there.path.is_relative_to(tmp_path)
    assert resolve_base(uri, cache_dir=tmp_path).path == there.path, "fetched once"
    config = json.loads((base / "scheduler/scheduler_config.json").read_text()) | {"prediction_type": "v_prediction"}
    write_bytes(f"{uri}/scheduler/scheduler_config.json", json.dumps(config).encode())
    changed = resolve_base(uri, cache_dir=tmp_path)
    assert changed.prediction_type == "v_prediction" and changed.content_hash != local.content_hash
    with pytest.raises(BaseModelError, match=r"'s3://d2f/test-base/none' holds no files\. Check the URI"):
        resolve_base("s3://d2f/test-base/none", cache_dir=tmp_path)


def test_a_hub_id_is_fetched_in_safetensors_alone(base: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_base("owner/name").content_hash == resolve_base(str(base)).content_hash
    assert asked["name"] == "owner/name" and "unet/*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith((".bin", ".ckpt", ".pt", ".py")) for pattern in asked["patterns"])


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(name: str, **_: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(BaseModelError, match=r"'owner/name' is no local directory and could not be fetched") as caught:
        resolve_base("owner/name")
    assert "\n" not in str(caught.value)
