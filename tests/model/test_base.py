"""A base model is the same one wherever it lies: its hash is of its contents."""

import json
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from d2f_core import retry, storage
from d2f_core.model import hub
from d2f_core.model.base import BaseModelError, UnreachableHubError, local_copy, resolve_base
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
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    with pytest.raises(
        UnreachableHubError, match=r"'owner/name' is no local .* from the hub \(ConnectionError"
    ) as caught:
        resolve_base("owner/name")
    assert "\n" not in str(caught.value)


def hub_error(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("refused", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


def asked_through(monkeypatch: pytest.MonkeyPatch, base: Path, *errors: Exception) -> list[Exception]:
    """Let the hub's client raise these, one at a time, before it answers; returns those that are left."""
    left = list(errors)

    def snapshot_download(name: str, **_: Any) -> str:
        if left:
            raise left.pop(0)
        return str(base)

    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return left


def test_a_hub_in_trouble_is_asked_again(base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    nowhere = LocalEntryNotFoundError("no network, and not in the cache")
    nowhere.__cause__ = httpx2.ConnectError("name resolution")
    asked_through(monkeypatch, base, httpx2.ReadTimeout("slow"), hub_error(503), nowhere)
    assert resolve_base("owner/name").path == base
    assert caplog.text.count("could not fetch owner/name from the hub") == 3


@pytest.mark.parametrize("refusal", [hub_error(404), hub_error(401), OfflineModeIsEnabled("HF_HUB_OFFLINE=1")])
def test_what_the_hub_refuses_is_not_asked_again(refusal: Exception, base: Path, monkeypatch: pytest.MonkeyPatch):
    left = asked_through(monkeypatch, base, refusal, refusal)
    with pytest.raises(BaseModelError, match="could not be fetched from the hub") as caught:
        resolve_base("owner/name")
    assert len(left) == 1 and not isinstance(caught.value, UnreachableHubError)


def test_a_copy_is_fetched_without_a_probe(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It asks for some seconds only; every worker of a training fetches its base, and outlasts a longer outage."""
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(storage, "check_reachable", lambda uri, **_: pytest.fail("probed"))
    monkeypatch.setattr(storage, "list_tree", lambda uri, chosen: {"b/unet/config.json": {"ETag": "1", "size": 2}})
    monkeypatch.setattr(storage, "download_tree", lambda uri, target, chosen: target.mkdir(parents=True))
    assert local_copy("s3://b/base", cache_dir=tmp_path).is_relative_to(tmp_path)
