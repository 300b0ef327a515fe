"""The table of keys: what is written is read back to the last bit, by us and by diffusers' own converter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file

from d2f_core.hashing import hash_directory
from d2f_core.model.architectures import KNOWN
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.denoiser import load_unet
from d2f_core.model.single_file.convert import CONFIGS
from d2f_core.model.single_file.family import FAMILIES, Family, Part, family_of_directory, family_of_keys, read_parts
from d2f_core.model.single_file.write import write_checkpoint_file
from d2f_core.model.text_encoder import load_text_encoder
from tests.model.single_file.files import assert_equal, tensors_of, write_file
from tests.model.tiny_sd import Name, write_tiny

NAMES: tuple[Name, ...] = ("sd15", "sd21", "sdxl")
PUBLISHED = {"sd15": 1131, "sd21": 1214, "sdxl": 2514}
"""Keys of the published files, without what no network reads: of SD 2.1 (1,242) its last text layer (12), a projection,
a scale and 14 of the noise schedule; of SDXL (2,515) a scale."""


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Name, Path]:
    return request.param, write_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))


def test_a_directory_written_to_a_file_and_read_back_is_equal_to_the_last_bit(tiny: tuple[Name, Path], tmp_path: Path):
    _, base = tiny
    again = resolve_base(str(write_file(base, tmp_path / "one.safetensors")))
    assert_equal(tensors_of(again), tensors_of(resolve_base(str(base))))
    captions = ["a cat", "", "cab bat"]
    for name, states in load_text_encoder(resolve_base(str(base))).condition(captions).items():
        assert torch.equal(load_text_encoder(again).condition(captions)[name], states)
    written = write_checkpoint_file(
        str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors"), dtype="float32"
    )
    assert_equal(load_file(tmp_path / "two.safetensors"), load_file(tmp_path / "one.safetensors"))
    assert written.size == (tmp_path / "two.safetensors").stat().st_size


def test_a_file_of_half_the_size_holds_the_cast_values(tiny: tuple[Name, Path], tmp_path: Path):
    name, base = tiny
    dtype = "bfloat16" if name == "sdxl" else "float16"
    whole = load_file(write_file(base, tmp_path / "whole.safetensors"))
    half = write_file(base, tmp_path / "half.safetensors", dtype)
    kind = getattr(torch, dtype)
    assert_equal(
        load_file(half), {k: t.to(kind) if t.dtype.is_floating_point and len(t) else t for k, t in whole.items()}
    )
    read = tensors_of(resolve_base(str(half)))
    assert_equal(read, {k: t.to(kind).to(t.dtype) for k, t in tensors_of(resolve_base(str(base))).items()})


def test_diffusers_reads_the_same_networks(tiny: tuple[Name, Path], tmp_path: Path):
    name, base = tiny
    file = write_file(base, tmp_path / "one.safetensors", scheduler=False)
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    configs = resolve_base(str(file)).path
    pipeline = kind.from_single_file(str(file), config=str(configs), local_files_only=True)
    wanted = resolve_base(str(base))
    assert_equal(pipeline.unet.state_dict(), load_unet(wanted).state_dict())
    assert_equal(pipeline.vae.state_dict(), load_autoencoder(wanted).network.state_dict())
    encoder = load_text_encoder(wanted)
    networks = encoder.networks if name == "sdxl" else (encoder.network,)
    assert_equal(pipeline.text_encoder.state_dict(), networks[0].state_dict())
    if name == "sdxl":
        assert_equal(pipeline.text_encoder_2.state_dict(), networks[1].state_dict())


def empty(parts: list[Part]) -> dict[str, torch.Tensor]:
    return {e.key: torch.empty(part.key_shape(e), device="meta") for part in parts for e in part.entries}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_full_architectures_have_the_published_keys(family: Family):
    parts = read_parts(CONFIGS / family.name, family)
    checkpoint = empty(parts)
    keys = [*checkpoint, *(key for part in parts for key in part.buffers)]
    assert len(keys) == len({*keys}) == PUBLISHED[family.name] and family_of_keys(keys) is family
    read = {part.directory: as_diffusers_reads(part.directory, checkpoint, family) for part in parts}
    for part in parts:
        shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in read[part.directory].items()}
        assert shapes == part.shapes


def as_diffusers_reads(part: str, checkpoint: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    config = json.loads((CONFIGS / family.name / part / "config.json").read_text())
    if part in ("unet", "vae"):
        read = convert_ldm_unet_checkpoint if part == "unet" else convert_ldm_vae_checkpoint
        return read(dict(checkpoint), config)
    encoder = next(encoder for encoder in family.encoders if encoder.part == part)
    own = {key: tensor for key, tensor in checkpoint.items() if key.startswith(encoder.prefix)}
    if not encoder.openclip:
        return convert_ldm_clip_checkpoint(own)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return convert_open_clip_checkpoint(model, own, prefix=encoder.prefix)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_shipped_configs_are_those_of_the_known_architectures(family: Family):
    known, directory = KNOWN[family.name], CONFIGS / family.name
    assert family_of_directory(directory) is family
    parts = {"unet": known.unet, "vae": known.vae} | dict(
        zip(("text_encoder", "text_encoder_2"), known.text_encoders, strict=False)
    )
    for part, config in parts.items():
        shipped = json.loads((directory / part / "config.json").read_text())
        assert {name: shipped[name] for name in config} == json.loads(json.dumps(config))
    assert parts["vae"]["scaling_factor"] == family.scaling_factor


def test_the_shipped_configs_never_change():
    """They are part of the content hash by which trained models and latents know their base."""
    assert hash_directory(CONFIGS) == "9c7221caf53d80ed61095795d0a67a491c20b111e14ecf24c519223f44ced49c"
