"""A model on S3 is described by configs and headers, and has the hash of its contents."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from d2f_core import hashing, storage
from d2f_core.model import model_files
from d2f_core.model.artifact import ArtifactError, describe_model, load_model
from d2f_core.model.autoencoder import autoencoder_fingerprint, load_autoencoder
from d2f_core.model.base import BaseModelError, describe_base, described_copy, local_copy, resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import check_unet, load_unet
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from d2f_core.storage import StorageError, upload_tree, write_bytes
from infra.local.stack import StackEnv
from tests.got_from_s3 import bytes_got
from tests.model.artifacts import trained
from tests.model.tiny_sdxl import write_tiny_sdxl

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def header_size(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_of_a_base_on_s3_headers_are_read_and_contents_once_for_its_hash(
    s3: StackEnv, whole: Path, cache: Path
) -> None:
    uri, key = "s3://d2f/test-described/base", "test-described/base/"
    upload_tree(whole, uri)
    weights = {file.relative_to(whole).as_posix(): file for file in whole.rglob("*.safetensors")}
    with bytes_got() as got:
        described = describe_base(uri)
        check_unet(described)
        encoder = describe_text_encoder(described)
        assert described.latent_shape(64, 64) == resolve_base(str(whole)).latent_shape(64, 64)
    assert {name: got[key + name] for name in weights} == {name: header_size(file) for name, file in weights.items()}
    with bytes_got() as got:
        assert autoencoder_fingerprint(described) == autoencoder_fingerprint(resolve_base(str(whole)))
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert got == {key + vae: weights[vae].stat().st_size}
    with bytes_got() as got:
        assert described.content_hash == resolve_base(str(whole)).content_hash
        assert encoder.fingerprint == load_text_encoder(resolve_base(str(whole))).fingerprint
    assert got == {key + name: file.stat().st_size for name, file in weights.items() if name != vae}
    with bytes_got() as got:
        assert describe_base(uri).content_hash == described.content_hash
    assert not got, "what is known of a version is asked once"
    stored = sum(file.stat().st_blocks * 512 for file in (cache / "described").rglob("*.safetensors"))
    for load in (load_unet, load_autoencoder, load_text_encoder):
        with pytest.raises(RuntimeError, match=r"it is for checks\. Load the model from its URI"):
            load(described)
    assert stored < sum(file.stat().st_size for file in weights.values()) / 2, "the rest is a hole"


def test_a_new_version_is_described_anew_and_a_whole_copy_is_taken_when_there_is_one(
    s3: StackEnv, whole: Path, cache: Path, tmp_path: Path
) -> None:
    uri = "s3://d2f/test-described/new"
    upload_tree(whole, uri)
    before = describe_base(uri)
    data = bytearray((whole / UNET).read_bytes())
    data[-1] ^= 1
    write_bytes(f"{uri}/{UNET}", bytes(data))
    assert describe_base(uri).content_hash != resolve_base(str(whole)).content_hash
    assert describe_base(uri).content_hash == resolve_base(uri).content_hash
    assert described_copy(uri).path == local_copy(uri) and not described_copy(uri).left
    with pytest.raises(StorageError, match=r"was replaced while it was read\. Run the command again"):
        before.content_hash  # noqa: B018
    with pytest.raises(BaseModelError, match="holds no files"):
        describe_base("s3://d2f/test-described/none")


def test_an_object_is_hashed_in_pieces(
    s3: StackEnv, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "PIECE", 1000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.safetensors").write_bytes(bytes(range(250)) * 10)
    (tmp_path / "model/empty.safetensors").write_bytes(b"")
    upload_tree(tmp_path / "model", "s3://d2f/test-described/pieces")
    asked: list[int] = []
    read = storage.read_bytes

    def counted(uri: str, *range_: Any) -> bytes:
        asked.append(len(data := read(uri, *range_)))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    files = described_copy("s3://d2f/test-described/pieces")
    assert files.hash() == hashing.hash_directory(tmp_path / "model")
    assert max(asked) == 1000 and files.path.joinpath("a.safetensors").stat().st_size == 2500


def test_damage_on_s3_is_told_from_sizes_and_headers(s3: StackEnv, whole: Path, cache: Path) -> None:
    uri, data = "s3://d2f/test-described/damaged", (whole / UNET).read_bytes()
    upload_tree(whole, uri)
    for content, message in (
        (data[:-100], "its header tells of"),
        (data[:100], "has 100 bytes and says that"),
        (b"", "has 0 bytes"),
        (b"<!DOCTYPE html>", "has 15 bytes and says that"),
    ):
        write_bytes(f"{uri}/{UNET}", content)
        with pytest.raises(BaseModelError, match=f"unet/diffusion_pytorch_model.safetensors .*{message}"):
            check_unet(describe_base(uri))
    storage.remove_tree(f"{uri}/{UNET}")
    write_bytes(f"{uri}/unet/diffusion_pytorch_model.bin", b"pickle")
    with pytest.raises(BaseModelError, match="has no safetensors in unet/"):
        check_unet(describe_base(uri))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_trained_model_on_s3_is_described_as_it_would_be_loaded(
    s3: StackEnv, cache: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    from tests.flow.tiny_base import write_tiny_base

    base = write_tiny_base(tmp_path / "base")
    uri, base_uri = f"s3://d2f/test-described/{'lora' if lora else 'full'}", "s3://d2f/test-described/its-base"
    artifact = Path(trained(base, tmp_path / "model", lora))
    upload_tree(artifact, uri)
    upload_tree(base, base_uri)
    described = describe_model(uri, base_uri=base_uri)
    assert not (cache / "models").exists(), "no weights were copied"
    loaded = load_model(uri, base_uri=base_uri)
    for name in ("content_hash", "objective", "sampling", "task", "method", "default_size"):
        assert getattr(described, name) == getattr(loaded, name), name
    assert described.base.content_hash == loaded.base.content_hash
    shutil.rmtree(cache)
    write_bytes(f"{uri}/{'adapter' if lora else 'unet'}/training_args.bin", b"pickle")
    with pytest.raises(ArtifactError, match=r"training_args.bin' is a pickle"):
        describe_model(uri, base_uri=base_uri)
