"""A model of a stranger can't make a machine fetch a base that its user does not allow."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from d2f_core import storage
from d2f_core.model.artifact import ArtifactError, describe_model, load_model
from d2f_core.model.config import LoraConfig
from d2f_core.model.named_base import require_allowed
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    return Path(trained(write_tiny_base(place / "bases/own"), place / "model", LoraConfig(rank=2)))


def naming(model: Path, target: Path, base: str) -> str:
    shutil.copytree(model, target)
    description = json.loads((target / "diff2flow.json").read_text())
    description["base"]["uri"] = base
    (target / "diff2flow.json").write_text(json.dumps(description))
    return str(target)


@pytest.mark.parametrize("base", ["s3://other/base", "owner/name", "owner/name@main", "/etc", "{bases}/../elsewhere"])
def test_a_base_outside_of_the_allowed_places_is_refused_before_it_is_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
):
    bases = model.parent / "bases"
    monkeypatch.setenv("D2F_BASES", f"s3://models/, stabilityai/ ,{bases}")
    monkeypatch.setattr(storage, "list_tree", lambda *_: pytest.fail("was listed"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("was asked"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("was asked"))
    uri = naming(model, tmp_path / "copy", base.format(bases=bases))
    for call in (load_model, describe_model):
        with pytest.raises(ArtifactError, match=r"names the base .*, and D2F_BASES allows those below s3://models/"):
            call(uri)
        assert call(uri, base_uri=str(bases / "own")).method == "lora", "given by the user"


def test_allowed_places_are_whole_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bases = model.parent / "bases"
    monkeypatch.setattr(storage, "list_tree", lambda uri: {})
    for place in (f"{bases}", f"{bases}/own", f"file://{bases}", f"/nowhere,{bases}/"):
        monkeypatch.setenv("D2F_BASES", place)
        assert load_model(str(model)).method == "lora"
    monkeypatch.setenv("D2F_BASES", f"{bases}/ow,s3://models")
    with pytest.raises(ArtifactError, match="allows those below"):
        load_model(str(model))
    require_allowed("s3://models/own", "m")
    for base in ("s3://models-of-another/own", "s3://models/../other/own", "s3://modelsx"):
        with pytest.raises(ArtifactError, match="allows those below"):
            require_allowed(base, "m")


def test_a_base_that_is_too_large_is_refused_by_its_listing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("D2F_BASES", raising=False)
    monkeypatch.setattr(storage, "list_tree", lambda uri: {"b/unet/a.safetensors": {"size": 41_000_000_000}})
    with pytest.raises(ArtifactError, match=r"'m' names the base 's3://b', of 41\.0 GB, and D2F_MAX_BASE_GB is 40"):
        require_allowed("s3://b", "m")
    files = [SimpleNamespace(rfilename=name, size=8_000_000_000) for name in ("unet/a.safetensors", "b.safetensors")]

    def model_info(name: str, **_: Any) -> SimpleNamespace:
        assert name == "owner/name"
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    require_allowed("owner/name", "m")
    monkeypatch.setenv("D2F_MAX_BASE_GB", "7.5")
    with pytest.raises(ArtifactError, match=r"of 8\.0 GB, and D2F_MAX_BASE_GB is 7\.5"):
        require_allowed("owner/name@main", "m")
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        require_allowed("owner/name@main", "m")
    monkeypatch.setenv("D2F_MAX_BASE_GB", "seven")
    with pytest.raises(ArtifactError, match="D2F_MAX_BASE_GB='seven' must be a number"):
        require_allowed("owner/name", "m")
